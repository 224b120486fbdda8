"""benchmarks/steps_gpu.sh and runs_gpu.sh, with a Python that only writes down what it was asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import alive, needs_proc, wait_for

ROOT = Path(__file__).resolve().parents[1]
STUB = f"""#!{sys.executable}
import json, os, sys, time
words = sys.argv[1:]
if words[0] == "-c":
    print(os.environ["GPUS"])
    sys.exit()
begun, slow = time.time(), float(os.environ["SECONDS_OF_ONE"])
meet = os.environ["MEET"].split()
with open(os.environ["LOG"], "a") as log:
    print(json.dumps({{"words": words, "pid": os.getpid()}}), file=log, flush=True)
    for own in [name for name in meet if any(name in word for word in words)]:
        open(os.environ["LOG"] + "." + own, "w").close()
        while time.time() < begun + 40 and not all(os.path.exists(os.environ["LOG"] + "." + name) for name in meet):
            time.sleep(0.01)
    time.sleep(slow)
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    print(json.dumps({{"words": words, "gpu": gpu, "begun": begun, "ended": time.time()}}), file=log, flush=True)
print("what it said")
sys.exit(3 if any(os.environ["FAILS"] in word for word in words) else 0)
"""


class Call(NamedTuple):
    """One call of the stub: the script, its words, its GPU and when it ran."""

    words: list[str]
    gpu: str
    begun: float
    ended: float

    def has(self, word):
        return any(word in each for each in self.words)


@pytest.fixture
def begin(tmp_path):
    """Starts a script. meet: words of calls that wait for each other, which they can only at the same time."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def start(name, *words, gpus="0", fails="nothing", seconds=0.0, meet="", **more):
        environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        environment |= {"PYTHON": str(stub), "GPUS": gpus, "FAILS": fails, "SECONDS_OF_ONE": str(seconds)}
        environment |= {"MEET": meet, "LOG": str(tmp_path / "log"), "TMPDIR": str(tmp_path / "tmp"), **more}
        (tmp_path / "tmp").mkdir(exist_ok=True)
        command = ["bash", f"benchmarks/{name}.sh", *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.fixture
def run(begin, tmp_path):
    """Runs one to its end: its calls, in the order in which they began, and the state that it leaves."""

    def call(name, *parts, status=0, **how):
        process = begin(name, str(tmp_path / "out"), "abc", *parts, **how)
        told = process.communicate(timeout=60)
        assert process.returncode == status, told
        assert list((tmp_path / "tmp").iterdir()) == []
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        (tmp_path / "log").unlink()
        calls = [Call(**line) for line in lines if "gpu" in line]
        return sorted(calls, key=lambda call: call.begun), state(tmp_path)

    return call


def state(place):
    return [line.split()[:3] for line in (place / "out" / "state").read_text().splitlines()]


def together(one, other):
    return min(one.ended, other.ended) > max(one.begun, other.begun)


def test_with_one_gpu_the_parts_follow_each_other(run, tmp_path):
    calls, told = run("steps_gpu", seconds=0.1)
    order = ["start.json", "small.json", "small_launched.json", "peers.json", "table.json", "compile_report"]
    assert all(call.has(word) for call, word in zip(calls, order, strict=True))
    assert {call.gpu for call in calls} == {"0"} and not any(map(together, calls, calls[1:]))
    names = ["start", "steps_small", "steps_small_launched", "steps_peers", "steps_table", "report"]
    assert [name for _, name, status in told if status == "0"] == names
    assert (tmp_path / "out" / "logs" / "steps_table.log").read_text() == "what it said\n"
    assert all(call.has("abc") for call in calls)
    table, report = calls[4], calls[5]
    assert "mac_168m:kernels=reference" in table.words and "--profile" in table.words
    assert "kernels=[triton]" in report.words and "variants=[inductor_cuda_graph,older_way]" in report.words
    (limit,) = (float(word.partition("=")[2]) for word in report.words if word.startswith("time_limit="))
    assert 2 * 2 * limit < 600, "a call's seconds: each of two variants has two processes"
    assert "commit='abc'" in report.words


def test_with_two_gpus_parts_run_beside_each_other_but_one_has_the_machine(run):
    calls, _ = run(
        "steps_gpu", "start", "table", "small", "report", gpus="0,1", meet="h200_steps_table.json h200_steps_small.json"
    )
    start, *others = calls
    assert not any(together(start, other) for other in others)
    for gpu in "01":
        own = [call for call in calls if call.gpu == gpu]
        assert not any(map(together, own, own[1:]))
    assert any(together(one, other) for one in others for other in others if one.gpu != other.gpu)
    assert {others[0].gpu, others[1].gpu} == {"0", "1"}


def test_gpus_are_those_that_one_may_see(run):
    calls, _ = run(
        "runs_gpu", "tests", "decode", gpus="0", meet="test_feed.py h200_decode.json", CUDA_VISIBLE_DEVICES="5,3"
    )
    assert sorted(call.gpu for call in calls) == ["3", "5"] and together(*calls)


def test_a_failure_is_told_and_loses_no_other_part(run):
    calls, told = run("runs_gpu", "decode", "feeding", fails="lengths.py", status=1)
    assert [call.words[0] for call in calls] == ["benchmarks/lengths.py", "benchmarks/feeding.py"]
    assert told == [
        ["decode", "decode", "started"], ["decode", "decode", "3"],
        ["feeding", "feeding", "started"], ["feeding", "feeding", "0"],
    ]  # fmt: skip
    _, told = run("runs_gpu", "tests")  # another call, which failed nowhere; what the first left stays
    assert [line for line in told if line[2] != "started"] == [
        ["decode", "decode", "3"], ["feeding", "feeding", "0"], ["tests", "tests", "0"],
    ]  # fmt: skip
    _, told = run("runs_gpu", "decode")
    assert ["decode", "decode", "0"] in told and ["decode", "decode", "3"] not in told


def test_runs_of_all_seeds_are_killed_at_once_and_one_that_differs_fails(run, tmp_path):
    how = {"SEEDS": "0 1 5", "KILLS": "7", "status": 1}
    calls, told = run("runs_gpu", "killed", "feeding", fails="killed/1.json", meet="0.json 1.json 5.json", **how)
    *killed, feeding = calls
    assert all(together(killed[0], other) for other in killed[1:]) and feeding.begun >= max(c.ended for c in killed)
    seeds = {call.words[call.words.index("--seed") + 1]: call for call in killed}
    firsts = {seed: call.words[call.words.index("--first") + 1] for seed, call in seeds.items()}
    assert firsts == {"0": "anywhere", "1": "running", "5": "saving"}
    assert all(call.has(f"h200_killed/{seed}.json") and call.has("7") for seed, call in seeds.items())
    ends = sorted(line for line in told if line[2] != "started")
    assert ends == [
        ["feeding", "feeding", "0"],
        *(["killed", f"killed_{i}", "3" if i == 1 else "0"] for i in (0, 1, 5)),
    ]
    assert (tmp_path / "out" / "h200_killed").is_dir()


def test_lengths_are_chosen_and_added(run):
    calls, _ = run("runs_gpu", "lengths", "decode", FAMILIES="mac lmm", BATCHES="4", LENGTHS="4096 65536")
    train, decode = (" ".join(call.words) for call in calls)
    assert "--models mac lmm --batches 4 --lengths 4096 65536 --profile --jobs 6 --add --commit abc" in train
    assert "decode --models mac lmm --jobs 3 --add" in decode
    train = " ".join(run("runs_gpu", "lengths")[0][0].words)
    assert "--models mac mag lmm --batches 4 1 --lengths 4096 65536 8192 16384 32768" in train


def test_what_is_no_part_is_refused(begin, tmp_path):
    process = begin("steps_gpu", str(tmp_path / "out"), "abc", "start", "tabel")
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and told == "error: PART: wanted some of start small peers table report, got tabel\n"
    assert not (tmp_path / "out").exists()
    process = begin("runs_gpu")
    assert process.communicate(timeout=60)[1].startswith("error: wanted OUT [COMMIT [PART...]]")
    assert process.returncode == 2


@needs_proc
@pytest.mark.parametrize(
    ("name", "parts", "count"), [("steps_gpu", ("table", "small", "peers"), 2), ("runs_gpu", ("killed",), 6)]
)
def test_an_end_ends_what_runs(begin, tmp_path, name, parts, count):
    process = begin(name, str(tmp_path / "out"), "abc", *parts, gpus="0,1", seconds=60)
    log = tmp_path / "log"

    def begun():
        found = [json.loads(line)["pid"] for line in log.read_text().splitlines()] if log.exists() else []
        return found if len(found) == count else []

    pids = wait_for(begun)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    wait_for(lambda: not any(map(alive, pids)), 10)
    assert {status for *_, status in state(tmp_path)} == {"started"}
    assert list((tmp_path / "tmp").iterdir()) == []
