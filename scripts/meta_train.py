"""Learn an optimizer: ``python scripts/meta_train.py steps=500 tasks=[quadratic,regression]``.

Its weights, for ``titanfunc.optim.learned.load_weights``, metrics and a picture go into a folder of their own. Every
setting is in conf/meta_train.yaml. What can be checked without torch is checked before torch is imported, and a
mistake is told in one line on stderr, with exit status 2.
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
from titanfunc.config.driver import require_driver
from titanfunc.config.failures import tell
from titanfunc.config.meta import MetaConfig, from_mapping, prepare, unknown_key
from titanfunc.config.mistakes import refuse_words, stop

CONF = Path(__file__).resolve().parent.parent / "conf"
MISTAKES = (HydraException, OmegaConfBaseException, ValueError)
EXAMPLE = "steps=500"


def main() -> None:
    """Read the settings from the command line and meta-train; the process ends with an exit status."""
    refuse_words(sys.argv[1:], [field.name for field in dataclasses.fields(MetaConfig)], EXAMPLE)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises what it would otherwise print over several lines
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="meta_train")(_meta_train)()
    except (*MISTAKES, OSError) as error:
        stop(error, unknown_key, EXAMPLE)
    except KeyboardInterrupt:
        print("interrupted: the weights of the last look at held-out tasks are written", file=sys.stderr)
        sys.exit(130)


def _meta_train(settings: DictConfig) -> None:
    """The job that hydra runs. It ends by SystemExit, as hydra would print more than one line for an error."""
    try:
        tree = OmegaConf.to_container(settings, resolve=True)
        assert isinstance(tree, dict)
        plan = prepare(from_mapping({str(name): value for name, value in tree.items()}))
        require_driver(plan.config.device, "device")
        keep_programs()  # before torch decides for itself
        from titanfunc import meta_training  # torch comes with it, and takes seconds: not before the checks

        parts = meta_training.assemble(plan)
    except MISTAKES as error:
        stop(error, unknown_key, EXAMPLE)
    except Exception as error:
        sys.exit(tell(error, "lower tasks_at_once or unroll"))
    try:
        meta_training.run(parts)
    except Exception as error:  # no mistake of the settings
        sys.exit(tell(error, "lower tasks_at_once or unroll"))


if __name__ == "__main__":
    main()
