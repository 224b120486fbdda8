"""The training loop: the only place that reads a value back from the device.

It reads at every ``log_every``-th step, after the first, at validations and at checkpoints; in between, steps are only
handed to the device. A checkpoint that is due ends an interval of metrics. One of a run that is stopped does not: the
interval's sums are saved with it, and its row so far is marked and dropped when the run goes on, so that a run that was
stopped, wherever, writes the rows of one that was not. So does one whose disk was full when a row was due: an interval
ends once its row is written.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.config.failures import NOT_FINITE
from titanfunc.config.train import TrainConfig
from titanfunc.train.display import Display
from titanfunc.train.feed import Feed
from titanfunc.train.metrics import UNFINISHED, Accumulator, bits_per_byte
from titanfunc.train.signals import StopSignals

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
    """Too many steps in a row were skipped because their loss or gradient was not finite.

    steps: what ``batches`` was asked for to get theirs. The state, which was saved, is that of before them, moved on
    by the steps after them, if any were taken before the device was read.
    """

    status = NOT_FINITE

    def __init__(self, steps: range) -> None:
        super().__init__(f"step {steps.stop}: loss or gradient not finite {len(steps)} steps in a row")
        self.steps = steps


def train(
    step_fn: StepFn,
    state: Any,
    batches: Callable[[int], Tensor | Mapping[str, Tensor]],
    config: TrainConfig,
    *,
    save: Callable[[int, Any, Mapping[str, Any]], Any],
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    writers: Sequence[Writer] = (),
    display: Display | None = None,
    bytes_per_token: float | None = 1.0,
    signals: StopSignals | None = None,
    resumed: Mapping[str, Any] | None = None,
) -> tuple[Any, Outcome]:
    """Take steps until ``config.steps`` are done, or SIGINT or SIGTERM asks to stop (after a last checkpoint).

    step_fn: ``(state, {"tokens": int64 [B, T + 1]}) -> (state, metrics)`` with 0-d metrics, among them ``loss``
    in nats a token. state: a TrainState; its ``step`` says where to begin, and its buffers may be donated.
    batches: the tokens [B, T + 1] of a step, or a dict of them and more (weights [B, T]), on the CPU; for a GPU it is
    called in a thread of its own, ahead of the step. save: called with the steps done, the state, and the sums of the
    metrics that are in no row yet, as json (none where a checkpoint is due). resumed: such sums of the checkpoint that
    the run goes on from; None where it has no checkpoint yet. evaluate: validation numbers from params, each written as
    ``validation_*``. bytes_per_token: of the text; None tells no bits per byte. signals: entered by the caller, where
    ``save`` ends after this returns; otherwise they are held in here.

    Raises Diverged when ``config.max_skipped`` steps in a row were skipped, NoBatch when a batch cannot be read, and
    what writers and ``evaluate`` raise: each after a checkpoint. What a step or ``save`` raises comes without one.
    """
    done = int(state.step)
    saved: int | None = done
    device = tree.leaves(state.params)[0].device
    display = display or Display(config.steps, done)
    interval = _Interval(device, bytes_per_token, resumed or {})
    validation: Mapping[str, float] = {}

    def checkpoint() -> None:
        nonlocal saved
        if done != saved:
            save(done, state, interval.sums)
        saved = done

    def leave() -> None:
        """Write the interval so far, in a row that is dropped when the run goes on, and save."""
        try:
            if interval.begun:
                values = interval.read(feed.waited)
                record({**values, UNFINISHED: True})
                display.show(done, values)
        finally:
            checkpoint()

    @contextlib.contextmanager
    def or_leave() -> Iterator[None]:
        """An error in here leaves the state as it is: it is saved first, unless that fails too."""
        try:
            yield
        except Exception:
            with contextlib.suppress(OSError):
                leave()
            raise

    def record(values: Mapping[str, Any]) -> None:
        for writer in writers:
            writer.write(done, values)

    def log() -> None:
        """Write what there is since the last time."""
        values = interval.read(feed.waited)
        for writer in writers:
            writer.write(done, values)
            interval.end()  # by the first, the file: that another could not take it is no reason to write it again
        interval.end()
        display.show(done, values)

    def ends_interval() -> bool:
        """Whether a row is due, as it is at the same steps of a run that was resumed."""
        return done in (1, config.steps) or _due(done, config.checkpoint_every) or _due(done, config.log_every)

    def require_finite() -> None:
        skipped = interval.longest_skipped(done)
        if len(skipped) >= config.max_skipped:
            raise Diverged(skipped)

    def validate() -> Mapping[str, float]:
        values = evaluate(state.params) if evaluate is not None else {}
        record({f"validation_{name}": value for name, value in values.items()})
        display.show(done, values, of="validation")
        return values

    with contextlib.ExitStack() as held, display, Feed(batches, done, config.steps, device) as feed:
        signals = signals or held.enter_context(StopSignals())
        if evaluate is not None and config.eval_every and done == 0 and resumed is None:
            validation = validate()
        if resumed and done and ends_interval():  # whose row could not be written; or the run is now to end here
            log()
            if evaluate is not None and _due(done, config.eval_every):
                validation = validate()
        if evaluate is not None and done == config.steps and not validation:  # left is but to tell how it ended
            validation = validate() if resumed else evaluate(state.params)
        stopping = signals.received is not None
        if stopping and resumed is None:
            saved = None
        interval.start()
        while done < config.steps and not stopping:
            try:
                batch = feed.next()
            except Exception:  # the steps before it are told too
                interval.pause()
                with or_leave():
                    raise
            state, metrics = step_fn(state, batch)
            done += 1
            interval.add(batch["tokens"], {**metrics, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row})
            display.advance(done)

            stopping = signals.received is not None
            last = done == config.steps
            eval_due = evaluate is not None and (last or _due(done, config.eval_every))
            save_due = last or _due(done, config.checkpoint_every)
            if not (ends_interval() or eval_due or stopping) and interval.compiled:
                continue
            interval.pause()
            with or_leave():
                if ends_interval():
                    log()
                    require_finite()
                if eval_due:
                    validation = validate()
            if save_due:
                checkpoint()
            interval.start()
        if stopping and done < config.steps:
            leave()
            require_finite()
    stopped_by = signals.received if done < config.steps else None  # one in the last step has nothing to stop
    return state, Outcome(done, stopped_by, interval.seconds, interval.tokens, validation)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak_memory(device: torch.device) -> float:
    """The most memory held so far, in GiB: of the device's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _Interval:
    """What happened since the last reading: metrics, tokens, and seconds between ``start`` and ``pause``.

    sums: of an interval that has begun already. seconds, tokens: over all steps but the first, which compiles.
    """

    def __init__(self, device: torch.device, bytes_per_token: float | None, sums: Mapping[str, Any]) -> None:
        self.compiled = False
        self.seconds, self.tokens = 0.0, 0
        self._device, self._bytes_per_token = device, bytes_per_token
        self._metrics = Accumulator(sums)
        self._seconds, self._started, self._tokens, self._waited = 0.0, 0.0, 0, 0.0
        self._compile_seconds = 0.0

    @property
    def begun(self) -> bool:
        """Whether there are metrics that are in no row yet."""
        return bool(self._metrics)

    @property
    def sums(self) -> Mapping[str, Any]:
        """Of the metrics that were read but do not end an interval, as json."""
        return self._metrics.sums

    def add(self, tokens: Tensor, metrics: Mapping[str, Tensor]) -> None:
        self._tokens += tokens.numel() - tokens.numel() // tokens.shape[-1]
        self._metrics.add(metrics)

    def start(self) -> None:
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, once the device has finished what it was handed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        if self.compiled:
            self._seconds += seconds
        else:
            self.compiled, self._compile_seconds, self._tokens = True, seconds, 0

    def longest_skipped(self, done: int) -> range:
        """The most steps in a row that were skipped, of those that ended among the steps that were read last, at
        ``done`` steps."""
        in_row = self._metrics.each.get("skipped_in_row", ())
        most = max(in_row, default=0)
        if not most:
            return range(0)
        end = done - len(in_row) + in_row.index(most) + 1
        return range(end - int(most), end)

    def end(self) -> None:
        """Begin the next interval: what was read is in a row."""
        self._metrics.read()

    def read(self, waited: float) -> dict[str, float]:
        """The means of the metrics, with bits per byte (of text), and speed and memory since the last reading.

        waited: seconds of all intervals in which there was no batch yet to hand to the device. Until ``end`` is called
        the interval goes on, as far as metrics go.
        """
        values = self._metrics.read(end=False)
        head = {"loss": values.pop("loss")}
        if self._bytes_per_token is not None:
            head["bits_per_byte"] = bits_per_byte(head["loss"], self._bytes_per_token)
        if "accuracy" in values:
            head["accuracy"] = values.pop("accuracy")
        if self._tokens:
            values["tokens_per_second"] = self._tokens / self._seconds
            self.seconds += self._seconds
            self.tokens += self._tokens
        if self._compile_seconds:
            values["compile_seconds"], self._compile_seconds = self._compile_seconds, 0.0
        values["data_wait_seconds"] = waited - self._waited
        self._seconds, self._tokens, self._waited = 0.0, 0, waited
        return {**head, **values, "peak_memory_gib": _peak_memory(self._device)}
