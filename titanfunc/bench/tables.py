"""The benchmarks' tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = Mapping[str, Any]
TIMED = (("kernel", "compiled_reference"), ("titanfunc", "titans_pytorch"))
"""Ours and what it is held against, by the beginnings of their fields."""
RATES = (("tb_per_s", "TB/s"), ("tflops", "TFLOP/s"))


def of_kernels(rows: Sequence[Row]) -> Table:
    """A line a row: whether it is right, microseconds and GiB of ours and of the other, and how many times as fast."""
    table = _empty("row", ("right", "ours µs", "other µs", "faster", "GiB", "other GiB", "rate"))
    for row in rows:
        ours, other = next((pair for pair in TIMED if f"{pair[0]}_us" in row), TIMED[0])
        times, memory = ([row.get(f"{name}_{unit}") for name in (ours, other)] for unit in ("us", "gib"))
        ratio = None if None in times else row[f"{other}_us"] / row[f"{ours}_us"]
        rates = [
            f"{row[name]:.3g} {unit}" for name, unit in (("tb_per_s", "TB/s"), ("tflops", "TFLOP/s")) if name in row
        ]
        right = "-" if "right" not in row else "yes" if row["right"] else "NO"
        cells = [*(number(each) for each in (*times, ratio)), *(number(each) for each in memory)]
        table.add_row(escape(row["name"]), right, *cells, ", ".join(rates) or "-")
    return _with_notes(table, [(row["name"], _trouble(row)) for row in rows])


def of_steps(rows: Sequence[Row], against: str = "") -> Table:
    """A line a row of training steps. against: the name of the row whose tokens a second the ratio is to ("": the
    first that has any)."""
    head = ("parameters", "batch", "ms a step", "tokens/s", "ratio", "GiB", "compile s", "breaks", "loss")
    table = _empty("model", head)
    base = next((row for row in rows if "tokens_per_second" in row and against in ("", row["name"])), None)
    for row in rows:
        speed = row.get("tokens_per_second")
        ratio = speed / base["tokens_per_second"] if speed and base else None
        loss = f"{row['loss_first']:.2f} -> {row['loss_last']:.2f}" if speed else "-"
        table.add_row(
            escape(row["name"]), number(row.get("parameters")), f"{row['batch']} x {row['seq_len']}",
            number(row.get("step_ms_median")), number(speed), number(ratio), number(row.get("peak_memory_gib")),
            number(row.get("first_step_seconds")), number(row.get("graph_breaks")), loss,
        )  # fmt: skip
    return _with_notes(table, [(row["name"], _trouble(row)) for row in rows])


def show(table: Table) -> None:
    """Print a table, at its own width where nobody looks at it through a window."""
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)


def number(value: float | None) -> str:
    """A figure to three places or so, "-" where there is none."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _empty(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, caption_justify="left", caption_style="")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _with_notes(table: Table, notes: Sequence[tuple[str, str]]) -> Table:
    """The table with what went wrong under it."""
    lines = [f"{name}: {note}" for name, note in notes if note]
    if lines:
        table.caption = escape("\n".join(lines))
    return table


def _trouble(row: Row) -> str:
    said = [row[name] for name in ("status", "error") if row.get(name, "measured") != "measured"]
    if row.get("right") is False:
        said.append(f"off by {row['furthest']:.2g} of the largest number")
    if row.get("peer_finite") is False:
        said.append("the peer's result is not finite")
    return "; ".join([*said, *(f"{name}: {row[name]}" for name in row if name.endswith("_error"))]).split("\n")[0]
