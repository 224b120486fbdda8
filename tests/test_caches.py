"""Where caches lie."""

from __future__ import annotations

import os
from pathlib import Path

from titanfunc import caches


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


def test_a_folder_that_cannot_be_made_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TITANFUNC_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    caches.keep_programs()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
