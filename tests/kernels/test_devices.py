"""Every operation with a kernel refuses a tensor that is not where its others are, whichever it is."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.kernels import (
    test_adamw,
    test_attention,
    test_learned_mlp,
    test_memory_read,
    test_memory_wide,
    test_memory_write_read,
    test_norm,
    test_single_write,
)
from tests.kernels.checks import draw
from tests.kernels.test_memory_wide import by_kernels as write
from titanfunc.ops import backend, symmetric
from titanfunc.ops.fp8 import linear_fp8
from titanfunc.ops.gate import silu_gate
from titanfunc.ops.linear_cross_entropy import linear_cross_entropy
from titanfunc.ops.norm_linear import norm_linear
from titanfunc.ops.rotary import Rotary, rotary_table, rotate

triton = functools.partial(functools.partial, kernels="triton")


def attention(make):
    function, tensors = make()
    return triton(function), tensors


def targets():
    return torch.zeros(2, 3, dtype=torch.int64, device=draw(1).device)


def rotated(x, cos, sin):
    return rotate(x, Rotary(cos, sin), "triton")


def table():
    return [draw(2, 5, 8), *rotary_table(torch.arange(5, device=draw(1).device), 8, torch.float32)]


# The operation's name, and what makes a function and the tensors that it takes.
CASES = {
    "memory_write, small": ("memory_write", lambda: (write, test_memory_wide.problem((1, 1, 2, 16, 16, 32)))),
    "memory_write, wide": ("memory_write", lambda: (write, test_memory_wide.problem((1, 1, 2, 5, 12, 20)))),
    "memory_write_read": (
        "memory_write(_read)?",
        lambda: (test_memory_write_read.by_kernels, test_memory_write_read.asked((1, 1, 2, 5, 12, 20))),
    ),
    "memory_read": (
        "memory_read",
        lambda: (test_memory_read.read, test_memory_read.problem(2, 1, tokens=16, size=16, hidden=16)),
    ),
    "window_attention": (
        "window_attention",
        lambda: attention(lambda: test_attention.windows(1, 1, 5, 3, 16, 2)),
    ),
    "segment_attention": (
        "segment_attention",
        lambda: attention(lambda: test_attention.segments(1, 1, 2, 3, 16, 2, True)),
    ),
    "rms_norm": ("rms_norm", lambda: test_norm.problem("rms_norm", 3, 8)[::2]),
    "layer_norm": ("layer_norm", lambda: test_norm.problem("layer_norm", 3, 8)[::2]),
    "unit_rows": ("unit_rows", lambda: test_norm.problem("unit_rows", 3, 8)[::2]),
    "silu_gate": ("silu_gate", lambda: (triton(silu_gate), [draw(3, 4), draw(3, 4)])),
    "rotate": ("rotate", lambda: (rotated, table())),
    "norm_linear": (
        "norm_linear",
        lambda: (triton(norm_linear, dtype=torch.float32), [draw(8), draw(8, 4), draw(3, 8)]),
    ),
    "linear_cross_entropy": (
        "linear_cross_entropy",
        lambda: (triton(linear_cross_entropy), [draw(2, 3, 4), draw(4, 5), targets(), draw(2, 3).abs()]),
    ),
    "linear_fp8": (
        "linear_fp8",
        lambda: (lambda w, x: linear_fp8(w, x, torch.float32, kernels="triton"), [draw(16, 32), draw(3, 16)]),
    ),
    "adamw": (
        "adamw",
        lambda: (test_adamw.update("triton", 2), [*test_adamw.scalars(), *test_adamw.leaves([(3,), (2, 2)])]),
    ),
    "gram": ("gram", lambda: (triton(symmetric.gram), [draw(1, 4, 3)])),
    "square_polynomial": (
        "square_polynomial",
        lambda: (triton(symmetric.square_polynomial, linear=1.0, square=2.0), [draw(1, 4, 4)]),
    ),
    "learned_mlp": ("learned_mlp", lambda: (test_learned_mlp.step("triton"), test_learned_mlp.problem((5, 7), 4))),
    "learned_mlp, a vector": (
        "learned_mlp",
        lambda: (test_learned_mlp.step("triton"), test_learned_mlp.problem((5,), 4)),
    ),
    "single_write": (
        "single_write",
        lambda: (test_single_write.function(2, "triton"), test_single_write.problem((3, 4, 5), 2)),
    ),
}


def test_every_operation_with_a_kernel_is_here():
    kernels = {operation for operation, rows in backend.table().items() if "triton" in rows}
    assert kernels == {name.split(",")[0] for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_elsewhere_is_refused_whichever_it_is(case):
    name, make = CASES[case]
    function, tensors = make()
    for place, tensor in enumerate(tensors):
        moved = [tensor.to("meta") if i == place else t for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=rf"^{name}: .*kernels=reference"):
            function(*moved)
