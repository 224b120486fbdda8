"""scripts/bench_kernels.py: rows are checked, at sizes that an interpreter takes; what is not there says so."""

import argparse
import importlib
import json
import re
import weakref
from functools import partial

import pytest
import torch

from titanfunc.bench import kernels, peers, tables
from titanfunc.bench.common import exit_status
from titanfunc.bench.kernel_rows import attention, blocks, memory

bench_kernels = importlib.import_module("scripts.bench_kernels")
SMALL = blocks._both("small norm", lambda device: blocks._rows(1, 6, 16, device), blocks.rms_norm, 2, 3)
HAS_PEER = pytest.mark.skipif(not peers.installed(), reason="needs titans-pytorch")


@pytest.fixture
def result(tmp_path, monkeypatch, capsys):
    """Runs the script on some rows of its own on the CPU; the result, and what it printed."""

    def run(rows, *options, status=0):
        out = tmp_path / "new" / "result.json"
        monkeypatch.setattr(kernels, "all_rows", lambda: rows)
        monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--device", "cpu", "--out", str(out), *options])
        monkeypatch.setenv("COLUMNS", "150")
        with pytest.raises(SystemExit) as ended:
            bench_kernels.main()
        assert ended.value.code == status
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


def _without(rows, function):
    return [{**rows[1], "name": "another", "kernel": function}]


def test_rows_are_checked_and_stand_in_a_table(result):
    found, printed = result(SMALL, "--rows", "small")
    assert [row["name"] for row in found["rows"]] == ["small norm forward", "small norm"]
    assert all(row["right"] and row["furthest"] <= 0.03 for row in found["rows"])
    assert found["torch"] == torch.__version__ and "--rows small" in found["command"]
    assert re.search(r"^small norm +yes ", printed, re.MULTILINE)


def test_a_wrong_row_and_one_that_fails_lose_no_others(result):
    wrong = _without(SMALL, lambda scale, x: blocks.rms_norm(scale, x) * 1.1)
    broken = _without(SMALL, lambda scale, x: 1 / 0)
    found, printed = result([*wrong, *broken, *SMALL], status=1)
    assert [row.get("right") for row in found["rows"]] == [False, None, True, True]
    assert found["rows"][1]["error"].startswith("ZeroDivisionError")
    assert re.search(r"^another +NO ", printed, re.MULTILINE) and "of the largest number" in printed


def test_a_gradient_that_is_wrong_is_found(result):
    wrong = _without(SMALL, lambda scale, x: blocks.rms_norm(scale.detach(), x))
    assert not result(wrong, status=1)[0]["rows"][0]["right"]


def test_a_peer_that_is_not_there_says_so(result, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda: False)
    found, printed = result(peers.rows(), "--rows", "4 x 2048.*8 of 64")
    assert [row["status"] for row in found["rows"]] == ["titans_pytorch is not installed"]
    assert "is not installed" in printed


def test_ours_beside_a_peer_is_checked_by_the_reference(result, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda: True)
    row = peers._row(1, 32, 32, 2, 16)
    make = lambda device: [part.float() for part in row["make"](device)]  # noqa: E731 (no bfloat16 in the interpreter)
    found, _ = result([{**row, "make": make, "peer": lambda device: lambda: [torch.full((2,), torch.nan)]}], status=1)
    assert found["rows"][0]["right"] and found["rows"][0]["peer_finite"] is False


@pytest.mark.parametrize("fails", ["when it is made", "when it is called"])
def test_a_peer_that_fails_loses_not_ours_and_gives_its_memory_back(result, monkeypatch, fails):
    monkeypatch.setattr(peers, "installed", lambda: True)
    freed, held = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append([there() is None for there in held]))

    def peer(device):
        tensor = torch.ones(4, requires_grad=True)
        held.append(weakref.ref(tensor))
        if fails == "when it is made":
            raise torch.OutOfMemoryError("CUDA out of memory.")

        def call():
            result = [tensor * 2]
            result.append(result)  # garbage that only the collector finds
            held.append(weakref.ref(result[0]))
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return call

    row = {**SMALL[1], "peer": peer}
    found, printed = result([row])
    (told,) = found["rows"]
    assert told["right"] and told["furthest"] <= 0.03 and "error" not in told and "peer_finite" not in told
    assert told["titans_pytorch_error"] == "OutOfMemoryError: CUDA out of memory."
    assert re.search(r"^small norm +yes ", printed, re.MULTILINE) and "CUDA out of memory" in printed
    assert freed == [[True] * len(held)]


@pytest.mark.parametrize("fails", [False, True])
def test_ours_is_timed_beside_a_peer_or_without_it(monkeypatch, fails):
    monkeypatch.setattr(peers, "installed", lambda: True)
    monkeypatch.setattr(kernels, "microseconds", lambda call, rounds: (2.0, 1.0))
    monkeypatch.setattr(kernels, "microseconds_eager", lambda call, rounds: (8.0, 3.0))
    monkeypatch.setattr(torch, "compile", lambda way, **_: way)
    row = {**SMALL[1], "make": lambda _: SMALL[1]["make"]("cpu")}
    row["peer"] = lambda device: lambda: [torch.ones(1 // (not fails))]
    found = kernels.measured(row, argparse.Namespace(device="cuda", tolerance=0.03, rounds=1))
    assert found["right"] and (found["titanfunc_us"], found["titanfunc_gib"]) == (2.0, 1.0)
    assert found.get("titans_pytorch_us") == (None if fails else 8.0)
    assert ("ZeroDivisionError" in found.get("titans_pytorch_error", "")) == fails
    assert exit_status([found]) == 0


@HAS_PEER
def test_their_layer_runs():
    (y,) = peers.theirs(1, 32, 32, 2, 16, torch.device("cpu"))()
    assert y.shape == (1, 32, 32) and torch.isfinite(y).all()


def same(one, other, inputs):
    """Outputs and gradients of two functions, in float32."""
    inputs = [t.float() if t.is_floating_point() else t for t in inputs]
    cotangents = kernels.cotangents_of(one, inputs)
    ways = (kernels.outputs_and_gradients(way, True)(inputs, cotangents) for way in (one, other))
    for ours, theirs in zip(*ways, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("filled", [3, 8])
def test_torchs_own_attention_sees_the_window(filled):
    same(
        partial(attention._alone, "reference"),
        attention._by_torch_window,
        attention._alone_inputs(2, 2, 20, 8, 16, 0, filled, "cpu"),
    )


@pytest.mark.parametrize(("context", "prefix"), [(True, 3), (False, 3), (True, 0), (False, 0)])
def test_torchs_own_attention_sees_the_segments(context, prefix):
    same(
        partial(attention._segments, "reference", 8, context),
        partial(attention._by_torch_segments, 8, context),
        attention._segment_inputs(2, 2, 24, 16, prefix, context, "cpu"),
    )


def test_the_loop_laid_open_is_the_references(monkeypatch):
    for name, size in {"B": 2, "TOKENS": 24, "D": 16, "F": 32}.items():
        monkeypatch.setattr(memory, name, size)
    ways = (partial(memory._layer, chunk=8, kernels=way) for way in ("reference", memory.UNROLLED))
    same(*ways, memory.layer_inputs("cpu"))


def test_every_row_has_a_name_of_its_own():
    names = [row["name"] for row in kernels.all_rows()]
    assert len(set(names)) == len(names) > 50
    assert [name for name in names if name.startswith("peer: ")] == [row["name"] for row in peers.rows()]


def test_times_stand_beside_each_other():
    rows = [
        {"name": "fast", "right": True, "kernel_us": 12.34, "compiled_reference_us": 24.68, "tflops": 300.0},
        {"name": "peer", "right": True, "titanfunc_us": 1.0, "titans_pytorch_error": "OutOfMemoryError: [much]"},
    ]
    table = tables.of_kernels(rows)
    cells = [list(column.cells) for column in table.columns]
    assert [column[0] for column in cells] == ["fast", "yes", "12.3", "24.7", "2.00", "-", "-", "300 TFLOP/s"]
    assert [column[1] for column in cells][:5] == ["peer", "yes", "1.00", "-", "-"]
    assert "OutOfMemoryError" in table.caption


@pytest.mark.parametrize(
    "options",
    [
        ("--rows", "["),
        ("--rounds", "0"),
        ("--round", "x"),
        ("--rows", "no such row"),
        ("--out", "."),
        ("--out", __file__ + "/x"),
    ],
)
def test_a_mistake_is_told_in_one_line(monkeypatch, capsys, options):
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as ended:
        bench_kernels.main()
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
