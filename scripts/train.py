"""Train a language model: ``python scripts/train.py model=mac_tiny optim.lr=1e-3``, or ``titanfunc-train``.

Every setting is in conf/. What can be checked without torch is checked before torch is imported, and a mistake is
told in one line on stderr, with exit status 2.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from titanfunc.config.experiment import SECTIONS, from_mapping, unknown_key
from titanfunc.config.runs import prepare

CONF = Path(__file__).resolve().parent.parent / "conf"
MISTAKES = (HydraException, OmegaConfBaseException, ValueError)


def main() -> None:
    """Read the settings from the command line and train; the process ends with the run's exit status."""
    for word in sys.argv[1:]:
        if re.match(rf"--?({'|'.join(SECTIONS)})\b", word):
            _refuse(f"{word}: settings are written without dashes, as train.steps=100")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises what it would otherwise print over several lines
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(_train)()
    except MISTAKES as error:
        _refuse(explain(error))
    except KeyboardInterrupt:
        print("interrupted: nothing is lost but what came after the last checkpoint", file=sys.stderr)
        sys.exit(130)


def explain(error: Exception) -> str:
    """One line that says what is wrong with the command line, and what to write instead."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        choices = ", ".join(option for option in error.options if option != "base")
        return f"{group}={name}: no such choice; wanted one of {choices}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r}: cannot be read; settings are written as group.name=value, as train.steps=100"
    if unknown := re.match(r"Could not override '([^']+)'", text):
        return unknown_key(unknown[1])
    return text


def _train(settings: DictConfig) -> None:
    """The job that hydra runs. It ends by SystemExit, as hydra would print more than one line for an error."""
    try:
        tree = OmegaConf.to_container(settings, resolve=True)
        assert isinstance(tree, dict)
        experiment = from_mapping({str(name): section for name, section in tree.items()})
        place = prepare(experiment)
        from titanfunc import job  # torch comes with it, and takes seconds: not before the checks

        parts = job.assemble(experiment, place)
    except MISTAKES as error:
        _refuse(explain(error))
    try:
        status = job.run(parts)
    except Exception:  # no mistake of the settings: show where it happened
        traceback.print_exc()
        status = 1
    if status:
        sys.exit(status)


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
