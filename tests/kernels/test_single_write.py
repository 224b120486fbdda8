"""The single write: Triton against the reference, at both precisions, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from titanfunc_kernels import single_write as raw

import titanfunc as tf
from tests.kernels import checks
from tests.kernels.checks import DEVICE, DTYPES, GPU, draw
from titanfunc.ops import _by_reference
from titanfunc.ops.single_write import single_write

# N, D, F
LARGE = [
    (2048, 512, 512), (333, 65, 190), (1000, 128, 64), (64, 64, 64), (77, 512, 1024), (8192, 512, 512),
    (4100, 272, 1104),
]  # fmt: skip
SHAPES = LARGE if GPU else [(70, 24, 40), (33, 17, 5), (64, 64, 64), (1, 3, 2)]
SHAPES = [*SHAPES, (3, 1, 1), (5, 3, 1)]
SMALL = (19, 12, 20)
OPTIONS = [  # masked, reduction, largest norm as a part of the gradient's
    (False, "mean", None),
    (True, "mean", 0.5),
    (True, "sum", 2.0),
    (False, "sum", 0.1),
]


# Tiles so small that every stage has many of them: rows cut into shares, or weights cast ahead of all else.
CUTS = {
    "shares": raw.Blocks(32, 32, 32, 32, 32, 16, 16, 512, 4, 2),
    "cast ahead": raw.Blocks(32, 32, 32, 32, 16, 16, 1, 512, 4, 2, ahead=True, together=False, early=True),
}


@pytest.fixture(params=["as tuned", *CUTS])
def blocks(request, monkeypatch):
    """Tiles as they are, or those of a cut."""
    if request.param in CUTS:
        monkeypatch.setattr(raw, "blocks_of", lambda *sizes: CUTS[request.param])
        monkeypatch.setattr(raw, "SUM_BLOCK", 16)
        monkeypatch.setattr(raw, "WHOLE", 256)


def problem(shape, depth, dtype=torch.float32, memories=()):
    """Matrices and momenta, k, v, three rates and a mask, each with the axes ``memories`` before it."""
    n, d, f = shape
    sizes = [(d, f), (f, d)] if depth == 2 else [(d, d)]
    weights = [draw(*memories, *size, seed=i, scale=size[0] ** -0.5) for i, size in enumerate(sizes)]
    momentum = [draw(*memories, *size, seed=5 + i, scale=0.1) for i, size in enumerate(sizes)]
    k, v = (draw(*memories, n, d, dtype=dtype, seed=10 + i) for i in range(2))
    rates = [torch.full(memories, rate, device=DEVICE) for rate in (0.1, 0.8, 0.7)]
    mask = (draw(*memories, n, seed=20) > -0.5).float() * draw(*memories, n, seed=21).abs()
    return [*weights, *momentum, k, v, *rates, mask]


def function(depth, kernels, masked=True, reduction="mean", largest=None, rates=None):
    """The write as a function of a problem's tensors, loss and norm as [1]; rates: numbers in place of its tensors."""

    def write(*tensors):
        k, v, *given, mask = tensors[2 * depth :]
        found = single_write(
            tensors[:depth], tensors[depth : 2 * depth], k, v, *(rates or given), mask if masked else None,
            max_grad_norm=largest, reduction=reduction, kernels=kernels,
        )  # fmt: skip
        return (*found.weights, *found.momentum, found.loss.reshape(1), found.grad_norm.reshape(1))

    return write


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_as_exact_as_the_reference(shape, depth, dtype, blocks):
    masked, reduction, part = OPTIONS[SHAPES.index(shape) % len(OPTIONS)]
    tensors = problem(shape, depth, dtype)
    options = {"masked": masked, "reduction": reduction}
    norm = float(function(depth, "reference", **options)(*tensors)[-1])
    options["largest"] = part and part * norm
    kernel, reference = (function(depth, kernels, **options) for kernels in ("triton", "reference"))
    # Where bfloat16 rounds what they sum, single numbers, the loss and the norm, are as close as luck has it, and so
    # are matrices of three: 0.7 % apart is luck, and float32 says the rest of them.
    single, few = (1e-6, 1e-6) if dtype == torch.float32 else (2.0**-9, 2.0**-6 if shape[2] == 1 else 1e-6)
    checks.check_against_float64(
        lambda *t: kernel(*t)[: 2 * depth], lambda *t: reference(*t)[: 2 * depth], tensors, floor=few
    )
    wide = reference(*(t.double() for t in tensors))
    for name, *numbers in zip(
        ("loss", "norm"), *(f[2 * depth :] for f in (kernel(*tensors), reference(*tensors), wide)), strict=True
    ):
        checks.assert_as_exact(name, *numbers, max(single, few))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("masked", "reduction", "part"), OPTIONS)
def test_every_option_with_rates_as_numbers(depth, masked, reduction, part, blocks):
    tensors = problem(SMALL, depth)
    options = {"masked": masked, "reduction": reduction, "rates": (0.2, 0.9, 0.3)}
    norm = float(function(depth, "reference", **options)(*tensors)[-1])
    options["largest"] = part and part * norm
    checks.check_against_float64(
        function(depth, "triton", **options), function(depth, "reference", **options), tensors, gradients=False
    )


def test_a_mask_of_zeros_and_rows_that_are_not_finite():
    for broken in (False, True):
        *tensors, mask = problem(SMALL, 2)
        if broken:
            tensors[4][3, 0] = torch.nan
        else:
            mask.zero_()
        want = function(2, "reference")(*tensors, mask)
        got = function(2, "triton")(*tensors, mask)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert not broken or all(torch.equal(a, b) for a, b in zip(got[:4], tensors[:4], strict=True))


@pytest.mark.parametrize("depth", [1, 2])
def test_maps_over_memories(depth, blocks):
    memories = 3
    tensors = problem(SMALL, depth, memories=(memories,))
    shared = 2 * depth  # k is one for all memories, the second axis of v is theirs
    tensors[shared], tensors[shared + 1] = tensors[shared][0], tensors[shared + 1].movedim(0, 1)
    in_dims = [0] * len(tensors)
    in_dims[shared], in_dims[shared + 1] = None, 1
    checks.check_vmap(function(depth, "triton", largest=0.1), tensors, in_dims, range(shared + 2))


def test_one_broken_memory_harms_no_other():
    tensors = problem(SMALL, 2, memories=(3,))
    tensors[4][1, 2, 3] = torch.inf
    got = torch.func.vmap(function(2, "triton"))(*tensors)
    for ours, old in zip(got[:4], tensors[:4], strict=True):
        assert torch.isfinite(ours).all()
        assert [torch.equal(ours[i], old[i]) for i in range(3)] == [False, True, False]


@pytest.mark.parametrize("depth", [1, 2])
def test_compiled_and_twice_differentiated(depth):
    tensors = problem(SMALL, depth)
    argnums = range(len(tensors))
    write, reference = (function(depth, kernels, largest=0.1) for kernels in ("triton", "reference"))
    checks.check_compiled(write, tensors, argnums)
    checks.check_second(write, reference, tensors, argnums)
    checks.check_backward_that_runs(_by_reference, "gradients", write, tensors, argnums)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_takes_it(depth, dtype):
    _, d, f = SMALL
    *tensors, k, v, forget, decay, rate, mask = problem(SMALL, depth, dtype)
    net = tf.memory.mlp(d, f, depth=depth)
    weights, momentum = ({f"w{i}": tensors[first + i] for i in range(depth)} for first in (0, depth))
    want, got = (
        tf.memory.update(net, weights, momentum, k, v, forget, decay, rate, 0.1, mask=mask, kernels=kernels)
        for kernels in ("reference", "triton")
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for name in weights:
        torch.testing.assert_close(got.weights[name], want.weights[name], **tolerance)
        torch.testing.assert_close(got.momentum[name], want.momentum[name], **tolerance)
    torch.testing.assert_close(got.loss, want.loss, **tolerance)
    torch.testing.assert_close(got.grad_norm, want.grad_norm, **tolerance)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t.double(), r"weights\[0\]: wanted float32"),
        (1, lambda t: t[:, :4], r"weights\[1\]: wanted shape \[20, 12\]"),
        (2, lambda t: t.T, r"momentum\[0\]: wanted shape \[12, 20\]"),
        (4, lambda t: t.half(), "k: wanted float32 or bfloat16"),
        (4, lambda t: t[:0], "k: wanted .* neither of them 0"),
        (5, lambda t: t.bfloat16(), "v: wanted k's dtype"),
        (5, lambda t: t[:3], r"v: wanted k's shape, \[19, 12\]"),
        (6, lambda t: t.expand(2), "forget: wanted a number or a 0-d tensor"),
        (9, lambda t: t[:3], r"mask: wanted shape \[19\]"),
        (9, lambda t: t.to("meta"), "mask: wanted a tensor on k's device"),
    ],
)  # fmt: skip
def test_refuses(place, change, message):
    tensors = problem(SMALL, 2)
    tensors[place] = change(tensors[place])
    with pytest.raises(ValueError, match=f"single_write: {message}"):
        function(2, "triton")(*tensors)


def test_refuses_a_cpu_that_does_not_interpret(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="single_write: k: wanted a CUDA tensor"):
        function(2, "triton")(*(t.cpu() for t in problem(SMALL, 2)))


def test_refuses_networks_and_options():
    net = tf.memory.mlp(4, 6, bias=True)
    x = torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="net: wanted an MLP without biases"):
        tf.memory.update(net, {}, {}, x, x, 0.1, 0.9, 0.1, kernels="triton")
    module = tf.memory.from_module(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"net: wanted .* from a module"):
        tf.memory.update(module, {}, {}, x, x, 0.1, 0.9, 0.1, kernels="triton")
    three = [torch.zeros(4, 4, device=DEVICE)] * 3
    with pytest.raises(ValueError, match="weights: wanted one or two layers"):
        single_write(three, three, x, x, 0.1, 0.9, 0.1, kernels="triton")
    with pytest.raises(ValueError, match="kernels: wanted one of reference, triton"):
        single_write(three, three, x, x, 0.1, 0.9, 0.1, kernels="cuda")
    with pytest.raises(ValueError, match="reduction: wanted one of mean, sum"):
        single_write(three, three, x, x, 0.1, 0.9, 0.1, reduction="max")
    with pytest.raises(ValueError, match="max_grad_norm: wanted None or a positive norm"):
        single_write(three, three, x, x, 0.1, 0.9, 0.1, max_grad_norm=0.0)


def raw_write(tensors, depth, together):
    *matrices, k, v, forget, decay, rate, mask = tensors
    found = raw.single_write(
        matrices[:depth], matrices[depth:], k, v, [forget, decay, rate], mask, max_grad_norm=0.1, together=together
    )
    return [*found.weights, *found.momentum, found.loss, found.grad_norm]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memories", [1, 5])
def test_a_launch_for_all_stages_computes_what_a_launch_a_stage_does(depth, dtype, memories, blocks, monkeypatch):
    if not GPU:  # programs run one after another, so that only one can wait for all
        monkeypatch.setattr(raw, "multiprocessors", lambda tensor: 1)
    tensors = problem(LARGE[0] if GPU else SMALL, depth, dtype, (memories,))
    with checks.poison():
        apart, together = (raw_write(tensors, depth, together) for together in (False, True))
    checks.assert_near(together, apart, 1e-5)


@pytest.mark.parametrize(("n", "tiles"), [(1, 1), (70, 3), (2048, 32), (256, 128), (8192, 64)])
def test_shares_cover_the_rows_and_none_is_empty(n, tiles):
    for blocks in (raw.FEW, raw.MANY, *raw.BLOCKS.values(), *CUTS.values()):
        share, shares = raw._shares(blocks, tiles, n)
        assert share % blocks.gradient_inner == 0
        assert (shares - 1) * share < n <= shares * share
        assert shares * tiles <= max(blocks.fill, tiles)


def test_tiles_go_by_the_work():
    sizes = [(256, 512, 512), (2048, 512, 512), (8192, 512, 2048)]
    assert [raw.blocks_of(torch.bfloat16, 1, *size) for size in sizes] == [
        raw.FEW,
        raw.BLOCKS[torch.bfloat16],
        raw.MANY,
    ]
    assert raw.blocks_of(torch.bfloat16, 8, *sizes[1]) == raw.MANY
    for d in (64, 500):
        assert raw.blocks_of(torch.bfloat16, 8, 2048, d, 512) == raw.BLOCKS[torch.bfloat16]
    assert {raw.blocks_of(torch.float32, 1, *size) for size in sizes} == {raw.BLOCKS[torch.float32]}


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("how", [{"together": True}, {"together": False}, {"together": False, "early": True}])
def test_a_graph_repeats_its_bits(depth, how, monkeypatch):
    tuned = raw.BLOCKS[torch.bfloat16]
    monkeypatch.setattr(raw, "blocks_of", lambda *sizes: tuned._replace(**how))
    tensors = problem(LARGE[0], depth, torch.bfloat16, (2,))
    want = raw_write(tensors, depth, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = raw_write(tensors, depth, None)
    for _ in range(20):
        graph.replay()
        again = raw_write(tensors, depth, None)
        assert all(torch.equal(a, b) for found in (captured, again) for a, b in zip(found, want, strict=True))
