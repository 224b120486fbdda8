"""Groups, momentum networks and gradient levels, each against its formula."""

from __future__ import annotations

import math

import pytest
import torch

import titanfunc as tf
from tests.optim.nested.problems import draw, parameters
from titanfunc import rng, tree
from titanfunc.models.roles import stacked
from titanfunc.optim.nested import momentum
from titanfunc.optim.nested.levels import combine, init_levels
from titanfunc.optim.nested.networks import apply_mlp, log_and_sign


def like(params, seed):
    leaves = [draw(*leaf.shape, seed=seed + i) for i, leaf in enumerate(tree.leaves(params))]
    return tree.with_leaves(params, leaves)


def test_groups_are_a_role_and_a_layer():
    params = parameters()
    layout = tf.optim.by_role(params)
    assert dict(layout.families) == {"feed_forward": 2, "norms_and_gates": 2, "embedding": 0, "head": 0}
    sums = layout.pack(layout.sums(params, params))
    up, norm = params["blocks"]["feed_forward"]["up"], params["blocks"]["norm"]
    torch.testing.assert_close(sums["feed_forward"], (up**2).sum((1, 2)))
    torch.testing.assert_close(sums["norms_and_gates"], (norm**2).sum(1))
    torch.testing.assert_close(sums["head"], (params["head"] ** 2).sum()[None])
    factors = torch.arange(1.0, 7.0, dtype=torch.float64)
    scaled, by_name = layout.scale(params, factors), layout.pack(factors)
    for i in range(2):
        torch.testing.assert_close(scaled["blocks"]["norm"][i], by_name["norms_and_gates"][i] * norm[i])
    torch.testing.assert_close(scaled["embedding"], by_name["embedding"] * params["embedding"])
    assert layout.weight(torch.device("cpu")).sum().item() == pytest.approx(1)
    depth = layout.pack(layout.depth(torch.device("cpu")))
    assert depth["embedding"] == 0 and depth["head"] == 1
    torch.testing.assert_close(depth["feed_forward"], torch.tensor([1 / 3, 2 / 3]))


def test_a_real_models_groups():
    model = tf.models.build(tf.models.preset("mac_tiny", layers=3, tie_embeddings=False))
    layout = tf.optim.by_role(model.init(rng.generator(0)))
    assert set(layout.names) == {
        "attention", "embedding", "feed_forward", "head", "memory", "norms_and_gates", "outer_norms_and_gates",
    }  # fmt: skip
    assert sum(max(layers, 1) for _, layers in layout.families) == 4 * 3 + 3
    # Parameters of no model: a group for each of their parts.
    assert tf.optim.by_role({"w": torch.ones(2, 2), "b": torch.ones(2)}).names == ["b", "w"]


def test_log_and_sign_is_andrychowiczs():
    x = torch.tensor([2.0, -0.5, 1e-6, -1e-6, 0.0], dtype=torch.float64)
    want = [
        (math.log(2) / 10, 1.0), (math.log(0.5) / 10, -1.0), (-1.0, math.exp(10) * 1e-6), (-1.0, -math.exp(10) * 1e-6),
        (-1.0, 0.0),
    ]  # fmt: skip
    torch.testing.assert_close(log_and_sign(x), torch.tensor(want, dtype=torch.float64))


def seen(params):
    return momentum.Seen(like(params, 100), like(params, 200), torch.tensor(0.3, dtype=torch.float64), ())


def network(kind, outputs, features, preprocess=True):
    made = momentum.init_network(rng.generator(0), kind, 5, 2, preprocess)
    made = {name: leaf.double() for name, leaf in made.items()}
    return {**made, "w1": draw(5, outputs, seed=1), "b1": draw(outputs, seed=2), "w0": draw(features, 5, seed=3)}


def test_l2_regression_scales_shifts_and_damps_every_tensor():
    params = parameters()
    updates, s = like(params, 0), seen(params)
    made = network("l2_regression", 3, 9)
    got = momentum.correct("l2_regression", made, updates, s, params, True)

    def rms(x):
        return (x**2).mean().sqrt()

    def one(u, g, m, place):
        cos = [(a / rms(a) * b / rms(b)).mean() for a, b in ((u, g), (u, m), (g, m))]
        rows = [rms(x).log() for x in (u, g, m)] + cos + [torch.log1p(rms(g - m) / rms(g)), place, s.trend]
        rows = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in rows])
        scale, shift, damping = 0.5 * torch.tanh(apply_mlp(made, 0.1 * rows))
        return (1 + scale) * u + (shift - damping * cos[1]) * rms(u) * m / rms(m)

    for path in (("embedding",), ("head",)):
        u, g, m, have = (t[path[0]] for t in (updates, s.grads, s.mean, got))
        torch.testing.assert_close(have, one(u, g, m, 0.5))
    u, g, m, have = (t["blocks"]["feed_forward"]["up"] for t in (updates, s.grads, s.mean, got))
    for i in range(2):
        torch.testing.assert_close(have[i], one(u[i], g[i], m[i], (i + 1) / 3))


@pytest.mark.parametrize("preprocess", [True, False])
def test_direct_update_goes_element_by_element(preprocess):
    params = parameters()
    updates, s = like(params, 0), seen(params)
    made = network("direct_update", 1, 4 if preprocess else 2, preprocess)
    got = momentum.correct("direct_update", made, updates, s, params, preprocess)["head"]
    u, g, m = (t["head"] for t in (updates, s.grads, s.mean))
    size = (u**2).mean().sqrt()
    g, m = g / (g**2).mean().sqrt(), m / (m**2).mean().sqrt()
    for i, j in ((0, 0), (3, 2)):
        features = [log_and_sign(x[i, j]) if preprocess else x[i, j].reshape(1) for x in (g, m)]
        torch.testing.assert_close(got[i, j], u[i, j] + size * apply_mlp(made, torch.cat(features)).squeeze())


def test_deep_momentum_learns_to_foretell():
    params = parameters()
    memories = momentum.init_memories(rng.generator(0), params, 8)
    grads = like(params, 0)

    def error(memories):
        """Against a gradient that is always the negative of the one before."""
        foretold = momentum._foretell(memories, tree.scale(grads, -1), grads, stacked(params))
        want = grads["head"] / (grads["head"] ** 2).mean().sqrt()
        return ((foretold["head"] - want) ** 2).mean().item()

    first = error(memories)
    for _ in range(60):
        memories = momentum.learn(memories, grads, tree.scale(grads, -1), grads)
    assert first == pytest.approx(1.0) and error(memories) < 0.3
    foretold = momentum._foretell(memories, grads, grads, stacked(params))
    updates, gain = like(params, 9), torch.tensor(0.2, dtype=torch.float64)
    s = seen(params)._replace(grads=grads, mean=grads, memories=memories)
    got = momentum.correct("deep_momentum", {"gain": gain}, updates, s, params, True)["head"]
    want = updates["head"] - 0.2 * (updates["head"] ** 2).mean().sqrt() * foretold["head"]
    torch.testing.assert_close(got, want)


def test_levels_fire_at_their_periods_and_weigh_what_their_share_says():
    params = {"w": draw(4, 3, seed=0)}
    levels = init_levels(params, (1, 3))
    fast = slow = torch.zeros(4, 3, dtype=torch.float64)
    total = torch.zeros(4, 3, dtype=torch.float64)
    for i in range(1, 8):
        grads = {"w": 10.0 ** (i % 3) * draw(4, 3, seed=i)}
        got, levels = combine(grads, levels, (1, 3))
        g = grads["w"]
        fast, total = 0.9 * fast + 0.1 * g, total + g
        if i % 3 == 0:
            slow, total = 0.9 * slow + 0.1 * total / 3, torch.zeros_like(total)
        want = g.norm() * fast / fast.norm()
        if i >= 3:
            want = 0.5 * (want + g.norm() * slow / slow.norm())
        torch.testing.assert_close(got["w"], want)
    assert [level.fired.item() for level in levels] == [7, 2] and levels[0].total == ()


def test_a_relative_correction_turns_and_keeps_every_tensors_length():
    params = parameters()
    old, new = like(params, 0), like(params, 50)
    kept = momentum.keep_length(new, old, params)
    for i in range(2):
        a, b, c = (t["blocks"]["feed_forward"]["up"][i] for t in (old, new, kept))
        torch.testing.assert_close(c, b * a.norm() / b.norm())
    torch.testing.assert_close(kept["head"].norm(), old["head"].norm())
    tx = tf.optim.nested(tf.optim.adamw(0.1), meta_lr=0.05, momentum="l2_regression")
    plain = tf.optim.adamw(0.1)
    state, base_state = tx.init(params), plain.init(params)
    for i in range(6):
        grads = like(params, 100 * i)
        moved, state = tx.update(grads, state, params, loss=torch.tensor(1.0))
        base, base_state = plain.update(grads, base_state, params)
    layout = tf.optim.by_role(params)
    sizes = [layout.pack(layout.sums(each, each).sqrt()) for each in (moved, base)]
    for name, factor in state.multipliers.items():
        torch.testing.assert_close(sizes[0][name], factor.double() * sizes[1][name])
    assert (moved["head"] / base["head"]).std() > 1e-3  # turned
