"""Writing and reading wide memories in one operation, against memory_write and memory_read by the reference."""

import functools

import pytest
import torch

import titanfunc as tf
from tests.kernels import checks, rounded
from tests.kernels.test_memory_wide import SHAPES, problem
from titanfunc.ops import backend
from titanfunc.ops.memory_read import memory_read
from titanfunc.ops.memory_write import memory_write
from titanfunc.ops.memory_write_read import memory_write_read


def asked(shape=SHAPES[0], depth=2, dtype=torch.float32, seed=0):
    """The write's tensors, then q and the gates of reads."""
    rows = shape[:4]
    q = torch.nn.functional.normalize(checks.draw(*rows, shape[4], seed=seed + 70), dim=-1).to(dtype)
    gates = [torch.sigmoid(checks.draw(*rows, seed=seed + 71 + i)) for i in range(2)]
    to_weights = torch.sigmoid(checks.draw(*rows, rows[3], seed=seed + 73)).tril()
    return [*problem(shape, depth, dtype, seed), q, *gates, to_weights]


def by_kernels(*tensors, clip=0.5, first_order=False, kernels="triton"):
    depth = (len(tensors) - 13) // 3
    y, *lists, loss, kept = memory_write_read(
        tensors[:-4], *tensors[-4:], depth=depth, clip=clip, first_order=first_order, kernels=kernels
    )
    return (y, *(leaf for leaves in lists for leaf in leaves), loss, kept)


def reference(*tensors, **options):
    return by_kernels(*tensors, kernels="reference", **options)


def one_after_another(write, tensors):
    """Reads of what ``write`` says of the tensors behind which they stand, and what is left of it."""
    out = write(tensors[:-4])
    q, *gates = tensors[-4:]
    y = memory_read(q, out.weights, out.momentum, out.inputs, out.errors, *gates)
    return (y, *out.last_weights, *out.last_momentum, *out.anchor, out.loss, out.kept)


def as_precisely(*tensors, clip=0.5, first_order=False):
    """The reference, histories rounded as the kernels keep them."""
    depth = (len(tensors) - 13) // 3
    return one_after_another(lambda write: rounded.memory_write(write, depth, clip, first_order), tensors)


def smooth(tensors):
    """Where the tensors lie that have a gradient: all but refresh."""
    return [i for i in range(len(tensors)) if i != len(tensors) - 5]


def compare(tensors, **options):
    """Outputs and all gradients by the tolerance rule."""
    places = smooth(tensors)

    def pulled(function, tensors, cotangents=None):
        def outputs(*given):
            whole = list(tensors)
            for i, tensor in zip(places, given, strict=True):
                whole[i] = tensor
            return function(*whole, **options)

        out, pull = torch.func.vjp(outputs, *(tensors[i] for i in places))
        cotangents = cotangents or [checks.draw(*x.shape, dtype=x.dtype, seed=90 + i) for i, x in enumerate(out)]
        return out, pull(tuple(c.to(x.dtype) for c, x in zip(cotangents, out, strict=True))), cotangents

    with checks.poison():
        got, slopes, cotangents = pulled(by_kernels, tensors)
    plain, plain_slopes, _ = pulled(as_precisely, tensors, cotangents)
    exact, exact_slopes, _ = pulled(as_precisely, [tensor.double() for tensor in tensors], cotangents)
    for i, each in enumerate(zip(got, plain, exact, strict=True)):
        checks.assert_as_exact(f"output {i}", *each, floor=2e-6)
    rounded.assert_gradients_as_exact(tensors[-4].dtype, slopes, plain_slopes, exact_slopes, len(tensors) - 8)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, dtype):
    compare(asked(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", [SHAPES[0], (1, 1, 2, 7, 19, 37)], ids=str)
def test_one_layer(shape, dtype):
    compare(asked(shape, depth=1, dtype=dtype))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_reference_writes_and_then_reads(depth, first_order):
    tensors = asked((1, 2, 2, 5, 4, 6), depth)

    def directly(*tensors):
        def write(given):
            lists = [given[i * depth : (i + 1) * depth] for i in range(3)]
            return memory_write(*lists, *given[3 * depth :], depth=depth, clip=0.5, first_order=first_order)

        return one_after_another(write, tensors)

    by_name = functools.partial(reference, first_order=first_order)
    for read in (lambda run: run(*tensors), lambda run: checks.slopes_of(run, smooth(tensors))(*tensors)):
        assert all(torch.equal(a, b) for a, b in zip(read(by_name), read(directly), strict=True))


@pytest.mark.parametrize("depth", [1, 2])
def test_first_order(depth):
    compare(asked(depth=depth), first_order=True)


def test_an_anchor_that_never_moves():
    tensors = asked((1, 1, 2, 20, 24, 40))
    tensors[-5] = torch.zeros_like(tensors[-5])
    compare(tensors, clip=0.0)


@pytest.mark.parametrize("depth", [1, 2])
def test_transforms(depth):
    tensors = asked((1, 1, 2, 5, 20, 24), depth)
    checks.check_compiled(by_kernels, tensors, smooth(tensors))
    checks.check_second(by_kernels, reference, tensors, smooth(tensors))
    stacked = [torch.stack(each) for each in zip(tensors, asked((1, 1, 2, 5, 20, 24), depth, seed=100), strict=True)]
    checks.check_vmap(by_kernels, stacked, [0] * len(stacked), smooth(tensors))


@pytest.mark.parametrize("depth", [1, 2])
def test_the_kernels_backward_is_the_one_that_runs(depth, monkeypatch):
    from titanfunc_kernels import memory_wide_backward, memory_wide_read

    tensors = asked((1, 1, 2, 5, 20, 24), depth)
    reads = [len(tensors) - 4 + i for i in range(4)]
    checks.check_backward_that_runs(memory_wide_backward, "backward", by_kernels, tensors, smooth(tensors)[:-4])
    original = memory_wide_read.backward

    def marked(*args):
        pulled = original(*args)
        gates = memory_wide_read.Gates(*(torch.full_like(gate, 100.0) for gate in pulled.gates))
        return pulled._replace(queries=torch.full_like(pulled.queries, 100.0), gates=gates)

    monkeypatch.setattr(memory_wide_read, "backward", marked)
    torch._dynamo.reset()
    gradient = checks.slopes_of(by_kernels, reads)
    for run in (gradient, torch.compile(gradient, fullgraph=True, backend=checks.BACKEND)):
        assert all((slope == 100).all() for slope in run(*tensors))


@pytest.mark.parametrize("depth", [1, 2])
def test_no_chunks(depth):
    tensors = asked((1, 2, 1, 20, 24, 40), depth)
    cut = [t if i < 3 * depth else t[:, :, :0] for i, t in enumerate(tensors)]
    with pytest.raises(ValueError, match="k: wanted at least one chunk, got none"):
        by_kernels(*cut)


def test_refusals(monkeypatch):
    tensors = asked((1, 1, 1, 5, 20, 24))

    def refused(match, place, tensor):
        with pytest.raises(ValueError, match=match):
            by_kernels(*[tensor if i == place % len(tensors) else t for i, t in enumerate(tensors)])

    refused("memory_write_read: q: wanted", -4, tensors[-4].bfloat16())
    refused("keep_weights: wanted float32", -3, tensors[-3].double())
    refused("to_weights: wanted float32", -1, tensors[-1][..., :-1])
    with pytest.raises(ValueError, match="weights: wanted wide memories"):
        by_kernels(*asked((1, 1, 1, 16, 16, 32)))
    assert backend.table()["memory_write_read"] == ("reference", "triton")
    with pytest.raises(ValueError, match="kernels: wanted one of reference, triton for memory_write_read, got 'cuda'"):
        by_kernels(*tensors, kernels="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"memory_write.*: wanted a CUDA tensor .*kernels=reference"):
        by_kernels(*(t.cpu() for t in tensors))
    assert by_kernels(*tensors, kernels="reference")[0].shape == tensors[-4].shape


@pytest.mark.gpu
@pytest.mark.skipif(not checks.GPU, reason="needs a CUDA device")
def test_no_cotangent_of_a_history_is_made():
    net, size = tf.memory.mlp(512, 2048), 2 * 4 * 512 * 2048
    first = {name: checks.draw(1, *w.shape[1:], scale=0.03) for name, w in net.init(torch.Generator(), 1).items()}
    rows = [torch.nn.functional.normalize(checks.draw(4, 1, 2048, 512, seed=i), dim=-1).bfloat16() for i in range(3)]
    gates = tf.memory.Gates(*(s * torch.sigmoid(checks.draw(4, 1, 2048)) for s in (0.1, 0.9, 0.1)))

    def loss(q):
        state = tf.memory.init_state(first, 4)
        return tf.memory.scan(net, state, q, *rows[1:], gates, 64, aligned=True, kernels="triton")[0].square().sum()

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.func.grad(loss)(rows[0])
    histories = 2 * 2 * size * 32
    assert torch.cuda.max_memory_allocated() - before < 2.4 * histories
