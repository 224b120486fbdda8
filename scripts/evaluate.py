"""Evaluate trained runs: ``python scripts/evaluate.py run=runs/... tasks=[passkey]``, or ``titanfunc-evaluate``.

Recall by length and depth as tables, rows and pictures; loss by position; the same with the memory off. Every setting
is in conf/evaluate.yaml. What can be checked without torch is checked before torch is imported, and a mistake is told
in one line on stderr, with exit status 2.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from titanfunc.caches import keep_programs
from titanfunc.config.driver import require_driver, require_kernels
from titanfunc.config.evaluate import EvaluateConfig, from_mapping, prepare, unknown_key
from titanfunc.config.failures import tell
from titanfunc.config.mistakes import refuse_words, stop

CONF = Path(__file__).resolve().parent.parent / "conf"
MISTAKES = (HydraException, OmegaConfBaseException, ValueError)
EXAMPLE = "lengths=[2048,4096]"


def main() -> None:
    """Read the settings from the command line and evaluate; the process ends with an exit status."""
    names = [field.name for field in dataclasses.fields(EvaluateConfig)]
    # --run alone is a flag of hydra's.
    refuse_words(sys.argv[1:], ["run=" if name == "run" else name for name in names], EXAMPLE)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises what it would otherwise print over several lines
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")(_evaluate)()
    except (*MISTAKES, OSError) as error:
        stop(error, unknown_key, EXAMPLE)
    except KeyboardInterrupt:
        print("interrupted: the rows of finished runs are written", file=sys.stderr)
        sys.exit(130)


def _evaluate(settings: DictConfig) -> None:
    """The job that hydra runs. It ends by SystemExit, as hydra would print more than one line for an error."""
    try:
        tree = OmegaConf.to_container(settings, resolve=True)
        assert isinstance(tree, dict)
        plan = prepare(from_mapping({str(name): value for name, value in tree.items()}))
        require_driver(plan.config.device, "device")
        require_kernels(plan.config.kernels, plan.config.device, "kernels")
        keep_programs()  # before torch decides for itself
        from titanfunc import evaluation  # torch comes with it, and takes seconds: not before the checks

        tests = evaluation.assemble(plan)
    except MISTAKES as error:
        stop(error, unknown_key, EXAMPLE)
    except Exception as error:
        sys.exit(tell(error, "lower batch_size or piece"))
    try:
        evaluation.run(tests)
    except Exception as error:  # no mistake of the settings
        sys.exit(tell(error, "lower batch_size or piece"))


if __name__ == "__main__":
    main()
