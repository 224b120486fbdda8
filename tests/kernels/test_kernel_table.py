"""benchmarks/kernel_table.py: what it writes, where, and the page that it writes into."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"name": "fast", "right": True, "kernel_us": 12.34, "compiled_reference_us": 24.68, "kernel_gib": 0.5,
     "compiled_reference_gib": 1.0, "tb_per_s": 2.5},
    {"name": "slow", "right": True, "kernel_us": 7654.3, "compiled_reference_us": 5877.2, "kernel_gib": 0.59,
     "compiled_reference_gib": 1.07, "tflops": 311.4},
    {"name": "alone", "right": True, "kernel_us": 100.4, "compiled_reference_error": "RuntimeError: no"},
    {"name": "off", "right": False, "furthest": 0.25},
    {"name": "broken", "error": "CompilationError: a | b\nmore"},
    {"name": "peer: 4 x 2048", "right": True, "titanfunc_us": 1.0, "titans_pytorch_us": 2.0},
]  # fmt: skip
RESULT = {
    "command": "python scripts/bench_kernels.py", "device": "a GPU", "torch": "2.11", "triton": "3.6", "commit": "abc",
    "copy_tb_per_s": 4.25, "rows": ROWS,
}  # fmt: skip


@pytest.fixture
def kernel_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kernel_table")


def test_the_page_is_rewritten_between_its_markers(kernel_table, tmp_path, monkeypatch):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"before\n{kernel_table.BEGIN}\nold\n{kernel_table.END}\nafter\n", encoding="utf-8")
    results.write_text(json.dumps(RESULT), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["kernel_table.py", "--results", str(results), "--page", str(page)])
    for _ in range(2):  # the second time over its own
        kernel_table.main()
        lines = page.read_text(encoding="utf-8").splitlines()
        assert lines[:2] == ["before", kernel_table.BEGIN] and lines[-2:] == [kernel_table.END, "after"]
        assert lines[2] == (
            "a GPU, torch 2.11, triton 3.6, commit abc, copies at 4.25 TB/s: `python scripts/bench_kernels.py`"
        )
        assert lines[4].count("|") == lines[5].count("|") == len(kernel_table.HEADS) + 1
        assert lines[6:-2] == [
            "| fast | 12.3 | 24.7 | 2.00 | 0.50 | 1.00 | 2.5 TB/s |",
            "| slow | 7,654 | 5,877 | 0.77 | 0.59 | 1.07 | 311 TFLOP/s |",
            "| alone | 100 | - | - | - | - | - |",
            "| off | wrong by 0.25 of the largest | - | - | - | - | - |",
            "| broken | CompilationError: a \\| b | - | - | - | - | - |",
        ]


def test_a_page_without_markers_is_refused(kernel_table):
    with pytest.raises(ValueError, match="page: wanted the markers"):
        kernel_table.page_with(f"{kernel_table.END} {kernel_table.BEGIN}", "table")


def test_the_page_says_of_every_kernel_where_it_is_used(kernel_table):
    page = (ROOT / "benchmarks" / "kernels.md").read_text(encoding="utf-8")
    assert kernel_table.page_with(page, "x").count("\nx\n") == 1
    named = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    shared = {"launch", "order", "__init__"}
    for path in (ROOT / "kernels" / "titanfunc_kernels").glob("*.py"):
        fits = [name for name in named if path.match(f"{name}.py") or path.stem.startswith(f"{name}_")]
        assert fits or path.stem in shared, path.stem
