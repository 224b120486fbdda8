"""The train step with blocks computed again: one graph, equal to the step that keeps everything."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import titanfunc as tf
from tests.memory.problems import assert_same_tree
from tests.models.small import batch, draw_tokens, small
from titanfunc import tree

EQUAL = {"rtol": 1e-5, "atol": 1e-5}


def steps(name, tx, accumulate=1, documents=0, **changes):
    """(state, step) with everything kept, and with blocks computed again."""
    found = []
    for remat in ("none", "layer"):
        model, _ = small(name, remat=remat, **changes)
        step = tf.train.make_train_step(model, tx, accumulate, documents=documents)
        found.append((tf.train.init_state(model, tx), step))
    return found


@pytest.mark.parametrize(
    ("name", "accumulate", "documents", "layers"),
    [("attention", 1, 0, 1), ("input", 2, 8, 1), ("mag", 1, 0, 2), ("lmm", 2, 8, 1)],
)
def test_the_compiled_step_is_one_graph_that_equals_the_step_that_keeps(name, accumulate, documents, layers, graphs):
    backend, seen = graphs
    tx = tf.optim.adamw(1e-2)
    (kept, plain), (again, step) = steps(name, tx, accumulate, documents, layers=layers)
    donated = tree.map(torch.clone, again)
    compiled = tf.train.compile_step(step, backend)
    for i in range(4):
        kept, want = plain(kept, batch(i, documents))
        again, eager = step(again, batch(i, documents))
        donated, got = compiled(donated, batch(i, documents))
        assert torch.equal(eager["loss"], want["loss"])
        assert_same_tree(got, want, **EQUAL)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again), tree.leaves(kept), strict=True))
    assert_same_tree(donated, kept, **EQUAL)
    assert len(seen) == 1 and not counters["graph_break"]


def test_inductor_computes_the_same():
    torch._dynamo.reset()
    tx = tf.optim.adamw(1e-2)
    (kept, plain), (again, step) = steps("transformer", tx, layers=1)
    compiled = tf.train.compile_step(step)
    for i in range(2):
        kept, want = plain(kept, batch(i))
        again, got = compiled(again, batch(i))
        assert_same_tree(got, want, **EQUAL)


def test_dynamo_reads_the_step_without_a_break(graphs):
    backend, seen = graphs
    tx = tf.optim.adamw(1e-2)
    (state, plain), (again, step) = steps("input", tx, layers=1)
    want = plain(state, batch(0))
    got = torch.compile(step, fullgraph=True, backend=backend)(again, batch(0))
    assert_same_tree(got, want, **EQUAL)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("name", "options"),  # with the memory differentiated twice in one; without blocks computed again, in the other
    [
        ("input", {}), ("transformer", {"unroll": "exact", "k_unroll": 2}),
        ("input", {"mode": "implicit", "neumann_terms": 2}),
    ],
)  # fmt: skip
def test_the_nested_optimizer_learns_through_it(name, options, graphs):
    backend, _ = graphs
    tx = tf.optim.nested(tf.optim.adamw(1e-2), meta_lr=1e-2, **options)
    (kept, plain), (again, step) = steps(name, tx, layers=1)
    donated = tree.map(torch.clone, again)
    compiled = tf.train.compile_step(step, backend)
    for i in range(2):
        given = batch(i)
        if options:
            given["held_out"] = torch.stack([draw_tokens(4, 17, seed=100 + 2 * i + j) for j in range(2)])
        kept, want = plain(kept, given)
        again, got = step(again, given)
        donated, fast = compiled(donated, given)
        assert_same_tree(got, want, rtol=1e-4, atol=1e-4)
        assert_same_tree(fast, want, rtol=1e-4, atol=1e-4)
    assert not options or want["nested/meta_steps"].item() == 2
    assert_same_tree(again, kept, rtol=1e-4, atol=1e-4)
