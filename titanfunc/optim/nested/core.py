"""The nested optimizer: a base optimizer, and small networks that learn during training how to use it.

Letters: phi the networks' weights, theta the parameters, g a gradient, U one update, G groups (see groups.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.optim.base import GradientTransformation, Tree, apply_updates
from titanfunc.optim.nested import momentum as networks
from titanfunc.optim.nested.controller import (
    STATISTICS,
    Bounds,
    init_controller,
    log_multipliers,
    statistics,
)
from titanfunc.optim.nested.groups import Grouping, Groups, by_role
from titanfunc.optim.nested.levels import combine, init_levels
from titanfunc.optim.nested.meta import HeldOut, descend, implicit, init_meta, unrolled
from titanfunc.optim.nested.state import Inner, Made, NestedState, Record, Schedule, annealed, follow, share_of
from titanfunc.optim.transforms import clip_by_global_norm, current_learning_rate

MODES = ("simple", "explicit", "implicit")
UNROLLS = ("online", "first_order", "exact")


def nested(
    base: GradientTransformation | Callable[..., GradientTransformation],
    *,
    meta_lr: float = 2e-2,
    mode: str = "explicit",
    unroll: str = "online",
    k_unroll: int = 1,
    meta_update_freq: int = 1,
    meta_start: int = 0,
    controller_hidden_dim: int = 32,
    controller_num_layers: int = 2,
    controller_update_freq: int = 1,
    min_lr_mult: float = 0.1,
    max_lr_mult: float = 10.0,
    relative: bool = True,
    normalize: bool = False,
    anneal: bool = False,
    shrinkage: float = 0.0,
    momentum: str = "none",
    momentum_hidden_dim: int = 16,
    momentum_num_layers: int = 2,
    use_preprocessing: bool = True,
    use_cms_updates: bool = False,
    cms_frequencies: Sequence[int] = (1, 10, 100),
    neumann_terms: int = 8,
    max_grad_norm: float = 0.0,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    groups: Grouping = by_role,
    seed: int = 0,
) -> GradientTransformation:
    """Wraps a base optimizer of nested dicts of parameters (any shapes) in networks that learn how to use it.

    An update is the base's, corrected by a momentum network, times a learning-rate multiplier for each group: p <- p +
    mult_group net(U_base). Networks that are new return their input and multiply by exactly 1: with ``meta_lr=0``
    this is the base, bit for bit. What is off holds no state.

    base: a transformation, or a function such as ``adamw`` that ``base_lr`` and ``weight_decay`` are handed to.
    meta_lr: of Adam over the networks' weights phi; 0: nothing learns. max_grad_norm: of the whole gradient, before the
    base (0: no clip). groups: parameters -> Groups; by default a group a role and layer.
    Controller: an MLP (``controller_hidden_dim``, ``controller_num_layers``) over four statistics of a group, looked at
    every ``controller_update_freq`` steps, and an offset a group; multipliers stay in (min_lr_mult, max_lr_mult).
    relative: their geometric mean by weight count is held at 1 (nearly, where some are near a bound), and a momentum
    network turns an update without making it longer or shorter, so that the schedule alone owns the overall rate: a
    one-step judge is short-sighted about that (Wu et al., arXiv 1803.02021).
    momentum: "none", "l2_regression", "direct_update" (``use_preprocessing``: log-magnitudes and signs) or
    "deep_momentum" (always two layers); see ``nested.momentum.correct``. The last two hold momentum_hidden_dim numbers
    for every element of the parameters while they work. use_cms_updates: the base is handed the mean of gradient
    levels that fire every ``cms_frequencies`` steps.

    mode, the meta-gradient: "simple", a proxy from the loss's trend that is weak, kept to compare with; "explicit",
    d L(theta_{t+k}) / d phi; "implicit", by a Neumann series of ``neumann_terms`` as at a fixed point (at a true one
    the base's update is 0, and what only scales it has no gradient: it learns on the way there alone). unroll, for
    "explicit": "online", the next step's own gradient judges the last update, < g_{t+1}, dU_t / d phi >, which needs no
    further evaluation of the model; "first_order" or "exact" go through ``k_unroll`` steps on held-out batches. These
    and "implicit" learn at the calls of ``update`` that are handed ``held_out=HeldOut(objective, batches)``, k_unroll
    batches of them (2 for "implicit": one trains, one judges), and not at others.
    meta_update_freq: online and simple, meta-gradients a meta-step is the mean of; else, steps between the calls that
    hand out batches, which is the training loop's to do. meta_start: updates before learning begins. normalize: online,
    each group's share is the cosine of gradient and update, as large for a small group as for a large one;
    otherwise the plain inner product. shrinkage: pulls log multipliers towards 0 (0: not at all).
    anneal: log multipliers fade with the base's learning rate, in proportion, as it falls from its peak: what a
    one-step judge prefers pays early in training, less at its end.
    seed: of the networks. Raises ValueError for values out of range.
    """
    _check(locals())
    optimizer = _base_of(base, base_lr, weight_decay)
    clip = clip_by_global_norm(max_grad_norm) if max_grad_norm else None
    bounds = Bounds(min_lr_mult, max_lr_mult, relative)
    periods = tuple(cms_frequencies)
    learns = meta_lr > 0
    online = mode == "explicit" and unroll == "online"

    def init(params: Tree) -> NestedState:
        layout = groups(params)
        for name, leaf in tree.named_leaves(params).items():
            if leaf.dtype == torch.float16:
                raise ValueError(f"params: wanted float32, float64 or bfloat16, got float16 for {name}")
        device = tree.leaves(params)[0].device
        generator = rng.generator(seed)
        count = sum(max(layers, 1) for _, layers in layout.families)
        phi = {"controller": init_controller(generator, count, controller_hidden_dim, controller_num_layers)}
        if momentum != "none":
            phi["momentum"] = networks.init_network(
                generator, momentum, momentum_hidden_dim, momentum_num_layers, use_preprocessing
            )
        phi = tree.map(lambda leaf: leaf.to(device), phi)
        begun = optimizer.init(params)
        if anneal and current_learning_rate(begun) is None:
            raise ValueError("anneal: wanted a base whose state holds its learning rate, got one without")
        deep, wide = momentum == "deep_momentum", layout.sums(params).dtype
        inner = Inner(
            torch.zeros((), dtype=torch.int64, device=device),
            begun,
            torch.zeros(count, len(STATISTICS), dtype=wide, device=device),
            torch.zeros((), dtype=wide, device=device),
            tree.zeros_like(params) if momentum != "none" else (),
            tree.zeros_like(params) if deep else (),
            networks.init_memories(generator, params, momentum_hidden_dim) if deep else (),
            init_levels(params, periods) if use_cms_updates else (),
            Schedule(torch.zeros((), device=device), torch.ones((), device=device)) if anneal else (),
        )
        record: Any = ()
        if learns and online:
            zero = tree.zeros_like(params)
            record = Record(zero, zero if momentum != "none" and not deep else (), inner.average)
        ones = torch.ones(count, dtype=wide, device=device)
        return NestedState(inner, phi, layout.pack(ones), record, init_meta(phi) if learns else ())

    def multipliers(phi: Tree, layout: Groups, made: Made) -> Tensor:
        return torch.exp(made.share * log_multipliers(phi["controller"], made.stats, layout, bounds))

    def finish(phi: Tree, layout: Groups, made: Made, params: Tree) -> Tree:
        """The update that phi makes of what the base proposed."""
        updates = made.updates
        if momentum != "none":
            corrected = networks.correct(momentum, phi["momentum"], updates, made.seen, params, use_preprocessing)
            updates = networks.keep_length(corrected, updates, params) if relative else corrected
        return layout.scale(updates, multipliers(phi, layout, made))

    def advance(
        layout: Groups, grads: Tree, inner: Inner, params: Tree, loss: Any, extra: dict[str, Any]
    ) -> tuple[Made, Inner]:
        """What the base proposes, and the new inner state; phi has no part in it."""
        average, trend = follow(inner, loss)
        look = inner.count % controller_update_freq == 0
        stats = torch.where(look, statistics(layout, grads, params, trend), inner.stats)
        seen: Any = ()
        mean, memories, before = inner.mean, inner.memories, inner.before
        if momentum == "deep_momentum":
            memories = networks.learn(memories, grads, before, mean)
            before = grads
        if momentum != "none":
            mean = tree.map(lambda m, g: networks.DECAY * m + (1 - networks.DECAY) * g, mean, grads)
            seen = networks.Seen(grads, mean, trend, memories)
        clipped = clip.update(grads, (), params)[0] if clip else grads
        levels = inner.levels
        if use_cms_updates:
            clipped, levels = combine(clipped, levels, periods)
        updates, state = optimizer.update(clipped, inner.base, params, loss=loss, **extra)
        schedule = annealed(inner.schedule, state)
        new = Inner(inner.count + 1, state, stats, average, mean, before, memories, levels, schedule)
        return Made(updates, stats, seen, share_of(schedule)), new

    def learn(
        state: NestedState, layout: Groups, grads: Tree, params: Tree, loss: Any, held_out: HeldOut | None
    ) -> tuple[Tree, Any]:
        if not learns or (held_out is None and not online and mode != "simple"):
            return state.phi, state.meta
        inner = state.inner

        def penalty(phi: Tree, stats: Tensor) -> Tensor:
            logs = log_multipliers(phi["controller"], stats, layout, bounds)
            return 0.5 * shrinkage * (logs * logs).sum() if shrinkage else logs.sum() * 0.0

        def judged(phi: Tree) -> Tensor:
            """The last update, as phi would have made it, in the eyes of this gradient."""
            record = state.record
            seen: Any = ()
            if momentum != "none":
                before = inner.before if isinstance(record.grads, tuple) else record.grads
                seen = networks.Seen(before, inner.mean, record.trend, inner.memories)
            record = Made(record.updates, inner.stats, seen, share_of(inner.schedule))
            if momentum == "none":  # the update is linear in the multipliers: sums over groups tell all
                factors, now = (multipliers(weights, layout, record) for weights in (phi, state.phi))
                shares = factors * layout.sums(grads, record.updates)
                size = now * layout.sums(record.updates, record.updates).sqrt()
            else:
                moved = finish(phi, layout, record, params)
                shares = layout.sums(grads, moved)
                now = finish(state.phi, layout, record, params)
                size = layout.sums(now, now).sqrt()
            if normalize:
                shares = shares / (layout.sums(grads, grads).sqrt() * size).clamp_min(1e-30)
            return shares.sum() + penalty(phi, record.stats)

        def proxy(phi: Tree) -> Tensor:
            """Faster where the loss falls, slower where it rises; a momentum network should give the mean gradient."""
            _, trend = follow(inner, loss)
            logs = log_multipliers(phi["controller"], inner.stats, layout, bounds)
            total = trend.to(logs.dtype) * logs.sum() + penalty(phi, inner.stats)
            if momentum == "none":
                return total
            seen = networks.Seen(grads, inner.mean, trend, inner.memories)
            moved = networks.correct(momentum, phi["momentum"], grads, seen, params, use_preprocessing)
            apart = tree.map(lambda a, b: ((a - b) ** 2).sum(), moved, inner.mean)
            return total + torch.stack(tree.leaves(apart)).sum() / (tree.global_norm(grads) ** 2).clamp_min(1e-30)

        def step(phi: Tree, gradient: Tree, value: Any, within: Inner, theta: Tree) -> tuple[Tree, Inner]:
            made, new = advance(layout, gradient, within, theta, value, {})
            return finish(phi, layout, made, theta), new

        period = 1
        live = inner.count >= max(meta_start, 1)
        if online or mode == "simple":
            period = meta_update_freq
            gradient, value = torch.func.grad_and_value(judged if online else proxy)(state.phi)
        elif mode == "explicit":
            assert held_out is not None
            gradient, value = unrolled(
                step, state.phi, (grads, loss), inner, params, held_out, first_order=unroll == "first_order"
            )
            live = inner.count >= meta_start
        else:
            assert held_out is not None
            train, judge = held_out.batches

            def settle(theta: Tree, phi: Tree) -> Tree:
                gradient, value = torch.func.grad_and_value(held_out.objective)(theta, train)
                return apply_updates(theta, step(phi, gradient, value, inner, theta)[0])

            gradient, value = implicit(
                settle, state.phi, params, lambda theta: held_out.objective(theta, judge), terms=neumann_terms
            )
            live = inner.count >= meta_start
        return descend(state.phi, state.meta, gradient, value, live, rate=meta_lr, period=period)

    def update(
        updates: Tree,
        state: NestedState,
        params: Tree,
        *,
        loss: Any = None,
        held_out: HeldOut | None = None,
        **extra: Any,
    ) -> tuple[Tree, NestedState]:
        wanted = 2 if mode == "implicit" else k_unroll
        if held_out is not None and len(held_out.batches) != wanted:
            raise ValueError(f"held_out: wanted {wanted} batches, got {len(held_out.batches)}")
        layout = groups(params)
        phi, meta = learn(state, layout, updates, params, loss, held_out)
        made, inner = advance(layout, updates, state.inner, params, loss, extra)
        moved = finish(phi, layout, made, params)
        record: Any = ()
        if isinstance(state.record, Record):
            grads = updates if momentum not in ("none", "deep_momentum") else ()
            record = Record(made.updates, grads, follow(state.inner, loss)[1])
        return moved, NestedState(inner, phi, layout.pack(multipliers(phi, layout, made)), record, meta)

    return GradientTransformation(init, update)


def _base_of(
    base: GradientTransformation | Callable[..., GradientTransformation],
    base_lr: float | None,
    weight_decay: float | None,
) -> GradientTransformation:
    given = {name: value for name, value in (("weight_decay", weight_decay),) if value is not None}
    if isinstance(base, GradientTransformation):
        if base_lr is not None or given:
            raise ValueError(
                "base_lr, weight_decay: wanted none beside a base that is made already; or give base=adamw or the like"
            )
        return base
    if base_lr is None:
        raise ValueError("base_lr: wanted a learning rate for the base that is to be made, got none")
    return base(base_lr, **given)


def _check(given: dict[str, Any]) -> None:
    for name, choices in (("mode", MODES), ("unroll", UNROLLS), ("momentum", networks.KINDS)):
        if given[name] not in choices:
            raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {given[name]!r}")
    for name in ("meta_lr", "meta_start", "shrinkage", "max_grad_norm"):
        if not given[name] >= 0:
            raise ValueError(f"{name}: wanted 0 or a positive number, got {given[name]}")
    counts = (
        "k_unroll", "meta_update_freq", "controller_hidden_dim", "controller_num_layers", "controller_update_freq",
        "momentum_hidden_dim", "momentum_num_layers", "neumann_terms",
    )  # fmt: skip
    for name in counts:
        if not given[name] >= 1:
            raise ValueError(f"{name}: wanted at least 1, got {given[name]}")
    if given["mode"] == "explicit" and given["unroll"] == "online" and given["k_unroll"] > 1:
        raise ValueError(f"k_unroll: wanted 1 with unroll='online', got {given['k_unroll']}")
    if not 0 < given["min_lr_mult"] <= 1 <= given["max_lr_mult"]:
        raise ValueError(
            "min_lr_mult, max_lr_mult: wanted 0 < min_lr_mult <= 1 <= max_lr_mult, got "
            f"{given['min_lr_mult']}, {given['max_lr_mult']}"
        )
    periods = tuple(given["cms_frequencies"])
    if not periods or any(period < 1 for period in periods):
        raise ValueError(f"cms_frequencies: wanted periods of at least 1 step, got {periods}")
