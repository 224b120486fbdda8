"""Compare optimizers under one budget: ``python scripts/compare.py optims=[adamw,muon] seeds=[0,1,2]``.

Each optimizer tries equally many learning rates on a seed of its own and then runs all seeds at the best; with a seed,
all read the same batches. Every setting is in conf/compare.yaml. What can be checked without torch is checked before
torch is imported, and a mistake is told in one line on stderr, with exit status 2.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from titanfunc.caches import keep_programs
from titanfunc.config.compare import SECTIONS, CompareConfig, prepare, unknown_key
from titanfunc.config.driver import require_driver, require_kernels
from titanfunc.config.failures import tell
from titanfunc.config.mistakes import refuse_words, stop
from titanfunc.config.presets import offer

CONF = Path(__file__).resolve().parent.parent / "conf"
MISTAKES = (HydraException, OmegaConfBaseException, ValueError)
EXAMPLE = "seeds=[0,1,2]"


def main() -> None:
    """Read the settings from the command line and compare; the process ends with an exit status."""
    offer(ConfigStore.instance())
    names = [field.name for field in dataclasses.fields(CompareConfig)]
    refuse_words(sys.argv[1:], [*names, *SECTIONS], EXAMPLE)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises what it would otherwise print over several lines
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="compare")(_compare)()
    except (*MISTAKES, OSError) as error:
        stop(error, unknown_key, EXAMPLE)
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept; go on with out=FOLDER", file=sys.stderr)
        sys.exit(130)


def _compare(settings: DictConfig) -> None:
    """The job that hydra runs. It ends by SystemExit, as hydra would print more than one line for an error."""
    try:
        tree = OmegaConf.to_container(settings, resolve=True)
        assert isinstance(tree, dict)
        plan = prepare({str(name): value for name, value in tree.items()}, _read_optimizer)
        device = plan.budget.train.device
        require_driver(device, "train.device")
        require_kernels(plan.budget.model.kernels, device, "model.kernels")
        for entry in plan.entries:
            require_kernels(entry.optim.kernels, device, f"entries: {entry.name}: optim.kernels")
        keep_programs()  # before torch decides for itself
        from titanfunc import comparison  # torch comes with it, and takes seconds: not before the checks

        setup = comparison.assemble(plan)
    except MISTAKES as error:
        stop(error, unknown_key, EXAMPLE)
    except Exception as error:
        sys.exit(tell(error))
    try:
        status = comparison.run(setup)
    except Exception as error:  # no mistake of the settings
        status = tell(error)
    if status:
        sys.exit(status)


def _read_optimizer(name: str) -> Mapping[str, Any]:
    """The settings in a file of conf/optim, its own defaults list followed."""
    found = GlobalHydra.instance().config_loader().get_group_options("optim")
    choices = [choice for choice in found if choice != "base"]  # which is what the others are written on
    if name not in choices:
        raise ValueError(f"optims: wanted some of {', '.join(choices)}, got {name!r}")
    settings = OmegaConf.to_container(hydra.compose(f"optim/{name}").optim, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


if __name__ == "__main__":
    main()
