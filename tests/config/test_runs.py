import json
import os
from dataclasses import asdict, replace

import pytest

from tests.saved import put_checkpoint as put
from titanfunc.config import ModelConfig, TrainConfig, checkpoints, runs
from titanfunc.config.experiment import from_mapping
from titanfunc.config.optim import NestedConfig, OptimConfig

MODEL = ModelConfig(layers=2)


def put_checkpoint(run_dir, step, model=MODEL, age=0.0):
    place = put(run_dir, step, model=asdict(model))
    then = (place / checkpoints.METADATA).stat().st_mtime - age
    os.utime(place / checkpoints.METADATA, (then, then))
    return place


def test_a_checkpoint_is_of_the_same_model_whatever_computes_it(tmp_path):
    there = ModelConfig(kernels="triton", attention="sdpa", dim=64)
    metadata = {"model": json.loads(json.dumps(asdict(there)))}
    runs.refuse_other_model(metadata, ModelConfig(dim=64), tmp_path)
    for later in ("kernels", "remat", "fp8_scaling"):  # one of before there were any
        del metadata["model"][later]
    runs.refuse_other_model(metadata, ModelConfig(dim=64), tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers is 4 there and 3 here"):
        runs.refuse_other_model(metadata, ModelConfig(dim=64, layers=3), tmp_path)


def test_latest_needs_one(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        runs.latest(tmp_path)


def test_find_checkpoint(tmp_path):
    old = put_checkpoint(tmp_path / "a", 100, age=60)
    new = put_checkpoint(tmp_path / "b", 5)
    (tmp_path / "z_without").mkdir()
    assert runs.find_checkpoint("latest", root=tmp_path) == new
    assert runs.find_checkpoint("latest", str(tmp_path / "a"), root=tmp_path) == old
    assert runs.find_checkpoint(str(tmp_path / "a")) == old
    assert runs.find_checkpoint(str(old)) == old


@pytest.mark.parametrize("resume", ["latest", "nowhere"])
def test_find_checkpoint_refuses(tmp_path, resume):
    with pytest.raises(ValueError, match=r"^train\.resume: "):
        runs.find_checkpoint(resume, root=tmp_path)


def test_another_model_is_named(tmp_path):
    metadata = checkpoints.read_metadata(put_checkpoint(tmp_path, 1))
    runs.refuse_other_model(metadata, MODEL, tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers is 2 there and 3 here"):
        runs.refuse_other_model(metadata, ModelConfig(layers=3), tmp_path)


def test_another_optimizer_is_named(tmp_path):
    nested = OptimConfig(name="nested", nested=NestedConfig(base="adamw"))
    for there, here, told in (
        (OptimConfig(), OptimConfig(name="muon"), r"^optim\.name: wanted adamw, whose state .* holds, got 'muon'$"),
        (nested, OptimConfig(name="nested"), r"^optim\.nested\.base: wanted adamw, whose state .* holds, got 'muon'$"),
    ):
        metadata = {"optim": json.loads(json.dumps(asdict(there)))}
        runs.refuse_other_optimizer(metadata, there, tmp_path)
        with pytest.raises(ValueError, match=told):
            runs.refuse_other_optimizer(metadata, here, tmp_path)
    runs.refuse_other_optimizer({}, OptimConfig(name="muon"), tmp_path)  # one of before it was kept
    place = put(tmp_path, 1, model=asdict(MODEL), optim=asdict(OptimConfig(name="muon")))
    settings = {"model": {"preset": "mac_tiny"}, "train": {"resume": str(place), "steps": 9}}
    built = from_mapping(settings)
    with pytest.raises(ValueError, match=r"^optim\.name: wanted muon, whose state"):
        runs.prepare(replace(built, model=MODEL), root=tmp_path)


def test_differences_see_new_and_lost_fields():
    config = TrainConfig(steps=3)
    there = {**json.loads(json.dumps(config.__dict__)), "steps": 4, "gone": 1}
    assert runs.differences(there, config) == [("steps", 4, 3), ("gone", 1, None)]


def test_new_run_dirs(tmp_path):
    planned = runs.plan_run_dir("", "mac_tiny", root=tmp_path)
    assert planned.parent == tmp_path
    assert planned.name.endswith("_mac_tiny")
    assert not planned.exists()
    assert runs.make_run_dir(planned, exact=False) == planned
    assert runs.make_run_dir(planned, exact=False).name == planned.name + "_2"
    assert runs.make_run_dir(planned, exact=False).name == planned.name + "_3"

    given = tmp_path / "mine"
    assert runs.plan_run_dir(str(given), "mac_tiny") == given
    assert runs.make_run_dir(given, exact=True) == given
    assert runs.plan_run_dir(str(given), "mac_tiny") == given  # there, but empty
    (given / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"train\.run_dir: .* already holds something"):
        runs.plan_run_dir(str(given), "mac_tiny")
    with pytest.raises(ValueError, match=r"train\.run_dir: .* already holds something"):
        runs.plan_run_dir(str(given / "notes"), "mac_tiny")


def test_a_resumed_run_stays_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "one"
    old, new = put_checkpoint(run_dir, 1), put_checkpoint(run_dir, 2)
    assert runs.plan_run_dir("", "mac_tiny", new) == run_dir.relative_to(tmp_path)
    assert runs.plan_run_dir(str(run_dir), "mac_tiny", new) == run_dir.relative_to(tmp_path)
    assert runs.plan_run_dir("other", "mac_tiny", old).name == "other"
    with pytest.raises(ValueError, match="is not the newest checkpoint of its run"):
        runs.plan_run_dir("", "mac_tiny", old)


def experiment(**train):
    return from_mapping({"model": {"preset": "mac_tiny"}, "train": train})


def test_prepare(tmp_path):
    ready = experiment(resume="latest", steps=10)
    place = put_checkpoint(tmp_path / "one", 4, ready.model)
    found = runs.prepare(ready, root=tmp_path)
    assert (found.checkpoint, found.resumes, found.metadata["step"]) == (place, True, 4)
    assert found.run_dir.resolve() == tmp_path / "one"

    forked = runs.prepare(experiment(resume=str(place), run_dir=str(tmp_path / "two"), steps=10), root=tmp_path)
    assert (forked.run_dir, forked.checkpoint, forked.resumes) == (tmp_path / "two", place, False)

    fresh = runs.prepare(experiment(), root=tmp_path)
    assert (fresh.checkpoint, fresh.resumes) == (None, False)

    assert runs.prepare(experiment(resume="latest", steps=4), root=tmp_path).resumes, "its last files are missing"
    (tmp_path / "one" / "curves.png").touch()
    with pytest.raises(ValueError, match=r"^train\.steps: wanted more than the 4 steps"):
        runs.prepare(experiment(resume="latest", steps=4), root=tmp_path)
    other = from_mapping({"model": {"preset": "mac_tiny", "layers": 7}, "train": {"resume": "latest"}})
    with pytest.raises(ValueError, match="is of another model"):
        runs.prepare(other, root=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_prepare_needs_the_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else True)
    with pytest.raises(ValueError, match=r"^train\.tracker: tensorboard is not installed; run: pip install"):
        runs.prepare(experiment(tracker="tensorboard"), root=tmp_path)
