"""benchmarks/lengths.py at tiny sizes on a CPU: rows, failures, what holds the device, and the picture."""

import argparse
import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIZES = "layers=1,dim=16,heads=2,ff=16,memory.heads=1,memory.head_dim=8,memory.hidden=8,memory.chunk_size=8"
MAC, LMM = f"mac_tiny:{SIZES},mac.segment=16", f"lmm_tiny:{SIZES}"


@pytest.fixture
def lengths(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lengths

    return lengths


def run(part, out, *options):
    command = [sys.executable, str(BENCHMARKS / "lengths.py"), part, *options, "--out", str(out)]
    command += ["--device", "cpu", "--backend", "aot_eager"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_training_gives_a_row_for_each_length_and_a_failure_loses_no_other(tmp_path):
    said = run(
        "train", tmp_path / "train.json", "--models", LMM, "--lengths", "0", "16", "32", "--batches", "2",
        "--steps", "2", "--jobs", "3",
    )  # fmt: skip
    result = json.loads((tmp_path / "train.json").read_text())
    rows = {row["length"]: row for row in result["rows"]}
    assert list(rows) == [0, 16, 32]
    assert rows[0]["status"] == "failed" and "seq_len: wanted" in rows[0]["error"]
    for length in (16, 32):
        row = rows[length]
        assert row["status"] == "measured" and row["loss_finite"] and row["compile_seconds"] > 0
        assert row["ns_per_token"] == pytest.approx(1e6 * row["step_ms"] / (2 * length), rel=0.01)
    parameters = rows[16]["parameters"]
    assert rows[16]["state_gib"] == pytest.approx(12 * parameters / 2**30, rel=0.01)
    assert said.count("ns a token at the longest / at the shortest") == 1 and "torch" in result


def test_decoding_times_tokens_by_position_with_a_state_of_one_size(tmp_path):
    run("decode", tmp_path / "decode.json", "--models", MAC, "--until", "64", "--steps", "2")
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["position"] for row in rows] == [1, 4, 16, 64]
    assert len({row["state_bytes"] for row in rows}) == 1 and all(row["us_per_token"] > 0 for row in rows)
    assert all(row["state_finite"] for row in rows)


def test_a_piece_fed_to_the_state_is_what_one_pass_reads(lengths, tmp_path, monkeypatch):
    import length_rows

    from titanfunc import rng
    from titanfunc.bench.common import configuration

    monkeypatch.setattr(length_rows, "PIECE", 12)
    seen = []
    monkeypatch.setattr(length_rows, "per_token", lambda call, *_: seen.append(call) or 1.0)
    job = {"model": MAC, "backend": "eager", "until": 64, "steps": 1}
    length_rows.decode(job, length_rows.Device("cpu", str(tmp_path / "lock")))
    model = length_rows.tf.models.build(configuration(MAC))
    params = model.init(rng.generator(0))
    text = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    for call, position in zip(seen, (1, 4, 16, 64), strict=True):
        _, whole = model.apply(params, model.init_memory(params, 1), text[:, :position])
        for got, want in zip(length_rows.tree.leaves(call.memory), length_rows.tree.leaves(whole), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_process_at_a_time_has_the_device(lengths, tmp_path):
    import length_rows

    def free():
        with open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    lock = tmp_path / "lock"
    device = length_rows.Device("cpu", str(lock))
    with device.alone():
        assert free()
        ran = []
        compiled = torch.compile(lambda x: x + 1, backend=lambda graph, _: lambda *args: ran.append(free()) or args)
        compiled(torch.ones(2))
        assert ran == [False] and not free()  # taken before what was compiled runs
    assert free()


def test_ratios_are_of_the_longest_to_the_shortest_and_pass_over_failures(lengths):
    rows = [
        {"model": "a", "batch": 4, "length": 64, "ns_per_token": 3.0},
        {"model": "a", "batch": 4, "length": 8, "ns_per_token": 2.0},
        {"model": "a", "batch": 4, "length": 128, "status": "failed"},
        {"model": "a", "batch": 1, "length": 8, "ns_per_token": 2.0},
        {"model": "a", "position": 8, "us_per_token": 2.0},
    ]
    assert lengths.ratios(rows) == {("a", 4): 1.5}


def test_the_picture_has_a_panel_for_each_thing_that_was_measured(lengths, tmp_path):
    train = [
        {"model": model, "batch": batch, "length": 2**i, "ns_per_token": 9.0 / batch, "peak_memory_gib": batch * 2.0**i}
        for model in ("mac_24gb:layers=5", "lmm_24gb")
        for batch in (4, 1)
        for i in range(12, 17)
    ] + [{"model": "lmm_24gb", "batch": 4, "length": 2**17, "status": "failed", "error": "out of memory"}]
    decode = [
        {"model": "lmm_24gb", "position": 4**i, "us_per_token": 300.0, "us_per_token_replayed": 90.0}
        for i in range(5, 9)
    ] + [{"model": "mac_24gb:layers=5", "status": "failed"}]
    widths = []
    for files in ([train], [train, decode]):
        places = []
        for i, rows in enumerate(files):
            places.append(tmp_path / f"{i}.json")
            places[-1].write_text(json.dumps({"rows": rows}))
        lengths.draw(argparse.Namespace(files=places, out=tmp_path / "lengths.png"))
        widths.append(imread(tmp_path / "lengths.png").shape[1])
    assert widths[1] - widths[0] == pytest.approx(4.6 * 120, abs=2)
