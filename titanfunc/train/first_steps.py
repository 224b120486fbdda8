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
from titanfunc.ops import compile_ahead

KEPT = 200  # newest first steps
SLOWEST = 3  # kernels that are named


class FirstSteps:
    """The seconds of the last first step like this one. A writer of metrics: it takes ``compile_seconds``.

    settings: what decides what is compiled, as json takes it; versions and the device are added. say: takes a line on
    what was compiled. The file lies in ``caches.folder()``; one that cannot be read or written is done without.

    On a GPU it listens to Triton from :meth:`begin` until the first step is done, or it is closed.
    """

    def __init__(
        self, settings: Mapping[str, Any], device: torch.device, say: Callable[[str], None] = lambda text: None
    ) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        whole = json.dumps([settings, torch.__version__, name], sort_keys=True, default=str)
        self.key = hashlib.sha256(whole.encode()).hexdigest()[:16]
        self.file = caches.folder() / "first_steps.json"
        self._say = say
        self._kernels, self._waited = Kernels(), compile_ahead.so_far()
        self._listens = device.type == "cuda"

    def begin(self) -> None:
        """What is compiled from here on belongs to the first step."""
        self._waited = compile_ahead.so_far()
        if self._listens:
            self._kernels.listen()

    def last(self) -> float | None:
        """Seconds, or None if there was none like it."""
        seconds = self._all().get(self.key)
        return float(seconds) if isinstance(seconds, int | float) else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Remembers the ``compile_seconds`` among the numbers of a step, and says what inductor had on disk."""
        if "compile_seconds" not in values:
            return
        self._kernels.stop()
        inductors, autograds = _looked_up("inductor", "fxgraph_cache"), _looked_up("aot_autograd", "autograd_cache")
        if inductors or autograds:
            seconds = f"{float(values['compile_seconds']):.0f} s"
            held = [f"inductor's cache held {inductors}"] if inductors else []
            held += [f"AOTAutograd's {autograds}"] if autograds else []
            told = [f"of the programs, {', '.join(held)}", str(self._kernels), _waited(self._waited)]
            self._say(f"compiled in {seconds}; {'; '.join(filter(None, told))}")
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
        self._kernels.stop()

    def _all(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class Kernels:
    """Which kernels Triton compiled in this process, and which its cache on disk held, while this listened.

    What inductor's workers compiled, or its own cache held, Triton is not asked for here.
    """

    def __init__(self) -> None:
        self.compiled: list[tuple[str, float]] = []  # names and seconds
        self.held = 0
        self._knobs: Any = None
        self._before: Any = None
        self._stopped = False

    def listen(self) -> None:
        """Begins, where there is a Triton that tells; another's listener goes on being told."""
        try:
            from triton import knobs
        except ImportError:
            return
        self._knobs, self._before = knobs.compilation, knobs.compilation.listener
        self._knobs.listener = self.take

    def stop(self) -> None:
        """Ends; where another has begun since, which would be cut off, this one only hands on what it is told."""
        self._stopped = True
        if self._knobs is not None and self._knobs.listener == self.take:
            self._knobs.listener = self._before

    def take(self, *, src: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        """What Triton calls, with times in microseconds."""
        if self._stopped:
            pass
        elif cache_hit:
            self.held += 1
        else:
            self.compiled.append((str(src.name), 1e-6 * times.total))
        if self._before is not None:
            self._before(src=src, times=times, cache_hit=cache_hit, **rest)

    def __str__(self) -> str:
        """``of Triton's kernels, 2 compiled here in 3.1 s (_backward 2.1 s, _forward 1.0 s), 30 in its cache``."""
        if not self.compiled and not self.held:
            return ""
        slowest = sorted(self.compiled, key=lambda each: -each[1])
        named = [f"{name} {seconds:.1f} s" for name, seconds in slowest[:SLOWEST]]
        named += ["..."] if slowest[SLOWEST:] else []
        took = f" in {sum(seconds for _, seconds in slowest):.1f} s ({', '.join(named)})" if slowest else ""
        return f"of Triton's kernels, {len(slowest)} compiled here{took}, {self.held} in its cache"


def _waited(before: tuple[int, float]) -> str:
    """For the processes that compile ahead, since there were so many and so many seconds."""
    begun, seconds = (now - then for now, then in zip(compile_ahead.so_far(), before, strict=True))
    return f"waited {seconds:.1f} s for {begun} {'process' if begun == 1 else 'processes'}" if begun else ""


def _looked_up(compiler: str, cache: str) -> str:
    """``3 of 4``: so many programs of this process were found in a cache, of all; nothing where none was asked for."""
    found, *made = (counters[compiler][f"{cache}_{how}"] for how in ("hit", "miss", "bypass"))
    return f"{found} of {found + sum(made)}" if found + sum(made) else ""
