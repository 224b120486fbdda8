"""What the benchmarks share: which commit a result names, and with which status a script ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from titanfunc.bench.common import exit_status, write
from titanfunc.compile_report import checkout

ROOT = Path(__file__).resolve().parents[2]
IN_GIT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the history")


@IN_GIT
def test_the_commit_is_that_of_the_package_wherever_it_is_asked_for(tmp_path):
    git = lambda *words: subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)  # noqa: E731
    git("init")
    git("-c", "user.name=a", "-c", "user.email=a", "commit", "--allow-empty", "-m", "another project")
    ask = "from titanfunc.compile_report.checkout import commit; print(commit())"
    found = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    assert found == head.stdout


def test_a_folder_inside_of_another_projects_checkout_has_no_commit(tmp_path):
    assert checkout.commit(tmp_path) == checkout.UNKNOWN
    assert checkout.commit(ROOT / "titanfunc") == checkout.UNKNOWN


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"status": "measured", "fullgraph_error": "what the older way says"}, 0),
        ({"status": "failed", "error": "x"}, 1),
        ({"status": "timed out", "error": "x"}, 1),
        ({"status": "not here", "error": "a CUDA graph needs a CUDA device"}, 0),
        ({"status": "titans_pytorch is not installed"}, 0),
        ({"status": "measured", "warm_error": "timed out: x"}, 1),
        ({"name": "x", "error": "ZeroDivisionError"}, 1),
        ({"name": "x", "right": True, "kernel_us": 1.0}, 0),
        ({"name": "x", "right": False}, 1),
        ({"name": "x", "right": True, "kernel_error": "x"}, 1),
        ({"name": "peer", "right": True, "peer_finite": True, "titans_pytorch_error": "OutOfMemoryError"}, 0),
        ({"name": "peer", "right": True, "peer_finite": False}, 1),
        ({"status": "measured", "loss_finite": False}, 1),
        ({"status": "measured", "state_finite": True}, 0),
    ],
)
def test_the_status_says_whether_all_rows_are_there_and_right(row, status):
    assert exit_status([{"status": "measured"}, row]) == status


def test_a_result_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    out = tmp_path / "new" / "result.json"
    write({"rows": [1]}, out)
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write({"rows": [1, 2]}, out)
    assert json.loads(out.read_text()) == {"rows": [1]}


def test_no_rows_are_no_failure():
    assert exit_status([]) == 0
