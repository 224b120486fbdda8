"""The yaml files and the dataclasses say the same."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from titanfunc.config import PRESETS, DataConfig, ModelConfig, OptimConfig, TrainConfig
from titanfunc.config.data import CORPORA
from titanfunc.config.train import OPTIMIZERS

CONF = Path(__file__).parents[2] / "conf"


def read(name: str):
    # YAML 1.1, which PyYAML reads, takes 2e-3 for text where hydra takes it for a number.
    return {key: to_number(value) for key, value in yaml.safe_load((CONF / name).read_text()).items()}


def to_number(value):
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


def test_one_model_file_a_preset():
    files = {path.stem for path in (CONF / "model").glob("*.yaml")} - {"base"}
    assert files == set(PRESETS)
    for name in files:
        assert read(f"model/{name}.yaml") == {"defaults": ["base", "_self_"], "preset": name}


@pytest.mark.parametrize("name", CORPORA)
def test_data(name):
    wanted = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    assert read(f"data/{name}.yaml") == {**wanted, "corpus": name, "seq_len": None}
    assert {path.stem for path in (CONF / "data").glob("*.yaml")} == set(CORPORA)


def test_optim():
    assert {path.stem for path in (CONF / "optim").glob("*.yaml")} == set(OPTIMIZERS)
    given = read("optim/adamw.yaml")
    assert OptimConfig(**{**given, "betas": tuple(given["betas"])}) == OptimConfig()


def test_train():
    assert TrainConfig(**read("train.yaml")["train"]) == TrainConfig()
    assert set(read("train.yaml")["train"]) == set(names(TrainConfig()))
