"""What the benchmarks share: models named on the command line, and what a result says of where it was measured."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time

import torch
import yaml

import titanfunc as tf


def parsed(text: str) -> tuple[str, dict]:
    """``name:field=value,nested.field=value`` -> the name, and the nested overrides."""
    name, _, changes = text.partition(":")
    overrides: dict = {}
    for change in filter(None, changes.split(",")):
        key, value = change.split("=")
        *groups, last = key.split(".")
        inner = overrides
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = yaml.safe_load(value)
    return name, overrides


def configuration(text: str):
    """The ModelConfig that a model's text means."""
    name, overrides = parsed(text)
    return tf.models.preset(name, **overrides)


def commit() -> str:
    """The commit that is measured, in short."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown (no git history here)"


def header(args: argparse.Namespace) -> dict:
    """The command, hardware, versions, commit and date of a result, and no rows yet."""
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
