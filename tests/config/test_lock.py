"""One process a run, for as long as it lives and no longer."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.saved import put_checkpoint
from titanfunc.config import lock, runs
from titanfunc.config.experiment import from_mapping

PROGRAM = """
import os, sys, time
from pathlib import Path
from titanfunc.config.lock import hold
hold(Path(sys.argv[1]))
if sys.argv[2] == "forks" and os.fork():
    os._exit(0)
print("held", os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Begins another process, or its fork, that holds a run; returns its id."""
    begun = []

    def begin(run_dir, how="stays"):
        command = [sys.executable, "-c", PROGRAM, str(run_dir), how]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
        said, pid = process.stdout.readline().split()
        assert said == "held"
        begun.append((process, int(pid)))
        return int(pid)

    yield begin
    for process, pid in begun:
        os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path, other):
    pid = other(tmp_path)
    with pytest.raises(lock.RunTaken, match=r"^train\.run_dir: wanted a run that no other process trains, got ") as no:
        lock.hold(tmp_path)
    assert no.value.status == 2
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    lock.hold(tmp_path)
    lock.hold(tmp_path)  # it is mine


def test_a_fork_that_outlives_its_parent_holds_nothing(tmp_path, other):
    other(tmp_path, "forks")
    lock.hold(tmp_path)


def test_a_run_that_goes_on_is_locked_and_one_that_is_read_is_not(tmp_path, other):
    settings = {"model": {"preset": "mac_tiny"}, "train": {"resume": "latest", "steps": 10}}
    place = put_checkpoint(tmp_path / "one", 4, model=asdict(from_mapping(settings).model))
    other(tmp_path / "one")
    with pytest.raises(lock.RunTaken):
        runs.prepare(from_mapping(settings), root=tmp_path)
    elsewhere = {**settings["train"], "resume": str(place), "run_dir": str(tmp_path / "two")}
    assert runs.prepare(from_mapping({**settings, "train": elsewhere}), root=tmp_path).checkpoint == place


def test_a_new_run_takes_an_empty_folder(tmp_path):
    (tmp_path / lock.LOCK).touch()  # of a process that was killed just then
    assert runs.plan_run_dir(str(tmp_path), "mac_tiny") == tmp_path
    (tmp_path / "notes").touch()
    with pytest.raises(lock.RunTaken, match="wanted an empty folder for a new run"):
        lock.hold(tmp_path, new=True)
    (tmp_path / "notes").unlink()
    lock.hold(tmp_path, new=True)


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def fails(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    lock.hold(tmp_path)
    told = f"warning: {tmp_path / lock.LOCK}: No locks available; let no other process train there\n"
    assert capsys.readouterr().err == told
