"""Which device and which compiler a run has, and whether what it asks for runs there."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from titanfunc.config import ModelConfig, OptimConfig
from titanfunc.ops.backend import interpreted


def resolve_device(name: str, field: str = "train.device") -> torch.device:
    """The device that a name means; "auto" is the GPU if there is one. Raises ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{field}: wanted one of the {torch.cuda.device_count()} CUDA devices, got {name!r}")
    return device


def require_kernels_run(model: ModelConfig, device: torch.device, field: str = "model.kernels") -> None:
    """Raise ValueError where a model asks for kernels that do not run on a device."""
    _require_cuda(model.kernels, device, field)
    if model.kernels == "triton" and model.precision == "fp8" and device.type == "cuda":
        found, row = torch.cuda.get_device_capability(device), model.fp8_scaling == "row"
        if found < (8, 9) or (row and found != (9, 0)):
            needs = "9.0, as fp8_scaling=row does" if row else "8.9 or more"
            raise ValueError(
                f"{field}: wanted reference with precision=fp8 on {device} (of compute capability "
                f"{found[0]}.{found[1]}; the kernels need {needs}), got 'triton'"
            )


def require_optimizer_runs(optim: OptimConfig, device: torch.device) -> None:
    """Raise ValueError where an optimizer asks for kernels that do not run on a device."""
    _require_cuda(optim.kernels, device, "optim.kernels")


def _require_cuda(kernels: str, device: torch.device, field: str) -> None:
    if kernels == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(f"{field}: wanted reference on {device} (triton runs on a CUDA device), got 'triton'")


def resolve_backend(name: str, device: torch.device) -> str | None:
    """The torch.compile backend that a name means, or None; a device has no say but for "auto".

    "auto" is inductor, but None on a CPU without the C++ compiler that inductor calls there.
    """
    if name == "auto":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        name = "inductor" if device.type == "cuda" or shutil.which(compiler) else "none"
    return None if name == "none" else name
