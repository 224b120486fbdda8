"""Every write rule: the chunked form against the definition, in float64, at every depth; and the definition by hand."""

from __future__ import annotations

import pytest
import torch

import titanfunc as tf
from tests.memory.problems import KINDS, TOLERANCE, B, D, H, assert_same_tree, problem
from titanfunc import tree
from titanfunc.memory import WriteRule
from titanfunc.ops.objective import curvature, objective_of, slope, value
from titanfunc.ops.orthogonal import orthogonalize

RULES = {
    "mean": WriteRule(loss="mean"),
    "huber": WriteRule(objective="huber", parameter=0.3),
    "lp": WriteRule(objective="lp"),
    "lp4": WriteRule(objective="lp", parameter=4.0, loss="mean"),
    "chunk": WriteRule(write="chunk"),
    "chunk_clip": WriteRule(write="chunk", objective="huber", parameter=0.3, chunk_clip=0.5),
    "muon": WriteRule(write="chunk", optimizer="muon"),
    "first_order": WriteRule(outer_gradient="first_order"),
    "chunk_first_order": WriteRule(write="chunk", outer_gradient="first_order"),
    "none": WriteRule(outer_gradient="none"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_scan_equals_the_recurrence(kind, rule, chunk_size):
    net, state, q, k, v, gates = problem(kind, tokens=11)
    for read, clip in (("inclusive", 0.5), ("exclusive", None)):
        options = {"read": read, "clip": clip, "rule": rule}
        want, want_state = tf.memory.scan_recurrent(net, state, q, k, v, gates, chunk_size=chunk_size, **options)
        for aligned in (False, True):
            got, got_state = tf.memory.scan(net, state, q, k, v, gates, chunk_size, aligned=aligned, **options)
            torch.testing.assert_close(got, want, **TOLERANCE)
            assert_same_tree(got_state, want_state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_outer_gradients_equal_those_of_the_recurrence(kind, rule):
    net, state, q, k, v, gates = problem(kind, tokens=7)
    w0 = tree.map(lambda leaf: leaf[0], state.weights)

    def objective(scan):
        def loss(w0, q, k, v, gates):
            start = tf.memory.init_state(w0, B, rule)
            y, end = scan(net, start, q, k, v, gates, chunk_size=3, clip=0.3, rule=rule)
            return torch.sum(y**2) + sum(torch.sum(leaf**2) for leaf in tree.leaves(end[:2]))

        return torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(w0, q, k, v, gates)

    want, got = objective(tf.memory.scan_recurrent), objective(tf.memory.scan)
    still = {"first_order": (2, 3), "chunk_first_order": (2, 3), "none": (0, 2, 3, 4)}
    zero = next((still[name] for name in still if RULES[name] is rule), ())
    for place, part in enumerate(want):
        assert all((leaf.abs().max() > 0) == (place not in zero) for leaf in tree.leaves(part))
    assert_same_tree(got, want)


@pytest.mark.parametrize("rule", ["huber", "lp", "first_order"])
@pytest.mark.parametrize("kind", ["mlp1", "mlp3b"])
def test_second_derivatives_equal_those_of_the_recurrence(kind, rule):
    net, state, q, k, v, gates = problem(kind, tokens=5)

    def second(scan):
        def loss(q, gates):
            return torch.sum(scan(net, state, q, k, v, gates, chunk_size=2, clip=0.4, rule=RULES[rule])[0] ** 2)

        def norm(q, gates):
            return sum(torch.sum(leaf**2) for leaf in tree.leaves(torch.func.grad(loss, argnums=(0, 1))(q, gates)))

        return torch.func.grad(norm, argnums=(0, 1))(q, gates)

    assert_same_tree(second(tf.memory.scan), second(tf.memory.scan_recurrent))


@pytest.mark.parametrize("kind", ["mlp2", "module"])
@pytest.mark.parametrize("rule", ["chunk", "muon"])
@pytest.mark.parametrize("pieces", [(3, 8), (1,) * 11, (4, 4, 3), (9, 2)])
def test_pieces_equal_one_pass(kind, rule, pieces):
    net, state, q, k, v, gates = problem(kind, tokens=11)
    want, want_state = tf.memory.scan(net, state, q, k, v, gates, 4, rule=RULES[rule])
    outputs, start = [], 0
    for length in pieces:
        inputs = (x[:, :, start : start + length] for x in (q, k, v))
        part = tf.memory.Gates(*(g[:, :, start : start + length] for g in gates))
        y, state = tf.memory.scan(net, state, *inputs, part, 4, rule=RULES[rule])
        outputs.append(y)
        start += length
    torch.testing.assert_close(torch.cat(outputs, 2), want, **TOLERANCE)
    assert_same_tree(state, want_state)


@pytest.mark.parametrize("optimizer", ["gradient", "muon"])
def test_a_chunks_write_by_hand(optimizer):
    net, state, q, k, v, gates = problem("mlp2", tokens=4)
    rule = WriteRule(write="chunk", objective="huber", parameter=0.3, chunk_clip=0.7, optimizer=optimizer)
    y, after = tf.memory.scan(net, state, q, k, v, gates, 4, rule=rule)
    for b in range(B):
        for h in range(H):
            w, s = ({name: leaf[b, h] for name, leaf in part.items()} for part in state[:2])
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in w.items()}
            r = net.apply(leaves, k[b, h]) - v[b, h]
            loss = torch.nn.functional.huber_loss(r, torch.zeros_like(r), reduction="sum", delta=0.3)
            grads = dict(zip(leaves, torch.autograd.grad(2 * loss, list(leaves.values())), strict=True))
            norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
            assert norm > 0.7
            alpha, eta, theta = (gate[b, h].mean() for gate in gates)
            for name, leaf in w.items():
                g = grads[name] * 0.7 / norm
                if optimizer == "muon":
                    pace = eta * s[name] - g
                    want = (1 - alpha) * leaf + theta * orthogonalize(pace)
                else:
                    pace = eta * s[name] - theta * g
                    want = (1 - alpha) * leaf + pace
                torch.testing.assert_close(after.weights[name][b, h], want, **TOLERANCE)
                torch.testing.assert_close(after.momentum[name][b, h], pace, **TOLERANCE)
            torch.testing.assert_close(y[b, h, :3], net.apply(w, q[b, h, :3]), **TOLERANCE)
            new = {name: leaf[b, h] for name, leaf in after.weights.items()}
            torch.testing.assert_close(y[b, h, 3], net.apply(new, q[b, h, 3]), **TOLERANCE)


@pytest.mark.parametrize("kind", ["mlp2", "module"])
@pytest.mark.parametrize("rule", ["chunk", "muon"])
@pytest.mark.parametrize("bad", ["k", "inner_lr", "forget"])
def test_a_write_that_is_not_finite_is_dropped_from_its_chunk(kind, rule, bad):
    net, state, q, k, v, gates = problem(kind, tokens=8)
    if bad == "k":
        k[0, 1, 3, 0] = float("inf")
    else:
        getattr(gates, bad)[0, 1, 3] = float("nan")
    want, want_state = tf.memory.scan_recurrent(net, state, q, k, v, gates, chunk_size=4, rule=RULES[rule])
    got, got_state = tf.memory.scan(net, state, q, k, v, gates, 4, rule=RULES[rule])
    assert torch.isfinite(got).all() and all(torch.isfinite(x).all() for x in tree.leaves(got_state.weights))
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert_same_tree(got_state, want_state)


@pytest.mark.parametrize("rule", ["huber", "lp", "lp4", "mean"])
def test_an_objectives_derivatives(rule):
    objective = objective_of(RULES[rule], D)
    r = torch.linspace(-2, 2, 41, dtype=torch.float64) + 0.013
    first = torch.func.grad(lambda r: value(objective, r).sum())
    torch.testing.assert_close(slope(objective, r), first(r), **TOLERANCE)
    second = torch.func.grad(lambda r: first(r).sum())
    torch.testing.assert_close(curvature(objective, r), second(r), **TOLERANCE)


def test_orthogonalized_matrices_have_singular_values_near_one():
    g = torch.Generator().manual_seed(0)
    for shape in [(3, 5, 8), (2, 9, 4), (6, 6)]:
        x = torch.randn(*shape, generator=g)
        values = torch.linalg.svdvals(orthogonalize(x))
        assert values.max() < 1.3 and values.mean() > 0.7
        torch.testing.assert_close(orthogonalize(100 * x), orthogonalize(x), rtol=1e-4, atol=1e-5)
    zero = torch.zeros(4, 4, requires_grad=True)
    orthogonalize(zero).sum().backward()
    assert torch.equal(orthogonalize(zero), torch.zeros(4, 4)) and torch.isfinite(zero.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"write": "line"}, "rule.write: wanted one of token, chunk"),
        ({"objective": "l7"}, "rule.objective: wanted one of l2, huber, lp"),
        ({"parameter": 1.0}, "rule.parameter: wanted 0"),
        ({"objective": "lp", "parameter": 2.5}, "rule.parameter: wanted p of at least 3"),
        ({"chunk_clip": 1.0}, "rule.chunk_clip: wanted 0"),
        ({"optimizer": "muon"}, "rule.optimizer: wanted gradient"),
        ({"outer_gradient": "some"}, "rule.outer_gradient: wanted one of"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WriteRule(**options)
