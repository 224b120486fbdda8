"""Metrics: kept on the device between readings, written as one json row a reading."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanfunc.config.files import naming, write_text

LAST = ("lr", "skipped", "skipped_in_row")
"""Metrics of which the newest value is told; of all others, the mean over the interval."""
UNFINISHED = "unfinished"
"""Marks the row of an interval that was cut short, and that goes on when the run does."""


def bits_per_byte(loss: float, bytes_per_token: float = 1.0) -> float:
    """Bits a byte of text, from a loss in nats a token."""
    return loss / math.log(2) / bytes_per_token


class Accumulator:
    """Sums up the metrics of an interval, without reading the device until ``read``.

    Each step's values are copied into one small float32 tensor, since a compiled step may overwrite its outputs
    the next time it is called. each: what the newest reading had of every metric, a value a step.
    sums: of the interval as far as it was read, as json: by name the sum of the finite values, how many they are, and
    the newest value (None if it is not finite). Given them, another goes on as this one would, to the last bit.
    """

    def __init__(self, sums: Mapping[str, Any] | None = None) -> None:
        self.each: Mapping[str, tuple[float, ...]] = {}
        self.sums: Mapping[str, Any] = sums or {}
        self._names: tuple[str, ...] = ()
        self._rows: list[Tensor] = []

    def __bool__(self) -> bool:
        """Whether anything was added since the interval began."""
        return bool(self._rows or self.sums)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take one step's metrics, 0-d tensors of one device. Raises ValueError if the names change."""
        names = tuple(metrics)
        if self._rows and names != self._names:
            raise ValueError(f"metrics: wanted the same names at each step, {self._names}, got {names}")
        self._names = names
        self._rows.append(torch.stack([value.detach().to(torch.float32) for value in metrics.values()]))

    def read(self, *, end: bool = True) -> dict[str, float]:
        """One number a metric, by one transfer from the device. Empty if nothing was added.

        The mean over those steps where the value was finite (nan if none was), but for ``LAST``. end: then begin anew;
        otherwise the interval goes on. Sums of other metrics than were added since, as of other settings, are left out.
        """
        if self._rows:
            rows = torch.stack(self._rows).tolist()
            self._rows.clear()
            self.each = dict(zip(self._names, zip(*rows, strict=True), strict=True))
            before = self.sums if self.sums.keys() == self.each.keys() else dict.fromkeys(self.each, (0.0, 0, None))
            self.sums = {name: _added(before[name], column) for name, column in self.each.items()}
        sums = self.sums
        if end:
            self.sums = {}
        return {name: _told(name, *each) for name, each in sums.items()}


class MetricsFile:
    """``metrics.jsonl``: one json object a line, each with its ``step``.

    A row is the system's as soon as it is written, so that it outlives the process; that it outlives the machine too,
    ``checkpoint.write`` waits for. Rows since the last checkpoint are written again by the run that goes on from it.
    One of its very step, which a run that was resumed there and then killed has written already, is not.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        """Open for appending. resume_step: first drop the rows of later steps and of intervals that were cut short, and
        what is no row, with a warning.
        """
        self.path = Path(path)
        self._there: set[tuple[int, str]] = set()
        if resume_step is not None and self.path.exists():
            kept = [row for row in _readable(self.path) if row["step"] <= resume_step and UNFINISHED not in row]
            write_text(self.path, "".join(_line(row) for row in kept))
            self._there = {(resume_step, _kind(row)) for row in kept if row["step"] == resume_step}
        self._file = self.path.open("ab", buffering=0)  # so that nothing of a row that had no room is written later

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a row. Numbers that are not finite become null, which json has and NaN it has not.

        Raises OSError, with the file's name, where it cannot be written, as on a full disk: then none of it is there.
        """
        if (step, _kind(values)) in self._there:
            return
        with naming(self.path):
            line = _line({"step": step, **values}).encode()
            end = self._file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(end)
                raise

    def close(self) -> None:
        """Close the file; nothing can be written afterwards."""
        with contextlib.suppress(OSError):
            self._file.close()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order; a last line cut short by a crash is left out.

    Raises ValueError if any other line is not a json object with a ``step``.
    """
    rows = []
    for number, line in _lines(path):
        row = _row(line)
        if row is None:
            got = line.decode("utf-8", "replace").strip()[:60]
            raise ValueError(f"{path}: line {number}: wanted a json object with a step, got {got!r}")
        rows.append(row)
    return rows


def _readable(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file that can be read; one line on stderr tells of others, as a power failure leaves."""
    found = [(number, _row(line)) for number, line in _lines(path)]
    bad = [number for number, row in found if row is None]
    if bad:
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        print(f"warning: {path}: line {bad[0]}{more} cannot be read: left out", file=sys.stderr)
    return [row for _, row in found if row is not None]


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Every line that has an end, with its number."""
    return enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _kind(values: Mapping[str, Any]) -> str:
    """Of a row: an interval's begins with "loss", one of a validation with "validation_loss"."""
    return next((name for name in values if name != "step"), "")


def _line(row: Mapping[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean, allow_nan=False) + "\n"


def _added(before: Sequence[Any], values: Sequence[float]) -> tuple[float, int, float | None]:
    """The sum of finite values, how many they are, and the newest value: those before, and then ``values``."""
    total, count = before[0], before[1]
    for value in values:  # one by one, so that the sum does not hang on where an interval was cut
        if math.isfinite(value):
            total, count = total + value, count + 1
    return total, count, values[-1] if math.isfinite(values[-1]) else None


def _told(name: str, total: float, count: int, last: float | None) -> float:
    if name in LAST:
        return math.nan if last is None else last
    return total / count if count else math.nan
