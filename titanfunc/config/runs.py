"""Run folders and what lies in them, as far as names and json go. No torch: a wrong folder is refused at once.

runs/2026-01-31_12-00-00_mac_tiny/
    config.yaml                        every setting, filled in
    metrics.jsonl                      a row a logging interval, a validation, ...
    checkpoints/step_00000200/         the training state (checkpoints.py)
    lock                               held by the process that trains
    data.json                          which files were read: a run that is resumed reads the same
    tokenizer.json                     what made the tokens, unless they are bytes
    sample.txt, curves.png             written at the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from titanfunc.config._check import require
from titanfunc.config.checkpoints import (
    CHECKPOINTS,
    METADATA,
    check,
    checkpoints,
    last_written,
    newest_whole,
    read_metadata,
    step_of,
    warn_unless_verified,
)
from titanfunc.config.data import DataConfig
from titanfunc.config.experiment import Experiment
from titanfunc.config.files import expanded, require_folder
from titanfunc.config.lock import hold, is_free
from titanfunc.config.model import ModelConfig
from titanfunc.config.optim import OptimConfig
from titanfunc.config.strict_json import read_json

RUNS = Path("runs")
DATA, TOKENIZER, METRICS, CURVES = "data.json", "tokenizer.json", "metrics.jsonl", "curves.png"


def newest_of_all(field: str, root: Path = RUNS) -> Path | None:
    """The newest whole checkpoint of the run under ``root`` whose checkpoint was written last, or None.

    Raises ValueError, beginning with ``field``, if that run has none that is whole: an older one has to be named.
    """
    written = {run: when for run in root.glob("*") if (when := last_written(run)) is not None}
    if not written:
        return None
    newest, *older = sorted(written, key=lambda run: (written[run], run), reverse=True)
    found, faults = newest_whole(newest)
    if found is None:
        other = next((run for run in older if checkpoints(run)), None)
        ask = f"; to take an older run, name it, as {field}={other}" if other else ""
        raise ValueError(
            f"{field}: wanted a whole checkpoint in {newest}, the newest run, got none ({'; '.join(faults)}){ask}"
        )
    return found


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint's folder, whole or not, and not a run's."""
    return os.path.exists(path / METADATA) or (step_of(path) is not None and os.path.isdir(path))


def latest(run_dir: Path) -> Path:
    """The newest checkpoint of a run that is whole. Raises ValueError if it has none."""
    found, faults = newest_whole(run_dir)
    if found is None:
        why = f" ({'; '.join(faults)})" if faults else ""
        raise ValueError(f"train.resume: no whole checkpoint in {run_dir}{why}; leave train.resume out to begin anew")
    return found


def find_checkpoint(resume: str, run_dir: str = "", root: Path = RUNS) -> Path:
    """The checkpoint that ``train.resume`` means, every byte of it verified.

    "latest" is the newest of ``run_dir`` or, if that is empty, of the run under ``root`` whose checkpoint was
    written last. Anything else is a run's folder, or a checkpoint's. Of a run, the newest that is whole is taken, and
    damaged ones are told of on stderr. Raises ValueError if there is none, or the very checkpoint named is damaged.
    """
    if resume != "latest":
        path = expanded(resume)
        if is_checkpoint(path):
            check(path)
            return path
        if not os.path.isdir(path):
            raise ValueError(f"train.resume: wanted latest, or the folder of a run or a checkpoint, got {resume!r}")
        return latest(path)
    if run_dir:
        return latest(expanded(run_dir))
    newest = newest_of_all("train.resume", root)
    if newest is None:
        raise ValueError(f"train.resume: no run under {root.resolve()} has a checkpoint; leave train.resume out")
    return newest


def commit_of(run_dir: Path, data: DataConfig) -> str:
    """The commit of the dataset on the hub that a run was begun on, if ``data`` names that one and no revision, which
    would be the newest; "" where there is none, or what the run's folder says of its data cannot be read."""
    if data.corpus != "hub" or data.revision:
        return ""
    try:
        there = read_json(run_dir / DATA)
        commit = there["commit"] if there["named"][:3] == ["hub", data.path, data.subset] else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return commit if isinstance(commit, str) else ""


HOW_COMPUTED = ("kernels", "attention", "remat", "layer_code", "moe.kernel", "fp8_scaling")
"""Fields of a ModelConfig that say nothing of what the model is."""


def refuse_other_model(metadata: Mapping[str, Any], model: ModelConfig, checkpoint: Path) -> None:
    """Raise ValueError, naming the first difference, unless the checkpoint is of this very model; which kernels compute
    it may differ."""
    for name, there, here in differences(metadata["model"], model):
        if name in HOW_COMPUTED:
            continue
        raise ValueError(
            f"{checkpoint} is of another model: model.{name} is {there!r} there and {here!r} here; "
            f"ask for that model, or for another train.resume"
        )


def refuse_other_optimizer(metadata: Mapping[str, Any], optim: OptimConfig, checkpoint: Path) -> None:
    """Raise ValueError unless the checkpoint's state is that of this optimizer; one that does not say is taken."""
    there = metadata.get("optim")
    if not isinstance(there, Mapping) or "name" not in there:
        return
    nested = there.get("nested")
    base = nested.get("base") if isinstance(nested, Mapping) else None
    require(there["name"] == optim.name, "optim.name", f"{there['name']}, whose state {checkpoint} holds", optim.name)
    ok = optim.name != "nested" or base in (None, optim.nested.base)
    require(ok, "optim.nested.base", f"{base}, whose state {checkpoint} holds", optim.nested.base)


def differences(there: Mapping[str, Any], here: Any) -> list[tuple[str, Any, Any]]:
    """``(dotted name, value there, value here)`` for every field of a dataclass that differs from its json."""
    old, new = _flat(there), _flat(json.loads(json.dumps(dataclasses.asdict(here))))
    names = [*new, *(name for name in old if name not in new)]
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def plan_run_dir(run_dir: str, preset: str, checkpoint: Path | None = None, root: Path = RUNS) -> Path:
    """The folder that a run will use; makes nothing, but locks a run that goes on (``lock.hold``).

    A resumed run goes on in its own folder unless ``run_dir`` names another. Raises ValueError if a new run's
    folder is a file, cannot be made or already holds something, or a run would go on from a checkpoint that is not
    its newest, or that another process trains.
    """
    if checkpoint is not None and checkpoint.resolve().parent.name == CHECKPOINTS:
        own = checkpoint.resolve().parent.parent
        if not run_dir or expanded(run_dir).resolve() == own:
            hold(own)  # first: until then another process may save a later one
            later = _later(own, checkpoint)
            if later is not None:
                raise ValueError(
                    f"train.resume: {checkpoint} is not the newest checkpoint of its run ({later.name} is); name "
                    f"another folder by train.run_dir to go on from it there"
                )
            return own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own
    if not run_dir:
        require_folder(root, "train.run_dir")
        return root / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{preset}"
    path = expanded(run_dir)
    if os.path.exists(path) and not (os.path.isdir(path) and is_free(path)):
        raise ValueError(
            f"train.run_dir: {path} already holds something; name another folder, or continue the run in it by "
            f"train.resume=latest"
        )
    require_folder(path, "train.run_dir")
    return path


def _later(run_dir: Path, checkpoint: Path) -> Path | None:
    """A whole checkpoint of a run that is newer than one, or None."""
    after = step_of(checkpoint.resolve()) or 0
    for path in reversed(checkpoints(run_dir)):
        if (step_of(path) or 0) <= after:
            return None
        with contextlib.suppress(ValueError):
            check(path)
            return path
    return None


def make_run_dir(path: Path, *, exact: bool) -> Path:
    """Make a new run's folder and return it.

    exact: it has to be this one (it may be there, empty). Otherwise the next free name is taken
    (``..._2``) if another run was started in the same second.
    """
    if exact:
        path.mkdir(parents=True, exist_ok=True)
        return path
    for number in itertools.count(1):
        made = path if number == 1 else path.with_name(f"{path.name}_{number}")
        with contextlib.suppress(FileExistsError):
            made.mkdir(parents=True)
            break
    return made


class Place(NamedTuple):
    """Where a run lives: its folder, and the checkpoint that it goes on from, with that one's json.

    resumes: whether the run goes on in a folder that is there already.
    """

    run_dir: Path
    checkpoint: Path | None = None
    metadata: Mapping[str, Any] = {}
    resumes: bool = False


def prepare(experiment: Experiment, root: Path = RUNS) -> Place:
    """Look at everything outside the settings that a run needs; makes nothing, but locks a run that goes on.

    Raises ValueError, in one line, for a corpus, a tracker or a checkpoint that is missing, a checkpoint of
    another model or optimizer, or with all steps done (unless the run was killed before its last files were
    written), or a run's folder that is taken, or a run that another process trains.
    """
    train = experiment.train
    experiment.data.check_memory()
    experiment.data.check_sources()
    experiment.data.check_hub()
    if train.tracker != "none" and importlib.util.find_spec(train.tracker) is None:
        raise ValueError(f"train.tracker: {train.tracker} is not installed; run: pip install {train.tracker}")
    if not train.resume:
        return Place(plan_run_dir(train.run_dir, experiment.preset, root=root))
    checkpoint = find_checkpoint(train.resume, train.run_dir, root)
    metadata = read_metadata(checkpoint)
    warn_unless_verified(checkpoint, metadata)
    refuse_other_model(metadata, experiment.model, checkpoint)
    refuse_other_optimizer(metadata, experiment.optim, checkpoint)
    run_dir = plan_run_dir(train.run_dir, experiment.preset, checkpoint, root)
    resumes = run_dir.resolve() in checkpoint.resolve().parents
    done = metadata["step"]
    unfinished = resumes and done == train.steps and not (run_dir / CURVES).exists()  # killed while it wrote its last
    if done >= train.steps and not unfinished:
        raise ValueError(f"train.steps: wanted more than the {done} steps of {checkpoint}, got {train.steps}")
    return Place(run_dir, checkpoint, metadata, resumes)


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {path + key: value}
    return flat
