"""The train step whose blocks share code: equal to the step of blocks with code of their own."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import titanfunc as tf
from tests.memory.problems import assert_same_tree
from tests.models.small import batch, small
from titanfunc import tree
from titanfunc.ops import shared_code

EQUAL = {"rtol": 1e-4, "atol": 3e-5}


@pytest.mark.parametrize(
    ("name", "accumulate", "documents", "changes"),
    [
        ("attention", 1, 0, {}), ("input", 2, 8, {"memory_layers": (1,), "layers": 3}),
        ("mag", 1, 0, {"remat": "layer"}), ("mal", 1, 0, {"remat": "layer"}),
        ("lmm", 2, 8, {}), ("transformer", 1, 0, {"feed_forward": "moe"}),
    ],
)  # fmt: skip
def test_the_step_equals_the_one_of_blocks_with_code_of_their_own(name, accumulate, documents, changes, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    tx = tf.optim.adamw(1e-2)
    models = [small(name, layer_code=code, **changes)[0] for code in ("each", "shared")]
    plain, step = (tf.train.make_train_step(model, tx, accumulate, documents=documents) for model in models)
    each, shared = (tf.train.init_state(model, tx) for model in models)
    compiled = tf.train.compile_step(step, "aot_eager")
    programs = []
    original = shared_code._Program
    monkeypatch.setattr(shared_code, "_Program", lambda *given: programs.append(original(*given)) or programs[-1])
    for i in range(3):
        each, want = plain(each, batch(i, documents))
        shared, got = compiled(shared, batch(i, documents))
        assert_same_tree(got, want, **EQUAL)
    assert_same_tree(shared, each, **EQUAL)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert len(programs) == 1 + ("memory_layers" in changes) < models[0].config.layers


def test_inductor_computes_the_same_and_an_evaluation_has_code_of_its_own(monkeypatch):
    torch._dynamo.reset()
    tx = tf.optim.adamw(1e-2)
    (each, _), (shared, _) = (small("transformer", layer_code=code) for code in ("each", "shared"))
    want, got = (tf.train.init_state(model, tx) for model in (each, shared))
    plain, compiled = tf.train.make_train_step(each, tx), tf.train.compile_step(tf.train.make_train_step(shared, tx))
    for i in range(2):
        want, told = plain(want, batch(i))
        got, said = compiled(got, batch(i))
        assert_same_tree(said, told, **EQUAL)
    monkeypatch.setattr(shared_code, "_Program", None)
    evaluate = tf.train.compile_function(tf.train.make_eval_step(shared), "aot_eager")
    torch.testing.assert_close(evaluate(got.params, batch(9)), tf.train.make_eval_step(each)(want.params, batch(9)),
                               **EQUAL)  # fmt: skip
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(got.params))
