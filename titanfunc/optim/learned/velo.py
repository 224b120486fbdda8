"""VeLO: a small network for each tensor, mixed from a bank of them by a recurrent network that watches the tensors.

Metz et al. 2022, "VeLO: training versatile learned optimizers by scaling up" (arXiv 2211.09760), after its reference
code, google/learned_optimization (``hyper_v2``), and PyLO's port of it (Janson et al. 2025, arXiv 2506.10315).
``velo`` is all of it; ``velo_mlp`` the per-parameter network alone, one for all tensors.

Letters: L leaves, C features that the recurrent network reads, R its units, B networks in the bank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.optim.base import GradientTransformation, Tree, chain
from titanfunc.optim.learned import watcher
from titanfunc.optim.learned.features import Accumulators, accumulate, init_accumulators, velo_statistics, wide
from titanfunc.optim.learned.network import (
    Network,
    apply_layers,
    check_network,
    decay_shapes,
    init_layers,
    initial_decays,
    layer_shapes,
    per_parameter,
    width,
)
from titanfunc.optim.schedules import Schedule
from titanfunc.optim.transforms import scale_by_learning_rate

FEATURES, OUTPUTS = 30, 3
LIMIT = 1000.0
"""What a gradient is clipped to, element by element."""


def init_velo_mlp(generator: torch.Generator, hidden: int = 4) -> Network:
    """A network that has not learned yet: layers "input" [30, H], "hidden" [H, H] and "output" [H, 3], and "decays".

    Weights from N(0, 1 / in), so that a step is about a thousandth of its tensor's root mean square.
    """
    return {**init_layers(generator, (FEATURES, hidden, hidden, OUTPUTS)), "decays": initial_decays(generator.device)}


def velo_mlp(
    network: Network,
    *,
    learning_rate: float | Schedule = 1.0,
    step_mult: float = 0.001,
    exp_mult: float = 0.001,
) -> GradientTransformation:
    """p <- p - learning_rate step_mult rms(p) d exp(exp_mult s): (d, s, unused) by the network, for leaves of any shape

    VeLO's per-parameter network alone: one for all tensors, without the recurrent network that gives each tensor its
    own and scales its steps (``velo`` has it), and so without the loss. The third output is in the published weights
    and enters no step; nothing can be learned for it. rms(p): over the leaf, so a leaf of zeros hardly moves.
    network: as ``init_velo_mlp`` or ``load_weights`` give it; live, as in ``small_fc_lopt``. Gradients are clipped to
    1,000 first. VeLO's decays are fixed, at those of ``init_velo_mlp``.
    Raises ValueError for a network of other shapes and for values out of range. Metz et al., arXiv 2211.09760.
    """
    check_network(network, {**layer_shapes(FEATURES, width(network), OUTPUTS), **decay_shapes()})

    def step(own: Network, count: Tensor, p: Tensor, g: Tensor, kept: Accumulators) -> Tensor:
        return _step(own, p, g, kept, exp_mult) * step_mult

    return chain(per_parameter(network, step, LIMIT), scale_by_learning_rate(learning_rate))


def init_velo(generator: torch.Generator, hidden: int = 4, bank: int = 256, units: int = 512) -> Network:
    """A VeLO that has not learned yet: "bank", B per-parameter networks as in ``init_velo_mlp`` [B, in, out]; the
    watcher's "mix", "merge", "lstm", "controls", "rate" and "start" (see ``init_watcher``), R units; and "decays".
    """
    networks = [init_layers(generator, (FEATURES, hidden, hidden, OUTPUTS)) for _ in range(bank)]
    stacked = tree.map(lambda *weights: torch.stack(weights), *networks)
    return {"bank": stacked, **watcher.init_watcher(generator, bank, units), "decays": initial_decays(generator.device)}


class VeLOState(NamedTuple):
    """count: updates so far, 0-d int64. network, accumulators: as in ``LearnedState``.

    hidden, cell: of the recurrent network, [L, R]. losses: the decaying means of the loss.
    """

    count: Tensor  # type: ignore[assignment]  # a field in place of tuple.count
    network: Network
    accumulators: Tree
    hidden: Tensor
    cell: Tensor
    losses: watcher.Losses


def velo(
    network: Network,
    total_steps: int,
    *,
    learning_rate: float | Schedule = 1.0,
    step_mult: float = 0.001,
    exp_mult: float = 0.001,
) -> GradientTransformation:
    """p <- p - learning_rate r step_mult rms(p) d exp(exp_mult s), leaves of any shape of at most four axes above 1.

    (d, s) by a network of the leaf's own: 100 / B times the sum over the bank, weighted by B controls, that a recurrent
    network gives at each step with r, from what it reads of each leaf, of the losses and of t / total_steps.
    ``update`` wants ``loss``, 0-d. network: as ``init_velo``; published weights lie in two files, whose
    ``load_weights`` make one: ``{**load_weights(mlp), **load_weights(rnn)}``.
    Raises ValueError for a network of other shapes, values out of range, leaves of more axes, and without a loss.
    Metz et al., arXiv 2211.09760.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps: wanted at least 1, got {total_steps}")
    bank, units = _sizes(network)
    shapes = layer_shapes(FEATURES, width(network["bank"]), OUTPUTS, (bank,))
    within = {f"bank.{name}": shape for name, shape in shapes.items()}
    check_network(network, {**within, **watcher.watcher_shapes(bank, units), **decay_shapes()})

    def init(params: Tree) -> VeLOState:
        leaves = tree.named_leaves(params)
        for name, leaf in leaves.items():
            if sum(size > 1 for size in leaf.shape) > 4:
                raise ValueError(f"params: wanted leaves of at most 4 axes above 1, got {name} {list(leaf.shape)}")
        device = next(iter(leaves.values())).device
        own = tree.map(lambda weight: weight.to(device).clone(), network)
        hidden, cell = (own["start"][name].repeat(len(leaves), 1) for name in ("hidden", "cell"))
        count = torch.zeros((), dtype=torch.int64, device=device)
        kept = tree.map(init_accumulators, params)
        return VeLOState(count, own, kept, hidden, cell, watcher.init_losses(total_steps, device))

    def update(
        updates: Tree, state: VeLOState, params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, VeLOState]:
        if loss is None:
            raise ValueError("loss: wanted the 0-d loss of these gradients, got None")
        own = state.network
        losses = watcher.update_losses(state.losses, loss)
        updates = tree.map(lambda g: g.clamp(-LIMIT, LIMIT), updates)
        seen = watcher.loss_features(losses)
        done = state.count.to(torch.float32) / total_steps
        # It reads what was remembered before this gradient.
        read = tree.map(lambda p, old: watcher.tensor_features(p, old, done, seen), params, state.accumulators)
        controls, rates, hidden, cell = watcher.watch(own, torch.stack(tree.leaves(read)), state.hidden, state.cell)
        kept = tree.map(lambda g, old: accumulate(old, g, own["decays"]), updates, state.accumulators)
        rows = iter(zip(controls, rates, strict=True))  # in the order of the leaves, as they were stacked

        def step(p: Tensor, g: Tensor, now: Accumulators) -> Tensor:
            control, rate = next(rows)
            # The sum of weighted networks as one product: [B] @ [B, ...].
            mine = tree.map(lambda weights: torch.tensordot(control, weights, 1) * (100 / bank), own["bank"])
            return _step(mine, p, g, now, exp_mult) * (rate * step_mult)

        steps = tree.map(step, params, updates, kept)
        return steps, VeLOState(state.count + 1, own, kept, hidden, cell, losses)

    return chain(GradientTransformation(init, update), scale_by_learning_rate(learning_rate))


def _step(own: Network, p: Tensor, g: Tensor, kept: Accumulators, exp_mult: float) -> Tensor:
    """rms(p) d exp(exp_mult s) for a leaf of any shape."""
    out = apply_layers(own, velo_statistics(p, g, kept))
    scale = torch.sqrt(wide(p).square().mean() + 1e-9)
    return (out[:, 0] * torch.exp(out[:, 1] * exp_mult) * scale).reshape(p.shape)


def _sizes(network: Network) -> tuple[int, int]:
    """B and R. Raises ValueError where the leaves that tell them are not there."""
    try:
        units, bank = network["controls"]["weight"].shape
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError("network: wanted a nested dict with controls.weight [R, B], got another") from None
    if "bank" not in network:
        raise ValueError("network: wanted the bank of per-parameter networks beside the watcher's weights, got none")
    return int(bank), int(units)
