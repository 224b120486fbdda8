"""Learning an optimizer: its network's weights move along the gradient of the losses that it leads to.

The gradient is exact through a truncated unroll of K steps, the inner gradients' own derivatives included, for many
small tasks at once. Persistent evolution strategies (Vicol et al., arXiv 2112.13835) would have no bias from the
truncation, at a variance that grows with the number of weights: for the 2,409 of small_fc_lopt and a few dozen tasks
at once, a gradient through 10 steps learns in seconds on a CPU. What makes unrolled gradients fail, chaotic unrolls
(Metz et al., arXiv 1810.10180), is met by short truncations and by clipping each task's gradient by itself. A short
truncation is short-sighted (Wu et al., arXiv 1803.02021): tasks go on over several, so the network sees later steps,
but what a step does beyond its own truncation counts for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.fullgraph import Backend, compile_function
from titanfunc.optim.base import GradientTransformation, State, Tree, apply_updates
from titanfunc.optim.learned.network import Network, with_network
from titanfunc.optim.learned.tasks import Task

Make = Callable[[Network], GradientTransformation]
"""A network -> the optimizer that has it, such as ``small_fc_lopt``."""
FLOOR = 1e-3
"""Losses count relative to the first one, and below this part of it hardly more."""
BATCHES = 1 << 20
"""More than any task has steps."""


class Training(NamedTuple):
    """A task in the course of its training by a learned optimizer.

    seed: the task's, age: steps so far, 0-d int64. params, data: the task's. state: the optimizer's, without its
    network. first: the loss at the start, 0-d.
    """

    seed: Tensor
    age: Tensor
    params: Tree
    data: Tree
    state: State
    first: Tensor


class MetaState(NamedTuple):
    """network: what is learned. optimizer: the state of the optimizer that moves it. running: a ``Training`` a family,
    each leaf with an axis of tasks [P] in front.
    """

    network: Network
    optimizer: State
    running: dict[str, Training]


def begin(make: Make, network: Network, task: Task, seed: Tensor, age: int | Tensor = 0) -> Training:
    """The task of a seed (0-d int64) before its first step; age: counted from there, so that tasks end at odds."""
    data, params = task.draw(seed)
    state = with_network(make(network).init(params), ())
    first = task.loss(params, data, _batch(seed, torch.zeros_like(seed)))
    return Training(seed, torch.zeros_like(seed) + age, params, data, state, first)


def advance(make: Make, network: Network, task: Task, running: Training) -> tuple[Training, Tensor]:
    """One step of a task, and the loss before it, 0-d."""
    batch = _batch(running.seed, running.age)
    grads, loss = torch.func.grad_and_value(task.loss)(running.params, running.data, batch)
    state = with_network(running.state, network)
    updates, state = make(network).update(grads, state, running.params, loss=loss)
    params = apply_updates(running.params, updates)
    return running._replace(age=running.age + 1, params=params, state=with_network(state, ())), loss


def objective(loss: Tensor, first: Tensor) -> Tensor:
    """log(loss / first + FLOOR), any shapes: tasks of all sizes count alike, and each halving of a loss."""
    return torch.log(loss / first + FLOOR)


def unroll(make: Make, network: Network, task: Task, running: Training, steps: int) -> tuple[Tensor, Training]:
    """The mean objective after each of some steps, 0-d, each on a batch that no step has seen; and the task then."""
    total = torch.zeros((), device=running.first.device)
    for _ in range(steps):
        running, _ = advance(make, network, task, running)
        loss = task.loss(running.params, running.data, _batch(running.seed, running.age))
        total = total + objective(loss, running.first)
    return total / steps, running


def init_meta(
    make: Make,
    network: Network,
    optimizer: GradientTransformation,
    tasks: Mapping[str, Task],
    seeds: Tensor,
    horizon: int,
) -> MetaState:
    """The state before the first meta-step. seeds: [P] int64, the first tasks' in each family, spread over ages."""
    ages = torch.arange(len(seeds), device=seeds.device) * horizon // len(seeds)
    running = {name: _begin_all(make, network, task, seeds, ages) for name, task in tasks.items()}
    return MetaState(network, optimizer.init(network), running)


def make_meta_step(
    make: Make,
    optimizer: GradientTransformation,
    tasks: Mapping[str, Task],
    steps: int,
    horizon: int,
    clip_norm: float = 1.0,
) -> Callable[[MetaState], tuple[MetaState, dict[str, Tensor]]]:
    """state -> (state, metrics): ``steps`` of every task, then one of the network. Pure; of any shapes; compiles.

    A task whose age reaches ``horizon`` gives way to the next. clip_norm: of each task's gradient, before their mean;
    one that is not finite counts as zero. Metrics, 0-d: the objective and the mean norm before clipping.
    """

    def of_task(
        network: Network, task: Task, apart: int, running: Training
    ) -> tuple[Network, tuple[Tensor, Tensor, Training]]:
        def loss(weights: Network) -> tuple[Tensor, Training]:
            return unroll(make, weights, task, running, steps)

        grads, (value, then) = torch.func.grad_and_value(loss, has_aux=True)(network)
        norm = tree.global_norm(grads)
        good = torch.isfinite(norm) & torch.isfinite(value)
        factor = clip_norm / norm.clamp(min=clip_norm)
        grads = tree.map(lambda g: torch.where(good, g * factor, torch.zeros_like(g)), grads)
        anew = begin(make, network, task, running.seed + apart)
        return grads, (value, norm, tree.where((then.age >= horizon) | ~good, anew, then))

    def step(state: MetaState) -> tuple[MetaState, dict[str, Tensor]]:
        grads, metrics, running = [], {}, {}
        for name, task in tasks.items():
            old = state.running[name]
            each = functools.partial(of_task, state.network, task, len(old.seed))
            of_family, (values, norms, running[name]) = torch.func.vmap(each)(old)
            grads.append(tree.map(lambda g: g.mean(0), of_family))
            metrics[f"{name}/objective"], metrics[f"{name}/grad_norm"] = values.nanmean(), norms.nanmean()
        mean = tree.map(lambda *parts: sum(parts) / len(parts), *grads)
        updates, optimizer_state = optimizer.update(mean, state.optimizer, state.network)
        return MetaState(apply_updates(state.network, updates), optimizer_state, running), metrics

    return step


def curves(make: Make, network: Network, task: Task, seeds: Tensor, steps: int, backend: Backend = None) -> Tensor:
    """Losses [P, steps + 1] of the tasks of seeds [P] int64, trained from their start by an optimizer that stays.

    backend: of torch.compile, for one step. An optimizer that has no network is compared by ``make`` without one.
    """

    def one(network: Network, running: Training) -> tuple[Training, Tensor]:
        return torch.func.vmap(functools.partial(advance, make, network, task))(running)

    step = compile_function(one, backend)
    running = _begin_all(make, network, task, seeds, torch.zeros_like(seeds))
    losses = []
    for _ in range(steps + 1):
        running, loss = step(network, running)
        losses.append(loss)
    return torch.stack(losses, 1)


def loss_left(losses: Tensor) -> float:
    """What is left of the loss of [P, steps + 1] at the end: the geometric mean of last over first, 1 where not finite.

    The last is the mean of the last tenth of the steps, as each has a batch of its own.
    """
    last = losses[:, -max(losses.shape[1] // 10, 1) :].mean(1) / losses[:, 0]
    return float(torch.exp(objective(last.nan_to_num(1e6, 1e6), torch.ones(())).mean()))


def _begin_all(make: Make, network: Network, task: Task, seeds: Tensor, ages: Tensor) -> Training:
    """The tasks of seeds [P], at ages [P]."""
    running = torch.func.vmap(functools.partial(begin, make, network, task))(seeds, ages)
    # What is alike for all is one value seen P times: with memory of its own, the first step's graph serves them all.
    return tree.map(torch.Tensor.contiguous, running)


def _batch(seed: Tensor, age: Tensor) -> Tensor:
    return seed * BATCHES + age
