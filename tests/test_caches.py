"""Where caches lie."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.processes import python_path
from titanfunc import caches

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def nothing_is_chosen(monkeypatch):
    """No assembler, and no folder for bytecode, before a test and after it."""
    for name in ("TRITON_PTXAS_PATH", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)


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


def test_others_may_not_write_where_programs_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("TITANFUNC_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    torch = tmp_path / "torch" / "__init__.py"
    torch.parent.mkdir()
    torch.touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(torch)))
    before = os.umask(0o002)  # as users with a group of their own have it
    try:
        caches.keep_programs()
    finally:
        os.umask(before)
    places = [
        Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]),
        Path(sys.pycache_prefix),
        *Path(sys.pycache_prefix).parents[:2],
    ]
    assert [stat.S_IMODE(place.stat().st_mode) for place in places] == [0o700] * 4


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


TELLS_OF_TORCH = """
from titanfunc.caches import keep_programs
keep_programs()
import os, sys, torch
print(sys.dont_write_bytecode, os.path.exists(torch.__cached__), torch.__cached__)
"""


@pytest.mark.parametrize(
    ("environment", "flags", "kept"),
    [
        ({"PYTHONDONTWRITEBYTECODE": "1"}, [], "in the cache"),
        ({}, [], "beside it"),
        ({"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "mine"}, [], None),
        ({}, ["-B"], None),
        ({"PYTHONDONTWRITEBYTECODE": "1"}, ["-B"], None),
        ({"PYTHONDONTWRITEBYTECODE": "1"}, ["-W", "ignore", "-XB", "-sB"], None),
        ({"PYTHONDONTWRITEBYTECODE": ""}, ["-Bs"], None),
        ({"PYTHONDONTWRITEBYTECODE": "1"}, ["-W", "ignore", "-s"], "in the cache"),
    ],
)
def test_bytecode_is_kept_where_python_would_not_keep_it(environment, flags, kept, tmp_path):
    package = tmp_path / "packages" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    path = os.pathsep.join((str(package.parent), python_path()))
    given = {**os.environ, "TITANFUNC_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path, **environment}

    def tells() -> list[str]:
        command = [sys.executable, *flags, "-c", TELLS_OF_TORCH]
        done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=True)
        return done.stdout.split()

    own = tmp_path / "cache" / "python"
    for _ in range(2):  # what the first keeps, the second finds
        not_written, there, place = tells()
        assert (not_written, there) == (("False", "True") if kept else ("True", "False"))
        assert (own in Path(place).parents) == own.exists() == (kept == "in the cache")


def test_bytecode_that_is_there_stays_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("TITANFUNC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    torch = tmp_path / "torch" / "__init__.py"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(torch)))
    compiled = Path(importlib.util.cache_from_source(str(torch)))
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    caches.keep_bytecode()
    assert sys.pycache_prefix is None and sys.dont_write_bytecode
    compiled.unlink()
    torch.write_text("")
    own = tmp_path / "cache" / "python"
    caches.keep_bytecode()
    assert sys.pycache_prefix == os.environ["PYTHONPYCACHEPREFIX"] and Path(sys.pycache_prefix).parent == own
    assert not sys.dont_write_bytecode and "PYTHONDONTWRITEBYTECODE" not in os.environ
    assert stat.S_IMODE(Path(sys.pycache_prefix).stat().st_mode) == 0o700
    first = sys.pycache_prefix
    torch.write_text("another")
    for mode in (0o777, 0o770, 0o700):  # whom others could put a program into
        monkeypatch.setattr(sys, "pycache_prefix", None)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        own.chmod(mode)
        caches.keep_bytecode()
        assert (sys.pycache_prefix is None) == sys.dont_write_bytecode == (mode != 0o700)
    assert sys.pycache_prefix != first  # another installation's has a folder of its own
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(os, "geteuid", lambda: own.stat().st_uid + 1)
    caches.keep_bytecode()
    assert sys.pycache_prefix is None and sys.dont_write_bytecode


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
