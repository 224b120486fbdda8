"""Saving while training goes on: the state is copied to the host at once, and written by a thread."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from titanfunc.config import ModelConfig, checkpoints
from titanfunc.config.failures import NotWritten
from titanfunc.train import checkpoint

OLDER = "; older ones are as they were"


class SaveFailed(NotWritten):
    """A checkpoint could not be written; those from before are as they were."""


class Saver:
    """Checkpoints of one run, each written in the background; one at a time, a second save waits for the first.

    A ``Writer`` of metrics too: a row's ``validation_loss`` is that of the checkpoint of the same step. As a context
    manager it waits for the last save at the end. What goes wrong in the background is raised, as SaveFailed, by the
    next row, the next ``save`` or ``close``, and no state is lost by it that a second try can save: that ``save`` first
    writes its own, and ``close`` what failed. The thread calls nothing of CUDA: the copy is done before ``save``
    returns, so the next step may overwrite the state, or be recorded as a graph.
    """

    def __init__(
        self, run_dir: str | Path, model: ModelConfig, *, keep: int = 0, keep_best: int = 0, **configs: Any
    ) -> None:
        """Of what every checkpoint gets: see ``checkpoint.save``."""
        self._run_dir, self._model, self._configs = Path(run_dir), model, configs
        self._keep, self._keep_best = keep, keep_best
        self._buffers: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._thread: threading.Thread | None = None
        self._failed: SaveFailed | None = None
        self._last: tuple[int, Mapping[str, Tensor], str] | None = None
        self._validated: tuple[int, float] = (-1, math.nan)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SaveFailed as failed:
            if error is None:
                raise
            if failed is not error:
                print(f"warning: {failed}", file=sys.stderr)  # beside the error that ended the run

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Take note of a row's validation loss. Raises SaveFailed if a save has failed."""
        if "validation_loss" in values:
            self._validated = (step, float(values["validation_loss"]))
        if self._failed is not None:
            raise self._failed

    def save(self, step: int, state: Any, sums: Mapping[str, Any] | None = None) -> None:
        """Copy the state (tensors of any shapes, on one device) and begin to write it. sums: see ``checkpoint.save``.

        Raises ValueError if the run already has a whole checkpoint of this step. Raises SaveFailed if the save before
        failed: this one has then been tried, and waited for.
        """
        failed = self._wait()
        checkpoint.require_new(self._run_dir, step)
        of_step, loss = self._validated
        known = of_step == step and math.isfinite(loss)
        metadata = checkpoint.describe(step, self._model, loss if known else None, self._configs, sums)
        self._last = step, self._copy(checkpoint.named_leaves(state)), metadata
        self._thread = threading.Thread(target=self._write, args=self._last, name="checkpoint")
        self._thread.start()
        if failed is not None:
            self._wait()
            raise failed

    def close(self) -> None:
        """Wait until the last save is done. Raises SaveFailed if it failed, twice; more saves may follow."""
        failed = self._wait()
        if failed is not None and self._last is not None:
            self._write(*self._last)
            if (again := self._wait()) is not None:
                raise again
            print(f"warning: {failed}; it was saved at the second try", file=sys.stderr)

    def _wait(self) -> SaveFailed | None:
        """Until the last save is done; why it failed, if it did."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        return failed

    def _write(self, step: int, tensors: Mapping[str, Tensor], metadata: str) -> None:
        place, named = checkpoints.checkpoint_dir(self._run_dir, step), False
        try:
            if checkpoint.is_whole(place):  # at a second try
                checkpoint.point_latest(place)
            else:
                checkpoint.write(self._run_dir, step, tensors, metadata)
            named = True
            checkpoint.drop_old(self._run_dir, step, self._keep, self._keep_best)
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            undone = "older ones may not be dropped" if named else "may not be named as the newest"
            what = f"is saved, but {undone}" if checkpoint.is_whole(place) else "could not be saved"
            failed = SaveFailed(f"the checkpoint {place} {what} ({reason}){OLDER}")
            failed.errno = getattr(error, "errno", None)
            self._failed = failed

    def _copy(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leaves in buffers of the host, which are kept for the next time; pinned, for a GPU's."""
        device = next((leaf.device for leaf in leaves.values() if leaf.is_cuda), None)
        for name, leaf in leaves.items():
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (leaf.shape, leaf.dtype):
                self._buffers[name] = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
        if device is None:
            for name, leaf in leaves.items():
                self._buffers[name].copy_(leaf)
        else:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                for name, leaf in leaves.items():
                    self._buffers[name].copy_(leaf, non_blocking=True)
            self._stream.synchronize()
        return {name: self._buffers[name] for name in leaves}
