"""A run goes on with the files that it was begun on."""

import dataclasses
import json
import os

import pytest

from tests.data.tables import TEXTS, write_jsonl
from titanfunc.config.data import DataConfig
from titanfunc.data import open_source
from titanfunc.data.same import DATA, keep, require_same


@pytest.fixture
def config(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    settings = {"seq_len": 16, "batch_size": 4, "validation_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(corpus="files", path=str(tmp_path / "a.jsonl"), **settings)


@pytest.fixture
def run(tmp_path, config):
    (tmp_path / "run").mkdir()
    keep(tmp_path / "run", config, open_source(config, 1))
    return tmp_path / "run"


def again(run, config):
    require_same(run, config, open_source(config, 1))


def test_the_same_files_are_gone_on_with(run, config, tmp_path, monkeypatch):
    times = os.stat(config.path)
    os.utime(config.path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    again(run, config)
    again(run, dataclasses.replace(config, seed=7, validation_fraction=0.4, seq_len=8))
    monkeypatch.chdir(tmp_path)
    again(run, dataclasses.replace(config, path="a.jsonl"))
    assert json.loads((run / DATA).read_text())["documents"] == len(TEXTS)


@pytest.mark.parametrize("stream", [False, True])
def test_files_that_changed_are_refused_until_data_json_is_deleted(run, config, stream):
    if stream:
        config = dataclasses.replace(config, stream=True)
        keep(run, config, open_source(config, 1))
    before = os.path.getsize(config.path)
    with open(config.path, "a") as file:
        file.write('{"text": "one more"}\n')
    then, now = ("", "") if stream else ("60 documents, ", "61 documents, ")
    message = (
        f"data.path: {config.path} has changed since the run began ({then}{before:,} bytes in 1 file then, "
        f"{now}{before + 21:,} bytes in 1 file now); put the files back, or delete {run / DATA} to go on"
    )
    with pytest.raises(ValueError, match=r"^data\.path") as error:
        again(run, config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    (run / DATA).unlink()
    again(run, config)


def test_other_contents_of_the_same_size_are_refused(run, config):
    with open(config.path, "r+") as file:
        text = file.read().replace("word", "WORD", 1)
        file.seek(0)
        file.write(text)
    with pytest.raises(ValueError, match=r"in 1 file then, as many now, of other contents or times\); put the files"):
        again(run, config)


def test_files_of_another_name_may_be_gone_on_with(run, config, tmp_path):
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:30])
    again(run, dataclasses.replace(config, path=str(tmp_path / "b.jsonl")))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"named": []}'])
def test_what_is_damaged_is_told(run, config, content):
    (run / DATA).write_text(content)
    with pytest.raises(ValueError, match=r"data\.json: cannot be read \(.*\); delete it to go on$"):
        again(run, config)


def test_a_task_without_text_has_no_files(config, tmp_path):
    config = dataclasses.replace(config, task="mqar", path=str(tmp_path / "nowhere"), seq_len=128)
    source = open_source(config, 1)
    keep(tmp_path, config, source)
    require_same(tmp_path, config, source)
    assert not (tmp_path / DATA).exists()
