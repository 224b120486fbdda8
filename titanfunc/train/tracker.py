"""Trackers: metrics shown by another program, beside ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titanfunc.train.metrics import UNFINISHED


class TensorBoard:
    """Writes every number of a row as a TensorBoard scalar under its name, in the folder ``tensorboard``."""

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        """Open the event file. resume_step: rows of later steps, from before a resume, are no longer shown."""
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the finite numbers of a row, at a step (optimizer steps done); not of one that a resume would drop."""
        if UNFINISHED in values:
            return
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is pending; nothing can be written afterwards."""
        self._writer.close()
