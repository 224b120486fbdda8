"""Whether this machine can have a GPU at all, without torch, which takes seconds to say that there is none."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys

from titanfunc.config._check import require

SIGNS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/dxg", "/dev/kfd")
"""What stands there where a driver is loaded: of a GPU in a computer, on a small board, under Windows; AMD's."""


def has_driver() -> bool:
    """False where there is surely no driver of a GPU; torch knows better where this is True."""
    if sys.platform != "linux" or any(map(os.path.exists, SIGNS)) or shutil.which("nvidia-smi"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def require_kernels(kernels: str, device: str, field: str) -> None:
    """Raise ``ValueError`` for Triton's kernels where a run will surely have no GPU, unless they are interpreted
    (TRITON_INTERPRET=1); whether they run on a GPU that is there is seen later."""
    none = device == "cpu" or (device == "auto" and not has_driver())
    ok = kernels != "triton" or not none or os.environ.get("TRITON_INTERPRET") == "1"
    why = " on device=cpu" if device == "cpu" else ", as this machine has no driver of a GPU"
    require(ok, field, f"reference{why}", kernels)


def require_driver(device: str, field: str) -> None:
    """Raise ``ValueError`` for a CUDA device where there is no driver; which ones there are is seen later."""
    ok = not device.startswith("cuda") or has_driver()
    require(ok, field, "auto or cpu, as this machine has no driver of a GPU", device)
