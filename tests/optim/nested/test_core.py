"""The wrapper itself: it is its base until it learns, holds what it uses, and lives in the compiled step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import titanfunc as tf
from tests.memory.problems import assert_same_tree
from tests.models.small import draw_tokens, small
from tests.optim.nested.problems import KINDS, advance, base, batch, objective, parameters, start
from titanfunc import tree
from titanfunc.config.optim import NestedConfig, RoleRates


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("momentum", KINDS)
def test_without_learning_it_is_its_base_bit_for_bit(momentum, name):
    plain, wrapped = base(name), tf.optim.nested(base(name), meta_lr=0, momentum=momentum, relative=momentum == "none")
    ours = theirs = tree.map(lambda leaf: leaf.float(), parameters())
    ours_state, theirs_state = wrapped.init(ours), plain.init(theirs)
    torch.manual_seed(0)
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
    meta = 3 * controller + 5  # Adam's two moments, a sum, counts, a loss
    assert elements(mode="simple") == elements(mode="implicit") == elements(unroll="exact") == bare + meta
    assert elements() == bare + meta + size + 1  # the update that is judged, and the loss's trend
    regression = 9 * 16 + 16 + 16 * 3 + 3
    assert elements(meta_lr=0, momentum="l2_regression") == bare + size + regression
    # Learning, the gradient that the network saw too.
    assert elements(momentum="l2_regression") == bare + meta + 4 * regression + 3 * size + 1
    levels = 3 * size + 2 * size + 3 * 2
    assert elements(meta_lr=0, use_cms_updates=True) == bare + levels


def test_multipliers_fade_with_the_learning_rate():
    def falling(count):
        return 0.05 / (1.0 + count)

    grads, loss = torch.func.grad_and_value(objective)(parameters(), batch(0))
    found = {}
    for anneal in (False, True):
        tx = tf.optim.nested(tf.optim.adamw(falling), meta_lr=0, anneal=anneal)
        params, state = start(tx)
        found[anneal] = []
        for _ in range(3):
            _, state = tx.update(grads, state, params, loss=loss)
            found[anneal].append(torch.cat(list(state.multipliers.values())).log())
        assert tree.size(state.inner.schedule) == 2 * anneal
    assert found[False][2].abs().max() > 0.01
    for share, plain, faded in zip((1, 1 / 2, 1 / 3), found[False], found[True], strict=True):
        torch.testing.assert_close(faded, share * plain)


def test_fading_needs_a_learning_rate_to_follow():
    bare = tf.optim.chain(tf.optim.scale_by_adam(0.9, 0.95))
    with pytest.raises(ValueError, match="anneal: wanted a base whose state holds its learning rate"):
        tf.optim.nested(bare, anneal=True).init(parameters())


def test_multipliers_are_learned_within_their_bounds():
    tx = tf.optim.nested(base("adamw"), meta_lr=0.2, min_lr_mult=0.5, max_lr_mult=3.0, relative=False)
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
    model, _ = small("transformer" if options else "input", layers=2)
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
    families = {name for name in want if name.startswith("nested/multiplier_") and "." not in name}
    assert families == {f"nested/multiplier_{name}" for name in tf.optim.by_role(eager.params).names}
    layers = [want[f"nested/multiplier_attention.{i}"] for i in range(2)]
    torch.testing.assert_close(torch.stack(layers).mean(), want["nested/multiplier_attention"])


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


@pytest.mark.parametrize("mode", ["simple", "explicit", "implicit"])
def test_a_meta_gradient_that_is_not_finite_changes_no_network_and_is_counted(mode):
    unroll = {"unroll": "first_order"} if mode == "explicit" else {}
    tx = tf.optim.nested(base("adamw"), mode=mode, meta_lr=1e-2, momentum="l2_regression", **unroll)
    params = parameters()
    state = tx.init(params)
    spoilt = [(x * float("inf"), y) for x, y in (batch(7), batch(8))][: 2 if mode == "implicit" else 1]
    extra = {} if mode == "simple" else {"held_out": tf.optim.HeldOut(objective, spoilt)}
    for i in range(2):
        moved, after = advance(tx, params, state, i, **extra)
        if mode != "simple":
            assert all(torch.equal(a, b) for a, b in zip(tree.leaves(after.phi), tree.leaves(state.phi), strict=True))
            assert after.meta.refused == i + 1 and after.meta.steps == 0
        params, state = moved, after
    _, state = tx.update(tree.zeros_like(params), state, params, loss=torch.tensor(1.0))
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves((params, state.phi)))


def test_learning_begins_when_told_and_looks_when_told():
    tx = tf.optim.nested(base("adamw"), meta_lr=1e-2, meta_start=3, controller_update_freq=2)
    params = parameters()
    state = tx.init(params)
    stats = []
    for i in range(6):
        params, state = advance(tx, params, state, i)
        stats.append(state.inner.stats)
        assert state.meta.steps == max(i - 2, 0)
    assert torch.equal(stats[0], stats[1]) and torch.equal(stats[2], stats[3]) and not torch.equal(stats[1], stats[2])


def test_shrinkage_pulls_multipliers_towards_one():
    spread = []
    for shrinkage in (0.0, 10.0):
        tx = tf.optim.nested(base("adamw"), meta_lr=0.05, relative=False, shrinkage=shrinkage)
        params = parameters()
        state = tx.init(params)
        for i in range(20):
            params, state = advance(tx, params, state, i)
        spread.append(torch.cat(list(state.multipliers.values())).log().abs().mean())
    assert spread[1] < 0.5 * spread[0]


def test_a_shorter_period_on_the_way_goes_on_learning():
    params = parameters()
    slow, quick = (tf.optim.nested(base("adamw"), meta_lr=1e-2, meta_update_freq=n) for n in (10, 3))
    state = slow.init(params)
    for i in range(8):
        params, state = advance(slow, params, state, i)
    assert state.meta.steps == 0
    for i in range(7):
        params, state = advance(quick, params, state, i)
    assert state.meta.steps == 3


def test_role_rates_are_part_of_what_is_judged():
    rates = RoleRates(feed_forward=0.0, norm=3.0)
    config = tf.optim.OptimConfig("nested", clip_norm=0.0, nested=NestedConfig(base="adamw"), role_rates=rates)
    params = parameters()
    tx = tf.optim.from_config(config, 100)
    moved, state = advance(tx, params, tx.init(params), 0)
    recorded = state.record.updates
    for a, b, u in zip(*map(tree.leaves, (moved, params, recorded)), strict=True):
        torch.testing.assert_close(a - b, u)
    assert recorded["blocks"]["feed_forward"]["up"].abs().max() == 0


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
        ({"k_unroll": 3}, "k_unroll: wanted 1 with"), ({"cms_frequencies": (1, 0)}, "cms_frequencies: wanted"),
        ({"base_lr": 0.1}, "base_lr, weight_decay: wanted none"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tf.optim.nested(base("adamw"), **options)
    with pytest.raises(ValueError, match="base_lr: wanted a learning rate"):
        tf.optim.nested(tf.optim.adamw)
    for params in ([torch.ones(2)], torch.ones(2), {}, {"a": {}}, {"a": [torch.ones(2)]}):
        with pytest.raises(ValueError, match="params: wanted nested dicts of tensors"):
            tf.optim.nested(base("adamw")).init(params)
    with pytest.raises(ValueError, match="params: wanted float32, float64 or bfloat16, got float16 for a"):
        tf.optim.nested(base("adamw")).init({"a": torch.ones(2, dtype=torch.float16)})


@pytest.mark.parametrize(
    ("name", "options"),
    [("lmm", {"unroll": "exact", "k_unroll": 2}), ("transformer", {"mode": "implicit", "neumann_terms": 2})],
)
def test_steps_with_held_out_batches_are_another_graph(name, options):
    model, _ = small(name, layers=1)  # a memory's writes are differentiated twice, or attention is
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
