"""Learning an optimizer: held-out tasks end lower; the meta-step is what it says; tasks come and go by their seeds."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console

from titanfunc import rng, tree
from titanfunc.config import meta
from titanfunc.fullgraph import compile_function
from titanfunc.meta_training import KINDS, assemble, run
from titanfunc.optim import adamw, warmup_cosine
from titanfunc.optim.base import GradientTransformation
from titanfunc.optim.learned import init_small_fc_lopt, init_velo_mlp, small_fc_lopt, velo_mlp
from titanfunc.optim.learned.meta_training import (
    FLOOR,
    advance,
    begin,
    curves,
    init_meta,
    loss_left,
    make_meta_step,
    unroll,
)
from titanfunc.optim.learned.tasks import TASKS

SEEDS = torch.arange(3)
HELD_OUT = -1 - torch.arange(8)


def small(seed=0):
    return init_small_fc_lopt(rng.generator(seed), hidden=8)


def plain():
    """A meta-optimizer that returns the mean gradient itself."""
    return GradientTransformation(lambda params: (), lambda updates, state, params, **extra: (updates, state))


def test_the_configuration_knows_every_task_and_optimizer():
    assert set(meta.TASKS) == set(TASKS)
    assert set(meta.OPTIMIZERS) == set(KINDS)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_drawn_by_its_seed(name):
    task = TASKS[name]
    drawn = [task.draw(torch.tensor(seed)) for seed in (5, 5, 6)]
    assert all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, drawn[:2]), strict=True))
    for a, b in zip(tree.leaves(drawn[0]), tree.leaves(drawn[2]), strict=True):
        assert a.shape == b.shape and not torch.equal(a, b)
    data, params = drawn[0]
    losses = [task.loss(params, data, torch.tensor(seed)).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] > 0
    assert (losses[0] == losses[2]) == (name == "quadratic")  # the others draw a batch
    grads = torch.func.grad(task.loss)(params, data, torch.tensor(0))
    assert all((g != 0).any() for g in tree.leaves(grads))


@pytest.mark.parametrize("name", TASKS)
def test_adam_can_learn_every_task(name):
    losses = curves(lambda _: adamw(0.1, weight_decay=0.0), {}, TASKS[name], HELD_OUT, 50)
    assert losses.shape == (8, 51)
    assert loss_left(losses) < 0.15


def test_a_curve_is_a_plain_training():
    task, transformation = TASKS["regression"], small_fc_lopt(small())
    losses = curves(small_fc_lopt, small(), task, SEEDS, 3)
    data, params = task.draw(SEEDS[1])
    state = transformation.init(params)
    for step in range(4):
        batch = SEEDS[1] * (1 << 20) + step
        grads, loss = torch.func.grad_and_value(task.loss)(params, data, batch)
        torch.testing.assert_close(losses[1, step], loss)
        updates, state = transformation.update(grads, state, params)
        params = tree.map(torch.add, params, updates)


def test_what_is_left_of_the_loss():
    losses = torch.ones(2, 21)
    losses[0, -2:], losses[1, -2:] = 0.5, torch.tensor([0.1, 0.3])
    assert loss_left(losses) == pytest.approx(math.sqrt((0.5 + FLOOR) * (0.2 + FLOOR)))
    losses[1, -1] = math.nan
    assert loss_left(losses) > 100


def test_the_meta_gradient_is_the_mean_of_the_tasks_clipped_gradients():
    task, network, steps = TASKS["regression"], small(), 3
    found = []
    for seed in SEEDS:

        def loss(net, seed=seed):
            running, total = begin(small_fc_lopt, net, task, seed, 50 * seed // 3), 0.0
            for _ in range(steps):
                running, _ = advance(small_fc_lopt, net, task, running)
                batch = running.seed * (1 << 20) + running.age
                total += torch.log(task.loss(running.params, running.data, batch) / running.first + FLOOR) / steps
            return total

        found.append(torch.func.grad_and_value(loss)(network))
    norms = [math.sqrt(sum(g.square().sum().item() for g in tree.leaves(grads))) for grads, _ in found]
    limit = sorted(norms)[1]  # one task is clipped, and one is not
    clipped = [tree.scale(grads, min(1.0, limit / norm)) for (grads, _), norm in zip(found, norms, strict=True)]
    mean = tree.map(lambda *g: sum(g) / 3, *clipped)

    tasks = {"regression": task}
    meta_step = make_meta_step(small_fc_lopt, plain(), tasks, steps, horizon=50, clip_norm=limit)
    new, metrics = meta_step(init_meta(small_fc_lopt, network, plain(), tasks, SEEDS, 50))
    for old, grad, moved in zip(*map(tree.leaves, (network, mean, new.network)), strict=True):
        torch.testing.assert_close(moved, old + grad, rtol=1e-6, atol=1e-6 + 2e-3 * grad.abs().max().item())
    assert metrics["regression/objective"].item() == pytest.approx(
        sum(value for _, value in found).item() / 3, rel=1e-4
    )
    assert metrics["regression/grad_norm"].item() == pytest.approx(sum(norms) / 3, rel=1e-3)


def test_tasks_end_at_their_horizon_and_the_next_begin():
    tasks = {"quadratic": TASKS["quadratic"]}
    meta_step = make_meta_step(small_fc_lopt, plain(), tasks, steps=2, horizon=6)
    state = init_meta(small_fc_lopt, small(), plain(), tasks, SEEDS, 6)
    ages, seeds = [], []
    for _ in range(4):
        ages.append(state.running["quadratic"].age.tolist())
        seeds.append(state.running["quadratic"].seed.tolist())
        state, _ = meta_step(state)
    assert ages == [[0, 2, 4], [2, 4, 0], [4, 0, 2], [0, 2, 4]]
    assert seeds == [[0, 1, 2], [0, 1, 5], [0, 4, 5], [3, 4, 5]]
    last = state.running["quadratic"]
    assert last.seed.tolist() == [3, 4, 8]
    data, _ = TASKS["quadratic"].draw(torch.tensor(8))
    torch.testing.assert_close(last.data["map"][2], data["map"])
    assert last.state[0].count.tolist() == [2, 4, 0]
    assert torch.equal(last.first[0], begin(small_fc_lopt, small(), TASKS["quadratic"], torch.tensor(3)).first)


def test_a_task_that_blows_up_counts_for_nothing_and_is_replaced():
    tasks = {"quadratic": TASKS["quadratic"]}
    meta_step = make_meta_step(small_fc_lopt, plain(), tasks, steps=2, horizon=6)
    state = init_meta(small_fc_lopt, small(), plain(), tasks, SEEDS, 6)
    params = {"point": state.running["quadratic"].params["point"].clone()}
    params["point"][0] = math.inf
    broken = state._replace(running={"quadratic": state.running["quadratic"]._replace(params=params)})
    new, metrics = meta_step(broken)
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(new))
    assert new.running["quadratic"].seed.tolist() == [3, 1, 5]
    assert torch.isfinite(metrics["quadratic/objective"])
    whole, _ = meta_step(state)
    assert not torch.equal(whole.network["output"]["bias"], new.network["output"]["bias"])


def test_the_compiled_meta_step_is_the_eager_one(graphs):
    backend, seen = graphs
    tasks = {"quadratic": TASKS["quadratic"]}
    optimizer = adamw(warmup_cosine(1e-3, 1, 5), weight_decay=0.0)
    meta_step = make_meta_step(small_fc_lopt, optimizer, tasks, steps=2, horizon=4)
    compiled = compile_function(meta_step, backend)
    ours = theirs = init_meta(small_fc_lopt, small(), optimizer, tasks, SEEDS, 4)
    for _ in range(3):
        ours, theirs = compiled(ours)[0], meta_step(theirs)[0]
    assert len(seen) == 1
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "network", "rate", "bound"),
    [
        (small_fc_lopt, init_small_fc_lopt(rng.generator(0)), 5e-3, 0.1),
        (velo_mlp, init_velo_mlp(rng.generator(0)), 2e-2, 0.5),
    ],
    ids=["small_fc", "velo_mlp"],
)
def test_a_short_meta_training_lowers_the_loss_of_held_out_tasks(make, network, rate, bound):
    steps, horizon = 60, 40
    tasks = {"quadratic": TASKS["quadratic"]}
    optimizer = adamw(warmup_cosine(rate, 5, steps), weight_decay=0.0)
    meta_step = make_meta_step(make, optimizer, tasks, 8, horizon)
    state = init_meta(make, network, optimizer, tasks, torch.arange(8), horizon)
    for _ in range(steps):
        state, _ = meta_step(state)
    before, after = (
        loss_left(curves(make, net, tasks["quadratic"], HELD_OUT, horizon)) for net in (network, state.network)
    )
    assert before > 0.9
    assert after < bound


def test_a_run_is_the_same_again(tmp_path):
    """Byte for byte from one seed, and another from another."""
    written = {}
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        config = meta.MetaConfig(
            tasks=("quadratic",), tasks_at_once=2, held_out=2, unroll=2, horizon=4, steps=2, seed=seed, device="cpu"
        )
        place = tmp_path / name
        run(assemble(meta.MetaPlan(config, place)), Console(quiet=True))
        written[name] = [(place / file).read_bytes() for file in (meta.WEIGHTS, meta.METRICS)]
    assert written["one"] == written["two"]
    assert written["one"][0] != written["three"][0] and written["one"][1] != written["three"][1]


def test_an_unroll_judges_each_step_on_a_batch_of_its_own():
    task, network = TASKS["classification"], small()
    running = begin(small_fc_lopt, network, task, torch.tensor(2))
    value, then = unroll(small_fc_lopt, network, task, running, 1)
    after, loss = advance(small_fc_lopt, network, task, running)
    assert torch.equal(loss, running.first)
    judged = task.loss(after.params, after.data, torch.tensor(2 * (1 << 20) + 1))
    assert value.item() == pytest.approx(math.log(judged / running.first + FLOOR), abs=1e-6)
    assert then.age.item() == 1
