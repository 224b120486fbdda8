"""Tests marked ``gpu`` are skipped where there is no CUDA device, and kernels are interpreted there."""

import os
import tempfile

import pytest
import torch

_CACHE = tempfile.TemporaryDirectory(prefix="titanfunc_tests_", ignore_cleanup_errors=True)
os.environ["TITANFUNC_CACHE"] = _CACHE.name

if not torch.cuda.is_available():
    # Inductor looks up what the processor can, rather than compile a file a kind in every new folder of caches, and
    # compiles in this process: on a CPU another one costs more to begin than it compiles in a test.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Before anything imports triton, whose own functions are made for the one or the other when they are defined.
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # Each of pytest's workers compiles in processes of its own, for which inductor would begin 32.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    from titanfunc import caches

    caches.have_one_assembler()  # as in a run: what is tested is what is used


def pytest_unconfigure() -> None:
    _CACHE.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def graphs():
    """Counts what is compiled: a backend to compile with, and the list of graphs it was given."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    yield backend, seen
    torch._dynamo.reset()
