"""The head and its loss in chunks: Triton against the reference, and the reference against its definition."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from titanfunc_kernels import linear_cross_entropy as raw

from tests.kernels import checks
from tests.kernels.checks import DEVICE, GPU, draw
from titanfunc.ops.cross_entropy import cross_entropy
from titanfunc.ops.linear_cross_entropy import linear_cross_entropy

# B, T, D, V
SHAPES = (
    [(2, 1024, 512, 32000), (3, 333, 65, 5003), (1, 64, 64, 64), (4, 2048, 256, 256)]
    if GPU
    else [(2, 5, 9, 33), (1, 7, 16, 64), (1, 1, 3, 2)]
)
SMALL = (2, 5, 9, 33)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    if request.param == "many chunks":
        monkeypatch.setattr(raw, "GRAIN", 16 if GPU else 4)
        monkeypatch.setattr(raw, "BUFFER_BYTES", 2**20 if GPU else 64)
        monkeypatch.setattr(raw, "BLOCK", 128 if GPU else 16)


def problem(shape, dtype=torch.float32, tied=False):
    b, t, d, v = shape
    x = draw(b, t, d, dtype=dtype)
    weight = draw(v, d, seed=1, scale=d**-0.5).mT if tied else draw(d, v, seed=1, scale=d**-0.5)
    source = torch.Generator().manual_seed(2)
    return x, weight, torch.randint(v, (b, t), generator=source).to(DEVICE), draw(b, t, seed=3).abs()


def loss_by(kernels, targets):
    return lambda x, weight, *weights: linear_cross_entropy(x, weight, targets, *weights, kernels=kernels)[0]


def row_by(kernels, targets):
    """The loss [1], for what draws a cotangent of its shape."""
    return lambda *inputs: loss_by(kernels, targets)(*inputs).reshape(1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_by_the_tolerance_rule(chunks, shape, dtype, tied, weighted):
    x, weight, targets, weights = problem(shape, dtype, tied)
    inputs = [x, weight, weights] if weighted else [x, weight]
    checks.check_against_float64(row_by("triton", targets), row_by("reference", targets), inputs, floor=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_in_half_precision_takes_a_gradient_in_it(chunks, dtype):
    x, weight, targets, _ = problem(SHAPES[0], dtype)
    inputs = [x, weight.to(dtype)]
    checks.check_against_float64(row_by("triton", targets), row_by("reference", targets), inputs, floor=1e-5)


def test_the_reference_is_cross_entropy_of_the_logits():
    x, weight, targets, weights = (t.double() if t.is_floating_point() else t for t in problem(SMALL))
    loss, correct = linear_cross_entropy(x, weight, targets, weights)
    losses = [
        [math.log(sum(math.exp(z) for z in row)) - row[target] for row, target in zip(rows, line, strict=True)]
        for rows, line in zip((x @ weight).tolist(), targets.tolist(), strict=True)
    ]
    wanted = (torch.tensor(losses) * weights.cpu()).sum() / weights.cpu().sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.equal(correct, (x @ weight).argmax(-1) == targets)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_the_first_of_equal_largest_logits_is_the_argmax(chunks, dtype):
    """Whole numbers, exact in either precision, so that equal logits abound; every candidate is tried as target."""
    source = torch.Generator().manual_seed(5)
    v = 20
    x, weight = (torch.randint(-1, 2, shape, generator=source).to(DEVICE) for shape in ((v, 4), (4, v)))
    logits = (x.cpu() @ weight.cpu())[:, None].expand(v, v, v)
    targets = torch.arange(v).expand(v, v)
    every = x.to(dtype)[:, None].expand(v, v, 4).contiguous()
    with checks.poison():
        _, correct = linear_cross_entropy(every, weight.to(dtype), targets.to(DEVICE).contiguous(), kernels="triton")
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(correct.cpu(), first == targets) and correct.sum() == v


def test_no_weight_at_all_is_a_loss_of_zero(chunks):
    x, weight, targets, weights = problem(SMALL)
    loss = loss_by("triton", targets)
    grads = torch.func.grad(loss, (0, 1))(x, weight, 0 * weights)
    assert loss(x, weight, 0 * weights) == 0 and all((grad == 0).all() for grad in grads)


def test_a_target_outside_the_vocabulary_makes_the_loss_nan():
    x, weight, targets, _ = problem(SMALL)
    for outside in (-1, weight.shape[1], 2**40):
        targets[1, 2] = outside
        loss, correct = linear_cross_entropy(x, weight, targets, kernels="triton")
        assert loss.isnan() and not correct[1, 2]


@pytest.mark.parametrize("tied", [False, True])
def test_compiled_is_eager(tied):
    x, weight, targets, weights = problem(SHAPES[0], tied=tied)
    checks.check_compiled(loss_by("triton", targets), [x, weight, weights], (0, 1, 2), 1e-4 if GPU else 1e-5)


def test_compiled_from_a_tied_embedding():
    x, weight, targets, _ = problem(SHAPES[0], tied=True)
    loss = loss_by("triton", targets)
    checks.check_compiled(lambda x, table: loss(x + table[:5].sum(), table.mT), [x, weight.mT], (0, 1), 1e-4)


def test_under_vmap():
    x, weight, targets, weights = problem(SMALL)

    def function(x, weight, targets, weights):
        return linear_cross_entropy(x[None], weight, targets[None], weights[None], kernels="triton")

    checks.check_vmap(function, [x, weight, targets, weights], (0, None, 0, 0), (0, 1))


@pytest.mark.parametrize("tied", [False, True])
def test_second_derivatives_are_the_references(tied):
    x, weight, targets, weights = problem(SMALL, tied=tied)
    inputs = [x, weight, weights]
    checks.check_second(loss_by("triton", targets), loss_by("reference", targets), inputs, (0, 1, 2))


def test_the_backward_that_runs():
    x, weight, targets, _ = problem(SMALL)
    checks.check_backward_that_runs(raw, "backward", loss_by("triton", targets), [x, weight], (0, 1))


def test_what_it_holds_is_bounded():
    """The chunks cover everything, and none is over the bound unless it is as small as one may be."""
    for size in (1, 100, 128, 4096, 16384, 32000, 50257):
        for item in (2, 4 * 256, 2 * 32000, 2**22):
            chunk = raw._chunk(size, item)
            assert 1 <= chunk <= size and (chunk * item <= raw.BUFFER_BYTES or chunk <= raw.GRAIN)
    assert raw._chunk(32000, 2 * 16384) == 8064  # four chunks, not three and a rest


def test_refusals(monkeypatch):
    x, weight, targets, weights = problem(SMALL)
    loss = partial(linear_cross_entropy, kernels="triton")
    with pytest.raises(ValueError, match=r"weight: wanted \[D, V\]"):
        loss(x, weight.mT, targets)
    with pytest.raises(ValueError, match=r"targets: wanted \(2, 5\)"):
        loss(x, weight, targets[:, 1:])
    with pytest.raises(ValueError, match=r"weights: wanted \(2, 5\)"):
        loss(x, weight, targets, weights[0])
    with pytest.raises(ValueError, match="targets: wanted int64"):
        loss(x, weight, targets.int())
    with pytest.raises(ValueError, match="x: wanted float32, bfloat16 or float16"):
        loss(x.double(), weight, targets)
    with pytest.raises(ValueError, match="kernels: wanted one of reference, triton"):
        loss(x, weight, targets, kernels="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="x: wanted a CUDA tensor"):
        loss(x.cpu(), weight.cpu(), targets.cpu())


@pytest.mark.gpu
def test_peak_memory_is_bounded_by_the_buffer():
    x, weight, targets, _ = problem((8, 2048, 128, 32000), torch.bfloat16)
    loss = loss_by("triton", targets)
    torch.func.grad(loss, (0, 1))(x, weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.func.grad(loss, (0, 1))(x, weight)
    beside = weight.numel() * (4 + 2) + x.numel() * (4 + 4 + 2)
    assert torch.cuda.max_memory_allocated() - before < raw.BUFFER_BYTES + beside + 2**24


def test_against_cross_entropy_in_the_same_precision():
    x, weight, targets, weights = problem(SHAPES[0])
    want = cross_entropy(x @ weight, targets, weights)
    torch.testing.assert_close(loss_by("triton", targets)(x, weight, weights), want, rtol=1e-5, atol=1e-5)
