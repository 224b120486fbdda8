"""Where caches lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from titanfunc import caches

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.mark.slow
def test_a_run_keeps_them_there(tmp_path):
    """torch chooses a folder when it is imported, and then stays with it."""
    settings = "model=transformer_tiny model.layers=1 model.dim=16 model.heads=2 model.ff=16 data.batch_size=1"
    settings += " data.seq_len=32 train.steps=1 train.eval_every=0 train.sample_tokens=0 train.eval_batches=1"
    settings += " train.compile=inductor train.device=cpu"
    environment = {**os.environ, "TITANFUNC_CACHE": str(tmp_path / "cache")}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *settings.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache" / "inductor" / "fxgraph").is_dir()


def test_a_folder_that_cannot_be_made_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TITANFUNC_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    caches.keep_programs()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
