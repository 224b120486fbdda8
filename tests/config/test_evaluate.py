"""What an evaluation refuses, and what it plans, before torch is imported."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.saved import put_checkpoint, rewrite
from titanfunc.config import PRESETS, DataConfig, checkpoints, hub
from titanfunc.config.evaluate import EvaluateConfig, from_mapping, prepare, unknown_key
from titanfunc.config.recall import RecallConfig, WorldConfig

ROOT = Path(__file__).parents[2]


def make_run(folder, step=5, model=None, **data):
    """A run's folder with a checkpoint whose tensors nobody reads."""
    settings = DataConfig(**{"seq_len": 1000, **data})
    return put_checkpoint(folder, step, model=asdict(model or PRESETS["mac_tiny"]), data=asdict(settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": ""}, "run: wanted latest, or the folder of a run or a checkpoint, got ''"),
        ({"run": 3}, "run: wanted a path, as text, got 3"),
        ({"runs": ["a", 3]}, "runs: wanted a list of folders, got ['a', 3]"),
        ({"runs": "a"}, "runs: wanted a list in brackets, as [a,b], got 'a'"),
        ({"runs": ["a", "a"]}, "runs: wanted each one once, got ['a', 'a']"),
        ({"tasks": ["needle"]}, "tasks: wanted one of mqar, passkey, number, uuid, word, qa1, qa2, qa3, copying, got"),
        ({"lengths": [0]}, "lengths: wanted a list of whole numbers from 1 to 2147483647, got [0]"),
        ({"lengths": [2.5]}, "lengths: wanted a list of whole numbers from 1 to 2147483647, got [2.5]"),
        ({"depths": [1.5]}, "depths: wanted a list of numbers from 0 to 1, got [1.5]"),
        ({"depths": []}, "depths: wanted at least one, got []"),
        ({"pairs": [4, "x"]}, "pairs: wanted a list of whole numbers from 1 to 2147483647, got [4, 'x']"),
        ({"samples": 0}, "samples: wanted a whole number of at least 1, got 0"),
        ({"text_rows": -1}, "text_rows: wanted a whole number of at least 0, got -1"),
        ({"memory": "half"}, "memory: wanted one of both, on, off, got 'half'"),
        ({"device": "gpu"}, "device: wanted auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"compile": "fast"}, "compile: wanted one of auto, inductor, aot_eager, none, got 'fast'"),
        ({"kernels": "fast"}, "kernels: wanted one of reference, triton, got 'fast'"),
        ({"length": [3]}, "length: no such setting; did you mean lengths?"),
    ],
)
def test_refused_when_made(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        from_mapping(changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_lists_become_tuples():
    config = from_mapping({"tasks": ["passkey"], "lengths": [64], "depths": [0, 1]})
    assert config == EvaluateConfig(tasks=("passkey",), lengths=(64,), depths=(0, 1))
    assert unknown_key("xyzzy") == f"xyzzy: no such setting; there are {', '.join(asdict(EvaluateConfig()))}"


def test_the_newest_checkpoint_of_a_run_or_the_one_named(tmp_path):
    first = make_run(tmp_path / "a", 5)
    second = make_run(tmp_path / "a", 9)
    older = make_run(tmp_path / "b", 100)
    os.utime(older / checkpoints.METADATA, (1, 1))
    for name, wanted in ((str(tmp_path / "a"), second), (str(first), first), ("latest", second)):
        (subject,) = prepare(EvaluateConfig(run=name), tmp_path).subjects
        assert (subject.checkpoint, subject.step, subject.name) == (wanted, int(wanted.name[-8:]), "a")
        assert subject.model == PRESETS["mac_tiny"]


def test_defaults_are_what_the_run_was_trained_on(tmp_path):
    make_run(tmp_path / "text")
    make_run(tmp_path / "pairs", task="mqar")
    world = RecallConfig(text_weight=0.5, world=WorldConfig(kinds=("qa2", "qa1")))
    make_run(tmp_path / "world", task="world", recall=world)
    text, pairs, world = (prepare(EvaluateConfig(run=str(tmp_path / n))) for n in ("text", "pairs", "world"))
    assert text.tasks == ("passkey", "number", "uuid", "word") and text.reads_text and text.trained_on_text
    assert text.lengths == (1000, 2000, 4000) and text.out == tmp_path / "text" / "evaluation"
    assert pairs.tasks == ("mqar",) and not pairs.reads_text and not pairs.trained_on_text and pairs.text_rows == 0
    assert world.tasks == ("qa2", "qa1") and world.reads_text and world.trained_on_text
    assert world.data.recall.world.kinds == ("qa2", "qa1")  # a tuple again, after json
    assert pairs.levels("mqar") == (4, 8, 16, 32, 64) and pairs.levels("copying") == (0,)
    assert text.levels("passkey") == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert prepare(EvaluateConfig(run=str(tmp_path / "pairs"), tasks=("passkey",))).reads_text


def test_several_runs_read_what_the_first_was_trained_on(tmp_path):
    make_run(tmp_path / "x" / "one", seed=3)
    make_run(tmp_path / "x" / "two", model=PRESETS["transformer_tiny"], seed=4)
    plan = prepare(EvaluateConfig(runs=(str(tmp_path / "x" / "one"), str(tmp_path / "x" / "two"))), tmp_path)
    assert [subject.name for subject in plan.subjects] == ["one", "two"]
    assert [subject.model.family for subject in plan.subjects] == ["mac", "transformer"]
    assert plan.data.seed == 3
    assert plan.out.parent == tmp_path and plan.out.name.startswith("evaluation_")


def test_names_tell_checkpoints_apart(tmp_path):
    same = [make_run(tmp_path / "run", step) for step in (1, 2)]
    plan = prepare(EvaluateConfig(runs=tuple(map(str, same))), tmp_path)
    assert [subject.name for subject in plan.subjects] == ["run/step_00000001", "run/step_00000002"]
    others = [make_run(tmp_path / folder / "run", 1) for folder in ("a", "b")]
    plan = prepare(EvaluateConfig(runs=tuple(map(str, others))), tmp_path)
    assert [subject.name for subject in plan.subjects] == list(map(str, others))


def refusal(config, root):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (callers compare the message)
        prepare(config, root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_runs_that_are_not_there(tmp_path):
    assert refusal(EvaluateConfig(), tmp_path).startswith(f"run: no run under {tmp_path} has a checkpoint")
    wanted = "wanted latest, or the folder of a run or a checkpoint, got 'nowhere'"
    assert refusal(EvaluateConfig(run="nowhere"), tmp_path) == f"run: {wanted}"
    assert refusal(EvaluateConfig(runs=("nowhere",)), tmp_path) == f"runs: {wanted}"
    (tmp_path / "empty").mkdir()
    message = refusal(EvaluateConfig(run=str(tmp_path / "empty")), tmp_path)
    assert message.startswith("run: wanted a folder that holds a checkpoint, got ")


def test_a_model_that_does_not_read_bytes(tmp_path):
    place = make_run(tmp_path / "a", model=replace(PRESETS["mac_tiny"], vocab_size=300))
    message = refusal(EvaluateConfig(run=str(place)), tmp_path)
    assert message == f"{place}: wanted a model of bytes (256 tokens), got one of 300"


def test_a_checkpoint_of_an_unknown_version(tmp_path):
    place = make_run(tmp_path / "a")
    metadata = checkpoints.read_metadata(place)
    metadata["model"]["novel"] = 3
    rewrite(place, metadata)
    assert refusal(EvaluateConfig(run=str(place)), tmp_path).startswith(f"{place}: model.novel: no such setting")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("passkey",), "lengths": (50,)}, "lengths: wanted at least 82 for passkey, got 50"),
        ({"tasks": ("number", "qa3")}, "lengths: wanted at least 435 for qa3, got 100"),
        ({"tasks": ("mqar",)}, "lengths: wanted at least 255 for mqar of 64 pairs (lower pairs), got 100"),
        ({"tasks": ("copying",), "lengths": (1,)}, "lengths: wanted at least 2 for copying, got 1"),
    ],
)
def test_a_length_too_small_for_its_task(tmp_path, changes, message):
    make_run(tmp_path / "a")
    config = EvaluateConfig(**{"run": str(tmp_path / "a"), "lengths": (100, 4000), **changes})
    assert refusal(config, tmp_path) == message


def test_text_that_is_not_there(tmp_path):
    make_run(tmp_path / "a", corpus="text_folder", path=str(tmp_path / "gone"))
    message = refusal(EvaluateConfig(run=str(tmp_path / "a")), tmp_path)
    assert message.startswith("data.path: wanted a folder that exists, got ")
    assert message.endswith("(as the run was trained; text=FOLDER names another)")
    message = refusal(EvaluateConfig(run=str(tmp_path / "a"), text=str(tmp_path / "no")), tmp_path)
    assert message == f"text: wanted a folder that exists, got {str(tmp_path / 'no')!r}"
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("text")
    plan = prepare(EvaluateConfig(run=str(tmp_path / "a"), text=str(tmp_path / "texts")), tmp_path)
    assert (plan.data.corpus, plan.data.path) == ("text_folder", str(tmp_path / "texts"))


def test_a_result_folder_that_is_a_file(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "file").write_text("")
    message = refusal(EvaluateConfig(run=str(tmp_path / "a"), out=str(tmp_path / "file")), tmp_path)
    assert message.startswith("out: wanted a folder that can be made and ")


def test_no_torch_is_imported():
    code = "import sys, titanfunc.config.evaluate; sys.exit(bool({'torch', 'numpy', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_text_of_the_hub_is_that_of_the_commit_that_the_run_was_begun_on(tmp_path, monkeypatch):
    """What was held out then: a later commit may hold out what the run has learned."""
    monkeypatch.setattr(hub, "reachable", lambda: True)
    make_run(tmp_path / "one", corpus="hub", path="a/b", cache_dir=str(tmp_path / "cache"))
    about = {"named": ["hub", "a/b", "", ""], "commit": "1234"}
    assert prepare(EvaluateConfig(), tmp_path).data.revision == ""
    (tmp_path / "one" / "data.json").write_text(json.dumps(about))
    assert prepare(EvaluateConfig(), tmp_path).data.revision == "1234"
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(ValueError, match=r"^data\.path: wanted a folder laid out .*text=FOLDER names another\)$"):
        prepare(EvaluateConfig(), tmp_path)
