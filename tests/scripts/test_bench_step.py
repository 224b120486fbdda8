"""benchmarks/step_profile.py: kernels by kind, on made-up times; and train_step.py, which refuses what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from titanfunc.bench import step_profile

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_kernel_has_the_kind_that_its_name_says():
    names = {
        "nvjet_sm90_tst_256x128": "matrix products", "sm80_xmma_gemm_f32f32": "matrix products",
        "_attend": "attention", "by_keys": "attention", "pull_kernel": "memory", "trace_kernel": "memory",
        "triton_poi_fused_add_cat": "inductor's own", "Memcpy DtoD (Device -> Device)": "copies", "what": "other",
    }  # fmt: skip
    assert {name: step_profile.kind_of(name) for name in names} == names


def test_the_summary_adds_up_and_knows_overlaps_from_the_whole():
    kernels = [("nvjet_a", 0.0, 3000.0), ("nvjet_a", 4000.0, 5000.0), ("pull_kernel", 4500.0, 8000.0)]
    found = step_profile.summary(kernels, flops=790e12)
    assert found["step_ms"] == 8.0 and found["launches"] == 3
    assert found["kinds"] == [
        {"kind": "matrix products", "ms": 4.0, "launches": 2},
        {"kind": "memory", "ms": 3.5, "launches": 1},
    ]
    assert found["products_at_the_roof_ms"] == 1000.0
    assert found["kernels"][0] == {"name": "nvjet_a", "ms": 4.0, "launches": 2}
    assert "4.000 ms" in step_profile.table(found) and "1000.0 ms at 790 TFLOP/s" in step_profile.table(found)


def test_a_row_checks_its_first_loss_before_it_counts(tmp_path):
    out = tmp_path / "row.json"
    command = [
        sys.executable, str(BENCHMARKS / "train_step.py"), "--models", "mac_tiny:layers=1", "--backend", "aot_eager",
        "--batch", "1", "--seq", "32", "--steps", "11", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["loss_first"] == pytest.approx(row["loss_first_eager"], rel=0.01)
    assert row["graphs"] == 1 and row["graph_breaks"] == 0 and row["step_ms_median"] > 0
