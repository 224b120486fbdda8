"""Optimizers by label, and optimizers that move every so many steps: against plain ones, compiled, and in training."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import titanfunc as tf
from titanfunc import rng, tree
from titanfunc.models.base import Model
from titanfunc.nn import cms, init_cms
from titanfunc.optim import adamw, cms_labels, cms_periods, every, partition, warmup_cosine


def parameters(seed: int = 0):
    g = rng.generator(seed)
    return {
        "embedding": rng.normal(g, (5, 4), 1.0),
        "blocks": {"feed_forward": init_cms(g, 4, 6, 2), "norm": {"scale": rng.normal(g, (4,), 1.0)}},
    }


def gradients(i: int):
    return tree.scale(parameters(100 + i), 10.0 ** (i % 3 - 1))


def same(left, right):
    a, b = tree.named_leaves(left), tree.named_leaves(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(tx, steps: int, pick=lambda values: values):
    """The parameters after each step, and the last state; ``pick`` takes the part of the tree that takes part."""
    params = pick(parameters())
    state, history = tx.init(params), [params]
    for i in range(steps):
        updates, state = tx.update(pick(gradients(i)), state, params, loss=torch.tensor(1.0))
        params = tf.optim.apply_updates(params, updates)
        history.append(params)
    return history, state


def fast():
    return adamw(warmup_cosine(0.1, 2, 30), weight_decay=0.1)


def slow():
    return tf.optim.chain(tf.optim.clip_by_global_norm(0.5), tf.optim.scale_by_learning_rate(0.3))


def by_level(periods=(1, 3)):
    return partition(cms_periods(lambda period: adamw(warmup_cosine(0.1, 2, 30 // period)), periods), cms_labels)


def test_labels_follow_the_levels():
    labels = tree.named_leaves(cms_labels(parameters()))
    for name, label in labels.items():
        assert label == ("level0" if "level0" in name else "level1" if "level1" in name else "rest"), name
    assert set(labels.values()) == {"rest", "level0", "level1"}
    assert cms_labels({"levels": 0, "level": 0, "level12": {"w": 0}}) == {
        "levels": "rest", "level": "rest", "level12": {"w": "level12"},
    }  # fmt: skip


def test_each_leaf_moves_as_under_its_own_optimizer_alone():
    def labels(params):
        return tree.map(lambda leaf: "flat" if leaf.ndim == 1 else "matrix", params)

    together, _ = run(partition({"matrix": fast(), "flat": slow()}, labels), 6)
    matrices, _ = run(fast(), 6)  # without a global norm, a leaf's way depends on no other
    for whole, part in zip(together, matrices, strict=True):
        assert torch.equal(whole["embedding"], part["embedding"])
        assert same(whole["blocks"]["feed_forward"], part["blocks"]["feed_forward"])
    norms, _ = run(slow(), 6, lambda values: values["blocks"]["norm"])  # the norm clipped is that of these leaves
    assert all(same(whole["blocks"]["norm"], part) for whole, part in zip(together, norms, strict=True))


def test_one_label_is_the_optimizer_itself_and_order_is_kept():
    alone, state = run(fast(), 4)
    whole, (part, unused) = run(partition({"all": fast(), "none": slow()}, lambda p: tree.map(lambda _: "all", p)), 4)
    assert all(same(a, b) for a, b in zip(alone, whole, strict=True)) and same(part, state) and unused == ()
    assert list(whole[-1]) == list(parameters()) and list(whole[-1]["blocks"]) == list(parameters()["blocks"])


def test_a_state_holds_its_own_leaves_alone():
    params = {**parameters(), "empty": {}}
    tx = by_level()
    state = tx.init(params)
    sizes = dict.fromkeys(("rest", "level0", "level1"), 0)
    for label, leaf in zip(tree.leaves(cms_labels(params)), tree.leaves(params), strict=True):
        sizes[label] += leaf.numel()
    # Adam's two moments, and four or five scalars; a slower level adds its accumulated gradient.
    assert [tree.size(part) for part in state] == [
        2 * sizes["rest"] + 4, 2 * sizes["level0"] + 4, 3 * sizes["level1"] + 5,
    ]  # fmt: skip
    updates, new = tx.update(tree.zeros_like(params), state, params)
    assert updates["empty"] == {} and [tree.size(part) for part in new] == [tree.size(part) for part in state]


@pytest.mark.parametrize("make", [fast, lambda: tf.optim.scale_by_learning_rate(0.3)])  # Adam, and plain descent
def test_every_averages_and_moves_on_each_periodth_call(make):
    period = 3
    history, state = run(every(make(), period), 9, lambda values: {"embedding": values["embedding"]})
    tx, want = make(), history[0]
    inner = tx.init(want)
    for i in range(9):
        if i % period == period - 1:
            mean = sum(gradients(j)["embedding"] for j in range(i - period + 1, i + 1)) / period
            updates, inner = tx.update({"embedding": mean}, inner, want)
            want = tf.optim.apply_updates(want, updates)
            assert not torch.equal(history[i + 1]["embedding"], history[i]["embedding"])
        else:
            assert torch.equal(history[i + 1]["embedding"], history[i]["embedding"])
        torch.testing.assert_close(history[i + 1]["embedding"], want["embedding"], rtol=1e-5, atol=1e-6)
    assert state.count.item() == 0 and tree.global_norm(state.total) == 0
    assert (state.inner[0].count if make is fast else state.inner.count).item() == 3  # it counts its own updates


def test_between_updates_nothing_but_the_mean_changes():
    params = parameters()
    tx = every(fast(), 4)
    state = tx.init(params)
    for i in range(3):
        updates, new = tx.update(gradients(i), state, params)
        assert tree.global_norm(updates) == 0 and same(new.inner, state.inner)
        assert new.count.item() == i + 1 and same(new.total, tree.add(state.total, gradients(i)))
        state = new
    # An unbounded partial mean does no harm before its turn.
    updates, _ = tx.update(tree.scale(gradients(0), float("inf")), tx.init(params), params)
    assert tree.global_norm(updates) == 0


def test_a_period_of_one_is_the_optimizer_bit_for_bit():
    plain, state = run(fast(), 5)
    wrapped, wrapped_state = run(every(fast(), 1), 5)
    assert all(same(a, b) for a, b in zip(plain, wrapped, strict=True)) and same(state, wrapped_state)


def test_levels_move_at_their_frequencies():
    history, _ = run(by_level((1, 3)), 7)
    for i in range(7):
        before, after = history[i]["blocks"], history[i + 1]["blocks"]
        moved = {
            "rest": not torch.equal(before["norm"]["scale"], after["norm"]["scale"]),
            **{
                name: not same(before["feed_forward"][name], after["feed_forward"][name])
                for name in ("level0", "level1")
            },
        }
        assert moved == {"rest": True, "level0": True, "level1": i % 3 == 2}
    periods = []
    cms_periods(lambda period: periods.append(period) or fast(), (1, 4, 16))
    assert sorted(periods) == [1, 1, 4, 16]


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_dynamo_reads_an_update_as_one_graph_that_equals_eager_over_ten_steps(graphs):
    tx = tf.optim.chain(tf.optim.clip_by_global_norm(1.0), by_level((2, 3)))

    def step(grads, state, params, loss):
        updates, state = tx.update(grads, state, params, loss=loss)
        return tf.optim.apply_updates(params, updates), state

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    params = other = parameters()
    state = other_state = tx.init(params)
    for i in range(10):
        params, state = step(gradients(i), state, params, torch.tensor(1.0))
        other, other_state = compiled(gradients(i), other_state, other, torch.tensor(1.0))
        assert same(params, other) and same(state, other_state)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def language_model() -> Model:
    """An embedding, a Continuum Memory System and a tied head: the least that has levels."""

    def apply(params, memory, tokens, *, aligned=False, with_metrics=False):
        x = params["embedding"][tokens]
        logits = (x + cms(params["blocks"]["feed_forward"], x, x.dtype)) * params["blocks"]["norm"]["scale"]
        logits = logits @ params["embedding"].mT
        return (logits, memory, {}) if with_metrics else (logits, memory)

    return Model(lambda g: parameters(), lambda params, size: (), apply, None)


def batch(i: int):
    return {"tokens": torch.randint(0, 5, (3, 9), generator=rng.generator(i))}


def test_a_train_step_compiles_once_reports_the_rate_and_skips_what_is_not_finite(graphs):
    model, tx = language_model(), by_level((1, 3))
    step = tf.train.make_train_step(model, tx)
    compiled = tf.train.compile_step(step, "aot_eager")
    eager, donated = tf.train.init_state(model, tx), tf.train.init_state(model, tx)
    rates = []
    for i in range(10):
        eager, _ = step(eager, batch(i))
        donated, metrics = compiled(donated, batch(i))
        rates.append(metrics["lr"].item())
        assert same(donated, eager)
    rest = warmup_cosine(0.1, 2, 30)
    assert rates == pytest.approx([rest(torch.tensor(i)).item() for i in range(10)])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    # The tenth step was the first of level 1's fourth turn. A step that is not finite leaves its mean as it is.
    broken = eager._replace(params={**eager.params, "embedding": eager.params["embedding"] * float("nan")})
    after, metrics = step(broken, batch(10))
    assert metrics["skipped"].item() == 1 and same(after.opt_state, eager.opt_state)
    assert after.opt_state[2].count.item() == 1 and tree.global_norm(after.opt_state[2].total) > 0


def test_the_levels_learn():
    model, tx = language_model(), by_level((1, 3))
    step, state, losses = tf.train.make_train_step(model, tx), tf.train.init_state(model, tx), []
    for _ in range(30):
        state, metrics = step(state, batch(0))
        losses.append(metrics["loss"].item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("labels", "params", "message"),
    [
        (lambda p: {"w": "b"}, {"w": torch.ones(2)}, "labels: wanted one of a, got 'b' for w"),
        (lambda p: {"x": "a"}, {"w": torch.ones(2)}, "labels: wanted the parameters' nested dicts, got others"),
        (lambda p: {"d": {"w": "a"}}, {"d": torch.ones(2)}, "nested dicts, got others at d"),
        (lambda p: {"w": "a"}, {"w": (torch.ones(2),)}, "params: wanted nested dicts with a label a leaf, got tuple"),
        (lambda p: "a", torch.ones(2), "params: wanted nested dicts with a label a leaf, got Tensor"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, params, message):
    with pytest.raises(ValueError, match=message):
        partition({"a": slow()}, labels).init(params)


def test_a_state_of_other_parts_and_a_period_of_none_are_refused():
    tx = partition({"a": slow()}, lambda params: {"w": "a"})
    with pytest.raises(ValueError, match="state: wanted 1 parts, one a label, got 0"):
        tx.update({"w": torch.ones(2)}, (), {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="period: wanted at least 1, got 0"):
        every(slow(), 0)
