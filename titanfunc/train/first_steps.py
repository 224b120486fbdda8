"""How long first steps took, which compile: remembered from run to run, so that the next one can say what to expect."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._dynamo.utils import counters

from titanfunc import caches

KEPT = 200  # newest first steps


class FirstSteps:
    """The seconds of the last first step like this one. A writer of metrics: it takes ``compile_seconds``.

    settings: what decides what is compiled, as json takes it; versions and the device are added. say: takes a line on
    what was compiled. The file lies in ``caches.folder()``; one that cannot be read or written is done without.
    """

    def __init__(
        self, settings: Mapping[str, Any], device: torch.device, say: Callable[[str], None] = lambda text: None
    ) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        whole = json.dumps([settings, torch.__version__, name], sort_keys=True, default=str)
        self.key = hashlib.sha256(whole.encode()).hexdigest()[:16]
        self.file = caches.folder() / "first_steps.json"
        self._say = say

    def last(self) -> float | None:
        """Seconds, or None if there was none like it."""
        seconds = self._all().get(self.key)
        return float(seconds) if isinstance(seconds, int | float) else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Remembers the ``compile_seconds`` among the numbers of a step, and says what inductor had on disk."""
        if "compile_seconds" not in values:
            return
        inductors, autograds = _looked_up("inductor", "fxgraph_cache"), _looked_up("aot_autograd", "autograd_cache")
        if inductors or autograds:
            seconds = f"{float(values['compile_seconds']):.0f} s"
            held = [f"inductor's cache held {inductors}"] if inductors else []
            held += [f"AOTAutograd's {autograds}"] if autograds else []
            self._say(f"compiled in {seconds}; of the programs, {', '.join(held)}")
        known = {key: seconds for key, seconds in self._all().items() if key != self.key}
        known[self.key] = round(float(values["compile_seconds"]), 1)
        newest = dict(list(known.items())[-KEPT:])
        aside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(newest), encoding="utf-8")
            aside.replace(self.file)

    def close(self) -> None:
        """Nothing more will come."""

    def _all(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _looked_up(compiler: str, cache: str) -> str:
    """``3 of 4``: so many programs of this process were found in a cache, of all; nothing where none was asked for."""
    found, *made = (counters[compiler][f"{cache}_{how}"] for how in ("hit", "miss", "bypass"))
    return f"{found} of {found + sum(made)}" if found + sum(made) else ""
