"""Where caches lie."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.processes import python_path
from titanfunc import caches

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_assembler(monkeypatch):
    """None is chosen, before a test and after it."""
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.delenv("TRITON_PTXAS_PATH")


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("TITANFUNC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caches.folder() == tmp_path / "titanfunc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert caches.folder() == tmp_path / ".cache" / "titanfunc"
    monkeypatch.setenv("TITANFUNC_CACHE", str(tmp_path / "own"))
    assert caches.folder() == tmp_path / "own"


def test_programs_are_kept_there(monkeypatch, tmp_path):
    monkeypatch.setenv("TITANFUNC_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    caches.keep_programs()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine" and list(tmp_path.iterdir()) == []
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    caches.keep_programs()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")


@pytest.mark.parametrize("torch", ["with its own", "without", "that cannot be run", None])
def test_triton_assembles_by_what_torch_brings_along(torch, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    ptxas = tmp_path / "torch" / "bin" / "ptxas"
    if torch in ("with its own", "that cannot be run"):
        ptxas.parent.mkdir(parents=True)
        ptxas.touch(0o755 if torch == "with its own" else 0o644)
    found = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: torch and found)
    caches.keep_programs()
    assert os.environ.get("TRITON_PTXAS_PATH") == (str(ptxas) if torch == "with its own" else None)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "mine")
    caches.keep_programs()
    assert os.environ["TRITON_PTXAS_PATH"] == "mine"


TRAINS_NOTHING = """
import os, sys, types
import titanfunc
job = sys.modules["titanfunc.job"] = titanfunc.job = types.ModuleType("titanfunc.job")
job.assemble = lambda *_: print(os.environ["TORCHINDUCTOR_CACHE_DIR"], "torch" in sys.modules)
job.run = lambda _: 0
sys.argv = ["train.py", "train.device=cpu"]
from scripts import train
train.main()
"""


def test_scripts_choose_the_folder_before_torch_does(tmp_path):
    """torch chooses one when it is imported, and then stays with it."""
    environment = {
        **os.environ,
        "TITANFUNC_CACHE": str(tmp_path),
        "PYTHONPATH": python_path(),
    }
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-c", TRAINS_NOTHING]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'inductor'} False\n"), done.stderr
    for name in ("train", "evaluate", "compare", "meta_train"):
        text = (ROOT / "scripts" / f"{name}.py").read_text()
        assert text.index("keep_programs()") < text.index("  # torch comes with it"), name


def test_a_folder_that_cannot_be_made_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TITANFUNC_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    caches.keep_programs()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
