"""What the benchmarks share: models named on the command line, and what a result says of where it was measured.

No torch until a result is begun: a mistake on the command line is refused at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from titanfunc.compile_report.checkout import commit
from titanfunc.compile_report.process import failed
from titanfunc.config import ModelConfig, preset
from titanfunc.config.files import write_text
from titanfunc.config.mistakes import refuse


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


def header(args: argparse.Namespace) -> dict[str, Any]:
    """The command, hardware, versions, commit and date of a result, and no rows yet."""
    import torch

    cuda = torch.device(args.device).type == "cuda"
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if cuda else None,
        "commit": args.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }


def write(result: Mapping[str, Any], out: Path | None) -> None:
    """Write the result as it stands, in a new folder if need be; nowhere without ``out``.

    Wherever the process is killed, the last one or this one is there. Raises OSError where it cannot be written.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")


def device_of(name: str) -> str:
    """The device that --device names; "auto" is a GPU if there is one. Ends the process where it is not there."""
    from titanfunc.device import resolve_device  # torch comes with it

    try:
        return str(resolve_device(name, "--device"))
    except ValueError as error:
        refuse(str(error))


def exit_status(rows: Iterable[Mapping[str, Any]]) -> int:
    """Of a script that measured rows: 1 if one of them failed, was stopped at its time limit, or is not right.

    What this machine has not (status "not here" or "... is not installed") is no failure. Neither is what a peer's
    layer cannot do beside ours, its memory being too small: that is what was found.
    """
    return int(any(failed(row) or _wrong(row) for row in rows))


def _wrong(row: Mapping[str, Any]) -> bool:
    finite = [row[name] for name in ("loss_finite", "state_finite", "peer_finite") if name in row]
    untimed = [f"{way}_error" for way in ("kernel", "titanfunc", "compiled_reference", "eager_reference")]
    return row.get("right") is False or not all(finite) or any(name in row for name in untimed)
