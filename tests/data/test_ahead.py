"""Batches made ahead are those made when asked for."""

from __future__ import annotations

import pytest
import torch

from titanfunc.data.ahead import make_ahead


def batches(step):
    return {"tokens": torch.full((2, 3), step), "weights": torch.rand(2, generator=torch.Generator().manual_seed(step))}


def test_batches_made_ahead_are_the_same_in_any_order():
    ahead = make_ahead(batches, 9, workers=2)
    for step in (3, 4, 5, 2, 3, 8):
        got, want = ahead(step), batches(step)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(ValueError, match="step: wanted 0 to 8, got 9"):
        ahead(9)


def test_without_workers_nothing_changes():
    assert make_ahead(batches, 9, workers=0) is batches
    with pytest.raises(ValueError, match="workers: wanted 0 or more, got -1"):
        make_ahead(batches, 9, workers=-1)
