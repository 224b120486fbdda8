"""Report how a training step compiles: ``python scripts/compile_report.py model=mac_168m batch_size=16``.

A row a variant: graphs, breaks, recompiles, seconds to compile without and with caches, kernels, launches, step time
and memory, each in a process of its own; a table here, ``report.json`` and ``report.html`` in the run's folder. Every
setting is in conf/compile_report.yaml. What can be checked without torch is checked before torch is imported, and a
mistake is told in one line on stderr, with exit status 2. A row that failed, or was stopped at its time_limit, stands
in the report and makes the exit status 1; one that cannot run here ("not here") does not.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from titanfunc.config.compile_report import SECTIONS, CompileReportConfig, prepare, unknown_key
from titanfunc.config.driver import require_driver
from titanfunc.config.failures import tell
from titanfunc.config.mistakes import explain, refuse, refuse_words
from titanfunc.config.presets import offer

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = (HydraException, OmegaConfBaseException, ValueError)
EXAMPLE = "variants=[eager,inductor]"


def main() -> None:
    """Read the settings from the command line and measure; the process ends with an exit status."""
    offer(ConfigStore.instance())
    names = [field.name for field in dataclasses.fields(CompileReportConfig)]
    refuse_words(sys.argv[1:], [*names, *SECTIONS], EXAMPLE)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises what it would otherwise print over several lines
    try:
        hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="compile_report")(_report)()
    except MISTAKES as error:
        refuse(explain(error, unknown_key, EXAMPLE))
    except KeyboardInterrupt:
        print("interrupted: the rows that were measured are in the report", file=sys.stderr)
        sys.exit(130)


def _report(settings: DictConfig) -> None:
    """The job that hydra runs. It ends by SystemExit, as hydra would print more than one line for an error."""
    try:
        tree = OmegaConf.to_container(settings, resolve=True)
        assert isinstance(tree, dict)
        plan = prepare({str(name): value for name, value in tree.items()})
        require_driver(plan.config.device, "device")
        from titanfunc.compile_report.report import assemble, run  # torch comes with it, and takes seconds

        setup = assemble(plan, ROOT / "benchmarks")
    except MISTAKES as error:
        refuse(explain(error, unknown_key, EXAMPLE))
    except Exception as error:
        sys.exit(tell(error))
    try:
        complete = run(setup)
    except Exception as error:  # no mistake of the settings
        sys.exit(tell(error))
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
