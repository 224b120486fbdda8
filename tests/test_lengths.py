"""benchmarks/lengths.py at tiny sizes on a CPU: rows, failures, what holds the device, and the picture."""

import argparse
import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread

from tests.processes import alive, children, needs_proc, wait_for

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIZES = "layers=1,dim=16,heads=2,ff=16,memory.heads=1,memory.head_dim=8,memory.hidden=8,memory.chunk_size=8"
MAC, LMM = f"mac_tiny:{SIZES},mac.segment=16", f"lmm_tiny:{SIZES}"


@pytest.fixture
def lengths(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lengths

    return lengths


def command(part, out, *options):
    words = [sys.executable, str(BENCHMARKS / "lengths.py"), part, *options, "--out", str(out)]
    return [*words, "--device", "cpu", "--backend", "aot_eager"]


def run(part, out, *options, status=0):
    done = subprocess.run(command(part, out, *options), check=False, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout


def test_training_gives_a_row_for_each_length_and_a_failure_loses_no_other(tmp_path):
    said = run(
        "train", tmp_path / "train.json", "--models", LMM, "--lengths", "20000000", "16", "32", "--batches", "2",
        "--steps", "2", "--jobs", "3", status=1,
    )  # fmt: skip
    result = json.loads((tmp_path / "train.json").read_text())
    rows = {row["length"]: row for row in result["rows"]}
    assert list(rows) == [20000000, 16, 32]
    assert rows[20000000]["status"] == "failed" and "seq_len: wanted" in rows[20000000]["error"]
    times = sorted(rows[length]["alone"] for length in (16, 32))
    assert times[0][0] < times[0][1] <= times[1][0] < times[1][1]
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
    assert len({row["state_bytes"] for row in rows}) == 1
    assert all(0 < row["us_min_max"][0] <= row["us_per_token"] <= row["us_min_max"][1] for row in rows)
    assert all(row["state_finite"] and 0 < row["us_to_launch"] <= row["us_per_token"] for row in rows)
    assert all(row["to_first"] > 0 and len(row["us_rounds"]) == 9 for row in rows)


def test_what_slows_a_machine_down_for_a_while_slows_all_positions(lengths, monkeypatch):
    import length_rows

    took = iter([100, 100, 100, 100, 120, 120, 120, 120, 120, 100, 100, 100, 100, 100, 120, 120, 120, 120])

    def microseconds(call, steps, device):
        call()
        return float(next(took)), 7.0

    monkeypatch.setattr(length_rows, "microseconds", microseconds)
    states = {position: {"read": torch.tensor(float(position))} for position in (4, 64)}
    carried = length_rows.Carried(lambda memory, token: (token, memory), {"read": torch.zeros(())}, torch.zeros(1, 1))
    rows = length_rows.by_turns(carried, states, 5, length_rows.Device("cpu"))
    # 120 in five rounds of nine at the first and in four at the second: alike in all but one, and medians apart.
    assert [(row["position"], row["us_per_token"], row["to_first"]) for row in rows] == [(4, 120, 1), (64, 100, 1)]
    assert all(row["us_min_max"] == [100, 120] and row["us_to_launch"] == 7 for row in rows)


def test_every_round_goes_on_from_the_same_state_in_the_same_place(lengths):
    import length_rows

    seen = []

    def step(memory, token):
        seen.append((memory["read"].item(), memory["read"].data_ptr(), token.item()))
        memory["read"] += 1 if memory["read"] < 64 else float("inf")
        return token + 1, memory

    states = {position: {"read": torch.tensor(float(position))} for position in (4, 64)}
    carried = length_rows.Carried(step, {"read": torch.zeros(())}, torch.full((1, 1), 7))
    rows = length_rows.by_turns(carried, states, 2, length_rows.Device("cpu"))
    calls = length_rows.WARM_UP + 2
    assert [(read, token) for read, _, token in seen[::calls]] == [(4, 7), (64, 7)] * 9
    assert len({place for _, place, _ in seen}) == 1 and [state["read"].item() for state in states.values()] == [4, 64]
    assert [(row["state_finite"], row["state_bytes"]) for row in rows] == [(True, 4), (False, 4)]


def test_a_piece_fed_to_the_state_is_what_one_pass_reads(lengths, tmp_path, monkeypatch):
    import length_rows

    from titanfunc import rng
    from titanfunc.bench.common import configuration

    monkeypatch.setattr(length_rows, "PIECE", 12)
    seen = []
    monkeypatch.setattr(length_rows, "by_turns", lambda carried, states, *_: seen.append(states) or [])
    job = {"model": MAC, "backend": "eager", "until": 64, "steps": 1}
    length_rows.decode(job, length_rows.Device("cpu"))()
    model = length_rows.tf.models.build(configuration(MAC))
    params = model.init(rng.generator(0))
    text = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    assert list(seen[0]) == [1, 4, 16, 64]
    for position, memory in seen[0].items():
        _, whole = model.apply(params, model.init_memory(params, 1), text[:, :position])
        for got, want in zip(length_rows.tree.leaves(memory), length_rows.tree.leaves(whole), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_first_step_is_over_before_a_row_is_timed_and_counts_as_compiling(lengths, monkeypatch):
    import length_rows

    taken = []

    def compile_step(step, backend):
        def call(state, batch):
            taken.append(time.perf_counter())
            time.sleep(0.3 if len(taken) == 1 else 0)
            return state, {"loss": torch.zeros(())}

        return call

    monkeypatch.setattr(length_rows.tf.train, "compile_step", compile_step)
    job = {"model": LMM, "batch": 1, "length": 16, "steps": 2, "backend": "eager", "profile": False}
    measure = length_rows.train(job, length_rows.Device("cpu"))
    assert len(taken) == 1
    row = measure()
    assert row["compile_seconds"] >= 0.3 and len(taken) == length_rows.WARM_UP + 2


@pytest.mark.parametrize(("batch", "length", "kind", "alone"), [
    (4, 32768, "train", True), (1, 65536, "train", False), (4, 16384, "train", False), (4, 65536, "decode", False),
])  # fmt: skip
def test_the_first_step_of_a_long_row_has_the_device_alone(lengths, monkeypatch, tmp_path, batch, length, kind, alone):
    import length_rows

    found = []

    def first(job, device):
        with open(job["lock"]) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found.append(False)
            except BlockingIOError:
                found.append(True)
        return lambda: {"step_ms": 1.0}

    monkeypatch.setattr(length_rows, kind, first)
    places = {name: str(tmp_path / name) for name in ("lock", "told", "result")}
    job = {"kind": kind, "batch": batch, "length": length, "device": "cpu", **places}
    (tmp_path / "job.json").write_text(json.dumps(job))
    monkeypatch.setattr("sys.argv", ["length_rows.py", str(tmp_path / "job.json")])
    length_rows.main()
    assert found == [alone] and json.loads((tmp_path / "result").read_text())["step_ms"] == 1.0


def test_a_long_row_is_one_of_which_six_may_not_fit_on_a_gpu(lengths, monkeypatch):
    import length_rows

    device = length_rows.Device("cuda")
    for gib, alone in ((140, False), (80, True)):
        properties = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        assert device.is_long(4 * 65536) == alone and not device.is_long(4 * 16384)


@needs_proc
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_processes(tmp_path, sent):
    words = command("train", tmp_path / "train.json", "--models", LMM, MAC, "--lengths", "16", "--jobs", "1")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    rows = wait_for(lambda: children(process.pid, "length_rows"))
    process.send_signal(sent)
    told = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and told.splitlines()[-1].startswith("interrupted: ")
    assert "mac_tiny" not in told  # what had to wait was not begun
    assert not [pid for pid in rows if alive(pid)]


MISTAKES = {
    "model": (["train", "--models", "mac_tinny"], "--models: mac_tinny: preset: wanted FAMILY_SIZE"),
    "jobs": (["train", "--jobs", "0"], "--jobs: wanted at least 1, got 0"),
    "length": (["train", "--lengths", "0"], "--lengths: wanted at least 1, got 0"),
    "position": (["decode", "--until", "-5"], "--until: wanted at least 1, got -5"),
    "backend": (["train", "--backend", "foo"], "--backend: wanted one of inductor, aot_eager, eager, got 'foo'"),
    "profile": (["train", "--device", "cpu", "--profile"], "--profile: wanted a GPU, "),
    "folder": (["train", "--out", "."], "--out: wanted a file, got the folder '.'"),
    "missing": (["draw", "nowhere.json"], "files: wanted a result of this script, got 'nowhere.json'"),
    "part": (["learn"], "PART: wanted one of train, decode, draw, merge, got 'learn'"),
    "device": (["train", "--device", "cuda:77"], "--device: wanted "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(lengths, monkeypatch, capsys, name):
    words, said = MISTAKES[name]
    monkeypatch.setattr("sys.argv", ["lengths.py", words[0], "--out", "/tmp/lengths.json", *words[1:]])
    with pytest.raises(SystemExit) as ended:
        lengths.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"error: {said}") and told.count("\n") == 1, told


def test_no_torch_before_the_checks():
    words = [sys.executable, "-X", "importtime", str(BENCHMARKS / "lengths.py"), "train", "--jobs", "0"]
    told = subprocess.run(words, capture_output=True, text=True, check=False).stderr
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time")}
    assert "titanfunc.bench.jobs" in imported and not imported & {"torch", "numpy", "matplotlib"}


def result(command, *rows, **where):
    return {"command": command, "device": "a", "python": "3", "torch": "2", "triton": None, "commit": "c",
            "rows": list(rows), **where}  # fmt: skip


def test_rows_are_added_and_replaced_where_they_were_measured_again(lengths, tmp_path, monkeypatch, capsys):
    old = [{"model": "a", "batch": 4, "length": length, "step_ms": 1} for length in (8, 16)]
    new = [{"model": "a", "batch": batch, "length": 16, "step_ms": 2} for batch in (4, 1)]
    decoded = [{"model": "a", "status": "failed"}], [{"model": "a", "position": i} for i in (1, 4)]
    found = lengths.merged([result("one", *old, *decoded[0]), result("two", *new, *decoded[1])])
    assert found == result(["one", "two"], old[0], *new, *decoded[1])
    assert lengths.merged([found, result("two")])["command"] == ["one", "two"]
    with pytest.raises(SystemExit):
        lengths.merged([result("one"), result("two", commit="d")])
    assert capsys.readouterr().err == "error: results: wanted all of commit c, as the first is, got d\n"
    places = [tmp_path / "one.json", tmp_path / "two.json"]
    for place, rows in zip(places, (old, new), strict=True):
        place.write_text(json.dumps(result("x", *rows)))
    monkeypatch.setattr("sys.argv", ["lengths.py", "merge", *map(str, places), "--out", str(tmp_path / "both.json")])
    with pytest.raises(SystemExit) as ended:
        lengths.main()
    assert ended.value.code == 0
    assert json.loads((tmp_path / "both.json").read_text()) == result("x", old[0], *new)


@pytest.mark.parametrize(("add", "kept"), [(["--add"], [8, 16, 64]), ([], [64])])
def test_what_stands_in_the_result_stays_where_rows_are_added(lengths, tmp_path, monkeypatch, add, kept):
    asked = []

    def run_all(jobs, worker, at_once, limit, found, caches):
        for name, job in jobs.items():
            asked.append((job["model"], job["batch"], job["length"]))
            status = "measured" if job["length"] == 8 else "timed out"
            found(name, {"status": status, "error": "late"} if status != "measured" else {"status": status})

    monkeypatch.setattr(lengths, "run_all", run_all)
    out = tmp_path / "new" / "train.json"
    words = ["--device", "cpu", "--commit", "c", "--out", str(out), "--models", "lmm", "mac", "--batches", "2"]
    for more, status in ((["--lengths", "8", "16"], 1), (["--lengths", "8"], 0), (["--lengths", "64"], 1)):
        monkeypatch.setattr("sys.argv", ["lengths.py", "train", *words, *more, *add])
        with pytest.raises(SystemExit) as ended:
            lengths.main()
        assert ended.value.code == status
    assert sorted({row["length"] for row in json.loads(out.read_text())["rows"]}) == kept
    first = [(lengths.FAMILIES[name], 2, length) for length in (8, 16) for name in ("lmm", "mac")]
    assert asked[:4] == first  # all models at a length before the next length


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
    decode = [{"model": "lmm_24gb", "position": 4**i, "us_per_token": 90.0} for i in range(5, 9)] + [
        {"model": "mac_24gb:layers=5", "status": "failed"}
    ]
    widths = []
    for files in ([train], [train, decode]):
        results = [{"rows": rows} for rows in files]
        lengths.draw(argparse.Namespace(files=results, out=tmp_path / "lengths.png"))
        widths.append(imread(tmp_path / "lengths.png").shape[1])
    assert widths[1] - widths[0] == pytest.approx(4.6 * 120, abs=2)
