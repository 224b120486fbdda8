"""Numbers that are absurdly great are refused by name, before anything of their size is made."""

from __future__ import annotations

import dataclasses

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.scripts.wrong import choices, own, settings
from titanfunc.config import TrainConfig, experiment
from titanfunc.config.compare import CompareConfig
from titanfunc.config.compile_report import CompileReportConfig
from titanfunc.config.evaluate import EvaluateConfig
from titanfunc.config.meta import MetaConfig

GREAT, GREATER = 10**23, 10**400
"""More than 64 bits hold, and more than a float does."""
PARSER = OverridesParser.create()
SETTINGS = {key: value for key, value in settings().items() if isinstance(value, int | float | list)}
FLAT = {each: own(each()) for each in (CompareConfig, CompileReportConfig, EvaluateConfig, MetaConfig)}


def nested(key, value):
    """{"a": {"b": value}} of "a.b"."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def merged(one, other):
    both = {key: merged(one[key], other[key]) for key in one.keys() & other.keys()}
    return {**one, **other, **both}


@pytest.mark.parametrize("key", [key for key in settings() if key != "model.preset"])
def test_what_command_lines_are_drawn_from(key):
    default = settings()[key]
    for text in choices(key, default):
        value = PARSER.parse_override(f"key={text}").value()
        with pytest.raises(ValueError, match=rf"^{key}\b"):
            experiment.from_mapping(merged({"model": {"preset": "mac_tiny"}}, nested(key, value)))


@pytest.mark.parametrize("key", [key for key, value in SETTINGS.items() if not isinstance(value, bool)])
def test_of_a_run(key):
    default = SETTINGS[key]
    great = GREAT if isinstance(default, int) else GREATER
    value = [great] * max(len(default), 1) if isinstance(default, list) else great
    with pytest.raises(ValueError, match=rf"^{key}: wanted .*, got .?10{{22}}"):
        experiment.from_mapping(merged({"model": {"preset": "mac_tiny"}}, nested(key, value)))


@pytest.mark.parametrize("config", FLAT)
def test_of_other_scripts(config):
    numbers = {key: value for key, value in FLAT[config].items() if type(value) in (int, float)}
    assert numbers
    for key, default in numbers.items():
        with pytest.raises(ValueError, match=rf"^{key}: wanted "):
            dataclasses.replace(config(), **{key: GREAT if isinstance(default, int) else GREATER})


@pytest.mark.parametrize("key", ["seeds", "lrs", "lr_factors"])
def test_of_a_comparisons_lists(key):
    with pytest.raises(ValueError, match=rf"^{key}: wanted a list of "):
        CompareConfig(**{key: (GREAT if key == "seeds" else GREATER,)})


@pytest.mark.parametrize("key", ["lengths", "pairs"])
def test_of_an_evaluations_lists(key):
    with pytest.raises(ValueError, match=rf"^{key}: wanted a list of whole numbers from 1 to "):
        EvaluateConfig(**{key: (GREAT,)})


def test_the_greatest_are_taken():
    assert TrainConfig(seed=2**63 - 1, steps=2**48).steps == 2**48
    for change, wanted in (({"seed": 2**63}, 2**63 - 1), ({"steps": 2**48 + 1}, 2**48)):
        with pytest.raises(ValueError, match=rf"wanted a whole number of at most {wanted}, got "):
            TrainConfig(**change)
