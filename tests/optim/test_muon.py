"""Muon against torch's own, its orthogonalisation against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

import titanfunc as tf
from titanfunc import tree
from titanfunc.ops.orthogonal import orthogonalize


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hidden(i: int):
    """Matrices of two shapes, one the other's transpose."""
    return {"blocks": {"attention": {"wq": draw(3, 8, 12, seed=i)}, "memory": {"wk": draw(3, 12, 8, seed=i + 50)}}}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "theirs"), [("spectral", "original"), ("adam", "match_rms_adamw")])
def test_muon_follows_torch_step_by_step(nesterov, scale, theirs):
    wide = {"nesterov": nesterov, "scale": scale, "weight_decay": 0.1}
    runs = [(tf.optim.muon(0.05, **wide), hidden(0)), (tf.optim.muon(0.05, dtype=None, **wide), double(hidden(0)))]
    states = [tx.init(params) for tx, params in runs]
    twins = [row.clone().requires_grad_() for leaf in tree.leaves(hidden(0)) for row in leaf]
    other = torch.optim.Muon(twins, lr=0.05, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs)
    for i in range(1, 7):
        grads = hidden(10 * i)
        for twin, g in zip(twins, [row for leaf in tree.leaves(grads) for row in leaf], strict=True):
            twin.grad = g.clone()
        other.step()
        for r, (tx, params) in enumerate(runs):
            updates, states[r] = tx.update(grads if r == 0 else double(grads), states[r], params)
            runs[r] = (tx, tf.optim.apply_updates(params, updates))
        ours, exact, began = (flat(each) for each in (runs[0][1], runs[1][1], hidden(0)))
        want = torch.cat([twin.detach().flatten() for twin in twins]).double()
        # Both orthogonalise in bfloat16, whose rounding (0.4 %) five steps magnify: each is as near to the exact
        # result in float64 as the other.
        assert (want - exact).norm() < 0.03 * (exact - began).norm()
        assert (ours - exact).norm() < 1.5 * (want - exact).norm()


def flat(params):
    return torch.cat([leaf.flatten() for leaf in tree.leaves(params)]).double()


def double(params):
    return tree.map(lambda leaf: leaf.double(), params)


def test_alike_leaves_are_turned_as_each_would_be_alone():
    grads = tree.map(lambda leaf: leaf.double(), hidden(0))
    tx = tf.optim.scale_by_muon(0.0, nesterov=False, dtype=None)
    moved, _ = tx.update(grads, tx.init(grads), grads)
    wq, wk = grads["blocks"]["attention"]["wq"], grads["blocks"]["memory"]["wk"]
    for i in range(3):
        torch.testing.assert_close(moved["blocks"]["attention"]["wq"][i], orthogonalize(wq[i]))
        torch.testing.assert_close(moved["blocks"]["memory"]["wk"][i], 1.5**0.5 * orthogonalize(wk[i]))


@pytest.mark.parametrize(("method", "near"), [("newton_schulz", 0.35), ("polar_express", 0.15)])
def test_singular_values_move_to_one(method, near):
    left, _, right = torch.linalg.svd(draw(4, 16, 24, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(-1.5, 0, 16, dtype=torch.float64).flip(0)
    x = left * values @ right
    turned = orthogonalize(x, method=method)
    assert (torch.linalg.svdvals(turned) - 1).abs().max() < near
    assert (left.mT @ turned @ right.mT - torch.eye(16)).abs().max() < near  # the same singular vectors
    assert torch.equal(orthogonalize(x.mT, method=method), turned.mT)


def test_roles_decide_what_is_a_matrix():
    model = tf.models.build(tf.models.preset("mac_tiny", layers=2, tie_embeddings=False))
    params = model.init(torch.Generator().manual_seed(0))
    chosen = {name for name, yes in tree.named_leaves(tf.models.matrices(params)).items() if yes}
    inside = ("attention.w", "feed_forward.", "memory.w", "memory.context_out", "memory.gate_out")
    assert chosen and all(name.startswith(tuple(f"blocks.{part}" for part in inside)) for name in chosen)
    state = tf.optim.muon(1e-2).init(params)
    held = set(tree.named_leaves(state[0][0].momentum))
    assert held == chosen
    # Biases of stacked blocks are [layers, n]: vectors, however they look.
    rows = {"blocks": {"feed_forward": {"bias": draw(2, 5), "up": draw(2, 5, 4)}}, "plain": draw(3, 2), "b": draw(3)}
    want = {"blocks": {"feed_forward": {"bias": False, "up": True}}, "plain": True, "b": False}
    assert tf.models.matrices(rows) == want


def test_momentum_warms_up():
    momentum = tf.optim.linear(0.85, 0.95, 300)
    values = [momentum(torch.tensor(i)).item() for i in (0, 150, 300, 1000)]
    assert values == pytest.approx([0.85, 0.9, 0.95, 0.95])
    grads = hidden(0)
    moving, still = (tf.optim.scale_by_muon(m, dtype=None) for m in (momentum, 0.85))
    first, state = moving.update(grads, moving.init(grads), grads)
    want, _ = still.update(grads, still.init(grads), grads)
    for a, b in zip(tree.leaves(first), tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(tree.leaves(state.momentum)[0], 0.15 * tree.leaves(grads)[0])


def test_a_whole_model_trains_and_compiles():
    model = tf.models.build(tf.models.preset("mag_tiny", layers=2, dim=32, ff=48, memory={"heads": 1, "hidden": 16}))
    tx = tf.optim.muon(
        tf.optim.warmup_cosine(0.02, 2, 20), tf.optim.warmup_cosine(2e-3, 2, 20), mask=tf.models.decayed, clip_norm=1.0,
        method="polar_express", momentum=tf.optim.linear(0.85, 0.95, 10), dtype=None,
    )  # fmt: skip
    step = tf.train.make_train_step(model, tx)
    compiled = tf.train.compile_step(step, "aot_eager")
    states = [tf.train.init_state(model, tx) for _ in range(2)]
    batch = {"tokens": torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(0))}
    losses = []
    for _ in range(8):
        for i, run in enumerate((step, compiled)):
            states[i], metrics = run(states[i], batch)
        losses.append(metrics["loss"].item())
    assert losses[-1] < losses[0] - 0.4
    for (name, a), b in zip(tree.named_leaves(states[0].params).items(), tree.leaves(states[1].params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum: wanted"), ({"method": "svd"}, "method: wanted one of newton_schulz"),
        ({"scale": "rms"}, "scale: wanted one of spectral"), ({"steps": 0}, "steps: wanted at least 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tf.optim.muon(1e-2, **options)
    with pytest.raises(ValueError, match=r"params: wanted matrices \[\.\.\., N, K\], got b of shape \(3,\)"):
        tf.optim.scale_by_muon().init({"b": torch.zeros(3)})
