"""The chain of feed-forwards that are to be updated at different rates."""

from __future__ import annotations

import pytest
import torch

from titanfunc import rng, tree
from titanfunc.nn import cms, feed_forward, init_cms, init_feed_forward

D = 6


def parameters(hidden: int, levels: int, gain: float = 1.0):
    return tree.map(lambda leaf: leaf.double(), init_cms(rng.generator(0), D, hidden, levels, gain))


def features():
    return torch.randn(2, 5, D, generator=rng.generator(1)).double()


@pytest.mark.parametrize("levels", [1, 2, 3, 11])
def test_the_chain_is_one_residual_block_after_another(levels):
    params, x = parameters(22, levels), features()
    h = x
    for i in range(levels):
        block = params[f"level{i}"]
        gate = h @ block["gate"]
        h = h + (gate / (1 + torch.exp(-gate)) * (h @ block["up"])) @ block["down"]
    torch.testing.assert_close(x + cms(params, x, torch.float64), h, rtol=1e-12, atol=1e-12)


def test_one_level_is_the_feed_forward():
    one, x = parameters(8, 1), features()
    assert torch.equal(cms(one, x, torch.float64), feed_forward(one["level0"], x, torch.float64))
    plain = init_feed_forward(rng.generator(0), D, 8)
    assert all(torch.equal(leaf, one["level0"][name].float()) for name, leaf in plain.items())


@pytest.mark.parametrize(("hidden", "levels", "shares"), [(12, 3, [4, 4, 4]), (14, 3, [5, 5, 4]), (3, 3, [1, 1, 1])])
def test_the_levels_share_the_weights_of_one_feed_forward(hidden, levels, shares):
    params = parameters(hidden, levels)
    assert tree.size(params) == tree.size(init_feed_forward(rng.generator(0), D, hidden))
    assert [params[f"level{i}"]["down"].shape[0] for i in range(levels)] == shares and len(params) == levels


def test_the_gain_is_that_of_the_whole_chain():
    x = torch.randn(1, 4000, 64, generator=rng.generator(1))
    sizes = [cms(init_cms(rng.generator(0), 64, 512, n, 0.1), x, torch.float32).std().item() for n in (1, 2, 4)]
    assert sizes == pytest.approx([sizes[0]] * 3, rel=0.1)


def test_every_level_has_a_gradient_and_the_result_has_the_dtype():
    params, x = parameters(12, 3), features()
    gradient = torch.func.grad(lambda p: cms(p, x, torch.float64).square().sum())(params)
    assert all((leaf.abs().amax() > 0) for leaf in tree.leaves(gradient))
    y = cms(params, x, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), cms(params, x, torch.float64), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("levels", [0, 5])
def test_a_number_of_levels_that_does_not_fit_is_refused(levels):
    with pytest.raises(ValueError, match=f"levels: wanted 1 to hidden = 4, got {levels}"):
        init_cms(rng.generator(0), D, 4, levels)
