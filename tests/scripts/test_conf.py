"""The yaml files and the dataclasses say the same."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from titanfunc.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from titanfunc.config.data import CORPORA
from titanfunc.config.evaluate import EvaluateConfig
from titanfunc.config.evaluate import from_mapping as evaluation
from titanfunc.config.experiment import from_mapping
from titanfunc.config.optim import OPTIMIZERS
from titanfunc.config.recall import TASKS

DATASETS = {"fineweb_edu": 32000, "cosmopedia": 49152}
CONF = Path(__file__).parents[2] / "conf"


def read(name: str):
    # YAML 1.1, which PyYAML reads, takes 2e-3 for text where hydra takes it for a number.
    return {key: to_number(value) for key, value in yaml.safe_load((CONF / name).read_text()).items()}


def to_number(value):
    if isinstance(value, list):
        return [to_number(entry) for entry in value]
    if isinstance(value, dict):
        return {key: to_number(entry) for key, entry in value.items()}
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def names(config):
    return {
        field.name: names(getattr(config, field.name))
        if dataclasses.is_dataclass(getattr(config, field.name))
        else None
        for field in dataclasses.fields(config)
    }


def test_model_base_has_every_field_and_no_number():
    assert read("model/base.yaml") == {"preset": None, **names(ModelConfig())}


def test_presets_have_no_file_of_their_own():
    assert {path.stem for path in (CONF / "model").glob("*.yaml")} == {"base"}  # scripts/train.py offers them


def test_data_base_has_every_field_and_its_default():
    given = read("data/base.yaml")
    assert set(given) == set(names(DataConfig()))
    assert given.pop("seq_len") is None  # as the model's, which from_mapping fills in
    assert from_mapping({"model": {"preset": "mac_tiny"}, "data": given}).data == DataConfig()
    wanted = json.loads(json.dumps(dataclasses.asdict(DataConfig())))
    assert given == {name: value for name, value in wanted.items() if name != "seq_len"}


@pytest.mark.parametrize("name", [*CORPORA[:3], *TASKS])
def test_a_data_file_says_what_is_different(name):
    key = "corpus" if name in CORPORA else "task"
    given = read(f"data/{name}.yaml")
    long_rows = {"seq_len": 1024} if name in ("needle", "world") else {}
    assert given == {"defaults": ["base", "_self_"], key: name, **long_rows}
    path = {"path": "somewhere"} if name in ("text_folder", "files") else {}
    data = {key: value for key, value in given.items() if key != "defaults"}
    from_mapping({"model": {"preset": "mac_tiny"}, "data": {**data, **path}})  # a preset's own length is enough
    assert {each.stem for each in (CONF / "data").glob("*.yaml")} == {"base", *CORPORA[:3], *TASKS, *DATASETS}


@pytest.mark.parametrize(("name", "tokens"), DATASETS.items())
def test_a_dataset_of_the_hub_is_ready_to_be_read(name, tokens):
    data = read(f"data/{name}.yaml")
    assert data.pop("defaults") == ["base", "_self_"] and data["corpus"] == "hub"
    experiment = from_mapping({"model": {"preset": "mac_24gb"}, "data": data})
    assert experiment.model.vocab_size == tokens and experiment.data.subset and experiment.data.cache_dir


def test_optim_base_has_every_field_and_its_default():
    given = read("optim/base.yaml")
    assert given == json.loads(json.dumps(dataclasses.asdict(OptimConfig())))


@pytest.mark.parametrize("name", ["adamw", "muon", "nested_adamw", "nested_muon", "small_fc_lopt", "velo"])
def test_an_optimizer_file_says_what_is_different(name):
    given = read(f"optim/{name}.yaml")
    assert given.pop("defaults") == ["base", "_self_"]
    config = from_mapping({"model": {"preset": "mac_tiny"}, "optim": given}).optim
    wanted, _, base = name.partition("_") if name.startswith("nested") else (name, "", "")
    assert config.name == wanted and (not base or config.nested.base == base)
    assert {each.stem for each in (CONF / "optim").glob("*.yaml")} - {"base"} >= {name}
    assert {read(f"optim/{each.name}")["name"] for each in (CONF / "optim").glob("*.yaml")} == set(OPTIMIZERS)


def test_train():
    assert TrainConfig(**read("train.yaml")["train"]) == TrainConfig()
    assert set(read("train.yaml")["train"]) == set(names(TrainConfig()))


def test_evaluate():
    given = {name: value for name, value in read("evaluate.yaml").items() if name not in ("defaults", "hydra")}
    assert evaluation(given) == EvaluateConfig()
    assert set(given) == set(names(EvaluateConfig()))
