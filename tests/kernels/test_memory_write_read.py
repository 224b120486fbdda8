"""Writing and reading wide memories in one operation, against memory_write and memory_read by the reference."""

import pytest
import torch

import titanfunc as tf
from tests.kernels import checks
from tests.kernels.test_memory_wide import SHAPES, problem
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


def plainly(*tensors, clip=0.5, first_order=False):
    depth = (len(tensors) - 13) // 3
    lists = [list(tensors[i * depth : (i + 1) * depth]) for i in range(3)]
    out = memory_write(*lists, *tensors[3 * depth : -4], depth=depth, clip=clip, first_order=first_order)
    q, *gates = tensors[-4:]
    y = memory_read(q, out.weights, out.momentum, out.inputs, out.errors, *gates)
    return (y, *out.last_weights, *out.last_momentum, *out.anchor, out.loss, out.kept)


def smooth(tensors):
    """Where the tensors lie that have a gradient: all but refresh."""
    return [i for i in range(len(tensors)) if i != len(tensors) - 5]


def compare(tensors, **options):
    """Outputs and all gradients by the tolerance rule; the write's factors in bfloat16 see rounded histories, in sums
    that may cancel."""
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
    plain, plain_slopes, _ = pulled(plainly, tensors, cotangents)
    exact, exact_slopes, _ = pulled(plainly, [tensor.double() for tensor in tensors], cotangents)
    for i, each in enumerate(zip(got, plain, exact, strict=True)):
        checks.assert_as_exact(f"output {i}", *each, floor=2e-6)
    rounded = tensors[-4].dtype == torch.bfloat16
    for i, each in zip(places, zip(slopes, plain_slopes, exact_slopes, strict=True), strict=True):
        factor = i in range(len(tensors) - 8, len(tensors) - 5)
        checks.assert_as_exact(f"gradient {i}", *each, floor=2.0**-6 if rounded and factor else 2e-6)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, dtype):
    compare(asked(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_one_layer(dtype):
    compare(asked(depth=1, dtype=dtype))


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
    checks.check_second(by_kernels, plainly, tensors, smooth(tensors))
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


def test_refusals():
    tensors = asked((1, 1, 1, 5, 20, 24))

    def refused(match, place, tensor):
        with pytest.raises(ValueError, match=match):
            by_kernels(*[tensor if i == place % len(tensors) else t for i, t in enumerate(tensors)])

    refused("memory_write_read: q: wanted", -4, tensors[-4].bfloat16())
    refused("keep_weights: wanted float32", -3, tensors[-3].double())
    refused("to_weights: wanted float32", -1, tensors[-1][..., :-1])
    with pytest.raises(ValueError, match="weights: wanted wide memories"):
        by_kernels(*asked((1, 1, 1, 16, 16, 32)))


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
