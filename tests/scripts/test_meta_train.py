"""scripts/meta_train.py from the command line: mistakes in one line, and a run from its settings to its weights."""

import json

import pytest
import yaml

from tests.scripts.test_conf import read
from tests.scripts.test_mistakes import check
from titanfunc.config.meta import MetaConfig, from_mapping

MISTAKES = {
    "unknown key": (["task=[quadratic]"], "task: no such setting; did you mean tasks?"),
    "unknown key, appended": (["+foo=1"], "foo: no such setting; there are optimizer, start, "),
    "no equals sign": (["steps"], "'steps': cannot be read; settings are written as name=value, as steps=500"),
    "dashes": (["--steps=3"], "--steps=3: settings are written without dashes, as steps=500"),
    "no list": (["tasks=quadratic"], "tasks: wanted a list in brackets, as [a,b], got 'quadratic'"),
    "no task": (["tasks=[]"], "tasks: wanted at least one, got []"),
    "unknown task": (["tasks=[cubic]"], "tasks: wanted one of quadratic, regression, classification, got 'cubic'"),
    "a task twice": (["tasks=[quadratic,quadratic]"], "tasks: wanted each one once, got ['quadratic', 'quadratic']"),
    "unknown optimizer": (["optimizer=adam"], "optimizer: wanted one of small_fc_lopt, velo_mlp, got 'adam'"),
    "another type": (["steps=many"], "steps: wanted a whole number of at least 1, got 'many'"),
    "out of range": (["steps=0"], "steps: wanted a whole number of at least 1, got 0"),
    "a rate of nothing": (["lr=0"], "lr: wanted a positive number, got 0"),
    "an unroll too long": (["unroll=11", "horizon=10"], "unroll: wanted at most horizon = 10 steps, got 11"),
    "too long": (["horizon=200000"], "horizon: wanted at most 100,000 steps, got 200000"),
    "weights that are not there": (["start=nowhere.pt"], "start: wanted a file of weights, got 'nowhere.pt'"),
    "device": (["device=gpu"], "device: wanted auto, cpu, cuda or cuda:N, got 'gpu'"),
    "compile": (["compile=gcc"], "compile: wanted one of auto, inductor, aot_eager, none, got 'gcc'"),
}
TINY = ["tasks=[quadratic]", "tasks_at_once=2", "held_out=2", "unroll=2", "horizon=4", "eval_every=2", "device=cpu"]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(script, tmp_path, name):
    settings, message = MISTAKES[name]
    result = script(*settings, name="meta_train")
    check(result, message)
    assert list(tmp_path.iterdir()) == []


def test_the_yaml_says_what_the_dataclass_says():
    given = {name: value for name, value in read("meta_train.yaml").items() if name not in ("defaults", "hydra")}
    assert from_mapping(given) == MetaConfig()
    assert list(given) == list(vars(MetaConfig()))


def test_a_folder_that_is_taken(script, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    check(script("out=mine", name="meta_train"), "out: wanted a folder that is new or empty, got 'mine'")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"


def test_no_torch_before_the_checks(script):
    result = script("start=nowhere", python=("-X", "importtime"), name="meta_train")
    imported = {line.rpartition("|")[2].strip() for line in result.err.splitlines() if line.startswith("import time")}
    assert {"hydra", "titanfunc.config.meta"} <= imported
    assert not imported & {"torch", "numpy", "datasets", "matplotlib"}


def test_from_settings_to_weights_and_on_from_them(script, tmp_path):
    """A run that goes on from weights begins where they were."""
    done = script(*TINY, "steps=3", "out=one", name="meta_train")
    assert (done.status, done.err) == (0, "")
    assert "3 meta-steps in" in done.out and "untrained" in done.out
    files = {"config.yaml", "meta_loss.png", "metrics.jsonl", "weights.safetensors"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == files
    assert (tmp_path / "one" / "meta_loss.png").read_bytes()[:4] == b"\x89PNG"
    assert yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["horizon"] == 4
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert ["quadratic/held_out" in row for row in rows] == [True, False, True, True]
    assert all("quadratic/objective" in row for row in rows[1:])

    weights = str(tmp_path / "one" / "weights.safetensors")
    done = script(*TINY, "steps=1", "out=two", f"start={weights}", name="meta_train")
    assert (done.status, done.err) == (0, "")
    first = json.loads((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["quadratic/held_out"] == rows[-1]["quadratic/held_out"]

    refused = script(*TINY, "optimizer=velo_mlp", f"start={weights}", name="meta_train")
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert refused.err.startswith(f"error: start: {weights} is of no velo_mlp (network: input.weight: wanted [30, 32]")
