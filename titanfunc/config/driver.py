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


def require_driver(device: str, field: str) -> None:
    """Raise ``ValueError`` for a CUDA device where there is no driver; which ones there are is seen later."""
    ok = not device.startswith("cuda") or has_driver()
    require(ok, field, "auto or cpu, as this machine has no driver of a GPU", device)
