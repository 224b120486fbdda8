"""The benchmark of feeding measures what it says, here on the smallest of steps."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PLACE = Path(__file__).parents[1] / "benchmarks" / "feeding.py"
MODEL = "transformer_tiny:layers=1,dim=8,heads=1,ff=8,seq_len=40"


@pytest.fixture(scope="module")
def feeding():
    spec = importlib.util.spec_from_file_location("feeding", PLACE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_has_all_three_ways(feeding, monkeypatch, tmp_path):
    out = tmp_path / "new" / "rows.json"
    words = ["--model", MODEL, "--data", "copying", "--batch", "2", "--steps", "2", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["feeding.py", *words, "--backend", "none", "--device", "cpu", "--out", str(out)])
    feeding.main()
    result = json.loads(out.read_text())
    assert {"command", "commit", "torch", "device"} <= result.keys()
    (row,) = result["rows"]
    assert (row["data"], row["seq_len"]) == ("copying", 40)
    for name in ("fixed", "fed", "inline"):
        assert len(row["rounds_ms"][name]) == 3
        assert row[f"{name}_ms"] == sorted(row["rounds_ms"][name])[1] > 0
    assert row["fed_percent"] == pytest.approx(100 * (row["fed_ms"] / row["fixed_ms"] - 1), abs=0.1)
    assert row["batch_megabytes"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "nowhere"], "data.corpus: wanted one of "),
        (["--data", "needle:seq_len=8"], "data.seq_len: wanted at least "),
        (["--model", "mac_tinny"], "model.preset: wanted FAMILY_SIZE"),
        (["--rounds", "0"], "--rounds: wanted at least 1, got 0"),
    ],
)
def test_mistakes(feeding, monkeypatch, capsys, words, says):
    monkeypatch.setattr(sys, "argv", ["feeding.py", *words])
    with pytest.raises(SystemExit) as end:
        feeding.main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert told.startswith(f"error: {says}") and told.count("\n") == 1
