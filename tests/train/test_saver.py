"""Saving in the background: what is saved is the state of that moment, and nothing is left behind."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.train.states import MODEL, leaves, make_state, same
from titanfunc.config import TrainConfig, checkpoints, runs
from titanfunc.train import checkpoint
from titanfunc.train.saver import Saver


def gate(monkeypatch):
    """Holds the writer until it is let go; tells the order of what happens."""
    open_, order, real = threading.Event(), [], checkpoint.write

    def write(run_dir, step, tensors, metadata):
        order.append(f"begin {step}")
        assert open_.wait(30)
        place = real(run_dir, step, tensors, metadata)
        order.append(f"end {step}")
        return place

    monkeypatch.setattr(checkpoint, "write", write)
    return open_, order


def test_a_step_may_overwrite_the_state_while_it_is_written(tmp_path, monkeypatch):
    open_, _ = gate(monkeypatch)
    state = make_state(1)
    with Saver(tmp_path, MODEL) as saver:
        saver.save(1, state)
        for leaf in leaves(state):
            leaf.zero_()  # as a donated step does
        assert checkpoints.checkpoints(tmp_path) == []
        open_.set()
    assert same(checkpoint.load(runs.latest(tmp_path), make_state(2), MODEL), make_state(1))


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    open_, order = gate(monkeypatch)
    with Saver(tmp_path, MODEL) as saver:
        saver.save(1, make_state(1))
        threading.Timer(0.2, open_.set).start()
        saver.save(2, make_state(2))
        assert order[:2] == ["begin 1", "end 1"]
    assert order == ["begin 1", "end 1", "begin 2", "end 2"]
    for step in (1, 2):
        place = checkpoints.checkpoint_dir(tmp_path, step)
        assert same(checkpoint.load(place, make_state(3), MODEL), make_state(step))


def test_another_structure_or_shape_gets_buffers_of_its_own(tmp_path):
    with Saver(tmp_path, MODEL) as saver:
        saver.save(1, make_state(1))
        saver.save(2, make_state(2, width=7))
        saver.save(3, {"w": torch.ones(2)})
    assert same(
        checkpoint.load(checkpoints.checkpoint_dir(tmp_path, 2), make_state(3, width=7)), make_state(2, width=7)
    )
    loaded = checkpoint.load(checkpoints.checkpoint_dir(tmp_path, 3), {"w": torch.zeros(2)})
    assert torch.equal(loaded["w"], torch.ones(2))


def test_the_validation_loss_of_the_same_step_is_kept_and_ranks(tmp_path):
    with Saver(tmp_path, MODEL, keep=1, keep_best=1, train=TrainConfig(steps=9)) as saver:
        for step, loss in ((1, 2.0), (2, 1.0), (3, float("nan")), (4, 3.0)):
            saver.write(step, {"loss": 0.0})
            saver.write(step, {"validation_loss": loss})
            saver.save(step, make_state(step))
        saver.save(5, make_state(5))  # validated at 4, not here
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)] == [2, 5]
    best, newest = (checkpoints.check(path) for path in checkpoints.checkpoints(tmp_path))
    assert best["validation_loss"] == 1.0 and "validation_loss" not in newest
    assert newest["train"]["steps"] == 9


def test_a_step_that_is_saved_already_is_refused_before_anything_is_written(tmp_path):
    with Saver(tmp_path, MODEL) as saver:
        saver.save(1, make_state(1))
        with pytest.raises(ValueError, match="has no checkpoint yet, got 1"):
            saver.save(1, make_state(2))
    assert same(checkpoint.load(runs.latest(tmp_path), make_state(3)), make_state(1))


def test_no_thread_is_left_and_a_program_that_just_ends_has_saved(tmp_path):
    with Saver(tmp_path, MODEL) as saver:
        saver.save(1, make_state(1))
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    program = f"""
import sys, torch
from titanfunc.config import ModelConfig
from titanfunc.train.saver import Saver
Saver({str(tmp_path / "ended")!r}, ModelConfig(layers=2)).save(1, {{"w": torch.ones(10**6)}})
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode == 3
    place = runs.latest(tmp_path / "ended")
    assert torch.equal(checkpoint.load(place, {"w": torch.zeros(10**6)})["w"], torch.ones(10**6))


@pytest.mark.gpu
def test_on_a_gpu_what_is_saved_is_the_state_before_the_next_step(tmp_path):
    state = {"w": torch.zeros(2**26, device="cuda"), "n": torch.zeros((), dtype=torch.int64, device="cuda")}
    busy = torch.randn(4096, 4096, device="cuda")
    with Saver(tmp_path, MODEL) as saver:
        for step in range(1, 6):
            for _ in range(50):
                busy = busy @ busy / 64  # still at work when it is saved
            state["w"].fill_(step)
            state["n"].fill_(step)
            saver.save(step, state)
            for leaf in state.values():
                leaf.fill_(-1)
    for step in range(1, 6):
        loaded = checkpoint.load(checkpoints.checkpoint_dir(tmp_path, step), {k: v.cpu() for k, v in state.items()})
        assert int(loaded["n"]) == step
        assert bool((loaded["w"] == step).all())
