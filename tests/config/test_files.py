"""Paths of the settings: what can be one, and whether a folder can be made there."""

import errno
import os
from pathlib import Path

import pytest

from titanfunc.config import evaluate, experiment, files, meta, runs
from titanfunc.config.data import DataConfig
from titanfunc.data.pipeline import bpe_file


def test_a_folder_is_tried_and_leaves_nothing(tmp_path):
    for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        files.require_folder(path, "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file", "file/below", "a" * 300, f"new/{'a' * 300}", "dangling/below", "/proc/nope"])
def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, path):
    """Whoever asks: the rights of root are not all that counts."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"^out: wanted a folder that can be made and written into, got '.*' \(\w"):
        files.require_folder(Path(path), "out")
    assert sorted(os.listdir()) == ["dangling", "file"]


def test_a_full_disk_is_no_mistake(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "mkdir", full)
    files.require_folder(tmp_path / "a", "out")


@pytest.mark.parametrize("value", [5, None, "a" * 256, "é" * 128, "a/" * 2000, "a\0b", "a\ud800"])
def test_what_is_no_path(value):
    with pytest.raises(ValueError, match=r"^train\.run_dir: wanted a path") as error:
        files.require_path(value, "train.run_dir")
    assert len(str(error.value)) < 250
    files.require_path("a" * 255 + "/" + "a" * 255, "train.run_dir")
    files.require_path(os.fsdecode(b"a\xff"), "train.run_dir")  # a name need not be text


def test_home_is_the_users_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "weights").touch()
    assert runs.plan_run_dir("~/run", "mac_tiny") == tmp_path / "run"
    with pytest.raises(ValueError, match=rf"no whole checkpoint in {tmp_path}/texts"):
        runs.find_checkpoint("~/texts")
    with pytest.raises(ValueError, match=rf"no whole checkpoint in {tmp_path}/texts"):
        runs.find_checkpoint("latest", "~/texts")
    DataConfig("text_folder", "~/texts", cache_dir="~/cache").check_sources()
    assert bpe_file(DataConfig(tokenizer="bpe", cache_dir="~/cache")).parent == tmp_path / "cache"
    assert bpe_file(DataConfig(tokenizer="bpe", cache_dir="~nobody_of_this_name")).parent == Path(
        "~nobody_of_this_name"
    )
    learned = {"name": "velo", "learned": {"weights": ["~/weights"]}}
    found = experiment.from_mapping({"model": {"preset": "mac_tiny"}, "optim": learned})
    assert found.optim.learned.weights == (str(tmp_path / "weights"),)
    plan = meta.prepare(meta.MetaConfig(start="~/weights", out="~/out"))
    assert (plan.config.start, plan.out) == (str(tmp_path / "weights"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"^run: wanted a folder that holds a checkpoint, got '~/texts'"):
        evaluate.prepare(evaluate.EvaluateConfig(run="~/texts"), tmp_path)
    assert files.expanded("~nobody_of_this_name/a") == Path("~nobody_of_this_name/a")


def test_a_batch_that_is_more_than_the_memory(monkeypatch):
    monkeypatch.setattr("titanfunc.config.data._memory", lambda: 1 << 20)
    DataConfig(batch_size=500, seq_len=256).check_memory()
    message = r"^data\.batch_size: wanted rows that fit into this machine's 0\.0 GiB of memory \(as 512 of 257 tok"
    with pytest.raises(ValueError, match=message):
        DataConfig(batch_size=512, seq_len=256).check_memory()
    settings = experiment.from_mapping({"model": {"preset": "mac_tiny"}, "data": {"batch_size": 512}})
    with pytest.raises(ValueError, match=message):
        runs.prepare(settings)
