"""scripts/compare.py from the command line: mistakes in one line, a comparison, and its continuation."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from tests.scripts.test_mistakes import check
from titanfunc.config import TrainConfig
from titanfunc.config.compare import TRAIN, CompareConfig

CONF = Path(__file__).parents[2] / "conf"
MISTAKES = {
    "unknown key": (["seed=[1]"], "seed: no such setting; did you mean seeds?"),
    "unknown key, appended": (["+foo=1"], "foo: no such setting; there are optims, entries, "),
    "a setting of training alone": (["train.resume=latest"], "train.resume: no such setting; "),
    "one optimizer as in training": (["optim=adamw"], "optim: no such setting; did you mean optims?"),
    "unknown optimizer": (["optims=[adamw,foo]"], "optims: wanted some of adamw"),
    "unknown model": (["model=mac_huge"], "model=mac_huge: no such choice; wanted FAMILY_SIZE or "),
    "no equals sign": (["seeds"], "'seeds': cannot be read; settings are written as name=value, as seeds=[0,1,2]"),
    "dashes": (["--seeds=[1]"], "--seeds=[1]: settings are written without dashes, as seeds=[0,1,2]"),
    "no list": (["seeds=3"], "seeds: wanted a list in brackets, as [a,b], got 3"),
    "the tuning seed is reported": (["seeds=[100]"], "tune_seed: wanted a seed that is not among seeds = [100]"),
    "an optimizer's setting": (
        ["entries=[{optim:adamw,settings:{eps:0}}]"],
        "entries: adamw: optim.eps: wanted a positive number, got 0",
    ),
    "unequal budgets": (
        ["entries=[{name:A,optim:adamw,lrs:[1e-3]},{optim:adamw}]"],
        "entries: wanted as many lrs for each, got 1 for A and 3 for adamw",
    ),
    "out of range": (["model.layers=0"], "model.layers: wanted a whole number of at least 1, got 0"),
    "no corpus": (["data=text_folder"], "data.path: wanted the folder of .txt files to read"),
}
TINY = [
    "model=transformer_tiny", "model.dim=16", "model.layers=1", "model.heads=2", "model.ff=16", "model.seq_len=32",
    "data=mqar", "data.recall.mqar.min_pairs=2", "data.recall.mqar.max_pairs=4", "data.batch_size=2", "train.steps=2",
    "train.log_every=1", "train.eval_every=1", "train.eval_batches=1", "train.device=cpu", "train.compile=none",
]  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(script, tmp_path, name):
    settings, message = MISTAKES[name]
    check(script(*settings, name="compare"), message)
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_and_its_continuation(script, tmp_path):
    entries = "entries=[{optim:adamw},{name:'no decay',optim:adamw,settings:{weight_decay:0}}]"
    first = script(*TINY, entries, "lr_factors=[1,2]", "seeds=[0]", "out=mine", name="compare")
    assert (first.status, first.err) == (0, "")
    names = {"comparison.yaml", "runs.jsonl", "summary.jsonl", "table.md", "curves.png"}
    assert {path.name for path in (tmp_path / "mine").iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    lines = (tmp_path / "mine" / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["optimizer"] for line in lines] == ["adamw"] * 3 + ["no decay"] * 3
    assert "transformer_tiny: 2 optimizers, 2 steps, 1 seed" in first.out
    more = script(*TINY, entries, "lr_factors=[1,2]", "seeds=[0,1]", "out=mine", name="compare")
    assert (more.status, more.err) == (0, "")
    assert "6 are there already and are kept" in more.out
    after = (tmp_path / "mine" / "runs.jsonl").read_text().splitlines()
    assert after[:6] == lines and [json.loads(line)["seed"] for line in after[6:]] == [1, 1]
    check(script(*TINY, entries, "seeds=[0]", "out=mine", "data.seed=3", name="compare"), "out: mine holds runs with ")


def test_no_torch_before_the_checks(script):
    result = script("seeds=[100]", python=("-X", "importtime"), name="compare")
    imported = {line.rpartition("|")[2].strip() for line in result.err.splitlines() if line.startswith("import time")}
    assert {"hydra", "titanfunc.config.compare"} <= imported
    assert not imported & {"torch", "numpy", "datasets", "matplotlib"}


def test_the_yaml_file_and_the_dataclasses_say_the_same():
    given = yaml.safe_load((CONF / "compare.yaml").read_text())
    own = {field.name: getattr(CompareConfig(), field.name) for field in dataclasses.fields(CompareConfig)}
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
    assert {name: given[name] for name in own} == own
    assert set(given) == {*own, "defaults", "train", "hydra"}
    wanted = {name: getattr(TrainConfig(), name) for name in TRAIN}
    assert given["train"] == {**wanted, "eval_every": 25}  # ten points of a curve


def test_hydras_own_flags(script, tmp_path):
    shown = script("--cfg", "job", "tune_seed=7", name="compare")
    assert shown.status == 0 and "tune_seed: 7" in shown.out
    assert list(tmp_path.iterdir()) == []
