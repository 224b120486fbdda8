"""What a person sees of a run: a live bar with the newest numbers on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

SEPARATOR = "  "


class Display:
    """Shows a run of ``total`` steps of which ``done`` are done. A context manager; prints through ``console``."""

    def __init__(self, total: int, done: int = 0, console: Console | None = None) -> None:
        self.console = console or Console()
        self._total = total
        self._live: Live | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task("steps", total=total, completed=done)
            self._live = Live(self._bar, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def advance(self, step: int) -> None:
        """Move the bar to a step (optimizer steps done)."""
        if self._live:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float], of: str = "") -> None:
        """Show a reading of the metrics: below the bar, or as a line. of: what it is of; a line that stays."""
        text = describe(values)
        if self._live and not of:
            self._live.update(Group(self._bar, Text(text)))
            return
        text = SEPARATOR.join(
            part for part in (f"step {step:>{len(str(self._total))}}/{self._total}", of, text) if part
        )
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(values: Mapping[str, float]) -> str:
    """The numbers of a reading in one line, in the units that their names tell; of the multipliers, the extremes.

    >>> describe({"loss": 2.0, "bits_per_byte": 2.885, "memory/inner_lr": 0.25, "tokens_per_second": 5120.4})
    'loss 2.0000  bits/byte 2.885  inner_lr 0.25  5,120 tokens/s'
    """
    parts = []
    for name, value in values.items():
        if name in _FORMATS:
            parts.append(_FORMATS[name].format(value))
        elif name == "skipped":
            parts += [f"skipped {value:.0f}"] if value else []
        elif name == "data_wait_seconds":
            parts += [f"waited {value:.1f} s for data"] if value >= 0.1 else []
        elif name != "skipped_in_row" and not name.startswith("nested/multiplier_"):
            parts.append(f"{name.rpartition('/')[2]} {value:.3g}")
    return SEPARATOR.join(parts)


_FORMATS = {
    "loss": "loss {:.4f}",
    "bits_per_byte": "bits/byte {:.3f}",
    "accuracy": "accuracy {:.1%}",
    "auxiliary_loss": "auxiliary {:.4f}",
    "grad_norm": "grad {:.3f}",
    "lr": "lr {:.2e}",
    "compile_seconds": "first step {:.1f} s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_memory_gib": "{:.2f} GiB",
    "perplexity": "perplexity {:.2f}",
}
