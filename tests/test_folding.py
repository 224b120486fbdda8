"""What is made of parameters alone, apart from the rest."""

from __future__ import annotations

import pytest
import torch

from titanfunc.folding import fold

PARAMS = {"a": torch.randn(4, 6), "b": torch.randn(4, 2), "gain": torch.randn(6), "rows": torch.randn(2, 5, 4)}


def function(params, x, token):
    """Matrices that are joined and rounded, rows that are taken and rounded, and a gain that is read as it is."""
    joined = torch.cat([params["a"], params["b"]], 1).bfloat16()
    row = params["rows"].unbind(0)[1].T[:2].bfloat16()
    pair = torch.stack([params["b"], params["b"]])
    return {
        "y": (x.bfloat16() @ joined, row.sum()), "gained": params["gain"] * token, "a": params["a"][:, :3] * 2,
        "pair": pair * token,
    }  # fmt: skip


def operations(graph, *names):
    targets = [node.target.__name__.split(".")[0] for node in graph.graph.nodes if node.op == "call_function"]
    return [targets.count(name) for name in names]


def test_what_only_moves_or_rounds_is_made_beforehand():
    x, token = torch.randn(3, 4), torch.tensor(7)
    folded = fold(function, PARAMS, x, token)
    values = list(folded.before(*PARAMS.values()))
    assert sorted((tuple(v.shape), v.dtype, made) for v, made in zip(values, folded.made, strict=True)) == sorted([
        ((4, 8), torch.bfloat16, True), ((2, 5), torch.bfloat16, True), ((6,), torch.float32, False),
        ((4, 6), torch.float32, False), ((2, 4, 2), torch.float32, True),
    ])  # fmt: skip
    for made, value in zip(folded.made, values, strict=True):  # a parameter that is read as it is is not copied
        assert made != any(value is leaf for leaf in PARAMS.values())
    assert operations(folded.before, "cat", "stack", "unbind", "_to_copy", "mul", "mm") == [1, 1, 1, 2, 0, 0]
    # x is rounded here
    assert operations(folded.after, "cat", "stack", "unbind", "_to_copy", "mul", "mm") == [0, 0, 0, 1, 3, 1]
    found, wanted = folded(values, x, token), function(PARAMS, x, token)
    assert found.keys() == wanted.keys() and isinstance(found["y"], tuple)
    for name in ("gained", "a", "pair"):
        assert torch.equal(found[name], wanted[name])
    assert all(map(torch.equal, found["y"], wanted["y"]))


def test_other_shapes_than_it_was_made_for_are_refused():
    folded = fold(function, PARAMS, torch.randn(3, 4), torch.tensor(7))
    values = list(folded.before(*PARAMS.values()))
    with pytest.raises(ValueError, match="wanted the shapes, dtypes and device that parameters were read for"):
        folded(values, torch.randn(2, 4), torch.tensor(7))


def changes_a_copy(params, x):
    w = params["w"].clone()
    w.add_(1)
    w[0] = 5
    return w * x


def changes_through_a_view(params, x):
    w = params["w"].bfloat16()
    y = w.view(3, 1)
    w.mul_(2)
    return y * x


@pytest.mark.parametrize("function", [changes_a_copy, changes_through_a_view])
def test_what_is_made_beforehand_is_not_changed_afterwards(function):
    params, x = {"w": torch.arange(3.0)}, torch.ones(3)
    folded = fold(function, params, x)
    values = list(folded.before(params["w"]))
    assert any(folded.made)
    for _ in range(3):
        assert torch.equal(folded(values, x), function(params, x))
    assert torch.equal(params["w"], torch.arange(3.0))


def test_leaves_that_are_one_tensor_are_read_as_two():
    one, x = torch.randn(3), torch.randn(3)
    folded = fold(lambda params, x: params["a"] * x + params["b"], {"a": one, "b": one}, x)
    a, b = torch.randn(3), torch.randn(3)
    assert torch.equal(folded(list(folded.before(a, b)), x), a * x + b)
