"""Writing chunks with kernels, wide memories and the choice between them and small ones, against the reference."""

import functools

import pytest
import torch
from titanfunc_kernels import order

import titanfunc as tf
from tests.kernels import checks, rounded
from titanfunc.ops import memory_write_kernels
from titanfunc.ops.memory_write import Written, memory_write, write_chunks
from titanfunc.ops.objective import Objective

TOKEN, CHUNK = ("inner_lr", "to_weights", "to_momentum"), ("keep_weights", "momentum_to_weights", "keep_momentum")
# (B, H, N, C, D, F): sizes that no tile divides, chunks of one block and of two, block 64, odd; the GPU adds real ones.
SHAPES = [(1, 2, 3, 20, 24, 40), (1, 1, 2, 70, 20, 36), (1, 1, 2, 64, 64, 192), (1, 1, 2, 7, 17, 33)]
SHAPES += [(2, 1, 4, 64, 512, 2048), (1, 2, 3, 256, 512, 1024), (1, 3, 5, 100, 136, 264)] if checks.GPU else []


def problem(shape=SHAPES[0], depth=2, dtype=torch.float32, seed=0):
    """The operation's tensors: weights, momentum, anchor, k, v, the gates, refresh."""
    batch, heads, chunks, tokens, head, hidden = shape
    sizes = [(head, hidden), (hidden, head)] if depth == 2 else [(head, head)]
    leaves = [
        checks.draw(batch, heads, *size, seed=seed + 7 * i + j, scale=scale * size[0] ** -0.5)
        for i, scale in enumerate((1.0, 0.1, 1.0)) for j, size in enumerate(sizes)
    ]  # fmt: skip
    rows = [
        torch.nn.functional.normalize(checks.draw(batch, heads, chunks, tokens, head, seed=seed + 30 + i), dim=-1)
        for i in range(2)
    ]
    gates = [torch.sigmoid(checks.draw(batch, heads, chunks, tokens, seed=seed + 40 + i)) for i in range(3)]
    gates[0] = 4 / tokens * gates[0]
    factors = [torch.sigmoid(checks.draw(batch, heads, chunks, seed=seed + 50 + i)) for i in range(3)]
    refresh = (checks.draw(batch, heads, chunks, seed=seed + 60) > -0.5).float()
    return [*leaves, *(row.to(dtype) for row in rows), *gates, *factors, refresh]


def written(tensors, kernels="triton", clip=0.5, first_order=False):
    depth = (len(tensors) - 9) // 3
    lists = [list(tensors[i * depth : (i + 1) * depth]) for i in range(3)]
    return memory_write(
        *lists, *tensors[3 * depth :], depth=depth, clip=clip, first_order=first_order, kernels=kernels
    )  # fmt: skip


def flat(result: Written):
    *lists, loss, kept = result
    return (*(leaf for leaves in lists for leaf in leaves), loss, kept)


def by_kernels(*tensors, **options):
    return flat(written(tensors, **options))


def plainly(*tensors, **options):
    return flat(written(tensors, "reference", **options))


def as_precisely(*tensors, clip=0.5, first_order=False):
    """The reference, histories rounded as the kernels keep them."""
    return flat(rounded.memory_write(tensors, (len(tensors) - 9) // 3, clip, first_order))


def compare(tensors, **options):
    """Outputs and all gradients by the tolerance rule."""
    refresh = tensors[-1]

    def pulled(function, tensors, cotangents=None):
        outputs, pull = torch.func.vjp(lambda *t: function(*t, refresh.to(t[0].dtype), **options), *tensors[:-1])
        cotangents = cotangents or [checks.draw(*x.shape, dtype=x.dtype, seed=90 + i) for i, x in enumerate(outputs)]
        return outputs, pull(tuple(c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=True))), cotangents

    with checks.poison():
        got, slopes, cotangents = pulled(by_kernels, tensors)
    plain, plain_slopes, _ = pulled(as_precisely, tensors, cotangents)
    exact, exact_slopes, _ = pulled(as_precisely, [tensor.double() for tensor in tensors], cotangents)
    for i, each in enumerate(zip(got, plain, exact, strict=True)):
        checks.assert_as_exact(f"output {i}", *each)
    rounded.assert_gradients_as_exact(tensors[-9].dtype, slopes, plain_slopes, exact_slopes, len(slopes) - 3)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, dtype):
    compare(problem(shape, dtype=dtype))


@pytest.mark.parametrize(("tokens", "hidden", "dtype"), [(32, 192, torch.bfloat16), (40, 128, torch.float32)])
def test_tiles_that_divide_rows(tokens, hidden, dtype, monkeypatch):
    """Without masks along D and F, and along the tokens of 32."""
    from titanfunc_kernels import memory_wide

    for table in (memory_wide.OUTPUT, memory_wide.HIDDEN):
        monkeypatch.setitem(table, "BK", 32)
        monkeypatch.setitem(table, "BN", 32)
    for tiles in memory_wide.UPDATE.values():
        monkeypatch.setitem(tiles, "BM", 32)
        monkeypatch.setitem(tiles, "BN", 32)
    compare(problem((1, 1, 2, tokens, 64, hidden), dtype=dtype))


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", [SHAPES[0], (1, 1, 2, 7, 19, 37)], ids=str)
def test_one_layer(shape, dtype):
    compare(problem(shape, depth=1, dtype=dtype))


@pytest.mark.parametrize("depth", [1, 2])
def test_without_a_clip(depth):
    compare(problem(depth=depth), clip=0.0)


@pytest.mark.parametrize(("depth", "shape"), [(1, SHAPES[0]), (2, SHAPES[0]), (2, SHAPES[2])])
def test_first_order(depth, shape):
    compare(problem(shape, depth), first_order=True)


@pytest.mark.parametrize("refresh", [0.0, 1.0])
def test_an_anchor_that_never_or_always_moves(refresh):
    tensors = problem((1, 1, 2, 20, 24, 40))
    compare([*tensors[:-1], torch.full_like(tensors[-1], refresh)])


def test_small_memories_are_written_by_their_own_kernel():
    shape = (1, 2, 2, 16, 16, 32)
    assert memory_write_kernels.takes_small(2, *shape[3:], torch.float32)
    compare(problem(shape))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("bad", ["k", "v", "inner_lr", "square"])
def test_a_write_that_is_not_finite_is_dropped(depth, bad):
    tensors = problem((1, 2, 2, 5, 20, 24), depth)
    if bad == "square":  # a key so large that the gradient's norm overflows
        tensors[-9][0, 1, 1, 3] *= 1e30
    else:
        place = {"k": -9, "v": -8, "inner_lr": -7}[bad]
        tensors[place][0, 1, 1, 3] = torch.inf
    got, want = written(tensors), written(tensors, "reference")
    assert want.kept[0, 1, 1, 3] == 0 and torch.equal(got.kept, want.kept)
    for ours, theirs in zip(flat(got)[:-2], flat(want)[:-2], strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def loss(k, v, lr, kernels):
        moved = [*tensors[:-9], k, v, lr, *tensors[-6:]]
        return sum(x.square().sum() for x in flat(written(moved, kernels))[:-2])

    pairs = (torch.func.grad(functools.partial(loss, kernels=kind), (0, 1, 2))(*tensors[-9:-6]) for kind in
             ("triton", "reference"))  # fmt: skip
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
def test_compiled(depth):
    tensors = problem((1, 1, 2, 5, 20, 24), depth)
    checks.check_compiled(by_kernels, tensors, range(len(tensors) - 1))


@pytest.mark.parametrize("depth", [1, 2])
def test_vmap(depth):
    tensors = [problem((1, 1, 2, 5, 20, 24), depth, seed=seed) for seed in (0, 100)]
    stacked = [torch.stack(each) for each in zip(*tensors, strict=True)]
    stacked[-1] = stacked[-1][0]
    checks.check_vmap(by_kernels, stacked, [*[0] * (len(stacked) - 1), None], range(len(stacked) - 1))


@pytest.mark.parametrize("depth", [1, 2])
def test_second_derivatives_are_the_references(depth):
    tensors = problem((1, 1, 2, 5, 20, 24), depth)
    checks.check_second(by_kernels, plainly, tensors, range(len(tensors) - 1))


@pytest.mark.parametrize("depth", [1, 2])
def test_the_kernels_backward_is_the_one_that_runs(depth):
    from titanfunc_kernels import memory_wide_backward

    tensors = problem((1, 1, 2, 5, 20, 24), depth)
    checks.check_backward_that_runs(
        memory_wide_backward, "backward", by_kernels, tensors, range(len(tensors) - 1)
    )  # fmt: skip


def test_scan_by_kernels_equals_scan():
    net = tf.memory.mlp(20, 24)
    first = {name: checks.draw(2, *w.shape[1:], scale=0.3, seed=5) for name, w in
             net.init(torch.Generator(), 2).items()}  # fmt: skip
    q, k, v = (torch.nn.functional.normalize(checks.draw(1, 2, 37, 20, seed=i), dim=-1) for i in range(3))
    gates = tf.memory.Gates(
        *(scale * torch.sigmoid(checks.draw(1, 2, 37, seed=9 + i)) for i, scale in enumerate((0.1, 0.9, 0.1)))
    )

    def run(k, kernels):
        state = tf.memory.init_state(first, 1)
        parts = []
        for piece in (slice(0, 10), slice(10, 37)):  # the second begins inside a chunk, at an older anchor
            gate = tf.memory.Gates(*(g[:, :, piece] for g in gates))
            y, state = tf.memory.scan(
                net, state, *(x[:, :, piece] for x in (q, k, v)), gate, 16, clip=0.5, kernels=kernels
            )  # fmt: skip
            parts.append(y)
        return torch.cat(parts, 2)

    torch.testing.assert_close(run(k, "triton"), run(k, "reference"), rtol=1e-5, atol=1e-6)
    slopes = [torch.func.grad(lambda k, kind: run(k, kind).square().sum())(k, kind) for kind in ("triton", "reference")]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2])
def test_no_chunks(depth):
    tensors = problem((1, 2, 1, 20, 24, 40), depth)
    cut = [t if i < 3 * depth else t[:, :, :0] for i, t in enumerate(tensors)]
    for run in (by_kernels, plainly):
        with pytest.raises(ValueError, match="k: wanted at least one chunk, got none"):
            run(*cut)


def test_refusals(monkeypatch):
    tensors = problem((1, 1, 1, 5, 20, 24))
    lists = [tensors[:2], tensors[2:4], tensors[4:6]]
    rest = tensors[6:]

    def refused(match, lists=lists, rest=rest, **options):
        with pytest.raises(ValueError, match=f"{match}.*kernels=reference"):
            memory_write(*lists, *rest, **{"depth": 2, "clip": 0.0, "kernels": "triton", **options})

    refused("objective", objective=Objective("huber", 1.0))
    refused("objective", objective=Objective(scale=0.5))
    refused("weights: wanted matrices", [[*each, each[0][..., 0, :], each[1][..., 0, :]] for each in lists])
    refused("depth", [[*each, each[0]] for each in lists], depth=3)
    refused("restart", restart=torch.ones_like(rest[-1]), initial=lists[0])
    refused("clip", clip=float("inf"))
    refused("momentum", [lists[0], [x.mT for x in lists[1]], lists[2]])
    refused("anchor: wanted float32", [*lists[:2], [x.double() for x in lists[2]]])
    refused("k, v: wanted one shape", rest=[rest[0][..., :-1], *rest[1:]])
    refused("k, v: wanted float32 or bfloat16", rest=[x.double() for x in rest[:2]] + rest[2:])
    refused("keep_momentum", rest=[*rest[:7], rest[7][..., None], rest[8]])
    refused("inner_lr: wanted float32", rest=[*rest[:2], rest[2].double(), *rest[3:]])
    monkeypatch.setattr(memory_write_kernels, "WIDE_MEMORIES", 1)
    refused("k: wanted 1 to 1 wide memories", [[x.expand(2, -1, -1, -1) for x in each] for each in lists],
            [x.expand(2, *x.shape[1:]) for x in rest])  # fmt: skip
    with pytest.raises(ValueError, match="kernels: wanted one of reference, triton"):
        memory_write(*lists, *rest, depth=2, clip=0.0, kernels="cuda")
    if not checks.GPU:
        monkeypatch.delenv("TRITON_INTERPRET")
        refused("weights: wanted a CUDA tensor")
    assert write_chunks([*tensors], [2, 2, 0, 0], [0.0, 0.0, 1.0])[0].shape == (1, 1, 1, 20, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not checks.GPU, reason="launches overlap on a device alone")
def test_launches_that_overlap_give_the_same_bits(monkeypatch):
    tensors = problem((2, 2, 8, 64, 512, 2048), dtype=torch.bfloat16)
    slopes = checks.slopes_of(by_kernels, range(len(tensors) - 1))
    monkeypatch.setattr(order, "OVERLAP", False)
    apart = [*by_kernels(*tensors), *slopes(*tensors)]
    monkeypatch.setattr(order, "OVERLAP", True)
    for _ in range(20):
        together = [*by_kernels(*tensors), *slopes(*tensors)]
        assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not checks.GPU, reason="needs a CUDA device")
def test_a_graph_replays_what_was_written():
    tensors = problem((2, 1, 4, 64, 512, 2048), dtype=torch.bfloat16)
    want = by_kernels(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = by_kernels(*tensors)
    graph.replay()
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
