"""Documents packed in one row: each is read as if it stood alone."""

from __future__ import annotations

import itertools

import pytest
import torch

import titanfunc as tf
from tests.models.small import MEMORIES, MEMORY, MODELS, draw_tokens, small
from titanfunc import tree

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CUTS = ((0, 7, 8, 20), (5, 13))
"""Where documents begin in the two rows; the second row's first tokens belong to the text before."""


def packed(length: int = 30, cuts=CUTS, most: int = 4):
    starts = torch.zeros(len(cuts), length, dtype=torch.bool)
    for row, places in enumerate(cuts):
        starts[row, list(places)] = True
    return tf.memory.Documents(starts, most)


def parts(cuts, length):
    bounds = sorted({0, *cuts, length})
    return list(itertools.pairwise(bounds))


@pytest.mark.parametrize("most", [4, 7])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_may_go_on_after_documents_that_began_it(name, most):
    model, params = small(name)
    tokens, more = draw_tokens(2, 21), draw_tokens(2, 9, seed=9)
    memory = model.init_memory(params, 2)
    documents = packed(21, ((0, 7, 18), (0, 13)), most)
    want, want_after = model.apply(params, memory, tokens, documents=documents)
    got, after = model.apply(params, memory, tokens, documents=documents, aligned=True)
    torch.testing.assert_close(got, want, **CLOSE)
    if memory:
        alone = model.apply(params, model.init_memory(params, 1), tokens[:1, 18:])[1]
        last = model.apply(params, alone, more[:1])[0]
        for state in (after, want_after):
            torch.testing.assert_close(model.apply(params, state, more)[0][:1], last, **CLOSE)


@pytest.mark.parametrize("rule", ["token", "chunk"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_document_is_read_as_if_it_stood_alone(name, rule):
    model, params = small(name, **({"memory": {**MEMORY, "rule": {"write": rule}}} if name in MEMORIES else {}))
    tokens, more = draw_tokens(2, 30), draw_tokens(2, 5, seed=9)
    memory = model.init_memory(params, 2)
    if memory:  # in the middle of another text
        _, memory = model.apply(params, memory, draw_tokens(2, 6, seed=5))
    got, after = model.apply(params, memory, tokens, documents=packed())
    goes_on, _ = model.apply(params, after, more)
    for row, cuts in enumerate(CUTS):
        for first, end in parts(cuts, 30):
            state = model.init_memory(params, 1) if first in cuts else tree.map(lambda x: x[row : row + 1], memory)  # noqa: B023
            want, state = model.apply(params, state, tokens[row : row + 1, first:end])
            torch.testing.assert_close(got[row : row + 1, first:end], want, **CLOSE)
        if memory:
            torch.testing.assert_close(
                goes_on[row : row + 1], model.apply(params, state, more[row : row + 1])[0], **CLOSE
            )


RULES = [{}, {"write": "chunk"}, {"outer_gradient": "first_order"}, {"outer_gradient": "none"}]


@pytest.mark.parametrize(
    ("name", "rule"), [*[(name, {}) for name in MODELS], *[(name, rule) for name in MEMORIES for rule in RULES[1:]]]
)
def test_nothing_crosses_a_boundary_and_gradients_are_those_of_the_parts(name, rule):
    model, params = small(name, **({"memory": {**MEMORY, "rule": rule}} if rule else {}))
    tokens, cuts = draw_tokens(1, 24), ((0, 9, 13),)
    documents = packed(24, cuts, most=3)

    def together(params):
        logits, _ = model.apply(params, model.init_memory(params, 1), tokens, aligned=True, documents=documents)
        return logits.square().sum()

    def apart(params):
        total = 0.0
        for first, end in parts(cuts[0], 24):
            memory = model.init_memory(params, 1)
            total = total + model.apply(params, memory, tokens[:, first:end], aligned=True)[0].square().sum()
        return total

    want, got = (torch.func.grad(loss)(params) for loss in (apart, together))
    for (path, a), b in zip(tree.named_leaves(got).items(), tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_a_row_with_more_documents_than_said_is_not_answered_wrongly(name):
    model, params = small(name)
    tokens = draw_tokens(2, 30)
    many = packed(30, (tuple(range(0, 30, 2)), (5,)), most=2)
    logits, _ = model.apply(params, model.init_memory(params, 2), tokens, documents=many)
    assert torch.isnan(logits[0]).all() and torch.isfinite(logits[1]).all()


def test_documents_of_another_shape_are_refused():
    model, params = small()
    memory, tokens = model.init_memory(params, 2), draw_tokens(2, 30)
    with pytest.raises(ValueError, match=r"documents.starts: wanted bool \(2, 30\)"):
        model.apply(params, memory, tokens, documents=packed(29, ((0,), (0,))))
    with pytest.raises(ValueError, match=r"documents.most: wanted at least 1"):
        model.apply(params, memory, tokens, documents=packed(most=0))
