"""What the benchmarks share: models named on the command line, and what a result says of where it was measured.

No torch until a result is begun: a mistake on the command line is refused at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from titanfunc.config import ModelConfig, preset
from titanfunc.config.mistakes import refuse


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line, which begins with the option, and end the process with status 2."""
        message = message.removeprefix("argument ")
        if wrong := re.match(r"(\S+): invalid (int|float) value: (.*)", message):
            refuse(f"{wrong[1]}: wanted a {'whole ' * (wrong[2] == 'int')}number, got {wrong[3]}")
        if missing := re.match(r"(\S+): expected (at least one|one) argument", message):
            refuse(f"{missing[1]}: wanted {'some values' if missing[2] != 'one' else 'a value'}, got none")
        if required := re.match(r"the following arguments are required: (.*)", message):
            refuse(f"{required[1]}: wanted, and not given")
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            options = [option for option in self._option_string_actions if option.startswith("--")]
            near = difflib.get_close_matches(unknown[1], options, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(options)}"
            refuse(f"{unknown[1]}: no such option; {hint}")
        refuse(message)


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """``name:field=value,nested.field=value`` -> the name, and the nested overrides; ValueError without a value.

    >>> parsed("mac_tiny:layers=1,memory.heads=1")
    ('mac_tiny', {'layers': 1, 'memory': {'heads': 1}})
    >>> parsed("mac_tiny:memory_layers=[0,2],layers=3")
    ('mac_tiny', {'memory_layers': [0, 2], 'layers': 3})
    """
    name, _, changes = text.partition(":")
    overrides: dict[str, Any] = {}
    for change in filter(None, re.split(r",(?![^\[]*\])", changes)):  # a list's commas are its own
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{text}: wanted FIELD=VALUE after the colon, got {change!r}")
        *groups, last = key.split(".")
        inner = overrides
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{text}: wanted {group} as a value or as a group of fields, got both")
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{text}: wanted {key} as a number or a word, got {value!r}") from None
    return name, overrides


def configuration(text: str) -> ModelConfig:
    """The ModelConfig that a model's text means."""
    name, overrides = parsed(text)
    return preset(name, **overrides)


def commit() -> str:
    """The commit that is measured, in short."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown (no git history here)"


def header(args: argparse.Namespace) -> dict[str, Any]:
    """The command, hardware, versions, commit and date of a result, and no rows yet."""
    import torch

    cuda = torch.device(args.device).type == "cuda"
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if cuda else None,
        "commit": args.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }


def write(result: Mapping[str, Any], out: Path | None) -> None:
    """Write the result as it stands, in a new folder if need be; nowhere without ``out``."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def device_of(name: str) -> str:
    """The device that --device names; "auto" is a GPU if there is one. Ends the process where it is not there."""
    from titanfunc.device import resolve_device  # torch comes with it

    try:
        return str(resolve_device(name, "--device"))
    except ValueError as error:
        refuse(str(error))
