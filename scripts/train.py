"""Train a language model: ``python scripts/train.py model=mac_tiny optim.lr=1e-3``, or ``titanfunc-train``.

Every setting is in conf/. What can be checked without torch is checked before torch is imported, and a mistake is
told in one line on stderr, with exit status 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from titanfunc.caches import keep_programs
from titanfunc.config.driver import require_driver, require_kernels
from titanfunc.config.experiment import SECTIONS, from_mapping, unknown_key
from titanfunc.config.failures import tell
from titanfunc.config.mistakes import refuse_words, stop
from titanfunc.config.presets import offer
from titanfunc.config.runs import prepare
from titanfunc.uncollected import uncollected

CONF = Path(__file__).resolve().parent.parent / "conf"
MISTAKES = (HydraException, OmegaConfBaseException, ValueError)
EXAMPLE = "train.steps=100"


def main() -> None:
    """Read the settings from the command line and train; the process ends with the run's exit status."""
    offer(ConfigStore.instance())
    refuse_words(sys.argv[1:], SECTIONS, EXAMPLE)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises what it would otherwise print over several lines
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(_train)()
    except (*MISTAKES, OSError) as error:
        stop(error, unknown_key, EXAMPLE)
    except KeyboardInterrupt:
        print("interrupted: nothing is lost but what came after the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _train(settings: DictConfig) -> None:
    """The job that hydra runs. It ends by SystemExit, as hydra would print more than one line for an error."""
    try:
        tree = OmegaConf.to_container(settings, resolve=True)
        assert isinstance(tree, dict)
        experiment = from_mapping({str(name): section for name, section in tree.items()})
        place = prepare(experiment)
        require_driver(experiment.train.device, "train.device")
        for name in ("model", "optim"):
            require_kernels(getattr(experiment, name).kernels, experiment.train.device, f"{name}.kernels")
        keep_programs()  # before torch decides for itself
        try:
            with uncollected():
                from titanfunc import job  # torch comes with it, and takes seconds: not before the checks

                parts = job.assemble(experiment, place)
        except KeyboardInterrupt:
            kept = f"; tokens that lie in {experiment.data.cache_dir} are kept" if experiment.data.cache_dir else ""
            print(f"interrupted before the first step{kept}", file=sys.stderr)
            sys.exit(130)
    except MISTAKES as error:
        stop(error, unknown_key, EXAMPLE)
    except Exception as error:
        sys.exit(tell(error))
    try:
        status = job.run(parts)
    except Exception as error:  # no mistake of the settings
        status = tell(error)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
