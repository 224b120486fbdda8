"""What is wrong with a command line, in one line. Knows hydra's errors by their fields and imports no hydra."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from titanfunc.config.failures import tell
from titanfunc.config.files import require_folder
from titanfunc.config.presets import wanted_names

GROUPS = ("model", "data", "optim")
ANY = ("",)
OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--help", "-h"): (), ("--hydra-help",): (), ("--version",): (), ("--resolve",): (), ("--run", "-r"): (),
    ("--multirun", "-m"): (), ("--shell-completion", "-sc"): (), ("--cfg", "-c"): ("job", "hydra", "all"),
    ("--package", "-p"): ANY, ("--config-path", "-cp"): ANY, ("--config-name", "-cn"): ANY,
    ("--config-dir", "-cd"): ANY, ("--experimental-rerun",): ANY,
    ("--info", "-i"): ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}  # fmt: skip
"""Hydra's own, and what may be said with each: nothing, anything, or one of these (after --info nothing, too). Hydra
itself would tell of a wrong one over many lines."""
ADDED = ("hydra.job.env_set.", "hydra.sweeper.params.", "hydra.launcher.", "hydra.callbacks.")
"""Groups of hydra's own settings that take names which are not there yet; elsewhere it would look at none."""


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
    if missing:
        return f"--config-name: wanted a file of settings that is there, as scripts have one each, got {missing!r}"
    if re.match(r"(Primary|Additional) config directory", text):
        return f"--config-path, --config-dir: wanted a folder that is there; {text}"
    if override := getattr(error, "override", None):
        form = "group.name=value" if "." in example.partition("=")[0] else "name=value"
        name, equals, value = override.partition("=")
        quoted = f"; this text in quotes, as '{name}=\"{value}\"'" if equals and value.startswith("~") else ""
        return f"{override!r}: cannot be read; settings are written as {form}, as {example}{quoted}"
    if isinstance(error, OSError) and error.filename:  # hydra makes its folders before a script begins
        return (
            f"hydra.run.dir, or hydra.sweep.dir: wanted a folder that can be made and written into, got "
            f"{error.filename!r} ({error.strerror})"
        )
    if unknown := re.match(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        return _unknown_of_hydra(unknown[1]) if _of_hydra(unknown[1]) else unknown_key(unknown[1])
    if several := re.match(r"Ambiguous value for argument '([^=]+)=(.*)' 1\.", text):
        return (
            f"{several[1]}: wanted one value, got {several[2]!r}; several, one run after another, take -m, and a text "
            f"with a comma quotes of its own, as '{several[1]}=\"{several[2]}\"'"
        )
    if merged := re.match(r"Error merging override ([^=]+)=(.*)", text):
        why = f" ({' '.join(str(error.__cause__).split(' full_key')[0].split())[:200]})" if error.__cause__ else ""
        return f"{merged[1]}: wanted a value or a list, got {merged[2]!r}{why}"
    if missing := re.match(r"Interpolation key '([^']+)' not found full_key: (\S+)", text):
        return f"{missing[2]}: wanted a setting that is there between the braces, got {missing[1]!r}"
    if "nterpolation" in type(error).__name__ and (found := re.match(r"(.*?)\s*full_key: (\S+)", text)):
        return (
            f"{found[2]}: wanted another setting between the braces, as ${{train.seed}}, or oc.env: and a variable "
            f"that is set; {found[1][:200]}"
        )
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


def refuse_words(words: Sequence[str], names: Iterable[str], example: str) -> None:
    """Refuse words of the command line that set one of ``names`` with dashes before it, a number for a choice, nothing
    at all, an option that hydra does not have, or a setting of hydra's that it would not look at."""
    own = re.compile(rf"--?({'|'.join(names)})\b")
    said = False  # by the option before
    for place, word in enumerate(words):
        if said or word == "--":
            said = False
            continue
        if re.match(r"\w*=-?[\d.]+$", word) and word.partition("=")[0] in ("", *GROUPS):
            refuse(f"{word!r}: wanted the name of a choice, or a setting with its group, as train.steps=100")
        if not word.strip() or re.match(r"[+~]*[=@]", word):
            refuse(f"{word!r}: wanted the name of a setting first, as {example}")
        if own.match(word):
            refuse(f"{word}: settings are written without dashes, as {example}")
        if word.startswith("-"):
            said = _takes_next(word, words[place + 1 :], example)
        elif _of_hydra(word.lstrip("+~")):
            _refuse_of_hydra(word)


def _takes_next(word: str, rest: Sequence[str], example: str) -> bool:
    """Whether the word after an option belongs to it. Refuses an option that is none, or what it cannot be given."""
    name, equals, value = word.partition("=")
    found = [(each, may) for each, may in OPTIONS.items() if name in each]
    long = [(each, may) for each, may in OPTIONS.items() if len(name) > 2 and each[0].startswith(name)]
    if len(found or long) != 1:
        there = ", ".join(each[0] for each in OPTIONS)
        refuse(f"{word}: no such option; there are {there}, and settings are written without dashes, as {example}")
    (((option, *_), may),) = found or long
    if not may:
        if equals:
            refuse(f"{word}: wanted {option} alone")
        return False
    follows = not equals and bool(rest) and not rest[0].startswith("-")
    value = value if equals or not follows else rest[0]
    if not value and option != "--info":
        refuse(f"{word}: wanted {'one of ' + ', '.join(may) if may != ANY else 'a value'} after it")
    if value and may != ANY and value not in may:
        refuse(f"{option}: wanted one of {', '.join(may)}, got {value!r}")
    return follows


def _of_hydra(name: str) -> bool:
    return name.startswith("hydra.")


def _unknown_of_hydra(key: str) -> str:
    return f"{key}: no such setting; --cfg hydra shows those of hydra's"


def _refuse_of_hydra(word: str) -> None:
    """Those that hydra would take and do nothing with, or end by a traceback."""
    key, _, value = word.lstrip("+~").partition("=")
    if word.startswith("+") and not key.startswith(ADDED):
        refuse(f"{word}: wanted a setting that hydra has, without +, as hydra.run.dir=FOLDER (--cfg hydra shows all)")
    if key == "hydra.verbose" and value.lower() != "false":
        refuse(f"{key}: wanted false, as hydra writes no log here, got {value!r}")
    if key in ("hydra.run.dir", "hydra.sweep.dir") and "${" not in value:
        try:
            require_folder(Path(value.strip("'\"")), key)
        except ValueError as error:
            refuse(str(error))
