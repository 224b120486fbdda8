"""Hundreds of wrong command lines: each is refused in one line that names the setting and says what is allowed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import python_path
from tests.scripts.wrong import Line, lines

ROOT = Path(__file__).parents[2]
LIMIT = 3.0
"""Seconds of the CPU; torch alone takes longer to import."""
LINES = lines()
SAYS = re.compile(
    r"wanted|did you mean|no such (setting|option); |are written |leave \S+ out|or name a folder|name another folder"
)


def complaints(line, status, out, err):
    """What is wrong with how a line was refused."""
    return [
        what
        for what, wrong in {
            f"status {status}": status != 2,
            "not one line": not (err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")),
            f"names none of {line.names}": not any(name in err for name in line.names),
            "does not say what is allowed": SAYS.search(err) is None,
            "prints on stdout": bool(out),
        }.items()
        if wrong
    ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a machine that no hub answers, and that interprets no kernels."""
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path_factory.mktemp("hub")), "no_proxy": "*"}
    plain = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "HF_HUB_OFFLINE")}
    return {**plain, **hub, "PYTHONPATH": python_path(), "COLUMNS": "80"}


def test_there_are_enough_and_none_comes_twice():
    words = [line.words for line in LINES]
    assert len(words) == len(set(words)) >= 200
    assert {line[0] for line in words} == {
        "train", "evaluate", "compare", "compile_report", "meta_train", "bench_step",
    }  # fmt: skip
    assert lines() == LINES


def test_each_is_refused_in_one_line(environment):
    command = [sys.executable, str(ROOT / "tests" / "scripts" / "tried.py")]
    tried = subprocess.run(
        command, input=json.dumps([line.words for line in LINES]), env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    wrong = {}
    for line, result in zip(LINES, json.loads(tried.stdout), strict=True):
        found = complaints(line, result["status"], result["out"], result["err"])
        found += ["torch was imported"] if result["torch"] else []
        found += [f"{result['seconds']:.1f} s"] if result["seconds"] > LIMIT else []
        found += [f"leaves {result['left']}"] if result["left"] else []
        if found:
            wrong[" ".join(line.words)] = (found, result["err"])
    assert wrong == {}


ALONE = [
    Line(tuple(words.split()), (name,))
    for words, name in {
        "train --foo": "--foo",
        "train hydra.run.dir=/proc/nope": "hydra.run.dir",
        "train train.steps=${train.steps}": "train.steps",
        "train train.run_dir=/proc/nope": "train.run_dir",
        "train data.tokenizer=nope/nope": "data.tokenizer",
        "train model.kernels=triton train.device=cpu": "model.kernels",
    }.items()
]
"""Which are told by a way of their own."""


@pytest.mark.parametrize(
    "line", [*ALONE, *random.Random(1).sample(LINES, 8)], ids=lambda line: " ".join(line.words)[:80]
)
def test_a_process_of_its_own_is_as_quick(line, environment, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / f"{line.words[0]}.py"), *line.words[1:]]
    child = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stderr is not None
    out, err = child.stdout.read(), child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert complaints(line, child.returncode, out, err) == [], err
    assert used.ru_utime + used.ru_stime < LIMIT
    assert list(tmp_path.iterdir()) == []
