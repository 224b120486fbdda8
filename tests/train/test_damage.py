"""However a checkpoint is damaged, that is noticed, and the one before is loaded."""

import os
import random
import shutil

import pytest
import torch

from tests.train.states import MODEL, make_state, same
from titanfunc.config import checkpoints, runs
from titanfunc.train import checkpoint

FILES = (checkpoints.METADATA, checkpoints.TENSORS, checkpoints.MANIFEST)


def flip_bits(draw, newest, older):
    path = newest / draw.choice(FILES)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 50))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut_short(draw, newest, older):
    path = newest / draw.choice(FILES)
    os.truncate(path, draw.randrange(path.stat().st_size))


def make_longer(draw, newest, older):
    with (newest / draw.choice(FILES)).open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 100)))


def remove(draw, newest, older):
    (newest / draw.choice(FILES)).unlink()


def swap(draw, newest, older):
    """A file of the one before in its place; the whole of it, at times."""
    names = FILES if draw.random() < 0.2 else (draw.choice(FILES),)
    for name in names:
        shutil.copy(older / name, newest / name)


def swap_within(draw, newest, older):
    one, other = draw.sample(FILES, 2)
    content = (newest / one).read_bytes()
    os.replace(newest / other, newest / one)
    (newest / other).write_bytes(content)


def blank(draw, newest, older):
    """A stretch of zeros, as of a disk that lost a page."""
    path = newest / checkpoints.TENSORS
    content = bytearray(path.read_bytes())
    begin = draw.randrange(len(content) - 1)
    stretch = bytes(min(draw.randint(1, 512), len(content) - begin))
    if content[begin : begin + len(stretch)] == stretch:
        begin, stretch = 0, bytes(16)
    content[begin : begin + len(stretch)] = stretch
    path.write_bytes(content)


DAMAGES = (flip_bits, flip_bits, flip_bits, cut_short, cut_short, make_longer, remove, swap, swap_within, blank)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        checkpoint.save(run_dir, step, make_state(step, width=100), MODEL)
    return run_dir


@pytest.mark.parametrize("seed", range(100))
def test_damage_is_noticed_and_the_checkpoint_before_loads(saved, tmp_path, capsys, seed):
    run_dir = tmp_path / "run"
    shutil.copytree(saved, run_dir)
    older, newest = checkpoints.checkpoints(run_dir)
    DAMAGES[seed % len(DAMAGES)](random.Random(seed), newest, older)
    like = make_state(3, width=100)
    with pytest.raises(ValueError, match="step_00000002: ") as error:
        checkpoint.load(newest, like, MODEL)
    assert "\n" not in str(error.value)
    assert same(like, make_state(3, width=100))

    assert runs.find_checkpoint(str(run_dir)) == older
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and "step_00000002" in said and said.count("\n") == 1
    assert same(checkpoint.load(older, like, MODEL), make_state(1, width=100))


def test_a_run_that_goes_on_before_a_damaged_checkpoint_sets_it_aside(saved, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(saved, run_dir)
    checkpoint.save(run_dir, 5, make_state(5), MODEL)
    for step in (2, 5):
        place = checkpoints.checkpoint_dir(run_dir, step)
        (place / checkpoints.TENSORS).write_bytes(b"damaged")
    assert runs.plan_run_dir("", "mac_tiny", runs.latest(run_dir)).resolve() == run_dir
    capsys.readouterr()
    checkpoint.save(run_dir, 2, make_state(2), MODEL, keep=2)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(run_dir)] == [1, 2]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {checkpoints.checkpoint_dir(run_dir, step)} is damaged, and was moved to damaged_step_{step:08d}"
        for step in (2, 5)
    ]
    assert (run_dir / "checkpoints" / "damaged_step_00000005" / checkpoints.TENSORS).read_bytes() == b"damaged"
    assert same(checkpoint.load(runs.latest(run_dir), make_state(3), MODEL), make_state(2))
    assert capsys.readouterr().err == ""


def test_every_single_bit_of_the_small_files_counts(saved, tmp_path):
    """Also those that change no number: a space, the case of a digit."""
    run_dir = tmp_path / "run"
    shutil.copytree(saved, run_dir)
    newest = checkpoints.checkpoints(run_dir)[-1]
    for name in (checkpoints.MANIFEST, checkpoints.METADATA):
        whole = (newest / name).read_bytes()
        for bit in range(0, 8 * len(whole), 1 if name == checkpoints.MANIFEST else 37):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            (newest / name).write_bytes(content)
            with pytest.raises(ValueError, match="step_00000002: "):
                checkpoints.check(newest)
        (newest / name).write_bytes(whole)
    assert checkpoints.check(newest)["step"] == 2
    assert torch.equal(checkpoint.load(newest, make_state(3, width=100)).step, torch.tensor(2))
