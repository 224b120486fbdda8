"""The wheel holds everything that training needs, and trains from another directory."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.processes import python_path

ROOT = Path(__file__).parents[1]
TOPS = {"titanfunc": "titanfunc", "titanfunc_kernels": "kernels/titanfunc_kernels"}
INSIDE = {"titanfunc/scripts": "scripts", "titanfunc/conf": "conf"}


def sources() -> set[str]:
    """What the wheel has to hold: every Python file of the packages, and every yaml of conf/."""
    wanted = set()
    for place, folder in {**TOPS, **INSIDE}.items():
        pattern = "*.yaml" if folder == "conf" else "*.py"
        wanted |= {f"{place}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob(pattern)}
    return wanted


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")
    for name in ("titanfunc", "kernels", "scripts", "conf"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tree / "dist")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tree)], check=True)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The wheel as an installer lays it out."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def test_everything_is_in_the_wheel_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources()


def test_console_script_and_licence(site):
    (info,) = site.glob("*.dist-info")
    entries = configparser.ConfigParser()
    entries.read(info / "entry_points.txt")
    assert dict(entries["console_scripts"]) == {
        "titanfunc-train": "titanfunc.scripts.train:main",
        "titanfunc-evaluate": "titanfunc.scripts.evaluate:main",
        "titanfunc-compare": "titanfunc.scripts.compare:main",
        "titanfunc-meta-train": "titanfunc.scripts.meta_train:main",
    }
    assert "Apache License" in next(info.rglob("LICENSE")).read_text()


def test_the_wheel_trains_and_evaluates_elsewhere(site, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.txt").write_text("Some text to be read. " * 20)
    settings = ["model=transformer_tiny", "model.dim=16", "model.layers=1", "model.heads=2", "model.ff=16"]
    settings += ["data=text_folder", "data.path=texts", "data.seq_len=16", "data.batch_size=1"]
    settings += ["data.validation_fraction=0.5", "train.steps=1", "train.sample_tokens=2", "train.compile=none"]
    command = "from titanfunc.scripts.train import main; main()"  # as the console script does
    done = subprocess.run(
        [sys.executable, "-c", command, *settings, "train.run_dir=mine"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "mine" / "curves.png").is_file()
    command = "from titanfunc.scripts.evaluate import main; main()"
    settings = ["tasks=[copying]", "lengths=[8]", "samples=1", "text_rows=1"]
    done = subprocess.run(
        [sys.executable, "-c", command, *settings, "run=mine"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "mine" / "evaluation" / "recall_copying.png").is_file()


def test_constraints_pin_what_the_project_asks_for():
    """Every direct requirement has one exact version; torch and triton are those that go together."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line).groups()
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["trackers"], *extras["dev"]]
    names = {re.match(r"[A-Za-z0-9._-]+", line)[0].lower().replace("_", "-") for line in wanted} - {"titanfunc"}
    assert names <= set(pins)
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
