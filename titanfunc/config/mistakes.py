"""What is wrong with a command line, in one line. Knows hydra's errors by their fields and imports no hydra."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from titanfunc.config.failures import tell
from titanfunc.config.presets import wanted_names

GROUPS = ("model", "data", "optim")


def explain(error: Exception, unknown_key: Callable[[str], str], example: str) -> str:
    """One line that says what is wrong, and what to write instead.

    unknown_key: the line for a key that does not exist. example: how a setting is written.
    """
    text = " ".join(str(error).split())
    missing, options = getattr(error, "missing_cfg_file", None), getattr(error, "options", None)
    if missing and options:
        group, _, name = missing.rpartition("/")
        if group == "model":
            return f"{group}={name}: no such choice; wanted {wanted_names(name)}"
        choices = ", ".join(option for option in options if option != "base")
        return f"{group}={name}: no such choice; wanted one of {choices}"
    if override := getattr(error, "override", None):
        form = "group.name=value" if "." in example.partition("=")[0] else "name=value"
        return f"{override!r}: cannot be read; settings are written as {form}, as {example}"
    if unknown := re.match(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        return unknown_key(unknown[1])
    if merged := re.match(r"Error merging override ([^=]+)=(.*)", text):
        return f"{merged[1]}: wanted a value or a list, got {merged[2]!r}"
    if missing := re.match(r"Interpolation key '([^']+)' not found full_key: (\S+)", text):
        return f"{missing[2]}: wanted a setting that is there between the braces, got {missing[1]!r}"
    return text


def stop(error: Exception, unknown_key: Callable[[str], str], example: str) -> NoReturn:
    """End the process for an error of before the work: with the status that the error itself has, as for data that
    cannot be read (``failures.told``), else with 2 as a mistake of the settings."""
    if hasattr(error, "status"):
        sys.exit(tell(error))
    refuse(explain(error, unknown_key, example))


def refuse(message: str) -> NoReturn:
    """Print one line on stderr and end the process with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def refuse_words(words: Iterable[str], names: Iterable[str], example: str) -> None:
    """Refuse words of the command line that set one of ``names`` with dashes before it, or a number for a choice."""
    for word in words:
        if re.match(r"\w*=-?[\d.]+$", word) and word.partition("=")[0] in ("", *GROUPS):
            refuse(f"{word!r}: wanted the name of a choice, or a setting with its group, as train.steps=100")
        if re.match(rf"--?({'|'.join(names)})\b", word):
            refuse(f"{word}: settings are written without dashes, as {example}")
