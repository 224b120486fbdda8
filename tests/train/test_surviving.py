"""What ends a run early is told in one line, with a status of its own, and loses nothing."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

from titanfunc import job, report, tree
from titanfunc.config import ModelConfig, experiment, runs
from titanfunc.config.failures import NO_DATA, NO_MEMORY, NOT_FINITE, NOT_WRITTEN, NoData, tell
from titanfunc.config.lock import RunTaken
from titanfunc.data.stream import StreamBatches
from titanfunc.train import checkpoint
from titanfunc.train.metrics import MetricsFile, read_rows
from titanfunc.train.saver import Saver

SETTINGS = {
    "model": {
        "preset": "mac_tiny", "dim": 16, "layers": 1, "heads": 2, "ff": 32, "seq_len": 32,
        "memory": {"head_dim": 8, "hidden": 8, "chunk_size": 8}, "mac": {"segment": 16},
    },
    "data": {"corpus": "text_folder", "path": "texts", "batch_size": 2, "validation_fraction": 0.5},
    "train": {
        "steps": 6, "log_every": 1, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 2, "sample_tokens": 4,
        "compile": "none", "device": "cpu", "run_dir": "mine", "max_skipped": 3,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"This is text {name}, of some length. " * 20)
    return tmp_path


def assemble(**train):
    settings = experiment.from_mapping({**SETTINGS, "train": {**SETTINGS["train"], **train}})
    return job.assemble(settings, runs.prepare(settings))


def again():
    """The run taken up where it was left; its losses by step."""
    assert job.run(assemble(resume="mine")) == 0
    return {row["step"]: row["loss"] for row in read_rows("mine/metrics.jsonl") if "loss" in row}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    here = os.getcwd()
    (place / "texts").mkdir()
    for name in ("one", "two"):
        (place / "texts" / f"{name}.txt").write_text(f"This is text {name}, of some length. " * 20)
    os.chdir(place)
    try:
        assert job.run(assemble()) == 0
        return {row["step"]: row["loss"] for row in read_rows("mine/metrics.jsonl") if "loss" in row}
    finally:
        os.chdir(here)


@pytest.fixture
def ends(capsys):
    """Runs to an early end, and returns the status and the one line on stderr."""

    def call(parts):
        status = job.run(parts)
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1 and "Traceback" not in told
        return status, told

    return call


def feeding(parts, batch):
    """The parts, their batches made by ``batch(step, batches)``."""
    own = parts.source.batches
    return parts._replace(source=parts.source._replace(batches=lambda step: batch(step, own)))


FULL = OSError(errno.ENOSPC, "No space left on device")


def wait_for_saves():
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def test_a_file_that_vanishes_costs_nothing_but_the_rest(folder, ends, undisturbed):
    shard = folder / "shard"
    shard.write_text("tokens")

    def batch(step, own):
        if step == 3:
            shard.unlink()
        shard.read_text()
        return own(step)

    status, told = ends(feeding(assemble(), batch))
    assert status == NO_DATA
    assert f"the batch of step 4: [Errno 2] No such file or directory: '{shard}'" in told
    assert "; step 3 is saved: go on from there with train.resume=mine" in told
    assert [row["step"] for row in read_rows("mine/metrics.jsonl")] == [1, 2, 3]
    assert again() == undisturbed


def test_the_steps_since_the_last_reading_are_told_when_data_end(ends):
    def batch(step, own):
        if step == 5:
            raise EOFError
        return own(step)

    status, told = ends(feeding(assemble(log_every=3, checkpoint_every=0), batch))
    assert (status, "the batch of step 6: the data are exhausted" in told) == (NO_DATA, True)
    assert [row["step"] for row in read_rows("mine/metrics.jsonl")] == [1, 3, 5]
    assert runs.checkpoints(Path("mine"))[-1].name == "step_00000005"


def test_files_that_cannot_be_read_at_the_start(monkeypatch):
    monkeypatch.setattr(job, "open_source", lambda *_, **__: Path("texts/gone").read_text())
    with pytest.raises(NoData, match="No such file or directory: 'texts/gone'"):
        assemble()


def test_a_read_that_times_out_is_no_file_that_cannot_be_written(ends):
    def evaluate(params):
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    status, told = ends(assemble(eval_every=3)._replace(evaluate=evaluate))
    assert (status, told.partition(";")[0]) == (NO_DATA, "error: Connection timed out")


@pytest.mark.parametrize(
    ("name", "wanted"), [("open_source", "by data.cache_dir, or cut the lo"), ("init_state", "lower model.dim, ")]
)
def test_too_little_memory_before_the_first_step(monkeypatch, capsys, name, wanted):
    def fails(*_, **__):
        raise MemoryError("much too much")

    monkeypatch.setattr(job, name, fails)
    with pytest.raises(MemoryError) as raised:
        assemble()
    assert tell(raised.value) == NO_MEMORY
    told = capsys.readouterr().err
    assert told.startswith("error: much too much; ") and wanted in told and "batch_size" not in told


def test_a_cache_that_cannot_be_written_is_no_data_that_cannot_be_read(monkeypatch):
    def fails(*_, **__):
        raise FULL

    monkeypatch.setattr(job, "open_source", fails)
    with pytest.raises(OSError, match="No space left") as raised:
        assemble()
    assert tell(raised.value) == NOT_WRITTEN


def test_too_little_memory_says_what_to_lower(ends, undisturbed):
    parts = assemble()

    def step(state, batch):
        if int(state.step) == 3:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 GiB. And so on."
            )
        return parts.step(state, batch)

    status, told = ends(parts._replace(step=step))
    assert status == NO_MEMORY
    assert "CUDA out of memory. Tried to allocate 20.00 MiB; lower data.batch_size" in told
    assert "model.remat=layer" in told and "train.accumulate" in told
    assert "step 2 is saved" in told and "so on" not in told
    assert again() == undisturbed


def test_a_full_disk_while_a_checkpoint_is_written(ends, monkeypatch, undisturbed):
    sync, full = os.fsync, []

    def fails(handle):
        if full:
            raise FULL
        sync(handle)

    monkeypatch.setattr(os, "fsync", fails)

    parts = assemble()

    def step(state, batch):
        if int(state.step) == 3:
            wait_for_saves()  # step 2's, which has room
            full.append(True)
        return parts.step(state, batch)

    status, told = ends(parts._replace(step=step))
    assert status == NOT_WRITTEN
    assert told.endswith(
        "step_00000004 could not be saved (No space left on device); step 2 is saved: go on from there with "
        "train.resume=mine\n"
    )
    monkeypatch.setattr(os, "fsync", sync)
    assert again() == undisturbed


@pytest.mark.parametrize("failing", [(2,), (2, 3)])
def test_a_save_that_fails_costs_no_later_state(ends, monkeypatch, undisturbed, failing):
    parts = assemble(checkpoint_every=2)
    real = checkpoint.write

    def write(run_dir, step, *rest):
        if step in failing:
            raise FULL
        return real(run_dir, step, *rest)

    def step(state, batch):
        wait_for_saves()
        return parts.step(state, batch)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", write)
        status, told = ends(parts._replace(step=step))
    assert status == NOT_WRITTEN
    assert "step_00000002 could not be saved (No space left on device)" in told
    if failing == (2,):
        assert "step 3 is saved: go on from there" in told, "told at the next row, which is saved"
        assert again() == undisturbed
    else:
        assert "no checkpoint was saved" in told


def test_a_save_that_fails_once_it_is_in_its_place_is_told_as_saved(ends, monkeypatch, undisturbed):
    """The disk is full when ``latest`` is moved; the second try moves it."""
    failed, real = [], checkpoint.replace_text

    def fails_once(path, text):
        if not failed and "step_00000004" in text:
            failed.append(path)
            raise FULL
        real(path, text)

    monkeypatch.setattr(checkpoint, "replace_text", fails_once)
    parts = assemble(checkpoint_every=4)

    def step(state, batch):
        wait_for_saves()
        return parts.step(state, batch)

    status, told = ends(parts._replace(step=step))
    assert status == NOT_WRITTEN and [path.name for path in failed] == ["latest"]
    assert "step_00000004 is saved, but may not be named as the newest (No" in told
    assert "step 5 is saved: go on from there" in told
    assert again() == undisturbed


def test_a_second_try_names_the_newest(monkeypatch, tmp_path):
    failed, real = [], checkpoint.replace_text

    def fails_once(path, text):
        if not failed:
            failed.append(path)
            raise FULL
        real(path, text)

    monkeypatch.setattr(checkpoint, "replace_text", fails_once)
    with Saver(tmp_path, ModelConfig()) as saver:
        saver.save(1, {"w": torch.ones(2)})
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001\n"


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(monkeypatch, undisturbed):
    real, real_close, closing, unheld = checkpoint.write, Saver.close, threading.Event(), []

    def write(run_dir, step, *rest):
        if step == 6:
            assert closing.wait(60), "the loop is over"
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run_dir, step, *rest)

    def close(saver):
        closing.set()
        real_close(saver)

    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr(Saver, "close", close)
    before = signal.signal(signal.SIGTERM, lambda *_: unheld.append(True))
    try:
        assert job.run(assemble()) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not unheld
    assert runs.latest(Path("mine")).name == "step_00000006"
    assert Path("mine/curves.png").is_file()


def test_a_last_save_that_fails_once_is_tried_again(monkeypatch, capsys, undisturbed):
    real, tried = checkpoint.write, []

    def write(run_dir, step, *rest):
        tried.append(step)
        if tried.count(6) == 1:
            raise FULL
        return real(run_dir, step, *rest)

    monkeypatch.setattr(checkpoint, "write", write)
    assert job.run(assemble()) == 0
    assert tried == [2, 4, 6, 6]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("warning: ") and "saved at the second try" in told
    assert runs.latest(Path("mine")).name == "step_00000006"


class FullAfterThree(MetricsFile):
    """A metrics file whose disk is full from the fourth row on: /dev/full is the kernel's own."""

    def write(self, step, values):
        if step == 4:
            self._file.close()
            self._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
        super().write(step, values)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' /dev/full")
def test_a_full_disk_while_metrics_are_written(ends, monkeypatch, undisturbed):
    with monkeypatch.context() as patched:
        patched.setattr(job, "MetricsFile", FullAfterThree)
        status, told = ends(assemble())
    assert status == NOT_WRITTEN
    assert told == (
        "error: mine/metrics.jsonl: No space left on device; step 4 is saved: go on from there with train.resume=mine\n"
    )
    assert again() == undisturbed, "the row that had no room too"
    assert len(read_rows("mine/metrics.jsonl")) == len(undisturbed) + 1, "each once, and one of the validation"


def test_half_a_row_is_taken_back(tmp_path):
    """A disk has room for half of the second row: nothing of it is there then, nor before the third."""
    rows = MetricsFile(tmp_path / "metrics.jsonl")
    rows.write(1, {"loss": 1.0})
    whole, limits = (tmp_path / "metrics.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            rows.write(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    rows.write(3, {"loss": 3.0})
    rows.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' /dev/full")
@pytest.mark.parametrize("before", ["", "killed"])
def test_a_row_that_had_no_room_is_of_its_whole_interval_and_is_written_once(ends, folder, monkeypatch, capsys, before):
    settings = {"steps": 12, "log_every": 4, "eval_every": 4, "checkpoint_every": 0}
    assert job.run(assemble(run_dir="straight", **settings)) == 0
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(job, "MetricsFile", FullAfterThree)
        assert ends(assemble(**settings))[0] == NOT_WRITTEN
    if before:  # after it has written the row, and with no later checkpoint

        def batch(step, own):
            raise ZeroDivisionError

        monkeypatch.setattr(Saver, "save", lambda *_: None)
        with pytest.raises(ZeroDivisionError):
            job.run(feeding(assemble(resume="mine", **settings), batch))
        monkeypatch.undo()
        monkeypatch.chdir(folder)
    assert job.run(assemble(resume="mine", **settings)) == 0
    rows = [
        [(row["step"], row.get("loss"), row.get("validation_loss")) for row in read_rows(f"{name}/metrics.jsonl")]
        for name in ("straight", "mine")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_that_is_to_end_where_it_was_stopped_has_its_last_rows(monkeypatch, steps):
    """Step 4 has been validated when the run is stopped, step 3 has not."""
    settings = {"log_every": 5, "eval_every": 2, "checkpoint_every": 0}
    assert job.run(assemble(run_dir="straight", steps=steps, **settings)) == 0
    parts = assemble(steps=9, **settings)

    def step(state, batch):
        if int(state.step) == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return parts.step(state, batch)

    assert job.run(parts._replace(step=step)) == 128 + signal.SIGTERM
    assert job.run(assemble(resume="mine", steps=steps, **settings)) == 0
    rows = [
        {(row["step"], "loss" in row, "validation_loss" in row) for row in read_rows(f"{name}/metrics.jsonl")}
        for name in ("straight", "mine")
    ]
    assert rows[0] == rows[1] and len(read_rows("mine/metrics.jsonl")) == len(rows[1])


def test_a_full_disk_at_the_start_leaves_the_settings_of_before(ends, monkeypatch):
    assert job.run(assemble(steps=2)) == 0
    before = Path("mine/config.yaml").read_text()

    def fails(handle):
        raise FULL

    monkeypatch.setattr(os, "fsync", fails)
    status, told = ends(assemble(resume="mine"))
    assert (status, told.partition(";")[0]) == (NOT_WRITTEN, "error: mine/config.yaml: No space left on device")
    assert Path("mine/config.yaml").read_text() == before
    assert not list(Path("mine").glob("*.writing"))


@pytest.mark.parametrize("name", ["sample.txt", "curves.png"])
def test_a_full_disk_at_the_end(ends, monkeypatch, name):
    write = job.write_text

    def fails(*arguments):
        if name == "curves.png" or arguments[0].name == name:
            raise OSError(errno.ENOSPC, "No space left on device", f"mine/{name}")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(*(report, "plot_curves") if name == "curves.png" else (job, "write_text"), fails)
        status, told = ends(assemble())
    assert status == NOT_WRITTEN
    assert told.startswith(f"error: mine/{name}: No space left on device; all 6 steps are done, and ")
    assert "step_00000006 is saved" in told
    before = Path("mine/metrics.jsonl").read_text()
    again()
    assert Path("mine/metrics.jsonl").read_text() == before
    assert Path("mine/sample.txt").is_file() and Path("mine/curves.png").is_file()
    with pytest.raises(ValueError, match="wanted more than the 6 steps"):
        assemble(resume="mine")


def test_a_run_goes_on_with_its_own_tokenizer_alone(folder):
    made = {**SETTINGS["data"], "corpus": "files", "cache_dir": "kept", "tokenizer": "bpe", "bpe_size": 260}
    rows = [{"text": f"{word} and so on, for a while. " * 30} for word in ("apples", "pears", "quinces", "figs")]
    for name in ("there", "elsewhere"):
        (folder / name).mkdir()
        (folder / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [{"text": row["text"].replace("and so on", "xyzzy xyzzy")} for row in rows]

    def put_together(path, **train):
        data = {**made, "path": path}
        model = {**SETTINGS["model"], "vocab_size": 260}
        train = {**SETTINGS["train"], "sample_prompt": "and", **train}
        settings = experiment.from_mapping({"model": model, "data": data, "train": train})
        return job.assemble(settings, runs.prepare(settings))

    assert job.run(put_together("there")) == 0
    assert (folder / "mine" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match=r"^data\.tokenizer: wanted that of the run, .*tokenizer\.json, got bpe"):
        put_together("elsewhere", resume="mine", steps=8)
    assert job.run(put_together("there", resume="mine", steps=8)) == 0


def test_a_run_goes_on_with_its_own_texts_wherever_it_is_called_from(folder, monkeypatch):
    assert job.run(assemble(steps=1, sample_tokens=0)) == 0
    record = Path("mine/data.json").read_text()
    other = folder / "other"
    (other / "texts").mkdir(parents=True)
    for name in ("one", "two"):
        (other / "texts" / f"{name}.txt").write_text("Something else altogether. " * 30)
    monkeypatch.chdir(other)
    for run_dir in ("", "fork"):
        with pytest.raises(
            ValueError, match=rf"^data\.path: wanted the texts that the run began with, {folder}/texts \("
        ):
            assemble(resume=str(folder / "mine"), run_dir=run_dir)
    assert (folder / "mine" / "data.json").read_text() == record
    shutil.rmtree("texts")
    shutil.copytree(folder / "texts", "texts")
    assert assemble(resume=str(folder / "mine"), run_dir="").place.resumes


@pytest.mark.parametrize("prompt", [" ", "a\0b", "\udcff"])
def test_a_prompt_of_no_tokens_is_refused_before_the_first_step(folder, prompt):
    if prompt == " ":
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "text": 1, "?": 2}, "?"))
        library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        library.save("words.json")
    tokenizer = "words.json" if prompt == " " else "bytes"
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "tokenizer": tokenizer}}
    settings["train"] = {**SETTINGS["train"], "sample_prompt": prompt}
    made = experiment.from_mapping(settings)
    with pytest.raises(ValueError, match=r"^train\.sample_prompt: wanted a text "):
        job.assemble(made, runs.prepare(made))
    without = dataclasses.replace(made, train=dataclasses.replace(made.train, sample_tokens=0))
    job.assemble(without, runs.prepare(without))


def test_a_new_run_that_another_process_has_begun_meanwhile(folder):
    parts = assemble()
    (folder / "mine").mkdir()
    with (folder / "mine" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunTaken, match="wanted a run that no other process trains, got mine"):
            job.run(parts)
    assert [path.name for path in (folder / "mine").iterdir()] == ["lock"]
    assert job.run(parts) == 0


def test_a_file_in_the_folders_place(folder, ends):
    parts = assemble()
    (folder / "mine").write_text("a file")
    status, told = ends(parts)
    assert (status, told) == (NOT_WRITTEN, "error: mine: File exists; no checkpoint was saved\n")
    assert (folder / "mine").read_text() == "a file"


def weighted(step, own):
    weight = float("nan") if step >= 2 else 1.0
    return {**own(step), "weights": torch.full((2, 32), weight)}


def with_documents(source, documents):
    fields = {name: getattr(source, name) for name in (*source._fields, "bytes_per_token")}
    return SimpleNamespace(**{**fields, "documents": documents})


def test_steps_that_are_not_finite_name_their_documents(ends):
    def documents(step):
        return [f"{name} of {step}" for name in "abcdefg"]

    parts = feeding(assemble(), weighted)
    status, told = ends(parts._replace(source=with_documents(parts.source, documents)))
    assert status == NOT_FINITE
    assert "step 5: loss or gradient not finite 3 steps in a row" in told
    said = "; step 3, the first of them, read a of 2, b of 2, c of 2, d of 2, e of 2 and 2 more: all are in mine/not_"
    assert "step 5 is saved: go on from there with train.resume=mine" + said in told
    rows = json.loads(Path("mine/not_finite.json").read_text())["skipped"]
    assert [row["step"] for row in rows] == [3, 4, 5]
    assert rows[1]["documents"] == documents(3)
    metrics = read_rows("mine/metrics.jsonl")
    assert [row["skipped"] for row in metrics] == [0, 0, 1, 2, 3]
    assert metrics[-1]["loss"] is None


def test_steps_that_are_not_finite_are_traced_to_the_files(ends):
    parts = feeding(assemble(), weighted)
    status, told = ends(parts)
    assert status == NOT_FINITE
    rows = json.loads(Path("mine/not_finite.json").read_text())["skipped"]
    assert [row["documents"] for row in rows] == [list(parts.source.documents(step)) for step in (2, 3, 4)]
    assert all(row["documents"] for row in rows)
    assert rows[0]["documents"][0] in told


def test_documents_that_cannot_be_named_leave_the_line_as_it_is(ends):
    def documents(step):
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    parts = feeding(assemble(), weighted)
    status, told = ends(parts._replace(source=with_documents(parts.source, documents)))
    assert status == NOT_FINITE
    assert "step 5: loss or gradient not finite 3 steps in a row" in told and "step 5 is saved" in told
    assert told.endswith("; the documents of these steps cannot be named ([Errno 110] Connection timed out)\n")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streams_documents_are_named_without_reading_it_again(folder, ends, monkeypatch, workers):
    rows = [{"text": f"This is row {number}, of some length, and then some more of it. " * 2} for number in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"corpus": "files", "path": "rows.jsonl", "stream": True, "batch_size": 2, "workers": workers}
    train = {**SETTINGS["train"], "steps": 30, "log_every": 10, "checkpoint_every": 0}
    settings = experiment.from_mapping({**SETTINGS, "data": data, "train": train})
    parts = job.assemble(settings, runs.prepare(settings))
    wanted = {step + 1: (parts.source.batches(step), parts.source.documents(step))[1] for step in range(12, 18)}
    begun = []
    monkeypatch.setattr(StreamBatches, "_begin", lambda self, real=StreamBatches._begin: (begun.append(1), real(self)))
    parts = job.assemble(settings, runs.prepare(settings))
    status, told = ends(feeding(parts, lambda step, own: weighted(step if 12 <= step < 18 else 0, lambda _: own(step))))
    assert status == NOT_FINITE and "step 18: loss or gradient not finite 6 steps in a row" in told
    found = json.loads(Path("mine/not_finite.json").read_text())["skipped"]
    assert {row["step"]: row["documents"] for row in found} == wanted
    assert len({name for names in wanted.values() for name in names}) > 3
    assert len(begun) == 1, "this process has read nothing again"


def test_steps_that_are_not_finite_leave_the_state_of_before(ends):
    parts = feeding(assemble(), weighted)
    before = []

    def step(state, batch):
        if int(state.step) == 2:
            before.extend(leaf.clone() for leaf in tree.leaves((state.params, state.opt_state)))
        return parts.step(state, batch)

    status, told = ends(parts._replace(step=step, source=with_documents(parts.source, None)))
    assert status == NOT_FINITE and "a smaller optim.lr may do" in told
    saved = assemble(resume="mine").state
    assert (int(saved.step), int(saved.skipped), int(saved.skipped_in_row)) == (5, 3, 3)
    after = tree.leaves((saved.params, saved.opt_state))
    assert len(after) == len(before) and all(torch.equal(*both) for both in zip(after, before, strict=True))


def test_an_error_of_the_program_keeps_its_traceback():
    def batch(step, own):
        raise ZeroDivisionError("of the code")

    with pytest.raises(ZeroDivisionError, match="of the code"):
        job.run(feeding(assemble(), batch))
