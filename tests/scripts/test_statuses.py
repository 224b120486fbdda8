"""What is wrong with the data, and not with the settings, has a status of its own also before the first step."""

import errno
import os
import sys
from dataclasses import asdict

import pytest

import scripts.compare
import scripts.evaluate
import scripts.train
from tests.data.tables import TEXTS, write_jsonl
from tests.saved import put_checkpoint
from titanfunc.config import PRESETS
from titanfunc.config.data import DataConfig
from titanfunc.config.failures import NO_DATA, NO_MEMORY, NOT_WRITTEN
from titanfunc.data import load, making

SETTINGS = [
    "data=files", "data.path=texts", "data.cache_dir=cache", "data.seq_len=16", "data.batch_size=2",
    "data.validation_fraction=0.3", "model.layers=1", "train.compile=none", "train.device=cpu", "train.eval_batches=1",
    "train.steps=1",
]  # fmt: skip


@pytest.fixture(params=["train", "compare", "evaluate"])
def call(request, tmp_path, monkeypatch, capfd):
    """Runs a script in this process: its exit status, and its one line on stderr."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "texts" / "a.jsonl", TEXTS)
    settings = SETTINGS
    if request.param == "evaluate":
        trained_on = {"corpus": "files", "path": "texts", "cache_dir": "cache", "validation_fraction": 0.3}
        put_checkpoint(tmp_path / "run", 1, model=asdict(PRESETS["mac_tiny"]), data=trained_on)
        settings = ["run=run", "device=cpu", "out=out"]

    def main():
        monkeypatch.setattr(sys, "argv", [f"{request.param}.py", *settings])
        with pytest.raises(SystemExit) as ended:
            getattr(scripts, request.param).main()
        said = capfd.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
        assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()
        return ended.value.code, said.err

    return main


def test_a_line_that_is_no_json(call, tmp_path):
    with (tmp_path / "texts" / "a.jsonl").open("a") as file:
        file.write('{"text": "cut off')
    status, line = call()
    assert status == NO_DATA and "texts/a.jsonl: line 61: not JSON" in line


def test_a_full_disk_while_tokens_are_written(call, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, line = call()
    assert status == NOT_WRITTEN and "cannot write cache/tokens-" in line


def test_a_process_that_tokenizes_is_killed(call, monkeypatch):
    monkeypatch.setattr(making, "_ALONE_BYTES", 0)
    monkeypatch.setattr(making, "_cores", lambda: 2)
    begin = making.subprocess.Popen

    def deadly(command, **options):
        return begin([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(making.subprocess, "Popen", deadly)
    status, line = call()
    assert status == NO_MEMORY and "a process that tokenizes was killed" in line


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_shard_that_is_damaged(call, tmp_path, monkeypatch, damage):
    load(DataConfig("files", "texts", cache_dir="cache"))
    (tokens,) = tmp_path.glob("cache/tokens-*/*.tokens")
    content = tokens.read_bytes()
    tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:] if damage == "flipped" else content[:-1])
    status, line = call()
    assert status == NO_DATA and f"{tokens.name}: " in line
