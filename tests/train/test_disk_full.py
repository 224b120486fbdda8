"""A disk that is full, or fails, while a checkpoint is saved: the one before loads, and no half of one is counted."""

import errno
import os
import subprocess
from collections import Counter

import pytest
import torch

from tests.train.states import MODEL, make_state, same
from titanfunc.config import checkpoints, runs
from titanfunc.train import checkpoint
from titanfunc.train.saver import SaveFailed, Saver

CALLS = ("open", "write", "fsync", "rename", "replace")


def count_calls(monkeypatch, fail=None):
    """Counts what is asked of the system; the ``fail``, a name and a number, is refused, and its likes after it."""
    seen, real = Counter(), {name: getattr(os, name) for name in CALLS}

    def make(name):
        def call(*args, **kwargs):
            seen[name] += 1
            if fail is not None and name == fail[0] and seen[name] >= fail[1]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real[name](*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, make(name))
    return seen


def all_places(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        run_dir = tmp_path_factory.mktemp("counted")
        checkpoint.save(run_dir, 1, make_state(1), MODEL)
        seen = count_calls(patch)
        checkpoint.save(run_dir, 2, make_state(2), MODEL)
    return [(name, number) for name in CALLS for number in range(1, seen[name] + 1)]


def test_no_room_at_any_call_leaves_the_checkpoint_before(tmp_path_factory):
    places = all_places(tmp_path_factory)
    assert len(places) > 20 and {name for name, _ in places} == set(CALLS)
    for fail in places:
        run_dir = tmp_path_factory.mktemp("full")
        older = checkpoint.save(run_dir, 1, make_state(1), MODEL)
        with pytest.MonkeyPatch.context() as patch:
            count_calls(patch, fail)
            with pytest.raises(OSError, match="No space left on device"):
                checkpoint.save(run_dir, 2, make_state(2), MODEL, keep=1)
        newest = runs.latest(run_dir)
        wanted = make_state(1) if newest == older else make_state(2)
        assert same(checkpoint.load(newest, make_state(3), MODEL), wanted), fail
        assert older.is_dir(), fail
        if fail[0] != "open":  # without which a folder cannot be deleted either
            assert not list((run_dir / checkpoints.CHECKPOINTS).glob(".writing_*")), fail
        checkpoint.save(run_dir, 3, make_state(3), MODEL)  # once there is room again
        assert same(checkpoint.load(runs.latest(run_dir), make_state(4), MODEL), make_state(3)), fail


@pytest.mark.parametrize("fail", [("write", 2), ("fsync", 3), ("rename", 1)])
def test_the_background_tells_it_once_in_a_line_at_the_next_save(tmp_path, monkeypatch, fail):
    saver = Saver(tmp_path, MODEL, keep=1)
    saver.save(1, make_state(1))
    saver.close()
    with monkeypatch.context() as patch:
        count_calls(patch, fail)
        saver.save(2, make_state(2))
        with pytest.raises(SaveFailed, match=r"step_00000002 could not be saved \(No space left") as error:
            saver.save(3, make_state(3))
    assert "\n" not in str(error.value) and str(error.value).endswith("older ones are as they were")
    assert error.value.errno == errno.ENOSPC
    saver.close()
    assert same(checkpoint.load(runs.latest(tmp_path), make_state(4), MODEL), make_state(1))
    saver.save(3, make_state(3))
    saver.close()
    assert same(checkpoint.load(runs.latest(tmp_path), make_state(4), MODEL), make_state(3))


def test_the_end_tells_it_and_beside_another_error_it_is_a_warning(tmp_path, monkeypatch, capsys):
    count_calls(monkeypatch, ("write", 1))

    def saving(then):
        with Saver(tmp_path, MODEL) as saver:
            saver.save(1, make_state(1))
            then()

    with pytest.raises(SaveFailed, match="step_00000001 could not be saved"):
        saving(lambda: None)
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        saving(lambda: 1 // 0)
    said = capsys.readouterr().err
    assert said.startswith("warning: the checkpoint ") and said.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs root, and leave to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    def state(seed):
        return {"w": torch.full((100_000,), float(seed))}  # 400 kB: two have room, the third has not

    saver = Saver(small_disk, MODEL, keep=2)
    for step in (1, 2, 3):
        saver.save(step, state(step))
    with pytest.raises(SaveFailed, match=r"step_00000003 could not be saved \(No space left on device\)"):
        saver.close()
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(small_disk)] == [1, 2]
    assert torch.equal(checkpoint.load(runs.latest(small_disk), state(0))["w"], state(2)["w"])
    assert not list((small_disk / checkpoints.CHECKPOINTS).glob(".writing_*"))
