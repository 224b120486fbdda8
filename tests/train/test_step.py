"""The train step: one graph, equal to eager, guarded."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import titanfunc as tf
from tests.memory.problems import assert_same_tree
from tests.models.small import MEMORY, MODELS, draw_tokens, small
from titanfunc import tree


def training(order: str, accumulate: int = 1, rate: float = 1e-2, **changes):
    model, _ = small(order, **changes)
    config = tf.config.OptimConfig(lr=rate, warmup_steps=3, weight_decay=0.01, betas=(0.9, 0.999))
    tx = tf.optim.from_config(config, 20, model.config)
    return model, tx, tf.train.make_train_step(model, tx, accumulate)


def batch(i: int, rows: int = 4, length: int = 17):
    return {"tokens": draw_tokens(rows, length, seed=i)}


ONE = {"layers": 1}
VARIANTS = {  # of two layers where a layer may differ from the next, and in one model more
    **{name: (name, {} if name == "attention" else ONE) for name in MODELS},
    "chunk": ("input", {**ONE, "memory": {**MEMORY, "rule": {"write": "chunk", "chunk_clip": 1.0}}}),
    "muon": ("lmm", {**ONE, "memory": {**MEMORY, "rule": {"write": "chunk", "optimizer": "muon"}}}),
    "huber": ("mal", {**ONE, "memory": {**MEMORY, "depth": 3, "rule": {"objective": "huber"}}}),
    "first_order": ("mag", {**ONE, "memory": {**MEMORY, "rule": {"outer_gradient": "first_order"}}}),
    "residual": ("attention", {**ONE, "mac": {"segment": 8, "context": "residual"}}),
    "moe": ("mal", {**ONE, "feed_forward": "moe"}),
    "cms": ("lmm", {**ONE, "feed_forward": "cms", "cms": {"periods": (1, 3)}}),
    "hybrid": ("input", {"memory_layers": (1,)}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_step_is_one_graph_that_equals_eager_and_never_recompiles(variant, graphs):
    backend, seen = graphs
    name, changes = VARIANTS[variant]
    model, tx, step = training(name, **changes)
    compiled = tf.train.compile_step(step, backend)
    eager, donated = tf.train.init_state(model, tx), tf.train.init_state(model, tx)
    rates = set()
    for i in range(10):
        eager, want = step(eager, batch(i))
        donated, got = compiled(donated, batch(i))
        rates.add(got["lr"].item())
        assert_same_tree(got, want, rtol=1e-5, atol=1e-5)
    assert_same_tree(donated, eager, rtol=1e-5, atol=1e-5)
    assert len(rates) >= 9  # the learning rate moved (the peak is taken twice)
    assert len(seen) == 1 and not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_dynamo_reads_the_step_itself_without_a_break(graphs):
    # compile_step traces by running; here Dynamo reads every line of the step instead: nothing in it breaks a graph.
    backend, seen = graphs
    model, tx, step = training("input", layers=1)
    state = tf.train.init_state(model, tx)
    new, metrics = torch.compile(step, fullgraph=True, backend=backend)(state, batch(0, rows=2, length=9))
    want, want_metrics = step(state, batch(0, rows=2, length=9))
    assert_same_tree(new, want, rtol=1e-5, atol=1e-5)
    assert_same_tree(metrics, want_metrics, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1 and not counters["graph_break"]


def test_the_graph_holds_inner_and_outer_gradients_and_the_optimizer(graphs):
    _, _ = graphs
    operations = set()

    def record(graph, inputs):
        operations.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record)
    model, tx, step = training("input", layers=1)
    tf.train.compile_step(step, backend)(tf.train.init_state(model, tx), batch(0))
    wanted = (
        "titanfunc.memory_write.",
        "titanfunc.memory_write_backward.",
        "nll_loss_backward",
        "aten.cos",
        "aten.sqrt",
    )
    for name in wanted:  # the writes, their derivative, the loss's, the schedule, Adam
        assert any(name in operation for operation in operations), name


def test_inductor_trains_like_eager():
    torch._dynamo.reset()
    model, tx, step = training("lmm", rate=1e-3, layers=1)  # the least to compile of what has a memory
    compiled = tf.train.compile_step(step)
    eager, donated = tf.train.init_state(model, tx), tf.train.init_state(model, tx)
    for i in range(3):
        eager, want = step(eager, batch(i))
        donated, got = compiled(donated, batch(i))
        torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-5, atol=1e-5)
    assert_same_tree(donated.params, eager.params, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_state_is_donated_and_metrics_outlive_the_next_step(backend):
    model, tx, step = training("input", layers=1)
    state = tf.train.init_state(model, tx)
    places = [leaf.data_ptr() for leaf in tree.leaves(state)]
    before = state.params["embedding"].clone()
    compiled = tf.train.compile_step(step, backend)
    state, first = compiled(state, batch(0))
    kept = first["loss"].item()
    state, _ = compiled(state, batch(1))
    assert [leaf.data_ptr() for leaf in tree.leaves(state)] == places
    assert not torch.equal(state.params["embedding"], before)
    assert first["loss"].item() == kept and state.step.item() == 2


@pytest.mark.parametrize("order", ["input", "transformer"])
def test_accumulation_equals_one_large_batch(order):
    results = []
    for accumulate in (1, 2, 4):
        model, tx, step = training(order, accumulate)
        state = tf.train.init_state(model, tx)
        for i in range(2):
            state, metrics = step(state, batch(i, rows=8))
        results.append((state.params, metrics))
    for other in results[1:]:
        assert_same_tree(other, results[0], rtol=1e-4, atol=1e-5)
    model, tx, step = training("transformer", 3)
    with pytest.raises(ValueError, match="a batch that 3 parts divide, got 4 rows"):
        step(tf.train.init_state(model, tx), batch(0))


@pytest.mark.parametrize("name", ["input", "mal"])
def test_packed_documents_train_as_one_graph_and_are_seen_alone(name, graphs):
    backend, seen = graphs
    model, tx, _ = training(name, layers=1)
    step = tf.train.make_train_step(model, tx, 2, documents=3)
    compiled = tf.train.compile_step(step, backend)
    eager, donated = tf.train.init_state(model, tx), tf.train.init_state(model, tx)
    for i in range(3):
        starts = torch.zeros(4, 16, dtype=torch.bool)
        starts[:, 0] = starts[0, 5 + i] = starts[3, 9] = True
        packed = {**batch(i), "starts": starts}
        eager, want = step(eager, packed)
        donated, got = compiled(donated, packed)
        assert_same_tree(got, want, rtol=1e-5, atol=1e-5)
    assert_same_tree(donated, eager, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    loss, _ = tf.train.loss_fn(model, eager.params, packed["tokens"], documents=tf.memory.Documents(starts, 3))
    plain, _ = tf.train.loss_fn(model, eager.params, packed["tokens"])
    assert not torch.isclose(loss, plain)
    with pytest.raises(ValueError, match="starts: wanted a batch with them, for documents=3, got a batch of tokens"):
        step(eager, batch(0))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    model, tx, step = training("input")
    state = tf.train.init_state(model, tx)
    state, _ = step(state, batch(0))
    broken = state._replace(params={**state.params, "norm": state.params["norm"] * float("nan")})
    after, metrics = step(broken, batch(1))
    assert metrics["skipped"].item() == 1
    for old, new in zip(
        tree.leaves((broken.params, broken.opt_state)), tree.leaves((after.params, after.opt_state)), strict=True
    ):
        assert torch.equal(old, new) or (old.isnan() & new.isnan()).all()
    again, _ = step(after, batch(2))
    assert (after.skipped.item(), again.skipped.item(), again.skipped_in_row.item()) == (1, 2, 2)
    mended, metrics = step(again._replace(params=state.params), batch(3))
    assert (mended.skipped.item(), mended.skipped_in_row.item(), mended.step.item()) == (2, 0, 4)
    assert metrics["skipped"].item() == 0


def test_a_step_of_another_structure_is_refused():
    model, tx, step = training("transformer")

    def wrong(state, batch):
        new, metrics = step(state, batch)
        return new._replace(opt_state=()), metrics

    with pytest.raises(Exception, match="a new state of the old one's structure"):
        tf.train.compile_step(wrong, "aot_eager")(tf.train.init_state(model, tx), batch(0))


def test_compile_function_takes_and_returns_pytrees_of_any_structure(graphs):
    backend, seen = graphs

    def swap(a):
        return {"first": a["x"] + 1, "second": a["y"]} if isinstance(a, dict) else (a[1], a[0] + 1)

    function = tf.train.compile_function(swap, backend)
    one, two = torch.ones(2), torch.full((2,), 2.0)
    for _ in range(2):  # back and forth: each structure keeps its own graph and its own names
        result = function({"x": one, "y": one})
        assert torch.equal(result["first"], two) and torch.equal(result["second"], one)
        pair = function((one, two))
        assert isinstance(pair, tuple) and torch.equal(pair[0], two) and torch.equal(pair[1], two)
    assert len(seen) == 2


def test_compiled_functions_of_the_same_shapes_keep_their_own_graphs(graphs):
    backend, seen = graphs
    functions = [tf.train.compile_function(lambda x, by=by: x * by, backend) for by in range(12)]
    for length in (3, 5):
        for by, function in enumerate(functions):
            assert function(torch.ones(length)).tolist() == [by] * length
    one = tf.train.compile_function(lambda x: x + 1, backend)  # more shapes than Dynamo allows one function
    assert [one(torch.ones(length)).sum().item() for length in range(1, 12)] == [2 * n for n in range(1, 12)]
    assert len(seen) == 2 * 12 + 11
    steps = []
    for rate in (1e-2, 1e-3):
        model, tx, step = training("transformer", rate=rate)
        steps.append((step, tf.train.compile_step(step, backend), tf.train.init_state(model, tx)))
    for step, compiled, state in steps:
        want, _ = step(state, batch(0))
        got, _ = compiled(state, batch(0))
        assert_same_tree(got.params, want.params, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_step_may_take_batches_of_several_structures(backend):
    def step(state, batch):
        name = "masked" if "mask" in batch else "plain"
        return (state[0] + 1,), {name: batch["tokens"].sum() + (100 if name == "masked" else 0)}

    torch._dynamo.reset()
    compiled = tf.train.compile_step(step, backend)
    state, tokens = (torch.zeros(()),), torch.ones(3)
    for batch in ({"tokens": tokens}, {"tokens": tokens, "mask": tokens}, {"tokens": tokens}):
        state, metrics = compiled(state, batch)
        assert {name: value.item() for name, value in metrics.items()} == (
            {"masked": 103.0} if "mask" in batch else {"plain": 3.0}
        )
    assert state[0].item() == 3
