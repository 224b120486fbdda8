"""Tests marked ``gpu`` are skipped where there is no CUDA device."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

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
