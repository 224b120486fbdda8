"""Training states small enough to be saved a thousand times."""

from typing import Any, NamedTuple

import torch

from titanfunc.config import ModelConfig

MODEL = ModelConfig(layers=2)


class Moments(NamedTuple):
    mean: Any
    nothing: tuple[()]


class State(NamedTuple):
    step: torch.Tensor
    params: Any
    opt_state: Any


def make_state(seed: int, width: int = 3) -> State:
    source = torch.Generator().manual_seed(seed)
    params = {
        "block": {"w": torch.randn(width, 2, generator=source), "b": torch.randn(2, generator=source).bfloat16()},
        "a": torch.randn((), generator=source, dtype=torch.float64),
    }
    moments = Moments({"w": torch.randn(2, width, generator=source).mT}, ())
    return State(torch.tensor(seed), params, (moments, ()))


def leaves(state: State) -> list[torch.Tensor]:
    moments = state.opt_state[0]
    return [state.step, *state.params["block"].values(), state.params["a"], moments.mean["w"]]


def same(state: State, other: State) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(other), strict=True))
