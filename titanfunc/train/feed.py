"""Batches made by a thread, and copied to the device, ahead of the steps that ask for them.

The thread makes batches and lays them into pinned memory. The copies themselves are handed to a stream of their own
by the thread that asks, which takes microseconds: no other may call CUDA, as an allocation or a look at an event there
would spoil the CUDA graph that the step may just be recording.

For a CPU batches are made when they are asked for: a thread would take the interpreter and a core from the step itself.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc.config.failures import NoData

Batch = dict[str, Tensor]
AHEAD = 3
"""Batches made before they are asked for."""
CLOSING = 5.0
"""Seconds that closing waits for a batch in the making, such as one that comes over a network."""


class NoBatch(NoData):
    """The batch of a step could not be read: a file is gone or damaged, or the data are exhausted."""


class Feed:
    """The batches of the steps from ``first`` up to ``end``, in order, as dicts on ``device``. A context manager.

    batches: the tokens [B, T + 1] of a step, or a dict of them and more, on the CPU; called for one step after the
    other. What it raises is raised for the step whose batch it was to be: as NoBatch, with the same message, where
    it is what data give cause for (OSError, EOFError, ValueError, StopIteration), else as it is.
    threaded: whether a thread makes them ahead (None: for a GPU). waited: seconds so far that ``next`` waited for one.
    """

    def __init__(
        self,
        batches: Callable[[int], Tensor | Mapping[str, Tensor]],
        first: int,
        end: int,
        device: torch.device,
        threaded: bool | None = None,
    ) -> None:
        self.waited = 0.0
        self._threaded = device.type == "cuda" if threaded is None else threaded
        self._batches, self._due, self._end = batches, first, end
        self._copies = _Copies(device) if device.type == "cuda" else None
        self._device = device
        self._room = threading.Semaphore(AHEAD)
        self._made: SimpleQueue[dict[str, _Laid] | BaseException] = SimpleQueue()
        self._coming: _Copied | Batch | BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._make_all, args=(first,), name="feed", daemon=True)

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def next(self) -> Batch:
        """The batch of the next step (leaves on the device, each used by the current stream alone).

        The thread begins with the first call, which does nothing but wait meanwhile: where ``batches`` forks
        processes, none is born with a lock that this thread holds.
        """
        if self._due >= self._end:
            raise ValueError(f"step: wanted one below {self._end}, got {self._due}")
        self._due += 1
        if self._coming is None:
            begun = time.perf_counter()
            if self._threaded and self._thread.ident is None:
                self._thread.start()
            made = self._made.get() if self._threaded else self._make(self._due - 1)
            self.waited += time.perf_counter() - begun
            self._coming = self._send(made)
        coming, self._coming = self._coming, None
        if isinstance(coming, BaseException):
            raise coming
        if not self._made.empty():  # its copy runs beside the step that is handed to the device next
            self._coming = self._send(self._made.get())
        if isinstance(coming, dict):
            return coming
        assert self._copies is not None
        return self._copies.arrived(coming)

    def close(self) -> None:
        """Make no more batches. Returns when the thread has ended, or is still at one batch after some seconds."""
        self._closed = True
        self._room.release()
        if self._thread.ident is not None:
            self._thread.join(CLOSING)
        self._coming = None

    def _send(self, made: dict[str, _Laid] | BaseException) -> _Copied | Batch | BaseException:
        self._room.release()
        if isinstance(made, BaseException):
            return made
        if self._copies:
            return self._copies.send(made)
        return {name: laid.leaf.to(self._device) for name, laid in made.items()}

    def _make_all(self, first: int) -> None:
        for step in range(first, self._end):
            self._room.acquire()
            if self._closed:
                return
            made = self._make(step)
            self._made.put(made)
            if isinstance(made, BaseException):
                return

    def _make(self, step: int) -> dict[str, _Laid] | BaseException:
        try:
            batch = self._batches(step)
            named = {"tokens": batch} if isinstance(batch, Tensor) else batch
            return {
                name: self._copies.lay(leaf) if self._copies else _Laid(leaf, False) for name, leaf in named.items()
            }
        except (OSError, EOFError, ValueError, StopIteration) as error:
            return _no_batch(step, error)
        except BaseException as error:
            return error  # to be raised where the batch is asked for


def _no_batch(step: int, error: Exception) -> NoBatch:
    said = " ".join(str(error).split()) or "the data are exhausted"
    found = NoBatch(f"the batch of step {step + 1}: {said}")
    found.__cause__ = error
    return found


class _Laid(NamedTuple):
    """A leaf on the CPU, and whether it lies in pinned memory of ours."""

    leaf: Tensor
    pinned: bool


class _Copied(NamedTuple):
    """A batch on the device once ``event`` is reached."""

    event: torch.cuda.Event
    batch: Batch


class _Copies:
    """Copies to a GPU on a stream of their own, from pinned memory that is used again once it has been read.

    A batch's memory on the GPU is the allocator's: it knows both streams, and gives it to no other copy before the
    step that reads it is done. ``lay`` calls no CUDA, and is all that another thread may call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._free: dict[tuple[torch.Size, torch.dtype], deque[Tensor]] = {}
        self._read_by: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def lay(self, leaf: Tensor) -> _Laid:
        """A leaf [...] in pinned memory, where some of its size is free."""
        free = self._free.get((leaf.shape, leaf.dtype))
        return _Laid(free.popleft().copy_(leaf), True) if free else _Laid(leaf, False)

    def send(self, made: Mapping[str, _Laid]) -> _Copied:
        """Begin the copies; a leaf [...] that lies in no pinned memory yet is laid into new."""
        while self._read_by and self._read_by[0][0].query():
            for leaf in self._read_by.popleft()[1]:
                self._free.setdefault((leaf.shape, leaf.dtype), deque()).append(leaf)
        pinned = {
            name: laid.leaf if laid.pinned else torch.empty(laid.leaf.shape, dtype=laid.leaf.dtype, pin_memory=True)
            for name, laid in made.items()
        }
        for name, laid in made.items():
            if not laid.pinned:
                pinned[name].copy_(laid.leaf)
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            batch = {name: leaf.to(self._device, non_blocking=True) for name, leaf in pinned.items()}
            event.record(self._stream)
        self._read_by.append((event, list(pinned.values())))
        return _Copied(event, batch)

    def arrived(self, copied: _Copied) -> Batch:
        """The batch (leaves of any shapes), for steps that the current stream takes from now on."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied.event)
        for leaf in copied.batch.values():
            leaf.record_stream(current)
        return copied.batch
