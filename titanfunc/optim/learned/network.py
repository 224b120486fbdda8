"""The small networks of learned optimizers, and the transformation that keeps one in its state.

Letters: F features, H hidden units, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.optim.base import GradientTransformation, Tree
from titanfunc.optim.learned.features import (
    FACTORED_DECAYS,
    MOMENTUM_DECAYS,
    SECOND_DECAYS,
    Accumulators,
    accumulate,
    init_accumulators,
)

Network = dict[str, Any]
LAYERS = ("input", "hidden", "output")


class LearnedState(NamedTuple):
    """count: updates so far, 0-d int64. network: its weights, live: what replaces them moves the next update.

    accumulators: an ``Accumulators`` in the place of each parameter.
    """

    count: Tensor  # type: ignore[assignment]  # a field in place of tuple.count
    network: Network
    accumulators: Tree


Step = Callable[[Network, Tensor, Tensor, Tensor, Accumulators], Tensor]
"""(network, updates so far 0-d, p [*S], g [*S], accumulators) -> what is to be subtracted at a rate of 1, [*S]."""


def init_layers(generator: torch.Generator, sizes: Sequence[int], gain: float = 1.0) -> Network:
    """Weights [in, out] from N(0, 1 / in), the last layer's times ``gain``, and zero biases [out], for four sizes."""
    network = {}
    for name, (fan_in, fan_out) in zip(LAYERS, pairwise(sizes), strict=True):
        std = (gain if name == "output" else 1.0) / math.sqrt(fan_in)
        network[name] = {
            "weight": rng.normal(generator, (fan_in, fan_out), std),
            "bias": torch.zeros(fan_out, device=generator.device),
        }
    return network


def initial_decays(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The published decays as they are learned, log(1 - decay) / 10: "momentum" [3], "second" [1], "factored" [3]."""
    decays = {"momentum": MOMENTUM_DECAYS, "second": SECOND_DECAYS, "factored": FACTORED_DECAYS}
    return {
        name: torch.tensor([math.log1p(-decay) / 10 for decay in values], device=device)
        for name, values in decays.items()
    }


def apply_layers(network: Mapping[str, Any], x: Tensor) -> Tensor:
    """[N, O] for x [N, F], ReLU between the layers, computed in the dtype of x."""
    for name in LAYERS:
        x = x @ network[name]["weight"].to(x.dtype) + network[name]["bias"].to(x.dtype)
        x = torch.relu(x) if name != LAYERS[-1] else x
    return x


def layer_shapes(features: int, hidden: int, outputs: int, bank: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of a network by its path. bank: how many networks lie in one, as leading axes."""
    sizes = (features, hidden, hidden, outputs)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (fan_in, fan_out) in zip(LAYERS, pairwise(sizes), strict=True):
        shapes |= {f"{name}.weight": (*bank, fan_in, fan_out), f"{name}.bias": (*bank, fan_out)}
    return shapes


def decay_shapes() -> dict[str, tuple[int, ...]]:
    """The shape of each decay by its path."""
    decays = {"momentum": MOMENTUM_DECAYS, "second": SECOND_DECAYS, "factored": FACTORED_DECAYS}
    return {f"decays.{name}": (len(values),) for name, values in decays.items()}


def check_network(network: Network, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, naming the first leaf that differs, unless a network's leaves have these paths and shapes."""
    found = {name: tuple(leaf.shape) for name, leaf in tree.named_leaves(network).items()}
    for name in [*shapes, *(name for name in found if name not in shapes)]:
        wanted, got = (str(list(s[name])) if name in s else "nothing" for s in (shapes, found))
        if wanted != got:
            raise ValueError(f"network: {name}: wanted {wanted}, got {got}")


def width(network: Network) -> int:
    """H, from the shape [..., F, H] of the first layer's weight. Raises ValueError where there is none."""
    try:
        return int(network["input"]["weight"].shape[-1])
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError("network: wanted a nested dict with input.weight [F, H], got another") from None


def per_parameter(network: Network, step: Step, limit: float = math.inf) -> GradientTransformation:
    """g -> step(...), leaf by leaf (any shapes), by a network that lives in the state (a ``LearnedState``).

    limit: gradients are clipped to it, element by element, before anything else sees them.
    """

    def init(params: Tree) -> LearnedState:
        device = tree.leaves(params)[0].device
        count = torch.zeros((), dtype=torch.int64, device=device)
        # A copy: a compiled step writes into its state's tensors.
        own = tree.map(lambda weight: weight.to(device).clone(), network)
        return LearnedState(count, own, tree.map(init_accumulators, params))

    def update(
        updates: Tree, state: LearnedState, params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, LearnedState]:
        own = state.network
        if math.isfinite(limit):
            updates = tree.map(lambda g: g.clamp(-limit, limit), updates)
        kept = tree.map(lambda g, old: accumulate(old, g, own["decays"]), updates, state.accumulators)
        steps = tree.map(lambda p, g, now: step(own, state.count, p, g, now), params, updates, kept)
        return steps, LearnedState(state.count + 1, own, kept)

    return GradientTransformation(init, update)


def with_network(state: Any, network: Any) -> Any:
    """An optimizer's state with another network (leaves of any shapes) in each learned optimizer's part of it."""
    if isinstance(state, tuple):
        if _is_learned(state):
            return state._replace(network=network)  # type: ignore[attr-defined]
        parts = [with_network(part, network) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def network_of(state: Any) -> Any:
    """The network inside an optimizer's state (leaves of any shapes), or None where there is none."""
    if isinstance(state, tuple):
        if _is_learned(state):
            return state.network  # type: ignore[attr-defined]
        for part in state:
            found = network_of(part)
            if found is not None:
                return found
    return None


def _is_learned(state: tuple[Any, ...]) -> bool:
    """A ``LearnedState``, or another that keeps a network and what it reads."""
    return {"network", "accumulators"} <= set(getattr(state, "_fields", ()))
