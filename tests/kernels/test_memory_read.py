"""Reads of small memories: the raw kernels by the tolerance rule, the operation they stand behind, and who asks for it.

Letters: R chunks of all memories, C tokens a chunk, D head size, F hidden size.
"""

from __future__ import annotations

import functools

import pytest
import torch
from titanfunc_kernels import memory_read as raw
from titanfunc_kernels import memory_read_backward
from titanfunc_kernels.memory_read import Blocks

import titanfunc as tf
from tests.kernels import checks
from tests.kernels.checks import DEVICE, DTYPES, GPU, draw
from titanfunc.ops import backend
from titanfunc.ops import memory_read as operation
from titanfunc.ops.memory_read import memory_read

# depth, R, C, D, F, and how the hidden features are cut up (None: as the launch chooses)
SHAPES = [
    (2, 2, 16, 16, 16, None),
    (2, 2, 16, 16, 64, Blocks(16, 4, 1)),
    (2, 1, 32, 16, 32, Blocks(16, 4, 1)),
    (2, 1, 16, 32, 64, None),
    (1, 3, 16, 16, 16, None),
    (1, 1, 16, 32, 32, Blocks(16, 4, 1)),
    (1, 1, 32, 16, 16, None),
]
BLOCK_64 = [(2, 1, 64, 64, 128, Blocks(64, 4, 1)), (1, 1, 64, 64, 64, Blocks(64, 4, 1))]
LARGE = [
    (2, 1024, 64, 64, 256, None),
    (1, 1024, 64, 64, 64, None),
    *((2, 5, c, d, e * d, None) for c in (16, 32, 64) for d in (16, 32, 64, 128) for e in (1, 2, 4)),
    *((1, 5, c, d, d, None) for c in (16, 32, 64) for d in (16, 32, 64, 128)),
]
TAKEN = [
    (shape, dtype) for shape in LARGE for dtype in DTYPES if dtype == torch.bfloat16 or shape[2] * shape[3] <= 64 * 64
]


def problem(depth, *lead, tokens, size, hidden, dtype=torch.float32, state=None, seed=0):
    """The tensors of ``memory_read`` in order, in one list: a chunk is read as after writes of unit keys."""
    shapes = [(size, hidden), (hidden, size)] if depth == 2 else [(size, size)]
    state = state or dtype

    def rows(*shape, seed):
        return torch.nn.functional.normalize(draw(*lead, tokens, *shape, seed=seed), dim=-1).to(dtype)

    weights = [draw(*lead, *s, seed=seed + i, scale=s[0] ** -0.5).to(state) for i, s in enumerate(shapes)]
    momentum = [draw(*lead, *s, seed=seed + 2 + i, scale=0.3 * s[0] ** -0.5).to(state) for i, s in enumerate(shapes)]
    inputs = [rows(s[0], seed=seed + 4 + i) for i, s in enumerate(shapes)]
    errors = [rows(s[1], seed=seed + 6 + i) for i, s in enumerate(shapes)]
    beta, f = (torch.sigmoid(draw(*lead, tokens, seed=seed + 8 + i)) for i in range(2))
    g = torch.sigmoid(draw(*lead, tokens, tokens, seed=seed + 10)).tril()
    return [rows(size, seed=seed + 11), *weights, *momentum, *inputs, *errors, beta, f, g]


def read(*tensors, kernels="triton"):
    """The operation on the tensors of ``problem``."""
    depth = (len(tensors) - 4) // 4
    lists = [list(tensors[1 + i * depth : 1 + (i + 1) * depth]) for i in range(4)]
    return memory_read(tensors[0], *lists, *tensors[-3:], kernels=kernels)


reference = functools.partial(read, kernels="reference")


def check(shape, dtype, monkeypatch, state=None):
    depth, chunks, tokens, size, hidden, blocks = shape
    if blocks:
        monkeypatch.setattr(raw, "FORWARD", dict.fromkeys(raw.FORWARD, blocks))
        monkeypatch.setattr(memory_read_backward, "BACKWARD", dict.fromkeys(raw.FORWARD, blocks))
    tensors = problem(depth, chunks, tokens=tokens, size=size, hidden=hidden, dtype=dtype, state=state)
    checks.check_against_float64(read, reference, tensors, floor=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients(shape, dtype, monkeypatch):
    check(shape, dtype, monkeypatch)


@pytest.mark.parametrize("shape", BLOCK_64, ids=str)
def test_block_64(shape, monkeypatch):
    check(shape, torch.bfloat16, monkeypatch)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_states_wider_than_the_products(shape, monkeypatch):
    check(shape, torch.bfloat16, monkeypatch, state=torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="too large to interpret")
@pytest.mark.parametrize(("shape", "dtype"), TAKEN, ids=str)
def test_large(shape, dtype, monkeypatch):
    check(shape, dtype, monkeypatch)


def test_any_leading_axes():
    whole = problem(2, 2, 1, 2, tokens=16, size=16, hidden=32)
    flat = [t.flatten(0, 2) for t in whole]
    assert torch.equal(read(*whole), read(*flat).unflatten(0, (2, 1, 2)))
    assert read(*(t[:0] for t in flat)).shape == (0, 16, 16)


@pytest.mark.parametrize("depth", [1, 2])
def test_compiled_under_vmap_and_twice(depth):
    sizes = {"tokens": 16, "size": 16, "hidden": 16}
    tensors = problem(depth, 2, **sizes)
    argnums = tuple(range(len(tensors)))
    checks.check_compiled(read, tensors, argnums)
    checks.check_second(read, reference, tensors, argnums)
    pairs = [torch.stack(pair, -1) for pair in zip(tensors, problem(depth, 2, **sizes, seed=50), strict=True)]
    checks.check_vmap(read, pairs, [-1] * len(pairs), argnums)
    checks.check_vmap(read, [pairs[0], *tensors[1:]], [-1, *[None] * (len(pairs) - 1)], argnums)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_kernels_backward_is_the_one_that_runs(depth, monkeypatch):
    def marked(given, *rest):
        return given._replace(
            **{
                name: [torch.full_like(t, 100) for t in leaf] if isinstance(leaf, list) else torch.full_like(leaf, 100)
                for name, leaf in given._asdict().items()
            }
        )

    monkeypatch.setattr(memory_read_backward, "backward", marked)
    tensors = problem(depth, 1, tokens=16, size=16, hidden=16)
    gradient = checks.slopes_of(read, range(len(tensors)))
    torch._dynamo.reset()
    for run in (gradient, torch.compile(gradient, fullgraph=True, backend=checks.BACKEND)):
        assert all((slope == 100).all() for slope in run(*tensors))


@pytest.mark.parametrize("how", ["inclusive", "exclusive"])
@pytest.mark.parametrize(("depth", "size"), [(1, 16), (2, 16), (2, 24)])
def test_a_scan_reads_by_the_kernel_where_it_is_small(depth, size, how, monkeypatch):
    seen = []
    original = operation._triton
    monkeypatch.setitem(backend._TABLE["memory_read"], "triton", lambda *given: seen.append(1) or original(*given))
    net = tf.memory.mlp(size, 2 * size, depth=depth)
    weights = {name: draw(1, *w.shape[1:], scale=0.2) for name, w in net.init(torch.Generator(), 1).items()}
    rows = [draw(1, 1, 20, size, seed=2 + i, scale=0.3) for i in range(3)]
    gates = [torch.sigmoid(draw(1, 1, 20, seed=5 + i)) for i in range(3)]

    def run(kernels):
        def outputs(weights, rows, gates):
            state = tf.memory.init_state(weights, 1)
            return tf.memory.scan(
                net, state, *rows, tf.memory.Gates(*gates), 16, read=how, clip=0.5, kernels=kernels
            )[0]  # fmt: skip

        y, pull = torch.func.vjp(outputs, weights, rows, gates)
        return [y, *tf.tree.leaves(pull(draw(*y.shape, seed=9)))]

    checks.assert_near(run("triton"), run("reference"), 2e-5)
    assert len(seen) == (size == 16)


def test_what_is_refused(monkeypatch):
    assert operation.takes(2, 64, 64, 256, torch.bfloat16) and operation.takes(1, 64, 128, 128, torch.bfloat16)
    assert not operation.takes(2, 64, 512, 2048, torch.bfloat16) and not operation.takes(3, 16, 16, 16, torch.float32)
    assert not operation.takes(2, 64, 128, 128, torch.float32) and not operation.takes(1, 128, 64, 64, torch.bfloat16)
    assert not operation.takes(2, 16, 16, 16, torch.float64)
    for shape in LARGE:
        for dtype in DTYPES:
            assert operation.takes(shape[0], *shape[2:5], dtype) == ((shape, dtype) in TAKEN)
    q, w1, w2, s1, s2, x1, x2, e1, e2, *gates = problem(2, 1, tokens=16, size=16, hidden=32)
    lists = [w1, w2], [s1, s2], [x1, x2], [e1, e2]

    def refused(match, q=q, weights=lists[0], inputs=lists[2], gates=gates):
        with pytest.raises(ValueError, match=f"memory_read: {match}.*kernels=reference takes it"):
            memory_read(q, weights, lists[1], inputs, lists[3], *gates, kernels="triton")

    refused("q: wanted float32 or bfloat16", q=q.double())
    refused("q, weights: wanted small memories", q=q[:, :8])
    refused(r"weights: wanted \[.., N, 32, 16\]", weights=[w1, w2[..., :8]])
    refused("weights: wanted torch.float32", weights=[w1, w2.bfloat16()])
    refused("inputs: wanted torch.float32", inputs=[x1, x2.bfloat16()])
    refused("to_weights: wanted torch.float32", gates=[*gates[:2], gates[2].double()])
    bias = [torch.zeros(1, 32, device=DEVICE), torch.zeros(1, 16, device=DEVICE)]
    with pytest.raises(ValueError, match="weights: wanted matrices alone"):
        memory_read(q, [*lists[0], *bias], [*lists[1], *bias], *lists[2:], *gates, kernels="triton")
    with pytest.raises(ValueError, match=r"memory_read: chunk size: wanted one of .* got 8"):
        raw.forward(raw.Read(q[:, :8], *lists, *gates))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="memory_read: q: wanted a CUDA tensor"):
        read(*(t.cpu() for t in problem(2, 1, tokens=16, size=16, hidden=16)))
