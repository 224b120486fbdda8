"""What a run is entered with so that it comes out the same each time, and that nothing of it is left behind."""

import pytest
import torch
import torch.utils.deterministic

from titanfunc.train.determinism import same_each_time

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings():
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return enabled, warns, torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(("device", "wanted"), [(CPU, False), (CPU, True), (CUDA, True), (CUDA, False)])
def test_it_holds_inside_and_is_as_before_outside(monkeypatch, device, wanted):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = settings()
    inside = []

    def fail():
        with same_each_time(device, wanted):
            inside.append(settings())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [(True, True, False) if wanted or device is CPU else before]
    assert settings() == before


def test_a_compiled_embeddings_gradient_is_the_same_however_many_threads_add():
    tokens = torch.randint(16, (4096,), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(4096, 16, generator=torch.Generator().manual_seed(1))

    @torch.compile
    def gradient(table):
        return torch.func.grad(lambda table: (torch.nn.functional.embedding(tokens, table) * weights).sum())(table)

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with same_each_time(CPU, False):
            found = [gradient(torch.zeros(16, 16)) for _ in range(30)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], each) for each in found)
