"""A mistake is told in one line, before torch is imported, and leaves no trace."""

from dataclasses import asdict

import pytest

from tests.saved import NO_TENSORS, put_checkpoint
from tests.scripts.conftest import ROOT
from titanfunc.config import PRESETS, checkpoints

MISTAKES = {
    "unknown key": (["model.layrs=3"], "model.layrs: no such setting; did you mean model.layers?"),
    "unknown key, appended": (["+train.foo=1"], "train.foo: no such setting; train has steps, "),
    "unknown section": (["+foo=1"], "foo: no such setting; they begin with model., data., optim., train."),
    "unknown group": (["modle=mac_tiny"], "modle: no such setting; did you mean model?"),
    "unknown choice": (["model=mac_huge"], "model=mac_huge: no such choice; wanted FAMILY_SIZE or "),
    "no equals sign": (["train.steps"], "'train.steps': cannot be read; settings are written as group.name=value"),
    "open bracket": (["optim.betas=[0.9"], "'optim.betas=[0.9': cannot be read"),
    "dashes": (["--train.steps=3"], "--train.steps=3: settings are written without dashes"),
    "a sweep without its flag": (["optim.lr=1e-3,1e-4"], "optim.lr: wanted one value, got '1e-3,1e-4'; several"),
    "a sweep of choices, one of them unknown": (["-m", "model=mac_tiny,foo"], "model=foo: no such choice; "),
    "a value of another type": (["model.layers=abc"], "model.layers: wanted a whole number, got 'abc'"),
    "a value out of range": (["train.steps=0"], "train.steps: wanted a whole number of at least 1, got 0"),
    "heads": (["model.heads=3"], "model.heads: wanted a divisor of dim = 128, got 3"),
    "vocabulary": (["model.vocab_size=300"], "model.vocab_size: wanted 256, as data.tokenizer=bytes has"),
    "no corpus path": (["data=text_folder"], "data.path: wanted the folder of .txt files to read"),
    "a corpus path that is not there": (["data=text_folder", "data.path=nowhere"], "data.path: wanted a folder that"),
    "a recall row too short": (
        ["data=needle", "data.seq_len=256"],
        "data.seq_len: wanted at least 540, for data.task=",
    ),
    "a recall kind": (
        ["data.recall.needle.kinds=[pin]"],
        "data.recall.needle.kinds: wanted a list of some of passkey, ",
    ),
    "nothing to resume": (["train.resume=latest"], "train.resume: no run under "),
    "a checkpoint that is not there": (["train.resume=nowhere"], "train.resume: wanted latest, or the folder of"),
    "device": (["train.device=gpu"], "train.device: wanted auto, cpu, cuda or cuda:N, got 'gpu'"),
    "interpolation": (["model.layers=${nowhere}"], "model.layers: wanted a setting that is there "),
}


def check(result, message):
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert result.out == ""
    assert result.status == 2
    assert result.seconds < 3


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(script, tmp_path, name):
    settings, message = MISTAKES[name]
    check(script(*settings), message)
    if "-m" not in settings:  # a sweep leaves hydra's record of itself
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def other_run(tmp_path):
    return put_checkpoint(tmp_path / "runs" / "other", 5, model=asdict(PRESETS["transformer_tiny"]))


def test_a_checkpoint_of_another_model(script, tmp_path, other_run):
    before = sorted(tmp_path.rglob("*"))
    message = (
        "runs/other/checkpoints/step_00000005 is of another model: model.family is 'transformer' there and 'mac' here"
    )
    check(script("train.resume=latest"), message)
    assert sorted(tmp_path.rglob("*")) == before
    assert (other_run / checkpoints.TENSORS).read_bytes() == NO_TENSORS


def test_a_folder_that_is_taken(script, tmp_path, other_run):
    check(script("train.run_dir=runs/other"), "train.run_dir: runs/other already holds something; ")
    assert [path.name for path in (tmp_path / "runs" / "other").iterdir()] == ["checkpoints"]


def test_no_torch_before_the_checks(script):
    result = script("train.resume=latest", python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in result.err.splitlines() if line.startswith("import time")}
    assert "hydra" in imported
    assert "titanfunc.config.runs" in imported
    assert not imported & {"torch", "numpy", "datasets", "matplotlib"}


def test_hydras_own_flags(script, tmp_path):
    shown = script("--cfg", "job", "optim.lr=0.5")
    assert shown.status == 0
    assert "lr: 0.5" in shown.out
    helped = script("--help")
    assert helped.status == 0
    assert "model: base, lmm_168m" in helped.out
    names = sorted(path.stem for path in (ROOT / "conf" / "data").glob("*.yaml"))
    assert f"data: {', '.join(names)}" in helped.out
    assert "3 losses or gradients not finite" in helped.out
    assert list(tmp_path.iterdir()) == []
