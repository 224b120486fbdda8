"""Features and updates against the published formulas, element by element in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.optim.learned import reference
from titanfunc import rng, tree
from titanfunc.optim import apply_updates, current_learning_rate
from titanfunc.optim.learned import (
    init_small_fc_lopt,
    init_velo_mlp,
    small_fc_lopt,
    small_fc_statistics,
    time_embedding,
    velo_mlp,
    velo_statistics,
)
from titanfunc.optim.learned.features import accumulate, init_accumulators
from titanfunc.optim.learned.network import initial_decays

SHAPES = [(), (1,), (5,), (3, 4), (4, 3), (3, 3), (1, 6), (2, 5, 3), (4, 2, 4), (2, 3, 1, 4)]


def leaf(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=rng.generator(seed), dtype=torch.float64).to(dtype)


def as_dict(tensor):
    return {i: tensor[i].item() for i in reference.elements(tensor.shape)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["small_fc", "velo"])
def test_statistics_are_the_published_ones(shape, kind):
    statistics = {"small_fc": small_fc_statistics, "velo": velo_statistics}[kind]
    p, kept, slow = leaf(shape, 0), init_accumulators(leaf(shape, 0)), reference.Leaf(shape)
    decays = {name: (-torch.tensor(d, dtype=torch.float64)).log1p() / 10 for name, d in reference.DECAYS.items()}
    for i in range(3):
        g = leaf(shape, 10 + i) * 10.0 ** (i - 2)
        kept = accumulate(kept, g, decays)
        slow.see(as_dict(g))
        ours = statistics(p, g, kept)
        theirs = torch.tensor(getattr(slow, kind)(as_dict(p), as_dict(g)), dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert ours.shape == (max(p.numel(), 1), {"small_fc": 28, "velo": 30}[kind])


def test_the_published_decays_are_where_learning_starts():
    for name, learned in initial_decays().items():
        assert (1 - torch.exp(10 * learned)).tolist() == pytest.approx(reference.DECAYS[name], abs=1e-7)


def test_time_is_embedded_at_eleven_scales():
    for t in (0, 1, 7, 250, 123_456):
        wanted = [math.tanh(t / s - 1) for s in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)]
        assert time_embedding(torch.tensor(t)).tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", ["small_fc", "velo"])
def test_updates_follow_the_published_formula_for_three_steps(kind):
    init, make = {"small_fc": (init_small_fc_lopt, small_fc_lopt), "velo": (init_velo_mlp, velo_mlp)}[kind]
    network = tree.map(lambda w: w + 0.3 * leaf(w.shape, w.numel(), torch.float32), init(rng.generator(1)))
    network["decays"] = init(rng.generator(1))["decays"]
    params = {"matrix": leaf((4, 3), 2), "deep": {"vector": leaf((5,), 3), "number": leaf((), 4)}}
    transformation = make(network, learning_rate=0.5)
    state = transformation.init(params)
    slow = {name: reference.Leaf(tuple(p.shape)) for name, p in tree.named_leaves(params).items()}
    for i in range(3):
        grads = tree.map(lambda p: leaf(p.shape, 20 + p.numel()) * (0.1 + i), params)  # noqa: B023
        updates, state = transformation.update(grads, state, params)
        for name, p in tree.named_leaves(params).items():
            g = as_dict(tree.named_leaves(grads)[name])
            slow[name].see(g)
            steps = (
                reference.small_fc_step(network, slow[name], as_dict(p), g, i)
                if kind == "small_fc"
                else reference.velo_step(network, slow[name], as_dict(p), g)
            )
            wanted = -0.5 * torch.tensor(steps, dtype=torch.float64).reshape(p.shape)
            torch.testing.assert_close(tree.named_leaves(updates)[name], wanted, rtol=2e-5, atol=1e-9)
        params = apply_updates(params, updates)
    assert state[0].count.item() == 3
    assert current_learning_rate(state).item() == 0.5


def test_velo_reads_gradients_clipped_to_a_thousand():
    network, params = init_velo_mlp(rng.generator(1)), {"w": leaf((4, 3), 2)}
    transformation = velo_mlp(network)
    g = leaf((4, 3), 5)
    g[0, 0], g[1, 2] = 1e7, -1e30
    clipped = g.clone()
    clipped[0, 0], clipped[1, 2] = 1000.0, -1000.0
    update, _ = transformation.update({"w": g}, transformation.init(params), params)
    wanted, _ = transformation.update({"w": clipped}, transformation.init(params), params)
    assert torch.equal(update["w"], wanted["w"])
    assert torch.isfinite(update["w"]).all()


def test_decays_are_live():
    """A network whose decays were learned remembers by them."""
    shape, decays = (3, 4), {"momentum": (0.5, 0.7, 0.2), "second": (0.8,), "factored": (0.3, 0.6, 0.9)}
    network = init_small_fc_lopt(rng.generator(1))
    network["decays"] = {name: torch.log(1 - torch.tensor(values)) / 10 for name, values in decays.items()}
    p, g, slow = leaf(shape, 0), leaf(shape, 1), reference.Leaf(shape, decays)
    transformation = small_fc_lopt(network)
    state = transformation.init({"p": p})
    for i in range(2):
        updates, state = transformation.update({"p": g * (i + 1)}, state, {"p": p})
        slow.see(as_dict(g * (i + 1)))
    steps = reference.small_fc_step(network, slow, as_dict(p), as_dict(g * 2), 1)
    torch.testing.assert_close(
        updates["p"].reshape(-1), -torch.tensor(steps, dtype=torch.float64), rtol=1e-4, atol=1e-8
    )
