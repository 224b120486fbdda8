"""The wrapper itself: it is its base until it learns, holds what it uses, and lives in the compiled step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import titanfunc as tf
from tests.memory.problems import assert_same_tree
from tests.models.small import draw_tokens, small
from tests.optim.nested.problems import KINDS, advance, base, parameters
from titanfunc import tree


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("momentum", KINDS)
def test_without_learning_it_is_its_base_bit_for_bit(momentum, name):
    plain, wrapped = base(name), tf.optim.nested(base(name), meta_lr=0, momentum=momentum, relative=momentum == "none")
    ours = theirs = tree.map(lambda leaf: leaf.float(), parameters())
    ours_state, theirs_state = wrapped.init(ours), plain.init(theirs)
    for i in range(50):
        grads = tree.map(lambda leaf, i=i: torch.randn_like(leaf) * 10.0 ** (i % 5 - 2), theirs)
        loss = torch.tensor(1.0 + i)
        updates, ours_state = wrapped.update(grads, ours_state, ours, loss=loss)
        ours = tf.optim.apply_updates(ours, updates)
        updates, theirs_state = plain.update(grads, theirs_state, theirs, loss=loss)
        theirs = tf.optim.apply_updates(theirs, updates)
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True)), i
    states = zip(tree.leaves(ours_state.inner.base), tree.leaves(theirs_state), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert ours_state.phi and ours_state.meta == () and ours_state.record == ()


def test_nothing_is_held_for_what_is_off():
    params = parameters()
    size, held = tree.size(params), tree.size(base("adamw").init(params))
    groups = 1 + 2 + 2 + 1
    controller = 4 * 32 + 32 + 32 + groups
    bare = held + 4 * groups + groups + controller + 2  # statistics, multipliers, networks, a count and an average

    def elements(**options):
        return tree.size(tf.optim.nested(base("adamw"), **options).init(params))

    assert elements(meta_lr=0) == bare
    meta = 3 * controller + 4  # Adam's two moments, a sum, counts, a loss
    assert elements(mode="simple") == elements(mode="implicit") == elements(unroll="exact") == bare + meta
    assert elements() == bare + meta + size + 4 * groups  # the update that is judged, and its statistics
    regression = 9 * 16 + 16 + 16 * 3 + 3
    assert elements(meta_lr=0, momentum="l2_regression") == bare + size + regression
    levels = 3 * size + 2 * size + 3 * 2
    assert elements(meta_lr=0, use_cms_updates=True) == bare + levels


def test_multipliers_are_learned_within_their_bounds():
    tx = tf.optim.nested(base("adamw"), meta_lr=0.05, min_lr_mult=0.5, max_lr_mult=3.0, relative=False)
    params = parameters()
    state = tx.init(params)
    for _ in range(30):
        params, state = advance(tx, params, state, 0)
    found = torch.cat(list(state.multipliers.values()))
    assert (found > 0.5).all() and (found < 3.0).all() and (found > 2.5).any() and found.std() > 0.02
    assert set(state.multipliers) == {"embedding", "feed_forward", "norms_and_gates", "head"}
    assert state.multipliers["feed_forward"].shape == (2,)
    metrics = tf.optim.metrics_of(state)
    assert metrics["nested/greatest_multiplier"] == found.max() and metrics["nested/meta_steps"] == 29
    torch.testing.assert_close(metrics["nested/momentum_norm"], tree.global_norm(state.inner.base[0].first))


def test_relative_multipliers_have_a_mean_of_one():
    tx = tf.optim.nested(base("adamw"), meta_lr=0.02, min_lr_mult=0.01, max_lr_mult=100.0)
    params = parameters()
    layout, state = tf.optim.by_role(params), tx.init(params)
    for i in range(10):
        params, state = advance(tx, params, state, i)
    logs = torch.log(torch.cat(list(state.multipliers.values())))
    assert logs.abs().max() > 0.02
    assert abs((layout.weight(torch.device("cpu")) * logs).sum()) < 0.01 * logs.abs().max()  # tanh bends a little


@pytest.mark.parametrize(
    "options",
    [
        {}, {"momentum": "l2_regression"}, {"momentum": "direct_update", "use_preprocessing": False},
        {"momentum": "deep_momentum"}, {"use_cms_updates": True, "cms_frequencies": (1, 3)},
        {"mode": "simple", "meta_update_freq": 2, "controller_update_freq": 3, "shrinkage": 0.1, "max_grad_norm": 1.0},
    ],
)  # fmt: skip
def test_the_whole_step_is_one_graph_that_equals_eager(options):
    model, _ = small("input", layers=2)
    slow = tf.optim.warmup_cosine(1e-2, 3, 20)
    plain = tf.optim.muon(slow, slow, dtype=None) if not options else tf.optim.adamw(slow)
    tx = tf.optim.nested(plain, meta_lr=1e-2, **options)
    step = tf.train.make_train_step(model, tx)
    torch._dynamo.reset()
    counters.clear()
    compiled = tf.train.compile_step(step, "aot_eager")
    eager, donated = tf.train.init_state(model, tx), tf.train.init_state(model, tx)
    for i in range(6):
        batch = {"tokens": draw_tokens(4, 17, seed=i)}
        eager, want = step(eager, batch)
        donated, got = compiled(donated, batch)
        assert_same_tree(got, want, rtol=1e-4, atol=1e-4)
    assert_same_tree(donated.params, eager.params, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert want["nested/meta_steps"] == (2 if "shrinkage" in options else 5)
    assert {name for name in want if name.startswith("nested/multiplier_")} == {
        f"nested/multiplier_{name}" for name in tf.optim.by_role(eager.params).names
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(name):
    model, _ = small("lmm", layers=1)
    tx = tf.optim.nested(base(name), meta_lr=1e-2, momentum="l2_regression", use_cms_updates=True)
    step = tf.train.make_train_step(model, tx)
    state = tf.train.init_state(model, tx)
    for i in range(3):
        state, _ = step(state, {"tokens": draw_tokens(4, 17, seed=i)})
    spoilt = state._replace(params={**state.params, "norm": state.params["norm"] * float("inf")})
    after, metrics = step(spoilt, {"tokens": draw_tokens(4, 17)})
    assert metrics["skipped"] == 1 and after.skipped == 1 and after.skipped_in_row == 1
    for old, new in zip(tree.leaves(spoilt.opt_state), tree.leaves(after.opt_state), strict=True):
        assert torch.equal(old, new)
    for old, new in zip(tree.leaves(spoilt.params), tree.leaves(after.params), strict=True):
        assert torch.equal(old, new)


def test_a_base_may_be_named_with_its_knobs():
    named = tf.optim.nested(tf.optim.adamw, base_lr=0.05, weight_decay=0.2, meta_lr=0)
    made = tf.optim.nested(tf.optim.adamw(0.05, weight_decay=0.2), meta_lr=0)
    params = parameters()
    a, _ = advance(named, params, named.init(params), 0)
    b, _ = advance(made, params, made.init(params), 0)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "guess"}, "mode: wanted one of simple, explicit, implicit"),
        ({"unroll": "all"}, "unroll: wanted one of online"), ({"momentum": "big"}, "momentum: wanted one of none"),
        ({"meta_lr": -1}, "meta_lr: wanted 0 or"), ({"k_unroll": 0}, "k_unroll: wanted at least 1"),
        ({"max_lr_mult": 0.5}, "max_lr_mult: wanted"), ({"min_lr_mult": 0.0}, "min_lr_mult"),
        ({"cms_frequencies": (1, 0)}, "cms_frequencies: wanted"),
        ({"base_lr": 0.1}, "base_lr, weight_decay: wanted none"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tf.optim.nested(base("adamw"), **options)
    with pytest.raises(ValueError, match="base_lr: wanted a learning rate"):
        tf.optim.nested(tf.optim.adamw)


@pytest.mark.parametrize("options", [{"unroll": "exact", "k_unroll": 2}, {"mode": "implicit", "neumann_terms": 2}])
def test_steps_with_held_out_batches_are_another_graph(options):
    model, _ = small("lmm", layers=1)
    tx = tf.optim.nested(tf.optim.adamw(1e-2), meta_lr=1e-2, **options)
    step = tf.train.make_train_step(model, tx)
    torch._dynamo.reset()
    counters.clear()
    compiled = tf.train.compile_step(step, "aot_eager")
    eager, donated = tf.train.init_state(model, tx), tf.train.init_state(model, tx)
    learned = []
    for i in range(4):
        batch = {"tokens": draw_tokens(4, 17, seed=i)}
        if i % 2 == 1:
            batch["held_out"] = torch.stack([draw_tokens(4, 17, seed=100 + 2 * i + j) for j in range(2)])
        eager, want = step(eager, batch)
        donated, got = compiled(donated, batch)
        assert_same_tree(got, want, rtol=1e-4, atol=1e-4)
        learned.append(want["nested/meta_steps"].item())
    assert learned == [0, 1, 1, 2]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
