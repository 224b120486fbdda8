"""Small memories, all chunks in one launch: the raw kernels by the tolerance rule, and the operation they stand behind.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from titanfunc_kernels import memory_small, memory_small_backward, order
from titanfunc_kernels.memory_small_common import Blocks, blocks_of, groups_of, refusal

from tests.kernels import checks, rounded
from tests.kernels.checks import DEVICE, GPU, draw
from titanfunc.ops import memory_write as reference
from titanfunc.ops.memory_write import memory_write

# depth, M, N, C, D, F, and how a memory is cut up (None: as the launch chooses)
SHAPES = [
    (2, 2, 3, 16, 16, 16, None),
    (2, 2, 3, 16, 16, 64, Blocks(1, 32, 4)),
    (2, 1, 2, 32, 16, 32, Blocks(1, 16, 4)),
    (2, 1, 2, 16, 32, 32, None),
    (1, 2, 3, 16, 16, 16, None),
    (1, 1, 2, 32, 32, 32, Blocks(1, 16, 4)),
]
BLOCK_64 = [(2, 1, 2, 64, 64, 64, None), (1, 1, 2, 64, 64, 64, None)]
LARGE = [
    *((2, 3, 9, 64, 64, 256, Blocks(p, 64, 8)) for p in (1, 2, 4)),
    (2, 100, 3, 64, 64, 256, None),
    (2, 32, 32, 64, 64, 256, None),
    *((2, 5, 7, c, d, e * d, None) for c in (16, 64, 128) for d, e in ((16, 4), (32, 2), (64, 1), (64, 2), (128, 2))),
    (2, 2, 3, 128, 128, 512, None),
    *((1, 5, 7, c, d, d, None) for c in (16, 64, 128) for d in (16, 32, 64, 128)),
]
# float32 is cut up in its own way, and not taken where a chunk's keys do not fit into shared memory
LARGE_FLOAT32 = dict.fromkeys((*shape[:-1], None) for shape in LARGE if shape[3] * shape[4] <= 64 * 64)


def problem(depth, memories, chunks, tokens, size, hidden, dtype=torch.float32, seed=0):
    """Arguments of the raw forward up to refresh, which is 0 here and there: for the first chunk of memory 0."""
    shapes = [(size, hidden), (hidden, size)] if depth == 2 else [(size, size)]
    lists = [
        [
            draw(memories, *shape, seed=seed + 10 * i + j, scale=scale * shape[0] ** -0.5)
            for j, shape in enumerate(shapes)
        ]
        for i, scale in enumerate((0.9, 0.3, 0.9))
    ]
    rows = (memories, chunks, tokens)
    k, v = (torch.nn.functional.normalize(draw(*rows, size, seed=seed + 40 + i), dim=-1).to(dtype) for i in range(2))

    def between(low, high, *shape, seed):
        return low + (high - low) * torch.sigmoid(draw(*shape, seed=seed))

    theta = between(0.0, min(0.3, 5 / tokens), *rows, seed=seed + 50)
    g, n = (between(0.1, 1.0, *rows, seed=seed + 51 + i) for i in range(2))
    factors = [between(0.2, 0.95, *rows[:2], seed=seed + 53 + i) for i in range(3)]
    refresh = torch.ones(rows[:2], device=DEVICE)
    refresh[0, 0] = 0
    if chunks > 2:
        refresh[-1, 1] = 0
    return *lists, k, v, theta, g, n, *factors, refresh


def flat(arguments):
    weights, momentum, anchor, *rest = arguments
    return [*weights, *momentum, *anchor, *rest]


def fields(scan):
    return [*scan.weights, *scan.momentum, *scan.last_weights, *scan.last_momentum, *scan.anchor, *scan.inputs,
            *scan.errors, scan.loss, scan.kept]  # fmt: skip


def by_reference(arguments, clip, dtype, cotangents, first_order=False, wide=False):
    """Outputs and gradients of the reference, its histories rounded as the kernels keep them; or all in float64."""
    depth = len(arguments[0])
    tensors = [(t.double() if wide else t).unsqueeze(0) for t in flat(arguments)]
    settings = [depth, depth, 0, int(first_order)], [clip, 0.0, 1.0]
    outputs = reference.write_chunks(tensors, *settings)
    if not wide:
        outputs[: 2 * depth] = [past.to(dtype) for past in outputs[: 2 * depth]]
    given = [(t.double() if wide else t.float()).unsqueeze(0) for t in cotangents]
    kept = [past.to(t.dtype) for past, t in zip(outputs, given, strict=True)]
    gradients = reference._backward(tensors, kept, given, *settings)
    return [t.squeeze(0) for t in outputs], [t.squeeze(0) for t in gradients[:-1]]


def check(arguments, clip, dtype, first_order=False, blocks=None):
    with checks.poison():
        outputs = memory_small.forward(*arguments, clip, dtype, blocks)
    given = outputs._replace(
        **{
            name: [draw(*t.shape, dtype=t.dtype, seed=100 * i + j) for j, t in enumerate(ts)]
            for i, (name, ts) in enumerate(outputs._asdict().items()) if isinstance(ts, list)
        },
        loss=draw(*outputs.loss.shape, seed=900),
    )  # fmt: skip
    with checks.poison():
        gradients = memory_small_backward.backward(*arguments, clip, outputs, *given[:8], first_order, blocks)
    plain = by_reference(arguments, clip, dtype, fields(given), first_order)
    exact = by_reference(arguments, clip, dtype, fields(given), first_order, wide=True)
    for i, (got, near, true) in enumerate(zip(fields(outputs), plain[0], exact[0], strict=True)):
        checks.assert_as_exact(f"output {i}", got, near.to(got.dtype), true, 2e-6)
    near = [each.to(got.dtype) for got, each in zip(gradients, plain[1], strict=True)]
    rounded.assert_gradients_as_exact(dtype, gradients, near, exact[1], len(gradients) - 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_outputs_and_gradients(shape, dtype):
    check(problem(*shape[:-1], dtype=dtype), 1.0, dtype, blocks=shape[-1])


@pytest.mark.parametrize("shape", BLOCK_64, ids=str)
def test_block_64(shape):
    check(problem(*shape[:-1], dtype=torch.bfloat16), 1.0, torch.bfloat16, blocks=shape[-1])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="too large to interpret")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.bfloat16) for shape in LARGE), *((shape, torch.float32) for shape in LARGE_FLOAT32)],
    ids=str,
)
# Bites every token, or none: at the edge a rounding may turn a gradient over.
@pytest.mark.parametrize("clip", [0.02, 1e3])
def test_large(shape, dtype, clip):
    check(problem(*shape[:-1], dtype=dtype), clip, dtype, blocks=shape[-1])


@pytest.mark.parametrize("shape", [(2, 2, 0, 16, 16, 16), (2, 0, 2, 16, 16, 16), (1, 2, 0, 16, 16, 16)], ids=str)
def test_no_chunks_and_no_memories(shape):
    depth, memories, chunks, tokens, size, hidden = shape
    arguments = problem(depth, memories or 1, chunks or 1, tokens, size, hidden)
    cut = [[t[:memories] for t in ts] if isinstance(ts, list) else t_of(ts, memories, chunks) for ts in arguments]
    scan = memory_small.forward(*cut, 1.0, torch.float32)
    for last, first in zip([*scan.last_weights, *scan.last_momentum, *scan.anchor], flat(cut), strict=False):
        assert torch.equal(last, first)
    given = [[torch.ones_like(t) for t in ts] if isinstance(ts, list) else torch.ones_like(ts) for ts in scan[:8]]
    gradients = memory_small_backward.backward(*cut, 1.0, scan, *given)
    assert all((t == 1).all() for t in gradients[: 3 * depth])
    assert [t.shape for t in gradients] == [t.shape for t in flat(cut)[:-1]]


def t_of(tensor, memories, chunks):
    """The first so many memories and chunks."""
    return tensor[:memories, :chunks]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="programs that wait for each other need a device that runs them at once")
def test_programs_that_share_a_memory_give_the_same_bits_every_time():
    arguments = problem(2, 32, 8, 64, 64, 256, dtype=torch.bfloat16)
    first = memory_small.forward(*arguments, 1.0, torch.bfloat16, Blocks(4, 64, 8))
    for _ in range(20):
        again = memory_small.forward(*arguments, 1.0, torch.bfloat16, Blocks(4, 64, 8))
        assert all(torch.equal(a, b) for a, b in zip(fields(first), fields(again), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="launches overlap on a device alone")
def test_launches_that_overlap_give_the_same_bits(monkeypatch):
    arguments = problem(2, 32, 8, 64, 64, 256, dtype=torch.bfloat16)
    scan = memory_small.forward(*arguments, 0.2, torch.bfloat16)
    given = [[torch.randn_like(t) for t in ts] if isinstance(ts, list) else torch.randn_like(ts) for ts in scan[:8]]
    monkeypatch.setattr(order, "OVERLAP", False)
    apart = memory_small_backward.backward(*arguments, 0.2, scan, *given)
    monkeypatch.setattr(order, "OVERLAP", True)
    for _ in range(20):
        together = memory_small_backward.backward(*arguments, 0.2, scan, *given)
        assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_how_memories_are_cut_up():
    assert blocks_of(1, 64, 64, 256, 2, torch.bfloat16, torch.device("cpu")).programs == 1
    groups = groups_of(7, 1, torch.zeros(()))  # two at once
    assert [(g.start, g.stop) for g in groups] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert groups_of(1, 8, torch.zeros(())) == [slice(0, 1)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("clip", "first_order"), [(0.0, False), (0.2, True), (0.2, False)])
def test_clip_and_first_order(depth, clip, first_order):
    check(problem(depth, 2, 3, 16, 16, 16), clip, torch.float32, first_order)


@pytest.mark.parametrize("depth", [1, 2])
def test_states_wider_than_the_products(depth):
    arguments = problem(depth, 3, 3, 16, 16, 16, dtype=torch.bfloat16)
    assert memory_small.forward(*arguments, 1.0, torch.float32).weights[0].dtype == torch.float32
    check(arguments, 1.0, torch.float32)


@pytest.mark.parametrize("refresh", [[0, 0, 0], [0, 1, 0]])
@pytest.mark.parametrize("depth", [1, 2])
def test_anchors(depth, refresh):
    *arguments, _ = problem(depth, 1, 3, 16, 16, 16)
    check((*arguments, torch.tensor([refresh], dtype=torch.float32, device=DEVICE)), 1.0, torch.float32)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("shape", [(2, 2, 3, 16, 16, 32), (1, 2, 3, 16, 16, 16)], ids=str)
def test_writes_that_are_not_finite_are_dropped(shape):
    arguments = problem(*shape)
    k, v, theta = arguments[3:6]
    k[0, 0, 3, 2], v[1, 1, 2, 0], theta[1, 1, 4] = torch.nan, torch.inf, torch.nan
    blocks = Blocks(1, 16, 4)
    kept = memory_small.forward(*arguments, 1.0, torch.float32, blocks).kept
    assert kept.sum() == kept.numel() - 3
    check(arguments, 1.0, torch.float32, blocks=blocks)
    k[0, 2, 1] = 1e19  # its gradient's square is not finite
    outputs = memory_small.forward(*arguments, 1.0, torch.float32, blocks)
    assert outputs.kept.sum() == kept.numel() - 4 and not outputs.errors[0][0, 2, 1].any()
    given = [[torch.ones_like(t) for t in ts] if isinstance(ts, list) else torch.ones_like(ts) for ts in outputs[:8]]
    gradients = memory_small_backward.backward(*arguments, 1.0, outputs, *given, blocks=blocks)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_what_is_refused():
    def refused(depth=2, size=64, hidden=256, tokens=64, product=torch.bfloat16, state=torch.bfloat16):
        return refusal(depth, size, hidden, tokens, product, state)

    assert not refused()
    assert "depth" in refused(depth=3)
    assert "head size" in refused(size=48)
    assert "hidden size" in refused(hidden=192)
    assert "chunk size" in refused(tokens=63)
    assert "keys" in refused(product=torch.float16)
    for shape in LARGE:
        *_, tokens, size, hidden, _ = shape
        refusal_of_float32 = refused(shape[0], size, hidden, tokens, torch.float32, torch.float32)
        assert ("keys" in refusal_of_float32) == ((*shape[:-1], None) not in LARGE_FLOAT32) == bool(refusal_of_float32)
    assert "state" in refused(product=torch.float32)
    arguments = problem(2, 1, 1, 16, 16, 16)
    short = [t[:, :, :8] for t in arguments[3:8]]
    with pytest.raises(ValueError, match=r"memory_small: chunk size: wanted one of .* got 8"):
        memory_small.forward(*arguments[:3], *short, *arguments[8:], 1.0, torch.float32)
    with pytest.raises(ValueError, match="memory_small: weights: wanted float32"):
        memory_small.forward([w.double() for w in arguments[0]], *arguments[1:], 1.0, torch.float32)


def operation(depth, *tensors, kernels="triton"):
    """The operation on tensors [B, H, ...]; what it returns in one tuple, histories in k's dtype."""
    lists = [list(tensors[i * depth : (i + 1) * depth]) for i in range(3)]
    *written, loss, _ = memory_write(*lists, *tensors[3 * depth :], depth=depth, clip=1.0, kernels=kernels)
    return (*(t for leaves in written for t in leaves), loss)


def batch(depth, seed=0):
    return [t.unsqueeze(0) for t in flat(problem(depth, 1, 2, 16, 16, 16, seed=seed))]


@pytest.mark.parametrize("depth", [1, 2])
def test_compiled_under_vmap_and_twice(depth):
    tensors = batch(depth)
    argnums = (0, 3 * depth, 3 * depth + 2)
    triton, plain = partial(operation, depth), partial(operation, depth, kernels="reference")
    checks.check_compiled(triton, tensors, argnums)
    checks.check_second(triton, plain, tensors, argnums)
    pairs = [torch.stack(pair) for pair in zip(tensors, batch(depth, seed=7), strict=True)]
    checks.check_vmap(triton, pairs, [0] * len(pairs), argnums)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_kernels_backward_is_the_one_that_runs(depth):
    checks.check_backward_that_runs(
        memory_small_backward, "backward", partial(operation, depth), batch(depth), (0, 3 * depth, 3 * depth + 1)
    )
