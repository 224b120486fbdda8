"""Run folders and what lies in them, as far as names and json go. No torch: a wrong folder is refused at once.

runs/2026-01-31_12-00-00_mac_tiny/
    config.yaml                        every setting, filled in
    metrics.jsonl                      a row a logging interval, a validation, ...
    checkpoints/step_00000200/
        checkpoint.json                what it is: format, step, configurations, versions
        state.safetensors              every tensor of the training state
    sample.txt, curves.png             written at the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from titanfunc.config.experiment import Experiment
from titanfunc.config.model import ModelConfig

RUNS = Path("runs")
CHECKPOINTS = "checkpoints"
METADATA = "checkpoint.json"
TENSORS = "state.safetensors"
FORMAT = 1


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step (optimizer steps done)."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, by step, oldest first; empty if there are none."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / METADATA).is_file() and (path / TENSORS).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def latest(run_dir: Path) -> Path:
    """The newest checkpoint of a run. Raises ValueError if it has none."""
    found = checkpoints(run_dir)
    if not found:
        raise ValueError(f"train.resume: no checkpoint in {run_dir}; leave train.resume out to begin anew")
    return found[-1]


def find_checkpoint(resume: str, run_dir: str = "", root: Path = RUNS) -> Path:
    """The checkpoint that ``train.resume`` means.

    "latest" is the newest of ``run_dir`` or, if that is empty, of the run under ``root`` whose checkpoint was
    written last. Anything else is a run's folder, or a checkpoint's. Raises ValueError if there is none.
    """
    if resume != "latest":
        path = Path(resume)
        if (path / METADATA).is_file():
            return path
        if not path.is_dir():
            raise ValueError(f"train.resume: wanted latest, or the folder of a run or a checkpoint, got {resume!r}")
        return latest(path)
    if run_dir:
        return latest(Path(run_dir))
    newest = [found[-1] for run in root.glob("*") if (found := checkpoints(run))]
    if not newest:
        raise ValueError(f"train.resume: no run under {root.resolve()} has a checkpoint; leave train.resume out")
    return max(newest, key=lambda path: ((path / METADATA).stat().st_mtime_ns, path))


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """The json of a checkpoint. Raises ValueError if it is missing, damaged or of another format."""
    try:
        metadata = json.loads((checkpoint / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint}: not a checkpoint that can be read ({error})") from None
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if version != FORMAT:
        raise ValueError(f"{checkpoint}: wanted a checkpoint of format {FORMAT}, got {version}")
    for name, kind in (("step", int), ("model", dict)):
        if not isinstance(metadata.get(name), kind):
            raise ValueError(f"{checkpoint}: not a checkpoint that can be read ({METADATA} has no {name!r})")
    return metadata


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


def differences(there: Mapping[str, Any], here: Any) -> list[tuple[str, Any, Any]]:
    """``(dotted name, value there, value here)`` for every field of a dataclass that differs from its json."""
    old, new = _flat(there), _flat(json.loads(json.dumps(dataclasses.asdict(here))))
    names = [*new, *(name for name in old if name not in new)]
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def plan_run_dir(run_dir: str, preset: str, checkpoint: Path | None = None, root: Path = RUNS) -> Path:
    """The folder that a run will use; makes nothing.

    A resumed run goes on in its own folder unless ``run_dir`` names another. Raises ValueError if a new run's
    folder is a file or already holds something, or a run would go on from a checkpoint that is not its newest.
    """
    if checkpoint is not None and checkpoint.resolve().parent.name == CHECKPOINTS:
        own = checkpoint.resolve().parent.parent
        if not run_dir or Path(run_dir).resolve() == own:
            newest = latest(own).name
            if newest != checkpoint.resolve().name:
                raise ValueError(
                    f"train.resume: {checkpoint} is not the newest checkpoint of its run ({newest} is); name "
                    f"another folder by train.run_dir to go on from it there"
                )
            return own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own
    if not run_dir:
        return root / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{preset}"
    path = Path(run_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"train.run_dir: {path} already holds something; name another folder, or continue the run in it by "
            f"train.resume=latest"
        )
    return path


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
    """Look at everything outside the settings that a run needs; makes nothing.

    Raises ValueError, in one line, for a corpus, a tracker or a checkpoint that is missing, a checkpoint of
    another model or with all steps done, or a run's folder that is taken.
    """
    train = experiment.train
    experiment.data.check_sources()
    if train.tracker != "none" and importlib.util.find_spec(train.tracker) is None:
        raise ValueError(f"train.tracker: {train.tracker} is not installed; run: pip install {train.tracker}")
    if not train.resume:
        return Place(plan_run_dir(train.run_dir, experiment.preset, root=root))
    checkpoint = find_checkpoint(train.resume, train.run_dir, root)
    metadata = read_metadata(checkpoint)
    refuse_other_model(metadata, experiment.model, checkpoint)
    done = metadata["step"]
    if done >= train.steps:
        raise ValueError(f"train.steps: wanted more than the {done} steps of {checkpoint}, got {train.steps}")
    run_dir = plan_run_dir(train.run_dir, experiment.preset, checkpoint, root)
    return Place(run_dir, checkpoint, metadata, run_dir.resolve() in checkpoint.resolve().parents)


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {path + key: value}
    return flat
