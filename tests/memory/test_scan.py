"""The chunked form against the definition, in float64."""

from __future__ import annotations

import pytest
import torch

import titanfunc as tf
from tests.memory.problems import KINDS, TOLERANCE, B, H, assert_same_tree, problem
from titanfunc import tree


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_scan_equals_the_recurrence(kind, read, clip, chunk_size):
    net, state, q, k, v, gates = problem(kind, tokens=11)
    options = {"read": read, "clip": clip}
    want, want_state = tf.memory.scan_recurrent(net, state, q, k, v, gates, chunk_size=chunk_size, **options)
    for aligned in (False, True):
        got, got_state = tf.memory.scan(net, state, q, k, v, gates, chunk_size, aligned=aligned, **options)
        torch.testing.assert_close(got, want, **TOLERANCE)
        assert_same_tree(got_state, want_state)


@pytest.mark.parametrize("kind", ["mlp2", "mlp3b", "module"])
@pytest.mark.parametrize("pieces", [(3, 8), (1,) * 11, (4, 4, 3), (5, 1, 5), (9, 2)])
def test_pieces_equal_one_pass(kind, pieces):
    net, state, q, k, v, gates = problem(kind, tokens=11)
    want, want_state = tf.memory.scan(net, state, q, k, v, gates, 4)
    outputs, start = [], 0
    for length in pieces:
        part = slice(start, start + length)
        inputs = (x[:, :, part] for x in (q, k, v))
        y, state = tf.memory.scan(net, state, *inputs, tf.memory.Gates(*(g[:, :, part] for g in gates)), 4)
        outputs.append(y)
        start += length
    torch.testing.assert_close(torch.cat(outputs, 2), want, **TOLERANCE)
    assert_same_tree(state, want_state)


@pytest.mark.parametrize("kind", ["mlp1", "mlp2", "mlp2b", "mlp3", "module"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_outer_gradients_equal_those_of_the_recurrence(kind, clip):
    net, state, q, k, v, gates = problem(kind, tokens=7)
    w0 = tree.map(lambda leaf: leaf[0], state.weights)

    def objective(scan):
        def loss(w0, q, k, v, gates):
            start = tf.memory.init_state(w0, B)
            y, end = scan(net, start, q, k, v, gates, chunk_size=3, clip=clip)
            return torch.sum(y**2) + sum(torch.sum(leaf**2) for leaf in tree.leaves(end[:2]))

        return torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(w0, q, k, v, gates)

    want, got = objective(tf.memory.scan_recurrent), objective(tf.memory.scan)
    assert all(leaf.abs().max() > 0 for leaf in tree.leaves(want))
    assert_same_tree(got, want)


@pytest.mark.parametrize("kind", ["mlp1", "mlp2b", "mlp3"])
def test_second_derivatives_equal_those_of_the_recurrence(kind):
    net, state, q, k, v, gates = problem(kind, tokens=5)

    def curvature(scan):
        def loss(k, v):
            return torch.sum(scan(net, state, q, k, v, gates, chunk_size=2, clip=0.4)[0] ** 2)

        def norm(k, v):
            return torch.sum(torch.func.grad(loss)(k, v) ** 2)

        return torch.func.grad(norm, argnums=(0, 1))(k, v)

    assert_same_tree(curvature(tf.memory.scan), curvature(tf.memory.scan_recurrent))


@pytest.mark.parametrize("clip", [None, 0.4])
def test_scan_maps_over_an_extra_axis(clip):
    problems = [problem("mlp2", tokens=6, seed=seed) for seed in range(3)]
    net = problems[0][0]
    stacked = [
        tree.map(lambda *leaves: torch.stack(leaves), *parts) for parts in zip(*[p[1:] for p in problems], strict=True)
    ]

    def gradient(state, q, k, v, gates):
        return torch.func.grad(lambda k: torch.sum(tf.memory.scan(net, state, q, k, v, gates, 4, clip=clip)[0] ** 2))(k)

    mapped = torch.func.vmap(gradient)(*stacked)
    for got, (_, *inputs) in zip(mapped, problems, strict=True):
        torch.testing.assert_close(got, gradient(*inputs), **TOLERANCE)


@pytest.mark.parametrize("kind", ["mlp2", "module"])
def test_a_token_changes_nothing_before_it_and_a_sample_no_other(kind):
    net, state, q, k, v, gates = problem(kind, tokens=11)
    before, _ = tf.memory.scan(net, state, q, k, v, gates, 4)
    changed_k, changed_v, changed_q = k.clone(), v.clone(), q.clone()
    for x in (changed_k, changed_v, changed_q):
        x[1, :, 6] += 1.0
    after, _ = tf.memory.scan(net, state, changed_q, changed_k, changed_v, gates, 4)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1, :, :6], before[1, :, :6])
    assert not torch.isclose(after[1, :, 6:], before[1, :, 6:]).all(-1).any()


@pytest.mark.parametrize("kind", ["mlp2", "mlp3b", "module"])
@pytest.mark.parametrize("bad", ["k", "v", "inner_lr", "forget", "momentum_decay"])
def test_a_write_that_is_not_finite_is_dropped(kind, bad):
    net, state, q, k, v, gates = problem(kind, tokens=8)
    dropped = gates._replace(inner_lr=gates.inner_lr.clone())
    dropped.inner_lr[0, 1, 3] = 0.0
    if bad in ("forget", "momentum_decay"):  # such a gate is left out as well: no forgetting, no decay
        dropped = dropped._replace(**{bad: getattr(gates, bad).clone()})
        getattr(dropped, bad)[0, 1, 3] = 0.0 if bad == "forget" else 1.0
    want, want_state = tf.memory.scan(net, state, q, k, v, dropped, 4)
    if bad in gates._fields:
        getattr(gates, bad)[0, 1, 3] = float("nan")
    else:
        (k if bad == "k" else v)[0, 1, 3, 0] = float("inf")
    for scan in (tf.memory.scan, tf.memory.scan_recurrent):
        got, got_state = scan(net, state, q, k, v, gates, chunk_size=4)
        torch.testing.assert_close(got, want, **TOLERANCE)
        assert_same_tree(got_state, want_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_many_tokens_stay_finite_with_a_clip(dtype, chunk_size):
    net = tf.memory.mlp(8, 16)
    g = torch.Generator().manual_seed(0)
    state = tf.memory.init_state(net.init(g, heads=1), 1)
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 1, 65_536, 8, generator=g), dim=-1) for _ in range(3))
    gates = tf.memory.Gates(*(torch.full((1, 1, 65_536), value) for value in (0.01, 0.9, 0.05)))
    y, state = tf.memory.scan(net, state, *(x.to(dtype) for x in (q, k, v)), gates, chunk_size, clip=1.0, aligned=True)
    assert torch.isfinite(y).all()
    # The bound of the clip: |W_t| <= |W_0| + theta c / (alpha (1 - eta)).
    assert all(leaf.norm() <= 10 + 0.05 / (0.01 * 0.1) for leaf in tree.leaves(state.weights))


def test_bad_arguments_are_named():
    net, state, q, k, v, gates = problem("mlp2", tokens=5)
    cases = [
        ((net, state, q[:, :, :3], k, v, gates), {}, "q: wanted the shape of k"),
        ((net, state, q, k, v, gates._replace(forget=gates.forget[:, :1])), {}, "gates.forget"),
        (
            (net, state, q, k, v, gates._replace(inner_lr=gates.inner_lr.bfloat16())),
            {},
            "gates.inner_lr: wanted float32",
        ),
        ((net, state, q[:1], k[:1], v[:1], tf.memory.Gates(*(x[:1] for x in gates))), {}, "state.weights.w0"),
        ((net, state, q[..., :2], k[..., :2], v[..., :2], gates), {}, "k: wanted head size 4"),
        (
            (net, state, q[:, :, :0], k[:, :, :0], v[:, :, :0], tf.memory.Gates(*(x[:, :, :0] for x in gates))),
            {},
            "one token",
        ),
        ((net, state, q, k, v, gates), {"read": "sideways"}, "read: wanted 'inclusive' or 'exclusive'"),
        ((net, state, q, k, v, gates), {"chunk_size": 0}, "chunk_size: wanted at least 1"),
        ((net, state, q, k, v, gates), {"clip": -0.5}, "clip: wanted None or a positive norm"),
    ]
    for arguments, options, message in cases:
        for scan in (tf.memory.scan, tf.memory.scan_recurrent):
            with pytest.raises(ValueError, match=message):
                scan(*arguments, **options)
    assert state.position.shape == (B, H)
