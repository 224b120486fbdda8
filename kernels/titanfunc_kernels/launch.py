"""What launching needs to know of the device; none of it waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

INTERPRETED_MULTIPROCESSORS = 2  # so that loops over programs take more than one turn at the shapes of tests


def multiprocessors(tensor: Tensor) -> int:
    """How many multiprocessors the device of ``tensor`` has."""
    if not tensor.is_cuda:
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """Makes the device of ``tensor`` the current one: Triton launches on that, wherever its arguments are."""
    return torch.cuda.device_of(tensor)
