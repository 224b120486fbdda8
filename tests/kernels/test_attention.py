"""Window and segment attention: kernels against their references, and against the models' own attention."""

from functools import partial
from unittest import mock

import pytest
import torch

from tests.kernels import checks
from titanfunc import models
from titanfunc.models.base import Call
from titanfunc.models.mac_piece import Piece
from titanfunc.nn import WindowCache, empty_cache, rotary_table, rotate
from titanfunc.nn import window_attention as block_by_block
from titanfunc.ops.attention import attention
from titanfunc.ops.segment_attention import segment_attention
from titanfunc.ops.window_attention import window_attention

# B, H, T, W, D, P: odd lengths, a window longer than the text, of one token, blocks of 64, one token, long prefixes.
WINDOWS = [
    (2, 2, 37, 21, 16, 5), (1, 1, 130, 64, 64, 17), (1, 1, 20, 75, 32, 0), (2, 1, 9, 1, 16, 1), (1, 1, 1, 9, 32, 2),
    (1, 1, 64, 64, 128, 70),
]  # fmt: skip
# B, H, R, S, D, P, with or without context.
SEGMENTS = [
    (2, 2, 3, 21, 16, 5, True), (1, 1, 2, 130, 64, 17, True), (1, 2, 2, 33, 32, 0, True), (1, 1, 2, 20, 16, 3, False),
    (1, 1, 1, 64, 128, 70, True), (1, 1, 5, 1, 16, 1, True),
]  # fmt: skip
BLOCKS = [(64, 64), (32, 64), (64, 32), (64, 128)]
if checks.GPU:
    WINDOWS += [
        (2, 3, 1000, 500, 64, 16),
        (3, 2, 1500, 64, 128, 5),
        (2, 2, 513, 2048, 32, 100),
        (1, 4, 4096, 512, 64, 0),
    ]
    SEGMENTS += [(2, 3, 3, 500, 64, 16, True), (2, 2, 5, 257, 128, 5, True), (4, 4, 2, 512, 64, 100, False)]


def ages(batch, tokens, window, seed=7):
    """Documents that begin at random places, after caches filled to random depths."""
    source = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, tokens, generator=source) < 2 / (tokens + 10)
    age = torch.empty(batch, tokens, dtype=torch.int64)
    run = torch.randint(0, window + 3, (batch,), generator=source)
    for t in range(tokens):
        run = torch.where(starts[:, t], 0, run)
        age[:, t] = run
        run = run + 1
    return age.to(checks.DEVICE)


def windows(batch, heads, tokens, window, size, prefix, dtype=torch.float32):
    """A function (q, keys, values, age, ...) with ``kernels``, and its arguments."""
    shapes = [(batch, heads, tokens, size), *[(batch, heads, window + tokens, size)] * 2]
    if prefix:
        shapes += [(batch, heads, tokens, size), *[(heads, prefix, size)] * 2]
    tensors = [checks.draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    tensors.insert(3, ages(batch, tokens, window))

    def function(q, keys, values, age, *fixed, kernels="reference"):
        return window_attention(q, keys, values, age, fixed or None, kernels=kernels)

    return function, tensors


def segments(batch, heads, count, segment, size, prefix, context, dtype=torch.float32):
    """A function (q, keys, values, ...) with ``kernels``, and its arguments."""
    shapes = [(batch, heads, count * segment, size)] * (5 if context else 3)
    shapes += [(heads, prefix, size)] * 2 if prefix else []
    tensors = [checks.draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]

    def function(q, keys, values, *rest, kernels="reference"):
        read, fixed = (rest[:2], rest[2:]) if context else (None, rest)
        return segment_attention(q, keys, values, segment, read, fixed or None, kernels=kernels)

    return function, tensors


def check(function, tensors, floor=1e-6):
    checks.check_against_float64(partial(function, kernels="triton"), function, tensors, floor=floor)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_window(shape, dtype):
    check(*windows(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SEGMENTS, ids=str)
def test_segments(shape, dtype):
    check(*segments(*shape, dtype=dtype))


@pytest.fixture
def with_blocks():
    """Has every kernel take blocks of so many queries and keys; gives the function that says how many."""
    from titanfunc_kernels import attention as forward
    from titanfunc_kernels import attention_backward as backward

    tables = [forward.FORWARD, backward.BY_QUERIES, backward.BY_KEYS]
    before = [dict(table) for table in tables]

    def take(queries, keys):
        for table in tables:
            table.update({key: blocks._replace(queries=queries, keys=keys) for key, blocks in table.items()})

    yield take
    for table, old in zip(tables, before, strict=True):
        table.update(old)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_blocks(blocks, with_blocks):
    with_blocks(*blocks)
    check(*windows(1, 1, 150, 70, 64, 20, dtype=torch.bfloat16))
    check(*segments(1, 1, 2, 140, 64, 20, True, dtype=torch.bfloat16))


def test_several_stretches_of_the_prefix():
    from titanfunc_kernels import attention_backward

    with mock.patch.object(attention_backward, "STRETCH", 20):
        check(*windows(2, 1, 90, 10, 16, 20))
        check(*segments(1, 2, 3, 23, 16, 70, True))


def test_large_scores():
    function, tensors = windows(1, 1, 50, 20, 32, 3)
    # Powers of two of scores near 100 on a GPU: 2 units in the last place, and what the scores' rounding adds.
    check(function, [4 * t if t.is_floating_point() else t for t in tensors], floor=4e-6)


def test_what_is_not_contiguous():
    function, tensors = segments(2, 3, 2, 17, 16, 4, True)
    check(function, [t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 4 else t for t in tensors])


def test_what_is_out_of_sight_is_not_loaded(with_blocks):
    with_blocks(16, 16)
    function, (q, keys, values, _) = windows(1, 1, 96, 32, 16, 0)
    t = torch.arange(96, device=checks.DEVICE).unsqueeze(0)
    age = t.where(t < 48, t - 48)  # nothing of the cache is seen, and a second document begins
    slopes = partial(torch.func.grad(checks.loss_of(partial(function, kernels="triton")), (0, 1, 2)))
    want = slopes(q, keys, values, age)
    lost = [x.clone() for x in (keys, values)]
    for x in lost:
        x[:, :, :32] = torch.nan
    for got, fine in zip(slopes(q, *lost, age), want, strict=True):
        assert torch.equal(got, fine)
    late = q.clone()
    late[:, :, 48:] = torch.nan  # the second document's
    for got, fine in zip(slopes(late, keys, values, age)[1:], want[1:], strict=True):
        assert torch.equal(got[:, :, :80], fine[:, :, :80])
        assert got[:, :, 80:].isnan().any()


@pytest.mark.parametrize("start", [15, 16, 17])
def test_documents_that_begin_beside_a_blocks_edge(start, with_blocks):
    with_blocks(16, 16)
    function, (q, keys, values, _) = windows(1, 1, 40, 33, 16, 0)
    t = torch.arange(40, device=checks.DEVICE).unsqueeze(0)
    check(function, [q, keys, values, t.where(t < start, t - start)])


def test_queries_past_the_window_are_not_loaded(with_blocks):
    with_blocks(16, 16)
    function, (q, keys, values, age) = windows(1, 1, 96, 32, 16, 0)
    age = torch.full_like(age, 200)
    slopes = partial(torch.func.grad(checks.loss_of(partial(function, kernels="triton")), (0, 1, 2)))
    want = slopes(q, keys, values, age)
    q[:, :, 64:] = torch.nan
    for got, fine in zip(slopes(q, keys, values, age)[1:], want[1:], strict=True):
        assert torch.equal(got[:, :, :64], fine[:, :, :64])


@pytest.mark.parametrize("prefix", [0, 3])
def test_window_is_the_models(prefix):
    """Pieces one after another, the cache filled in part, documents that begin anywhere."""
    batch, heads, size, window = 2, 2, 16, 24
    cache = empty_cache(batch, heads, window, size, torch.float32, checks.DEVICE)
    fixed = (checks.draw(heads, prefix, size, seed=8), checks.draw(heads, prefix, size, seed=9)) if prefix else None
    age = ages(batch, 70, 0, seed=3)
    for seed, piece in enumerate([slice(0, 10), slice(10, 40), slice(40, 70)]):
        tokens = piece.stop - piece.start
        q, k, v = (checks.draw(batch, heads, tokens, size, seed=10 * seed + i) for i in range(3))
        keys, values = torch.cat([cache.keys, k], -2), torch.cat([cache.values, v], -2)
        table = rotary_table(torch.arange(window + tokens, device=q.device), size, q.dtype)
        here = type(table)(*(x[window:] for x in table))
        for kernels in ("reference", "triton"):
            asked = None if fixed is None else (q, *fixed)
            got = window_attention(rotate(q, here), rotate(keys, table), values, age[:, piece], asked, kernels=kernels)
            want, new = block_by_block(q, k, v, cache, age[:, piece], fixed)
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
        cache = WindowCache(*new)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("context", [False, True])
def test_segments_are_macs(prefix, context):
    config = models.preset("mac_tiny", vocab_size=16)
    segment, count, heads = config.mac.segment, 2, config.heads
    size = config.dim // heads
    piece = Piece(config, torch.zeros(2, dtype=torch.int64), count * segment, Call(aligned=True), torch.float32)
    function, tensors = segments(2, heads, count, segment, size, prefix, context)

    def in_segments(x):
        if x.ndim == 3:
            x = x.unsqueeze(0).unsqueeze(2).expand(2, -1, count, -1, -1)
        else:
            x = x.unflatten(2, (count, segment))
        return x.transpose(1, 2).flatten(0, 1)

    q, own_keys, own_values, *rest = (in_segments(x) for x in tensors)
    seen = [(own_keys, own_values)]
    if context:
        seen.insert(0, (rest[0], rest[1]))
    if prefix:
        seen.insert(0, (rest[-2], rest[-1]))
    keys, values = (torch.cat(parts, -2) for parts in zip(*seen, strict=True))
    mask = piece.mask(prefix, context).to(checks.DEVICE)
    want = attention(q, keys, values, mask, "softmax").unflatten(0, (2, count)).transpose(1, 2).flatten(2, 3)
    for kernels in ("reference", "triton"):
        torch.testing.assert_close(function(*tensors, kernels=kernels), want, rtol=2e-4, atol=2e-5)


def small(kind):
    """A function and arguments of a few tokens, and which of them are floating-point."""
    make = windows(2, 1, 9, 5, 16, 3) if kind == "window" else segments(1, 2, 2, 5, 16, 3, True)
    return *make, [i for i, t in enumerate(make[1]) if t.is_floating_point()]


kinds = pytest.mark.parametrize("kind", ["window", "segments"])


@kinds
def test_compiled(kind):
    function, tensors, smooth = small(kind)
    checks.check_compiled(partial(function, kernels="triton"), tensors, smooth)


@kinds
def test_compiled_in_half_precision(kind):
    function, tensors, smooth = small(kind)
    tensors = [t.bfloat16() if t.is_floating_point() else t for t in tensors]
    checks.check_compiled(partial(function, kernels="triton"), tensors, smooth, tolerance=2e-2)


@kinds
def test_vmap(kind):
    if kind == "window":
        function, tensors = windows(1, 1, 9, 5, 16, 3)
    else:
        function, tensors = segments(1, 1, 1, 9, 16, 3, True)
    in_dims = [None if i in (1, len(tensors) - 1) else 1 for i in range(len(tensors))]
    several = [t if d is None else torch.stack([t, t.roll(1, -1)], d) for t, d in zip(tensors, in_dims, strict=True)]
    smooth = [i for i, t in enumerate(tensors) if t.is_floating_point()]
    checks.check_vmap(partial(function, kernels="triton"), several, in_dims, smooth)


@kinds
def test_second_derivatives(kind):
    function, tensors, smooth = small(kind)
    checks.check_second(partial(function, kernels="triton"), function, tensors, smooth)


@kinds
def test_the_kernels_backward_runs(kind):
    from titanfunc_kernels import attention_backward

    function, tensors, _ = small(kind)
    checks.check_backward_that_runs(
        attention_backward, "backward", partial(function, kernels="triton"), tensors, (0, 1, 2)
    )


def test_a_prefix_of_none_is_no_prefix():
    _, (q, keys, values, age) = windows(1, 2, 9, 5, 16, 0)
    none = q.new_empty(2, 0, 16)
    for kernels in ("reference", "triton"):
        want = window_attention(q, keys, values, age, kernels=kernels)
        assert torch.equal(window_attention(q, keys, values, age, (q, none, none), kernels=kernels), want)
        keys_, values_ = keys[:, :, :9], values[:, :, :9]
        want = segment_attention(q, keys_, values_, 3, kernels=kernels)
        assert torch.equal(segment_attention(q, keys_, values_, 3, None, (none, none), kernels=kernels), want)


def test_what_does_not_fit_is_refused():
    _, (q, keys, values, age, *prefix) = windows(2, 2, 9, 5, 16, 3)
    for wrong, message in [
        ((q[0], keys, values, age), "q: wanted"),
        ((q, keys[:, :, :9], values[:, :, :9], age), r"keys: wanted .* W of at least 1"),
        ((q, keys, values[:, :, 1:], age), "values: wanted"),
        ((q, keys, values, age[:, 1:]), "age: wanted"),
        ((q, keys, values, age.int()), "age: wanted int64"),
        ((q, keys, values, age, (q[:, :, 1:], *prefix[1:])), r"prefix\[0\]: wanted"),
        ((q, keys, values, age, (q, prefix[1][:1], prefix[2])), r"prefix\[1\]: wanted"),
        ((q, keys, values, age, (q, prefix[1], prefix[2][:, :1])), r"prefix\[2\]: wanted"),
    ]:
        with pytest.raises(ValueError, match=f"window_attention: {message}"):
            window_attention(*wrong)
    for wrong, message in [
        ((q[0], q, q, 3), "q: wanted"),
        ((q, q, q, 2), "segment: wanted a divisor of the 9 tokens, got 2"),
        ((q, keys, q, 3), "keys: wanted"),
        ((q, q, q, 3, (q, q[:, :1])), r"context\[1\]: wanted"),
        ((q, q, q, 3, None, (prefix[1][:1], prefix[2])), r"prefix\[0\]: wanted"),
        ((q, q, q, 3, None, (prefix[1], prefix[2][:, :1])), r"prefix\[1\]: wanted"),
    ]:
        with pytest.raises(ValueError, match=f"segment_attention: {message}"):
            segment_attention(*wrong)


def test_what_the_kernels_do_not_take_is_refused(monkeypatch):
    _, (q, keys, values, age, *prefix) = windows(2, 2, 9, 5, 16, 3)

    def refused(message, *args, **changes):
        with pytest.raises(ValueError, match=message):
            window_attention(*args, kernels=changes.pop("kernels", "triton"))

    refused("head size: wanted one of", q[..., :12], keys[..., :12], values[..., :12], age)
    refused("dtype of q: wanted float32 or bfloat16", q.double(), keys.double(), values.double(), age)
    refused("dtype of keys: wanted torch.float32", q, keys.bfloat16(), values, age)
    refused(r"dtype of prefix\[1\]", q, keys, values, age, (prefix[0], prefix[1].bfloat16(), prefix[2]))
    refused("kernels: wanted one of reference, triton", q, keys, values, age, kernels="cuda")
    with pytest.raises(ValueError, match="segment_attention: dtype of values"):
        segment_attention(q, q, q.half(), 3, kernels="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refused("q: wanted a CUDA tensor", *(x.cpu() for x in (q, keys, values, age)))
