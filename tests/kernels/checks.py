"""What every kernel's tests share: the tolerance rule, poisoned memory, transforms and compilation.

A function under test takes tensors and returns a tensor or a tuple of tensors; everything else it needs is bound
beforehand (a lambda or functools.partial).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BACKEND = "inductor" if GPU else "aot_eager"
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = 0.5  # of a unit in the last place: a result rounded to the nearest is off by that much

Function = Callable[..., Any]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers [*shape] on the device under test, the same on every device."""
    source = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=source)).to(dtype).to(DEVICE)


def leaves(value: Any) -> list[Tensor]:
    """A tensor, or a sequence of them, as a list."""
    return [value] if isinstance(value, Tensor) else list(value)


def _poisoned(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fresh memory from Python is NaN (whole numbers: the largest), so that what a kernel fails to write shows."""
    with contextlib.ExitStack() as stack:
        for owner, name in [
            (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
        ]:  # fmt: skip
            original = getattr(owner, name)

            def fresh(*args: Any, original: Function = original, **options: Any) -> Tensor:
                return _poisoned(original(*args, **options))

            stack.enter_context(mock.patch.object(owner, name, fresh))
        yield


def assert_as_exact(name: str, got: Tensor, plain: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
    """The tolerance rule, in the largest difference over the tensor: |got - exact| <= 2 |plain - exact| + a floor.

    got: the kernel's result; plain: plain torch's in the same precision; exact: plain torch's in float64. The floor is
    what rounding alone may do to the largest number, plus ``floor`` times that number.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{name}: {got.dtype}, wanted {plain.dtype}"
    if not got.numel():
        return
    error, allowed = (float((x.double() - exact).abs().max()) for x in (got, plain))
    largest = float(exact.abs().max())
    allowed = 2 * allowed + (ROUNDING * torch.finfo(got.dtype).eps + floor) * largest
    assert error <= allowed, f"{name}: {error:.3g} from float64, allowed {allowed:.3g}, largest number {largest:.3g}"


def _pulled(
    function: Function, tensors: Sequence[Tensor], cotangents: Sequence[Tensor] | None, seed: int
) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
    """Outputs of ``function`` and gradients of its floating-point arguments by name; the cotangents (drawn if None)."""
    smooth = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]

    def outputs(*given: Tensor) -> Any:
        whole = list(tensors)
        for i, tensor in zip(smooth, given, strict=True):
            whole[i] = tensor
        every = leaves(function(*whole))
        return tuple(t for t in every if t.is_floating_point()), tuple(every)

    floating, pull, every = torch.func.vjp(outputs, *(tensors[i] for i in smooth), has_aux=True)
    if cotangents is None:
        cotangents = [draw(*t.shape, dtype=t.dtype, seed=seed + i) for i, t in enumerate(floating)]
    found = {f"output {i}": t for i, t in enumerate(every)}
    return found | {f"gradient {i}": t for i, t in zip(smooth, pull(tuple(cotangents)), strict=True)}, cotangents


def check_against_float64(
    kernel: Function, reference: Function, tensors: Sequence[Tensor], exact: Function | None = None,
    gradients: bool = True, floor: float = 1e-6, seed: int = 1000,
) -> None:  # fmt: skip
    """Outputs of ``kernel`` and the gradients of its floating-point arguments, by the tolerance rule.

    The kernel's memory is poisoned. exact: the function to run in float64, where ``reference`` is bound to a dtype.
    """
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    exact = exact or reference
    if gradients:
        with poison():
            got, cotangents = _pulled(kernel, tensors, None, seed)
        plain, _ = _pulled(reference, tensors, cotangents, seed)
        best, _ = _pulled(exact, wide, [c.double() for c in cotangents], seed)
    else:
        with poison():
            got = {f"output {i}": t for i, t in enumerate(leaves(kernel(*tensors)))}
        plain, best = leaves(reference(*tensors)), leaves(exact(*wide))
        plain, best = dict(zip(got, plain, strict=True)), dict(zip(got, best, strict=True))
    for name, ours in got.items():
        if ours.is_floating_point():
            assert_as_exact(name, ours, plain[name], best[name], floor)
        else:
            assert torch.equal(ours, plain[name]), f"{name}: whole numbers differ"


def loss_of(function: Function) -> Function:
    """A 0-d float32 function of the same arguments, whose gradient gives every output its own cotangents."""

    def loss(*tensors: Tensor) -> Tensor:
        outputs = [output.float() for output in leaves(function(*tensors)) if output.is_floating_point()]
        return sum(((output.square() + output.sin()).sum() for output in outputs), outputs[0].new_zeros(()))

    return loss


def slopes_of(function: Function, argnums: Sequence[int]) -> Function:
    """The gradient of ``loss_of(function)`` for ``argnums``, a tuple."""
    return torch.func.grad(loss_of(function), tuple(argnums))


def assert_near(got: Any, want: Any, tolerance: float) -> None:
    """Each tensor of ``got`` within ``tolerance`` times the largest number of ``want``'s."""
    for i, (ours, theirs) in enumerate(zip(leaves(got), leaves(want), strict=True)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, i
        error = float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0
        largest = float(theirs.double().abs().max()) if ours.numel() else 0.0
        assert error <= tolerance * largest, f"leaf {i}: off by {error:.3g}, largest number {largest:.3g}"


def check_compiled(
    function: Function, tensors: Sequence[Tensor], argnums: Sequence[int], tolerance: float = 1e-5
) -> None:
    """Outputs and gradients in one graph are those run eagerly."""

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (*leaves(function(*tensors)), *slopes_of(function, argnums)(*tensors))

    torch._dynamo.reset()
    assert_near(torch.compile(both, fullgraph=True, backend=BACKEND)(*tensors), both(*tensors), tolerance)


def check_vmap(
    function: Function, tensors: Sequence[Tensor], in_dims: Sequence[int | None], argnums: Sequence[int],
    tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """vmap of the outputs and gradients over ``in_dims`` is a loop over the samples."""

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (*leaves(function(*tensors)), *slopes_of(function, argnums)(*tensors))

    size = next(t.shape[d] for t, d in zip(tensors, in_dims, strict=True) if d is not None)
    rows = [
        both(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True))) for i in range(size)
    ]
    want = [torch.stack(each) for each in zip(*rows, strict=True)]
    assert_near(torch.func.vmap(both, tuple(in_dims))(*tensors), want, tolerance)


def check_second(
    kernel: Function, reference: Function, tensors: Sequence[Tensor], argnums: Sequence[int], tolerance: float = 1e-4
) -> None:
    """The gradient of a function of the gradient is the reference's."""

    def second(function: Function) -> Any:
        def of_slopes(*tensors: Tensor) -> Tensor:
            return sum(slope.float().square().sum() for slope in slopes_of(function, argnums)(*tensors))

        return torch.func.grad(of_slopes, tuple(argnums))(*tensors)

    assert_near(second(kernel), second(reference), tolerance)


def check_backward_that_runs(
    owner: Any, name: str, function: Function, tensors: Sequence[Tensor], argnums: Sequence[int]
) -> None:
    """The raw backward ``owner.name`` is what gives the gradients of ``function``, eagerly and compiled.

    It is replaced by one that returns its own results filled with 100, which no derivative is.
    """
    original = getattr(owner, name)

    def marked(*args: Any, **options: Any) -> Any:
        given = original(*args, **options)
        every = [torch.full_like(t, 100.0) for t in leaves(given)]
        return every[0] if isinstance(given, Tensor) else tuple(every)

    gradient = slopes_of(function, argnums)
    torch._dynamo.reset()
    with mock.patch.object(owner, name, marked):
        for run in (gradient, torch.compile(gradient, fullgraph=True, backend=BACKEND)):
            for slope in run(*tensors):
                assert (slope == 100).all()
