"""The training loop: the only place that reads a value back from the device.

It reads at every ``log_every``-th step (and after the first, which is when the step compiles), at validations and
at checkpoints; in between, steps are only handed to the device.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.config.train import TrainConfig
from titanfunc.train.display import Display
from titanfunc.train.metrics import Accumulator, bits_per_byte

StepFn = Callable[[Any, dict[str, Tensor]], tuple[Any, Mapping[str, Tensor]]]


class Writer(Protocol):
    """Where rows of metrics go: ``MetricsFile``, or a tracker."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Take the numbers of a step (optimizer steps done)."""

    def close(self) -> None:
        """Nothing more will come."""


class Outcome(NamedTuple):
    """How a run of ``train`` ended.

    step: optimizer steps done in all. stopped_by: the signal that ended it early, or None. seconds, tokens: of
    the steps alone, without compiling, validating and saving. validation: the newest of ``evaluate``, or empty.
    """

    step: int
    stopped_by: signal.Signals | None
    seconds: float
    tokens: int
    validation: Mapping[str, float]


class Diverged(RuntimeError):
    """Too many steps in a row were skipped because their loss or gradient was not finite."""


def train(
    step_fn: StepFn,
    state: Any,
    batches: Callable[[int], Tensor | Mapping[str, Tensor]],
    config: TrainConfig,
    *,
    save: Callable[[int, Any], Any],
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    writers: Sequence[Writer] = (),
    display: Display | None = None,
    bytes_per_token: float | None = 1.0,
) -> tuple[Any, Outcome]:
    """Take steps until ``config.steps`` are done, or SIGINT or SIGTERM asks to stop (after a last checkpoint).

    step_fn: ``(state, {"tokens": int64 [B, T + 1]}) -> (state, metrics)`` with 0-d metrics, among them ``loss``
    in nats a token. state: a TrainState; its ``step`` says where to begin, and its buffers may be donated.
    batches: the tokens [B, T + 1] of a step, or a dict of them and more (weights [B, T]), on the CPU. save: called
    with the steps done and the state. evaluate: validation numbers from params, each written as ``validation_*``.
    bytes_per_token: of the text; None tells no bits per byte.

    Raises Diverged, after a checkpoint, when ``config.max_skipped`` steps in a row were skipped.
    """
    done = int(state.step)
    device = tree.leaves(state.params)[0].device
    display = display or Display(config.steps, done)
    interval = _Interval(device, bytes_per_token)
    validation: Mapping[str, float] = {}

    def record(values: Mapping[str, Any]) -> None:
        for writer in writers:
            writer.write(done, values)

    def validate() -> Mapping[str, float]:
        values = evaluate(state.params) if evaluate is not None else {}
        record({f"validation_{name}": value for name, value in values.items()})
        display.show(done, values, of="validation")
        return values

    with _StopSignals() as signals, display:
        if evaluate is not None and config.eval_every and done == 0:
            validation = validate()
        stopping = signals.received is not None
        if stopping:
            save(done, state)
        interval.start()
        while done < config.steps and not stopping:
            batch = _to(batches(done), device)
            state, metrics = step_fn(state, batch)
            done += 1
            interval.add(batch["tokens"], {**metrics, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row})
            display.advance(done)

            stopping = signals.received is not None
            last = done == config.steps
            log_due = last or stopping or not interval.compiled or done % config.log_every == 0
            eval_due = evaluate is not None and (last or _due(done, config.eval_every))
            save_due = last or stopping or _due(done, config.checkpoint_every)
            if not (log_due or eval_due or save_due):
                continue
            interval.pause()
            if log_due:
                values = interval.read()
                record(values)
                display.show(done, values)
                if values["skipped_in_row"] >= config.max_skipped:
                    save(done, state)
                    raise Diverged(
                        f"step {done}: loss or gradient not finite {values['skipped_in_row']:.0f} steps in a row; "
                        f"the weights of before are saved: resume with a smaller optim.lr, or look at the data"
                    )
            if eval_due:
                validation = validate()
            if save_due:
                save(done, state)
            interval.start()
    stopped_by = signals.received if done < config.steps else None  # one in the last step has nothing to stop
    return state, Outcome(done, stopped_by, interval.seconds, interval.tokens, validation)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _to(batch: Tensor | Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on the device; copies from pinned memory overlap with the steps still running there."""
    named = {"tokens": batch} if isinstance(batch, Tensor) else batch
    if device.type == "cuda":
        return {name: leaf.pin_memory().to(device, non_blocking=True) for name, leaf in named.items()}
    return {name: leaf.to(device) for name, leaf in named.items()}


def _peak_memory(device: torch.device) -> float:
    """The most memory held so far, in GiB: of the device's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _Interval:
    """What happened since the last reading: metrics, tokens, and seconds between ``start`` and ``pause``.

    seconds, tokens: over all intervals but the first, which is one step long and compiles it.
    """

    def __init__(self, device: torch.device, bytes_per_token: float | None) -> None:
        self.compiled = False
        self.seconds, self.tokens = 0.0, 0
        self._device, self._bytes_per_token = device, bytes_per_token
        self._metrics = Accumulator()
        self._seconds, self._started, self._tokens = 0.0, 0.0, 0

    def add(self, tokens: Tensor, metrics: Mapping[str, Tensor]) -> None:
        self._tokens += tokens.numel() - tokens.numel() // tokens.shape[-1]
        self._metrics.add(metrics)

    def start(self) -> None:
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, once the device has finished what it was handed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds += time.perf_counter() - self._started

    def read(self) -> dict[str, float]:
        """The means of the metrics, with bits per byte (of text), speed and memory; then begin the next interval."""
        values = self._metrics.read()
        head = {"loss": values.pop("loss")}
        if self._bytes_per_token is not None:
            head["bits_per_byte"] = bits_per_byte(head["loss"], self._bytes_per_token)
        if "accuracy" in values:
            head["accuracy"] = values.pop("accuracy")
        if self.compiled:
            values["tokens_per_second"] = self._tokens / self._seconds
            self.seconds += self._seconds
            self.tokens += self._tokens
        else:
            values["compile_seconds"] = self._seconds
            self.compiled = True
        self._seconds, self._tokens = 0.0, 0
        return {**head, **values, "peak_memory_gib": _peak_memory(self._device)}


class _StopSignals:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one does what it always does."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
