"""Writes the table of kernels.md from a result of scripts/bench_kernels.py.

    python benchmarks/kernel_table.py [--results benchmarks/results/h200_kernels.json] [--page benchmarks/kernels.md]

What stands between the page's two markers is replaced; the rest stays as it is. Rows of peers are no kernels' rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- table: kernel_table.py -->", "<!-- end of table -->"
HEADS = ("row", "kernel, µs", "compiled reference, µs", "times as fast", "GiB", "of the reference", "rate")


def table_of(result: dict[str, Any]) -> str:
    """A line on where it was measured, and a row of the table for each of the result's."""
    where = ", ".join([result["device"], *(f"{name} {result[name]}" for name in ("torch", "triton", "commit"))])
    ceiling = f", copies at {result['copy_tb_per_s']:g} TB/s" if "copy_tb_per_s" in result else ""
    lines = [f"{where}{ceiling}: `{result['command']}`", "", _line(HEADS), _line(["---", *["---:"] * (len(HEADS) - 1)])]
    if "note" in result:
        lines.insert(1, result["note"])
    rows = [row for row in result["rows"] if not row["name"].startswith("peer: ")]
    return "\n".join(lines + [_line(_cells(row)) for row in rows])


def page_with(page: str, table: str) -> str:
    """The page with another table between its markers; ValueError without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"page: wanted the markers {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row or not row.get("right", True):
        wrong = row["error"].split("\n")[0] if "error" in row else f"wrong by {row['furthest']:.2g} of the largest"
        return [row["name"], wrong.replace("|", "\\|"), *["-"] * (len(HEADS) - 2)]
    kernel, reference = row.get("kernel_us"), row.get("compiled_reference_us")
    ratio = "-" if kernel is None or reference is None else f"{reference / kernel:.2f}"
    units = (("tb_per_s", "TB/s"), ("tflops", "TFLOP/s"))
    rates = [f"{row[name]:.3g} {unit}" for name, unit in units if row.get(name) is not None]
    memory = (_number(row.get(f"{name}_gib"), ".2f") for name in ("kernel", "compiled_reference"))
    times = (_number(value, ",.1f" if value is not None and value < 100 else ",.0f") for value in (kernel, reference))
    return [row["name"], *times, ratio, *memory, ", ".join(rates) or "-"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Reads the arguments and rewrites the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "h200_kernels.json")
    parser.add_argument("--page", type=Path, default=HERE / "kernels.md")
    args = parser.parse_args()
    result = json.loads(args.results.read_text(encoding="utf-8"))
    page = page_with(args.page.read_text(encoding="utf-8"), table_of(result))
    args.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
