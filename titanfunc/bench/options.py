"""Options of the benchmarks' command lines: what they may be is known without torch, and a mistake is one line.

A function here that takes an option's text and returns its value is for ``type=`` of argparse.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from titanfunc.config._check import SIZE
from titanfunc.config.driver import has_driver, require_driver
from titanfunc.config.files import require_folder
from titanfunc.config.mistakes import refuse
from titanfunc.config.train import require_device


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line, which begins with the option, and end the process with status 2."""
        message = message.removeprefix("argument ")
        if wrong := re.match(r"(\S+): invalid (int|float) value: (.*)", message):
            refuse(f"{wrong[1]}: wanted a {'whole ' * (wrong[2] == 'int')}number, got {wrong[3]}")
        if wrong := re.match(r"(\S+): invalid choice: (.*) \(choose from (.*)\)", message):
            refuse(f"{wrong[1]}: wanted one of {wrong[3].replace(chr(39), '')}, got {wrong[2]}")
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


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a whole number, got {text!r}") from None
    _require(value >= 1, "at least 1", text)
    _require(value <= SIZE, f"at most {SIZE}", text)
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    return _above_zero(text, "a positive number")


def seconds(text: str) -> float:
    """A finite number of seconds above 0."""
    return _above_zero(text, "a positive number of seconds")


def device(text: str) -> str:
    """auto, cpu, cuda or cuda:N, the latter where there is a driver of a GPU."""
    _check(require_device, text)
    _check(require_driver, text)
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """One of some words."""

    def choice(text: str) -> str:
        _require(text in choices, f"one of {', '.join(choices)}", repr(text))
        return text

    return choice


def expression(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"wanted a regular expression, got {text!r} ({error})") from None
    return text


def folder(text: str) -> Path:
    """A folder that is there, or can be made."""
    _check(lambda path, field: require_folder(Path(path), field), text)
    return Path(text)


def new_file(text: str) -> Path:
    """A file that can be written, in a folder that is there or can be made; one that is there may be written over."""
    path = Path(text)
    _require(not path.is_dir(), "a file", f"the folder {text!r}")
    _require(not path.exists() or (path.is_file() and os.access(path, os.W_OK)), "a file to write over", repr(text))
    folder(str(path.parent))
    return path


def require_gpu(option: str, given: bool, where: str) -> None:
    """End the process if an option is given that needs a GPU, and --device, before or after torch has found out which
    it is, is surely none."""
    if given and (where == "cpu" or not has_driver()):
        where = where if where == "cpu" else f"{where}, as this machine has no driver of one"
        refuse(f"{option}: wanted a GPU, whose kernels it times, got --device {where}")


def _above_zero(text: str, wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a number, got {text!r}") from None
    _require(0 < value < math.inf, wanted, text)
    return value


def _require(ok: bool, wanted: str, got: str) -> None:
    if not ok:
        raise argparse.ArgumentTypeError(f"wanted {wanted}, got {got}")


def _check(check: Callable[[str, str], None], text: str) -> None:
    """A check of a setting, which names no setting here: argparse names the option."""
    try:
        check(text, "")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None
