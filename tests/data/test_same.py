"""A run goes on with the files that it was begun on."""

import dataclasses
import json
import os
import re
import shutil
from types import SimpleNamespace

import fsspec
import pytest
import torch

from tests.data.tables import TEXTS, write_jsonl
from titanfunc.config import hub as hub_of
from titanfunc.config.data import DataConfig
from titanfunc.config.runs import DATA, commit_of
from titanfunc.data import open_source, parts
from titanfunc.data.remote import open_remote
from titanfunc.data.same import keep, require_same


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
def test_a_copy_of_a_large_file_is_the_same_whenever_it_was_written(config, tmp_path, stream):
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 500)
    assert os.path.getsize(config.path) > 1 << 20
    config = dataclasses.replace(config, stream=stream)
    keep(tmp_path, config, open_source(config, 1))
    (tmp_path / "copy").mkdir()
    copy = dataclasses.replace(config, path=shutil.copy(config.path, tmp_path / "copy"))
    os.utime(copy.path, ns=(0, 10**18))
    again(tmp_path, copy)
    write_jsonl(tmp_path / "copy" / "a.jsonl", [*(TEXTS * 500)[:-1], TEXTS[-1].replace("document", "DOCUMENT")])
    with pytest.raises(ValueError, match=r"^data\.path: wanted the texts that the run began with, "):
        again(tmp_path, copy)


@pytest.mark.parametrize("stream", [False, True])
def test_files_that_changed_are_refused_until_data_json_is_deleted(run, config, stream):
    if stream:
        config = dataclasses.replace(config, stream=True)
        (run / DATA).unlink()
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
    with pytest.raises(ValueError, match=r"in 1 file then, as many now, of other contents\); put the files"):
        again(run, config)


def test_texts_that_moved_are_the_same_and_others_of_the_same_name_are_not(run, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, path="a.jsonl")
    for place, texts in (("moved", TEXTS), ("other", TEXTS[:30])):
        write_jsonl(tmp_path / place / "a.jsonl", texts)
    monkeypatch.chdir(tmp_path / "moved")
    again(run, config)
    monkeypatch.chdir(tmp_path / "other")
    before = (run / DATA).read_text()
    message = (
        rf"^data\.path: wanted the texts that the run began with, {tmp_path}/a\.jsonl \(60 documents, .*\), got "
        rf"others, a\.jsonl \(30 documents, .* in 1 file now\); name those, or delete {run / DATA} to"
    )
    with pytest.raises(ValueError, match=message) as error:
        again(run, config)
    assert "\n" not in str(error.value)
    keep(run, config, open_source(config, 1))
    assert (run / DATA).read_text() == before  # a record of what the run was begun on, whatever is read later
    (run / DATA).unlink()
    again(run, config)


def test_another_run_may_go_on_with_other_texts_if_it_names_them(run, config, tmp_path):
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:30])
    trained_on, other = dataclasses.asdict(config), dataclasses.replace(config, path=str(tmp_path / "b.jsonl"))
    require_same(run, other, open_source(other, 1), trained_on)
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:30])
    with pytest.raises(ValueError, match=r"^data\.path: .*a\.jsonl has changed since the run began"):
        require_same(run, config, open_source(config, 1), trained_on)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset that has the commits ``first`` and ``then``, the newest; what ``datasets`` would find on the hub, with
    files of this machine in the place of those that it would fetch."""
    import datasets

    for i, commit in enumerate(COMMITS):
        with fsspec.open(f"memory://hub/{commit}.jsonl", "wb") as file:
            file.write(
                "".join(json.dumps({"text": text.replace("word", 4 * str(i))}) + "\n" for text in TEXTS).encode()
            )

    def find(path, subset, revision):
        files = [f"hf://datasets/{path}@{revision or COMMITS[1]}/a.jsonl"]
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": files}))

    monkeypatch.setattr(datasets, "load_dataset_builder", find)
    monkeypatch.setattr(hub_of, "reachable", lambda: True)
    commit = re.compile("[01]{40}")
    monkeypatch.setattr(parts, "open_remote", lambda file: open_remote(f"memory://hub/{commit.search(file)[0]}.jsonl"))
    settings = {"seq_len": 16, "batch_size": 4, "validation_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
    return DataConfig("hub", "a/b", **settings)


COMMITS = ("0" * 40, "1" * 40)


@pytest.mark.parametrize("stream", [False, True])
def test_a_dataset_of_the_hub_is_gone_on_with_at_its_commit(hub, tmp_path, stream):
    hub = dataclasses.replace(hub, stream=stream)
    first = open_source(dataclasses.replace(hub, revision=COMMITS[0]), 1)
    (tmp_path / "run").mkdir()
    keep(tmp_path / "run", hub, first)
    assert json.loads((tmp_path / "run" / DATA).read_text())["commit"] == COMMITS[0]
    newest = open_source(hub, 1)
    assert newest.corpus.identity.commit == COMMITS[1]
    assert not torch.equal(newest.batches(0)["tokens"], first.batches(0)["tokens"])
    message = (
        rf"^data\.revision: a/b has changed since the run began \(.*commit 0{{12}} in 1 file then, .*commit 1{{12}} in "
        rf"1 file now\); ask for the former by data\.revision={COMMITS[0]}, or delete "
    )
    with pytest.raises(ValueError, match=message):
        require_same(tmp_path / "run", hub, newest)
    assert commit_of(tmp_path / "run", hub) == COMMITS[0]
    pinned = open_source(hub, 1, commit=commit_of(tmp_path / "run", hub))
    require_same(tmp_path / "run", hub, pinned)
    assert torch.equal(pinned.batches(0)["tokens"], first.batches(0)["tokens"])
    assert torch.equal(pinned.held_out[0]["tokens"], first.held_out[0]["tokens"])
    if not stream:
        told = [
            json.loads(path.read_text())["source"]["commit"] for path in tmp_path.glob("cache/tokens-*/manifest.json")
        ]
        assert sorted(told) == list(COMMITS)


def test_a_commit_is_of_the_same_dataset_and_of_no_other_revision(hub, tmp_path):
    keep(tmp_path, hub, open_source(hub, 1))
    assert commit_of(tmp_path, hub) == COMMITS[1]
    for other in ({"revision": "v1"}, {"path": "a/c"}, {"subset": "more"}):
        assert commit_of(tmp_path, dataclasses.replace(hub, **other)) == ""
    (tmp_path / DATA).write_text('{"named": 5}')
    assert commit_of(tmp_path, hub) == commit_of(tmp_path / "nowhere", hub) == ""


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
