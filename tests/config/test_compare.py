"""What a comparison refuses, and what it plans, before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from titanfunc.config import OptimConfig
from titanfunc.config.compare import prepare, to_mapping, unknown_key

ROOT = Path(__file__).parents[2]
TREE = {"model": {"preset": "mac_tiny"}, "data": {"task": "mqar"}, "train": {"steps": 10}}
FILES = {"adamw": {"name": "adamw", "lr": 2e-3}, "slow": {"name": "adamw", "lr": 1e-4, "betas": [0.9, 0.99]}}


def plan(tmp_path=Path("nowhere"), **own):
    return prepare({**TREE, **own}, FILES.__getitem__, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optims": []}, "optims: wanted at least one, got []"),
        ({"optims": "adamw"}, "optims: wanted a list in brackets, as [a,b], got 'adamw'"),
        ({"optims": ["adamw", "adamw"]}, "optims: wanted each one once, got ['adamw', 'adamw']"),
        ({"seeds": []}, "seeds: wanted a list of whole numbers from 0 to 9223372036854775807, got []"),
        ({"seeds": [1, 1]}, "seeds: wanted each one once, got [1, 1]"),
        ({"seeds": [5, 100]}, "tune_seed: wanted a seed that is not among seeds = [5, 100], got 100"),
        ({"tune_seed": -1}, "tune_seed: wanted a whole number of at least 0, got -1"),
        ({"lrs": [1e-3, 0]}, "lrs: wanted a list of positive numbers, got [0.001, 0]"),
        ({"lr_factors": []}, "lr_factors: wanted at least one, got []"),
        ({"out": 3}, "out: wanted a path, as text, got 3"),
        ({"entries": ["adamw"]}, "entries: wanted {optim: adamw}, and any of name, lrs, settings, got 'adamw'"),
        ({"entries": [{"optim": "adamw", "lr": 1}]}, "entries: wanted some of name, optim, lrs, settings, got 'lr'"),
        ({"entries": [{"optim": "adamw"}] * 2}, "entries: wanted names that differ, got ['adamw', 'adamw']"),
        ({"entries": [{"optim": "adamw", "lrs": [-1]}]}, "entries: adamw: lrs: wanted a list of positive numbers, "),
        (
            {"entries": [{"optim": "adamw", "settings": {"beta": 1}}]},
            "entries: adamw: optim.beta: no such setting; did you mean optim.betas?",
        ),
        (
            {"entries": [{"optim": "adamw", "lrs": [1, 2]}, {"optim": "slow", "lrs": [1]}]},
            "entries: wanted as many lrs for each, got 1 for slow and 2 for adamw",
        ),
        ({"train": {"seed": 3}}, "train.seed: no such setting; "),
        ({"train": {"steps": 0}}, "train.steps: wanted a whole number of at least 1, got 0"),
        ({"optim": {}}, "optim: no such setting; did you mean optims?"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        plan(**changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_entries_and_their_rates(tmp_path):
    found = plan(tmp_path, optims=["adamw", "slow"])
    assert [(entry.name, entry.lrs) for entry in found.entries] == [
        ("adamw", (1e-3, 2e-3, 4e-3)), ("slow", (5e-5, 1e-4, 2e-4)),
    ]  # fmt: skip
    assert found.tunes and found.out.parent == tmp_path and found.out.name.startswith("comparison_")
    assert found.experiment(found.entries[1]).optim == OptimConfig(lr=1e-4, betas=(0.9, 0.99))
    assert (found.budget.train.steps, found.budget.train.checkpoint_every) == (10, 0)
    given = [{"name": "mine", "optim": "slow", "lrs": [1, 2], "settings": {"eps": 1e-6}}, {"optim": "adamw"}]
    mine, other = plan(entries=given, lrs=[0.1, 0.2]).entries
    assert mine == ("mine", OptimConfig(lr=1e-4, betas=(0.9, 0.99), eps=1e-6), (1.0, 2.0)) and other.lrs == (0.1, 0.2)
    assert not plan(lrs=[0.1]).tunes


def test_folders(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^out: wanted a folder that can be made and written into, got "):
        plan(out=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"^out: wanted a folder of this comparison, or an empty one, got "):
        plan(out=str(tmp_path))
    (tmp_path / "empty").mkdir()
    found = plan(out=str(tmp_path / "empty"))
    assert found.before == {} and list((tmp_path / "empty").iterdir()) == []
    assert set(to_mapping(found)) == {"model", "data", "train", "seeds", "tune_seed", "lrs", "optimizers"}


def test_unknown_keys():
    assert unknown_key("model.layrs") == "model.layrs: no such setting; did you mean model.layers?"
    assert unknown_key("train.xyzzy").startswith("train.xyzzy: no such setting; train has steps, accumulate, ")
    assert unknown_key("xyzzy").startswith("xyzzy: no such setting; there are optims, entries, seeds, ")


def test_no_torch_is_imported():
    code = "import sys, titanfunc.config.compare; sys.exit(bool({'torch', 'numpy', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
