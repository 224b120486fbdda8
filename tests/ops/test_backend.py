"""The table of operations and their kernels."""

from __future__ import annotations

import pytest
import torch

from titanfunc.ops import backend
from titanfunc.ops.norm import rms_norm


def test_the_table_lists_an_operation_with_its_kernels():
    assert backend.table()["rms_norm"] == ("reference", "triton")


def test_an_unknown_kernel_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^kernels: wanted one of reference, triton for rms_norm, got 'cuda'$"):
        rms_norm(torch.ones(4), torch.ones(2, 4), kernels="cuda")


def test_a_tensor_that_no_kernel_can_reach_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"x: wanted a CUDA tensor with kernels=triton, got one on cpu"):
        rms_norm(torch.ones(4), torch.ones(2, 4), kernels="triton")
