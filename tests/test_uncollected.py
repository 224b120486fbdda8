"""The collector rests while a run starts, and works again afterwards."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from titanfunc.uncollected import uncollected

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def restored():
    worked = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if worked else gc.disable)()


def test_what_is_there_at_the_end_is_not_walked_over_again():
    gc.unfreeze()
    with uncollected():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() > len(kept)
    assert not {id(each) for each in gc.get_objects()} & {id(each) for each in kept}


def test_an_error_ends_the_rest():
    with pytest.raises(RuntimeError, match="mistake"), uncollected():
        raise RuntimeError("mistake")
    assert gc.isenabled()


def test_a_collector_that_rests_goes_on_to():
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_training_starts_so():
    told = (
        "import gc, sys; from scripts import train; from titanfunc import job\n"
        "job.assemble = lambda *parts: print('assembles', gc.isenabled()) or gc.get_freeze_count()\n"
        "job.run = lambda before: print('runs', gc.isenabled(), gc.get_freeze_count() > before + 100_000) or 0\n"
        "sys.argv = ['train.py', 'model=mac_tiny']; train.main()"
    )
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["assembles False", "runs True True"], done.stderr
