"""Words of a command line that are refused before hydra sees them, each in one line."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException

from titanfunc.config.mistakes import ANY, OPTIONS, explain, refuse_words

NAMES = ("model", "data", "optim", "train", "run=")
EXAMPLE = "train.steps=100"
CONF = Path(__file__).resolve().parents[2] / "conf"


def test_hydras_options_are_these():
    there = {}
    for action in get_args_parser()._actions:
        if action.option_strings:
            there[tuple(action.option_strings)] = () if action.nargs == 0 else tuple(action.choices or ANY)
    assert there == OPTIONS


@pytest.mark.parametrize(
    "line",
    [
        "train.steps=3", "-m train.seed=1,2", "--multirun train.seed=1", "--cfg job", "-c=job", "--cfg=hydra --resolve",
        "--info", "--info defaults", "-i all train.steps=3", "--config-name other --run", "--package x", "--hydra-help",
        "--res", "hydra.run.dir=.", "hydra.run.dir=${x}/a", "+hydra.sweeper.params.a=1", "hydra.verbose=false",
        "++train.steps=3", "-- train.steps=3", "model=mac_tiny",
    ],
)  # fmt: skip
def test_words_that_are_hydras_to_judge(line):
    refuse_words(line.split(), NAMES, EXAMPLE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--foo",
            "--foo: no such option; there are --help, .*--info, and settings are written without dashes, as train",
        ),
        ("--con x", "--con: no such option; there are"),  # of three
        ("-x", "-x: no such option; there are"),
        ("-5", "-5: no such option; there are"),
        ("--cfg nope", "--cfg: wanted one of job, hydra, all, got 'nope'"),
        ("--cfg", "--cfg: wanted one of job, hydra, all after it"),
        ("--cfg --run", "--cfg: wanted one of job, hydra, all after it"),
        ("-c=", "-c=: wanted one of job, hydra, all after it"),
        ("--config-name", "--config-name: wanted a value after it"),
        ("--info me", "--info: wanted one of all, config, .*, got 'me'"),
        ("--info train.steps=3", "--info: wanted one of all, config, .*, got 'train.steps=3'"),
        ("--resolve=3", "--resolve=3: wanted --resolve alone"),
        ("--train.steps=3", "--train.steps=3: settings are written without dashes, as train.steps=100"),
        ("--run=x", "--run=x: settings are written without dashes"),
        ("=", "'=': wanted the name of a setting first, as train.steps=100"),
        ("+=3", r"'\+=3': wanted the name of a setting first"),
        ("@x=3", "'@x=3': wanted the name of a setting first"),
        ("hydra.verbose=maybe", "hydra.verbose: wanted false, as hydra writes no log here, got 'maybe'"),
        ("+hydra.foo=1", r"\+hydra.foo=1: wanted a setting that hydra has, without \+, as hydra.run.dir=FOLDER"),
        ("hydra.run.dir=/dev/null/x", "hydra.run.dir: wanted a folder that can be made and written into, got '/dev/n"),
    ],
)
def test_words_that_are_refused(capsys, line, message):
    with pytest.raises(SystemExit) as ended:
        refuse_words(line.split(), NAMES, EXAMPLE)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert re.match(f"error: {message}", said.err)


def test_an_empty_word(capsys):
    with pytest.raises(SystemExit):
        refuse_words([""], NAMES, EXAMPLE)
    assert capsys.readouterr().err == "error: '': wanted the name of a setting first, as train.steps=100\n"


def test_a_folder_that_hydra_cannot_make():
    told = explain(FileNotFoundError(2, "No such file or directory", "/proc/x"), str, EXAMPLE)
    assert told.startswith(
        "hydra.run.dir, or hydra.sweep.dir: wanted a folder that can be made and written into, got '/"
    )


def test_a_home_is_written_in_quotes():
    error = ValueError("token recognition error")
    error.override = "train.run_dir=~/r"
    told = explain(error, str, EXAMPLE)
    assert told.endswith("as train.steps=100; this text in quotes, as 'train.run_dir=\"~/r\"'")
    error.override = "train.steps"
    assert explain(error, str, EXAMPLE).endswith("as train.steps=100")


def test_a_text_with_a_comma_is_told_to_be_quoted():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        with pytest.raises(HydraException) as found:
            compose("meta_train", ["out=a, b"])
        assert explain(found.value, str, EXAMPLE) == (
            "out: wanted one value, got 'a, b'; several, one run after another, take -m, and a text with a comma "
            "quotes of its own, as 'out=\"a, b\"'"
        )
        assert compose("meta_train", ['out="a, b"']).out == "a, b"
