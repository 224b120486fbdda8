"""How a step compiles, told: a table for a terminal, and one page of HTML that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Row = Mapping[str, Any]
COLUMNS = {
    "graphs": "graphs",
    "graph_breaks": "breaks",
    "recompiles": "recompiles",
    "compile_seconds_cold": "compile cold, s",
    "compile_seconds_warm": "compile warm, s",
    "kernel_count": "kernels",
    "launches": "launches",
    "cuda_graph": "CUDA graph",
    "step_ms": "step, ms",
    "peak_memory_gib": "GiB",
}
NARROW = {
    "recompiles": "recom-\npiles",
    "compile_seconds_cold": "cold\ns",
    "compile_seconds_warm": "warm\ns",
    "launches": "laun-\nches",
    "cuda_graph": "CUDA\ngraph",
    "step_ms": "step\nms",
}
# What a column means on every device; a report's own "columns" say what the others mean on its device.
MEANINGS = {
    "graphs": "graphs that Dynamo compiled for the first batch",
    "graph_breaks": "places where a graph had to end and plain Python goes on whenever they are passed; reasons below",
    "recompiles": "graphs compiled for later batches of the same shape",
    "compile_seconds_cold": "what the steps of the warm-up took beyond as many of the median's time, with empty caches "
    "of inductor and Triton",
    "compile_seconds_warm": "the same in a second process, with the caches that the first left",
    "cuda_graph": "whether a step is replayed from a CUDA graph",
    "step_ms": "the median of the timed steps, each with its loss read back",
}
STYLE = """
:root { --ink: #1f2430; --muted: #6b7280; --line: #e5e7eb; --page: #ffffff; --soft: #f6f7f9; --bar: #2563eb;
  --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --muted: #9aa3b2; --line: #30363f; --page: #15181d;
  --soft: #1d2127; --bar: #5b8def; --bad: #ff8a7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 82rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .25rem 0; } .muted { color: var(--muted); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--muted); font-weight: 600; font-size: .85rem; vertical-align: bottom; }
th:first-child, td:first-child, td.said { text-align: left; } td:first-child { white-space: nowrap; }
tbody tr:hover { background: var(--soft); } .bad { color: var(--bad); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .35rem .8rem; align-items: center; }
.bars i { display: block; height: .8rem; min-width: 2px; border-radius: 2px; background: var(--bar); }
.bars b { font-weight: 400; text-align: right; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; }
code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; font: 13px/1.45 ui-monospace, monospace; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem; } dl { grid-template-columns: 1fr; }
  dd { margin: 0 0 .4rem; } }
"""


def name_of(row: Row) -> str:
    """The variant, and the kernels where it has a choice."""
    return f"{row['variant']}, {row['kernels']}" if row["kernels"] else row["variant"]


def as_table(rows: Sequence[Row]) -> Table:
    """A line a variant, for a terminal; one that was not measured says why in the table's caption."""
    columns = _columns(rows)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, caption_justify="left", caption_style="")
    table.add_column("variant", overflow="fold")
    for column in columns:
        table.add_column(NARROW.get(column, COLUMNS[column]), justify="right", no_wrap=True)
    for row in rows:
        status = "" if row["status"] == "measured" else f"\n({row['status']})"
        table.add_row(name_of(row).replace(", ", "\n") + status, *(_cell(row, column) for column in columns))
    lines = [f"{name_of(row)}: {_note(row)}" for row in rows if _note(row)]
    if lines:
        table.caption = "\n".join(lines).replace("[", r"\[")
    return table


def as_html(report: Mapping[str, Any]) -> str:
    """A page with the table, bars of the step's and the compiler's time, every break's reason, and what it all means.

    report: what report.json holds: ``rows``, ``settings``, ``columns`` (name -> meaning on this device), ``what``,
    ``device``, ``threads``, ``python``, ``torch``, ``triton``, ``commit``, ``date``.
    """
    rows = report["rows"]
    versions = f"torch {report['torch']}, triton {report['triton']}, Python {report['python']}"
    parts = [
        "<h1>How the training step compiles</h1>",
        f"<p>{escape(report['what'])}</p>",
        f'<p class="muted">{escape(report["device"])}, threads: {report["threads"]}; {escape(versions)}; commit '
        f"{escape(report['commit'])}; {escape(report['date'])}</p>",
        "<h2>Variants</h2>",
        _table(rows),
        *_bars(rows, "step_ms", "A step, ms"),
        *_bars(rows, "compile_seconds_cold", "Compiling without caches, s"),
        *_bars(rows, "compile_seconds_warm", "Compiling with the caches of an earlier process, s"),
        *_notes(rows),
        "<h2>What the columns mean</h2>",
        _meanings(report["columns"]),
        "<h2>Settings</h2>",
        f"<details><summary>All of them</summary><pre>{escape(_indented(report['settings']))}</pre></details>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    title = f"<title>{escape(report['what'])}: compile report</title>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}{title}</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _columns(rows: Sequence[Row]) -> list[str]:
    """Those with anything in them, or all, while nothing is measured."""
    found = [column for column in COLUMNS if any(row.get(column) is not None for row in rows)]
    return found or list(COLUMNS)


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _note(row: Row) -> str:
    """Why a row is not there, or what made it less than one graph."""
    said = [row["error"]] if row.get("error") else []
    said += [f"{count} x {reason}" for reason, count in row.get("reasons", {}).items()]
    if row.get("left_eager"):
        said.append(f"left eager, as it broke in a loop: {', '.join(row['left_eager'])}")
    if row.get("fullgraph_error"):
        said.append(f"fullgraph=True raises {row['fullgraph_error']}")
    if row.get("warm_error"):
        said.append(f"with caches: {row['warm_error']}")
    return "; ".join(said)


def _table(rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    head = "".join(f"<th>{escape(COLUMNS[column])}</th>" for column in columns)
    lines = []
    for row in rows:
        if row["status"] == "measured":
            cells = "".join(
                f'<td class="bad">{_cell(row, column)}</td>'
                if column in ("graph_breaks", "recompiles") and row[column]
                else f"<td>{_cell(row, column)}</td>"
                for column in columns
            )
        else:
            kind = "muted" if row["status"] == "not here" else "bad"
            said = f"{escape(row['status'])}: {escape(row['error'])}"
            cells = f'<td class="said {kind}" colspan="{len(columns)}">{said}</td>'
        lines.append(f"<tr><td>{escape(name_of(row))}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr><th>variant</th>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def _bars(rows: Sequence[Row], column: str, title: str) -> list[str]:
    """A bar a measured row, its length the share of the longest; nothing where there are fewer than two."""
    shown = [row for row in rows if row.get(column) is not None]
    most = max((row[column] for row in shown), default=0)
    if len(shown) < 2 or not most:
        return []
    bars = "".join(
        f'<span>{escape(name_of(row))}</span><i style="width:{100 * row[column] / most:.1f}%"></i>'
        f"<b>{_cell(row, column)}</b>"
        for row in shown
    )
    return [f"<h2>{escape(title)}</h2>", f'<div class="bars">{bars}</div>']


def _notes(rows: Sequence[Row]) -> list[str]:
    told = [(name_of(row), _note(row)) for row in rows if row["status"] == "measured" and _note(row)]
    if not told:
        return []
    lines = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(note)}</code></dd>" for name, note in told)
    return ["<h2>Where and why a graph breaks</h2>", f"<dl>{lines}</dl>"]


def _meanings(own: Mapping[str, str]) -> str:
    meanings = {**MEANINGS, **own}
    lines = (f"<dt>{escape(COLUMNS[name])}</dt><dd>{escape(meanings[name])}</dd>" for name in COLUMNS)
    return f"<dl>{''.join(lines)}</dl>"


def _indented(tree: Mapping[str, Any], depth: int = 0) -> str:
    lines = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += [f"{'  ' * depth}{key}:", _indented(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{key}: {value}")
    return "\n".join(lines)
