"""Every model with its blocks computed again: the same losses and gradients, compiled, with less memory."""

from __future__ import annotations

import pytest
import torch

import titanfunc as tf
from tests.graph_memory import count, graph_of, peak
from tests.kernels.test_models import DEVICE, SIZES, draw
from tests.memory.problems import assert_same_tree
from tests.models.small import MODELS, draw_tokens, small
from titanfunc import tree
from titanfunc.train.step import loss_fn

REMAT = ("none", "layer")


def outcomes(name, tokens, documents=None, **changes):
    """(gradients, (loss, metrics)) in float32 with blocks kept, and with blocks computed again."""
    for remat in REMAT:
        model, params = small(name, remat=remat, **changes)
        params = tree.map(lambda leaf: leaf.float(), params)
        seed = torch.tensor(3) if "feed_forward" in changes else None

        def objective(params, model=model, seed=seed):
            return loss_fn(model, params, tokens, seed=seed, documents=documents)

        yield torch.func.grad_and_value(objective, has_aux=True)(params)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_metrics_are_bit_equal(name, packed):
    starts = torch.zeros(2, 19, dtype=torch.bool)
    starts[0, 7] = starts[1, 0] = True
    documents = tf.memory.Documents(starts, 3) if packed else None
    kept, again = outcomes(name, draw_tokens(2, 20), documents)
    named = tree.named_leaves(kept)
    assert [k for (k, a), b in zip(named.items(), tree.leaves(again), strict=True) if not torch.equal(a, b)] == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mal", {"feed_forward": "moe"}),
        ("input", {"feed_forward": "cms", "cms": {"periods": (1, 3)}, "memory_layers": (1,)}),
        ("mag", {"precision": "fp8"}),
        ("attention", {"precision": "bf16"}),
    ],
)
def test_so_are_mixtures_chains_and_low_precisions(name, changes):
    kept, again = outcomes(name, draw_tokens(2, 20), **changes)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(kept), tree.leaves(again), strict=True))


@pytest.mark.parametrize("name", ["mac_attention", "mal"])
def test_with_kernels_too(name):
    from tests.kernels.test_models import MODELS as PRESETS

    preset, changes = PRESETS[name]
    found = []
    for remat in REMAT:
        options = {**SIZES, **changes, "layers": 1, "kernels": "triton", "remat": remat}
        model = tf.models.build(tf.models.preset(preset, **options))
        params = tree.map(lambda p: p.to(DEVICE), model.init(torch.Generator().manual_seed(0)))
        found.append(torch.func.grad_and_value(lambda p, m=model: loss_fn(m, p, draw(2, 33))[0])(params))
    assert_same_tree(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_pieces_and_states_are_the_same():
    for name in ("attention", "mag"):
        found = []
        for remat in REMAT:
            model, params = small(name, remat=remat)
            memory = model.init_memory(params, 2)
            for write in (True, False):
                logits, memory = model.apply(params, memory, draw_tokens(2, 11), write=write)
            found.append((logits, memory))
        assert_same_tree(found[1], found[0])


@pytest.mark.parametrize(("name", "layers", "writes"), [("transformer", 4, 0), ("lmm", 2, 1)])
def test_the_graph_computes_blocks_twice_and_memory_grows_by_their_inputs(name, layers, writes):
    held = {}
    for remat in REMAT:
        for depth in (layers // 2, layers):
            model, params = small(name, remat=remat, layers=depth)
            params = tree.map(lambda leaf: leaf.float(), params)
            graph = graph_of(torch.func.grad(lambda p, t, m=model: loss_fn(m, p, t)[0]), params, draw_tokens(4, 65))
            held[remat, depth] = peak(graph)
            assert count(graph, "titanfunc.barrier") == (depth if remat == "layer" else 0)
            assert count(graph, "memory_write.default") == writes * depth * (2 if remat == "layer" else 1)
    grown = {remat: (held[remat, layers] - held[remat, layers // 2]) / (layers // 2) for remat in REMAT}
    stream = 4 * 64 * 16 * 4
    weights = 4 * sum(leaf.numel() for leaf in tree.leaves(params["blocks"])) / layers
    # A further block keeps its input, and the gradients of its weights and of its memory's first ones.
    assert grown["layer"] <= stream + 3 * weights
    assert grown["none"] >= 5 * grown["layer"]


def test_remat_is_named_where_it_is_unknown():
    with pytest.raises(ValueError, match="remat: wanted one of none, layer"):
        tf.models.preset("mac_tiny", remat="block")
