"""Meta-gradients against finite differences, each other and a closed form."""

from __future__ import annotations

import pytest
import torch

import titanfunc as tf
from tests.optim.nested.problems import KINDS, advance, base, batch, draw, objective, spy, start
from titanfunc import tree
from titanfunc.optim.nested.meta import implicit

OPTIONS = {"relative": False, "momentum_hidden_dim": 3, "controller_hidden_dim": 3}


def inner(left, right):
    return sum((a * b).sum() for a, b in zip(tree.leaves(left), tree.leaves(right), strict=True)).item()


def assert_directions(gradient, outcome, phi):
    """Along every leaf of phi, the gradient is the slope of the outcome."""
    for i, leaf in enumerate(tree.leaves(phi)):
        direction = [torch.zeros_like(each) for each in tree.leaves(phi)]
        direction[i] = draw(*leaf.shape, seed=300 + i)
        direction = tree.with_leaves(phi, direction)
        step = 1e-5
        ahead, behind = (outcome(tree.map(lambda p, d, s=s: p + s * d, phi, direction)) for s in (step, -step))
        slope = ((ahead - behind) / (2 * step)).item()
        assert slope != 0
        assert inner(gradient, direction) == pytest.approx(slope, rel=1e-5, abs=1e-11), i


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("momentum", KINDS)
def test_three_unrolled_steps_equal_finite_differences(monkeypatch, momentum, name):
    seen = spy(monkeypatch)
    options = {**OPTIONS, "momentum": momentum, "max_grad_norm": 0.5}
    tx = tf.optim.nested(base(name), meta_lr=1e-9, unroll="exact", k_unroll=3, **options)
    still = tf.optim.nested(base(name), meta_lr=0, **options)
    params, state = start(tx)
    for i in range(2):
        params, state = advance(tx, params, state, i)
    assert not seen  # without held-out batches nothing is learned
    later = [batch(i) for i in (3, 4, 5)]
    loss = objective(params, batch(2))
    grads = torch.func.grad(objective)(params, batch(2))
    tx.update(grads, state, params, loss=loss, held_out=tf.optim.HeldOut(objective, later))
    ((gradient, value, live),) = seen
    assert live

    def outcome(phi):
        theta, now = params, state._replace(phi=phi, record=(), meta=())
        for i in (2, 3, 4):
            theta, now = advance(still, theta, now, i)
        return objective(theta, batch(5))

    torch.testing.assert_close(value, outcome(state.phi), rtol=1e-12, atol=0)
    assert_directions(gradient, outcome, state.phi)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("momentum", KINDS)
@pytest.mark.parametrize("relative", [True, False])
def test_the_online_form_is_one_unrolled_step_of_first_order(monkeypatch, relative, momentum, name):
    options = {**OPTIONS, "relative": relative, "momentum": momentum, "normalize": False}
    found = [judged_by_the_third_batch(monkeypatch, base(name), u, **options) for u in ("first_order", "online")]
    assert_the_same(*found)


def test_the_online_form_judges_multipliers_as_they_faded(monkeypatch):
    falling = tf.optim.adamw(lambda count: 0.05 / (1.0 + count), 0.9, 0.95)
    options = {**OPTIONS, "normalize": False}
    found = [
        judged_by_the_third_batch(monkeypatch, falling, u, anneal=True, **options) for u in ("first_order", "online")
    ]
    assert_the_same(*found)
    plain = judged_by_the_third_batch(monkeypatch, falling, "online", **options)
    assert (tree.global_norm(plain) / tree.global_norm(found[1]) - 1).abs() > 0.5


def judged_by_the_third_batch(monkeypatch, optimizer, unroll, **options):
    """The meta-gradient when batch 2 has moved the parameters and batch 3 judges."""
    seen = spy(monkeypatch)
    tx = tf.optim.nested(optimizer, meta_lr=1e-12, unroll=unroll, **options)
    params, state = start(tx)
    for i in range(2):
        params, state = advance(tx, params, state, i)
    seen.clear()
    if unroll == "online":
        params, state = advance(tx, params, state, 2)
        seen.clear()
        advance(tx, params, state, 3)
    else:
        advance(tx, params, state, 2, held_out=tf.optim.HeldOut(objective, [batch(3)]))
    ((gradient, _, live),) = seen
    assert live
    return gradient


def assert_the_same(first, second):
    for (leaf, a), b in zip(tree.named_leaves(first).items(), tree.leaves(second), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-12, msg=lambda m, leaf=leaf: f"{leaf}: {m}")
        assert a.abs().max() > 0, leaf


def test_three_unrolled_steps_of_first_order_take_gradients_as_constants(monkeypatch):
    seen = spy(monkeypatch)
    tx = tf.optim.nested(base("adamw"), meta_lr=1e-9, unroll="first_order", k_unroll=3, **OPTIONS)
    still = tf.optim.nested(base("adamw"), meta_lr=0, **OPTIONS)
    params, state = start(tx)
    params, state = advance(tx, params, state, 0)
    advance(tx, params, state, 1, held_out=tf.optim.HeldOut(objective, [batch(i) for i in (2, 3, 4)]))
    gradient = seen[-1][0]

    def outcome(phi, constants=None):
        """Of steps with these gradients and losses; those found on the way where none are given."""
        theta, now, found = params, state._replace(phi=phi, record=(), meta=()), []
        for i in (1, 2, 3):
            slopes = constants[i - 1] if constants else torch.func.grad_and_value(objective)(theta, batch(i))
            found.append(slopes)
            updates, now = still.update(slopes[0], now, theta, loss=slopes[1])
            theta = tf.optim.apply_updates(theta, updates)
        return objective(theta, batch(4)), found

    constants = outcome(state.phi)[1]
    assert_directions(gradient, lambda phi: outcome(phi, constants)[0], state.phi)
    with pytest.raises(AssertionError):  # not the whole derivative
        assert_directions(gradient, lambda phi: outcome(phi)[0], state.phi)


def test_the_implicit_mode_is_a_neumann_series_at_its_own_step(monkeypatch):
    seen = spy(monkeypatch)
    tx = tf.optim.nested(base("adamw"), mode="implicit", meta_lr=1e-9, neumann_terms=3, **OPTIONS)
    still = tf.optim.nested(base("adamw"), meta_lr=0, **OPTIONS)
    params, state = start(tx)
    params, state = advance(tx, params, state, 0)
    advance(tx, params, state, 1, held_out=tf.optim.HeldOut(objective, [batch(2), batch(3)]))

    def settle(theta, phi):
        now = state._replace(phi=phi, record=(), meta=())
        slopes = torch.func.grad_and_value(objective)(theta, batch(2))
        return tf.optim.apply_updates(theta, still.update(slopes[0], now, theta, loss=slopes[1])[0])

    pull = torch.func.vjp(settle, params, state.phi)[1]
    term = torch.func.grad(objective)(params, batch(3))
    total = term
    for _ in range(2):
        term = pull(term)[0]
        total = tree.add(total, term)
    for got, want in zip(tree.leaves(seen[-1][0]), tree.leaves(pull(total)[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


def test_normalizing_asks_for_cosines(monkeypatch):
    found = {}
    for normalize in (True, False):
        seen = spy(monkeypatch)
        tx = tf.optim.nested(base("adamw"), meta_lr=1e-12, relative=False, normalize=normalize)
        params, state = start(tx, stir=0.0)
        first, state = advance(tx, params, state, 0)
        advance(tx, first, state, 1)
        found[normalize] = seen[-1][0]["controller"]["offset"]
    moved = tree.map(torch.sub, first, params)
    grads = torch.func.grad(objective)(first, batch(1))
    parts = [moved["blocks"]["feed_forward"]["up"], grads["blocks"]["feed_forward"]["up"]]
    dots = [(u * g).sum() for u, g in zip(*parts, strict=True)]
    cosines = [(u * g).sum() / u.norm() / g.norm() for u, g in zip(*parts, strict=True)]
    torch.testing.assert_close(found[False][:2], torch.stack(dots).double())
    torch.testing.assert_close(found[True][:2], torch.stack(cosines).double())


@pytest.mark.parametrize("momentum", KINDS)
@pytest.mark.parametrize("mode", ["simple", "explicit", "implicit"])
def test_every_weight_of_the_networks_learns(monkeypatch, mode, momentum):
    seen = spy(monkeypatch)
    tx = tf.optim.nested(base("adamw"), mode=mode, meta_lr=1e-2, momentum=momentum, neumann_terms=3)
    params, state = start(tx, stir=0.0)  # as they are when new
    extra = {"held_out": tf.optim.HeldOut(objective, [batch(7), batch(8)])} if mode == "implicit" else {}
    for i in range(4):
        params, state = advance(tx, params, state, i, **extra)
    for name, leaf in tree.named_leaves(seen[-1][0]).items():
        assert torch.isfinite(leaf).all() and leaf.abs().max() > 0, name
    assert state.meta.steps == (4 if mode == "implicit" else 3)


def test_the_implicit_gradient_of_ridge_regression_is_the_closed_form():
    x, y, xv, yv = draw(20, 4, seed=1), draw(20, seed=2), draw(15, 4, seed=3), draw(15, seed=4)
    phi = {"log_decay": 0.3 * draw(4, seed=5)}

    def solve(phi):
        return torch.linalg.solve(x.mT @ x / 20 + torch.diag(torch.exp(phi["log_decay"])), x.mT @ y / 20)

    def step(theta, phi):
        slope = x.mT @ (x @ theta["w"] - y) / 20 + torch.exp(phi["log_decay"]) * theta["w"]
        return {"w": theta["w"] - 0.2 * slope}

    def judge(theta):
        return ((xv @ theta["w"] - yv) ** 2).mean()

    gradient, value = implicit(step, phi, {"w": solve(phi)}, judge, terms=400)
    want, exact = torch.func.grad_and_value(lambda phi: judge({"w": solve(phi)}))(phi)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient["log_decay"], want["log_decay"], rtol=1e-9, atol=1e-12)


def test_mistakes_are_named():
    tx = tf.optim.nested(base("adamw"), unroll="exact", k_unroll=2)
    params, state = start(tx)
    with pytest.raises(ValueError, match="held_out: wanted 2 batches, got 1"):
        advance(tx, params, state, 0, held_out=tf.optim.HeldOut(objective, [batch(1)]))
