"""Named arithmetic over pytrees."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from titanfunc import rng, tree


class Pair(NamedTuple):
    left: torch.Tensor
    right: dict


def test_arithmetic_keeps_structure():
    value = Pair(torch.ones(2), {"b": torch.full((1,), 2.0), "a": (), "c": torch.zeros(())})
    assert list(tree.named_leaves(value)) == ["0", "1.b", "1.c"]
    doubled = tree.add(value, value)
    assert isinstance(doubled, Pair) and torch.equal(doubled.right["b"], torch.tensor([4.0]))
    assert tree.global_norm(value).item() == pytest.approx(6**0.5) and tree.size(value) == 4
    assert tree.global_norm({}).item() == 0
    chosen = tree.where(torch.tensor(False), value, tree.scale(value, 3.0))
    assert torch.equal(chosen.left, torch.full((2,), 3.0))


def test_generators_are_explicit():
    a, b = (rng.normal(rng.generator(3), (4,), 2.0) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, rng.normal(rng.generator(4), (4,), 2.0))
