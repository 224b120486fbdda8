"""Learned optimizers as transformations: live weights, compiled and differentiated; leaves of any shape and dtype."""

from __future__ import annotations

import optree
import pytest
import torch

from titanfunc import rng, tree
from titanfunc.fullgraph import compile_function
from titanfunc.optim import apply_updates, current_learning_rate, warmup_cosine
from titanfunc.optim.learned import (
    init_small_fc_lopt,
    init_velo,
    init_velo_mlp,
    network_of,
    small_fc_lopt,
    velo,
    velo_mlp,
    with_network,
)
from titanfunc.train import compile_step

KINDS = {
    "small_fc": (init_small_fc_lopt, small_fc_lopt),
    "velo_mlp": (init_velo_mlp, velo_mlp),
    "velo": (lambda g: init_velo(g, bank=5, units=8), lambda network, **options: velo(network, 20, **options)),
}


def draws(seed):
    g = rng.generator(seed)
    return {
        "matrix": torch.randn(4, 6, generator=g),
        "deep": {
            "vector": torch.randn(5, generator=g),
            "cube": torch.randn(2, 3, 4, generator=g),
            "number": torch.randn((), generator=g),
        },
    }


@pytest.fixture(params=KINDS)
def kind(request):
    init, make = KINDS[request.param]
    network = init(rng.generator(0))
    return request.param, network, make


def loss_of(params):
    """Smooth, coupled, and with a gradient in every leaf."""
    total = sum((leaf**2).sum() for leaf in tree.leaves(params))
    return total + (params["matrix"].sum() * params["deep"]["vector"].sum() / 10).tanh() + params["deep"]["number"]


def train(transformation, params, steps):
    """The loss after some steps."""
    state = transformation.init(params)
    for _ in range(steps):
        grads, loss = torch.func.grad_and_value(loss_of)(params)
        updates, state = transformation.update(grads, state, params, loss=loss)
        params = apply_updates(params, updates)
    return loss_of(params)


def test_the_state_has_the_network_and_keeps_its_structure(kind):
    _, network, make = kind
    params = draws(1)
    transformation = make(network)
    state = transformation.init(params)
    assert tree.map(torch.equal, network_of(state), network) == tree.map(lambda w: True, network)
    assert not {w.data_ptr() for w in tree.leaves(network_of(state))} & {w.data_ptr() for w in tree.leaves(network)}
    updates, new = transformation.update(draws(2), state, params, loss=torch.tensor(1.0))
    assert tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), updates, params)
    shapes = [[(x.shape, x.dtype) for x in tree.leaves(s)] for s in (state, new)]
    assert shapes[0] == shapes[1]
    assert all(torch.isfinite(x).all() for x in tree.leaves(new))
    assert current_learning_rate(new) == 1.0
    assert network_of(((), 3)) is None


def test_a_replaced_network_moves_the_next_update(kind):
    _, network, make = kind
    transformation, params = make(network), draws(1)
    state = transformation.init(params)
    other = tree.map(lambda w: w + 0.1, network)
    first, _ = transformation.update(draws(2), state, params, loss=torch.tensor(1.0))
    second, _ = transformation.update(draws(2), with_network(state, other), params, loss=torch.tensor(1.0))
    fresh, _ = make(other).update(draws(2), make(other).init(params), params, loss=torch.tensor(1.0))
    for a, b, c in zip(*map(tree.leaves, (first, second, fresh)), strict=True):
        assert not torch.equal(a, b)
        if kind[0] != "velo":  # whose first hidden state is the network's own
            assert torch.equal(b, c)


def test_every_weight_has_a_gradient(kind):
    """Through three updates, so that decays and recurrent weights matter; and it is the finite difference."""
    name, network, make = kind
    # No unit is dead, and no decay so near to 1 that float32 would not feel it move.
    network = tree.map(lambda w: w + 0.02, {**network, "decays": tree.map(lambda w: w + 0.1, network["decays"])})

    def loss_after(net, params):
        return train(make(net, step_mult=0.01), params, 3)

    grads = torch.func.grad(loss_after)(network, draws(1))
    for path, grad in tree.named_leaves(grads).items():
        grad = grad[..., :2] if "velo" in name and "output" in path else grad  # VeLO's third enters no step
        assert torch.isfinite(grad).all(), path
        assert (grad != 0).any(), path
        assert (grad != 0).any(-1).all() or not path.endswith("input.weight"), path  # each feature counts
    flat, structure = optree.tree_flatten(network)
    params = tree.map(lambda p: p.to(torch.float64), draws(1))
    for number, grad in enumerate(tree.leaves(grads)):
        losses = []
        for sign in (1, -1):
            moved = flat[number] + sign * 1e-3 * grad / grad.norm()
            shifted = optree.tree_unflatten(structure, [*flat[:number], moved, *flat[number + 1 :]])
            losses.append(loss_after(shifted, params).item())
        wanted = grad.norm().item()
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(wanted, rel=0.1, abs=1e-3)


def test_compiled_is_eager(kind, graphs):
    """In one graph, for ten steps with a schedule: neither the count nor the rate compiles anew."""
    _, network, make = kind
    backend, seen = graphs
    transformation = make(network, learning_rate=warmup_cosine(1.0, 3, 20))

    def step(params, state):
        grads, loss = torch.func.grad_and_value(loss_of)(params)
        updates, state = transformation.update(grads, state, params, loss=loss)
        return apply_updates(params, updates), state

    compiled = compile_function(step, backend)
    ours = theirs = (draws(1), transformation.init(draws(1)))
    for _ in range(10):
        ours, theirs = compiled(*ours), step(*theirs)
    assert len(seen) == 1
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_donated_step_leaves_the_callers_network_alone(graphs):
    """``compile_step`` writes the new state into the old one's tensors; here the network itself is learned in it."""
    backend, seen = graphs
    network = init_velo_mlp(rng.generator(0))
    before, transformation = tree.map(torch.clone, network), velo_mlp(network)

    def step(state, batch):
        params, optimizer = state
        updates, optimizer = transformation.update(batch, optimizer, params)
        optimizer = with_network(optimizer, tree.map(lambda w: w * 0.9, network_of(optimizer)))
        return (apply_updates(params, updates), optimizer), {"norm": tree.global_norm(updates)}

    compiled = compile_step(step, backend, cuda_graph=False)
    ours, theirs = ((draws(1), transformation.init(draws(1))) for _ in range(2))
    for i in range(3):
        (ours, _), (theirs, _) = compiled(ours, draws(i)), step(theirs, draws(i))
    assert len(seen) == 1
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for old, now, learned in zip(*map(tree.leaves, (before, network, network_of(ours[1]))), strict=True):
        assert torch.equal(old, now)
        torch.testing.assert_close(learned, 0.9**3 * old)


def test_the_meta_gradient_compiles(graphs):
    backend, seen = graphs
    network = init_small_fc_lopt(rng.generator(0), hidden=6)
    # The transformation is made within: what is compiled has to be given every tensor.
    grad = torch.func.grad(lambda net, params: train(small_fc_lopt(net), params, 2))
    ours, theirs = compile_function(grad, backend)(network, draws(1)), grad(network, draws(1))
    assert len(seen) == 1
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_zero_gradients_leave_everything_finite(kind):
    """Values and gradients, as for a unit that never fires."""
    _, network, make = kind
    params = {"w": torch.zeros(3, 2), "b": torch.zeros(2)}
    transformation = make(network)

    def moved(net):
        state, new = with_network(transformation.init(params), net), params
        for _ in range(2):
            grads = tree.map(lambda p: p * 0, new)
            updates, state = transformation.update(grads, state, new, loss=torch.tensor(1.0))
            new = apply_updates(new, updates)
        return sum((p + 1).square().sum() for p in tree.leaves(new))

    grads, value = torch.func.grad_and_value(moved)(network)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in tree.leaves(grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_leaves_of_other_dtypes(kind, dtype):
    _, network, make = kind
    transformation = make(network)
    params, grads = (tree.map(lambda p: p.to(dtype), draws(seed)) for seed in (1, 2))
    state = transformation.init(params)
    updates, state = transformation.update(grads, state, params, loss=torch.tensor(1.0))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in tree.leaves(state[0].accumulators)} == {kept}
    assert {u.dtype for u in tree.leaves(updates)} == {kept}
    assert {p.dtype for p in tree.leaves(apply_updates(params, updates))} == {dtype}
    assert all(torch.isfinite(u).all() for u in tree.leaves(updates))


def test_untrained_steps_are_small():
    for name, bound in (("small_fc", 5e-3), ("velo_mlp", 1e-2)):
        init, make = KINDS[name]
        for seed in range(5):
            transformation, params = make(init(rng.generator(seed))), draws(1)
            state = transformation.init(params)
            for i in range(5):
                grads = tree.map(lambda g: g * 10.0 ** (i - 2), draws(3 + i))  # noqa: B023
                updates, state = transformation.update(grads, state, params)
                assert all(update.abs().max() < bound for update in tree.leaves(updates))
                assert updates["matrix"].abs().max() > 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: small_fc_lopt({}), r"network: wanted a nested dict with input.weight \[F, H\], got another"),
        (lambda n: small_fc_lopt(init_velo_mlp(n)), r"network: input.weight: wanted \[39, 4\], got \[30, 4\]"),
        (lambda n: velo_mlp(init_small_fc_lopt(n)), r"network: input.weight: wanted \[30, 32\], got \[39, 32\]"),
        (
            lambda n: small_fc_lopt({k: v for k, v in init_small_fc_lopt(n).items() if k != "decays"}),
            r"network: decays.momentum: wanted \[3\], got nothing",
        ),
        (
            lambda n: small_fc_lopt({**init_small_fc_lopt(n), "more": torch.zeros(2)}),
            r"network: more: wanted nothing, got \[2\]",
        ),
        (lambda n: small_fc_lopt(init_small_fc_lopt(n), learning_rate=-1.0), "learning_rate: wanted 0 or a positive"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(rng.generator(0))
