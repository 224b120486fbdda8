"""The README's library example is the file under examples/, short, and it learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "examples" / "custom_step.py"


def test_the_example_learns():
    spec = importlib.util.spec_from_file_location("custom_step", SOURCE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main(steps=12, backend="aot_eager")
    assert losses[-1] < 0.8 * losses[0]


def test_the_example_is_short_and_stands_in_the_readme():
    text = SOURCE.read_text()
    assert len(text.splitlines()) <= 40
    assert text.strip() in (ROOT / "README.md").read_text()
