import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DeviceReads(TorchDispatchMode):
    """Counts what brings a value from a tensor to Python: item, int, float, bool, tolist, numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device_reads(monkeypatch):
    reads = DeviceReads()

    def counted(method):
        def call(tensor, *args, **kwargs):
            reads.count += 1
            return method(tensor, *args, **kwargs)

        return call

    for name in ("tolist", "numpy"):  # these two pass the dispatcher by
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    with reads:
        for read in (torch.Tensor.item, torch.Tensor.tolist, int, bool):
            read(torch.zeros(()))
        assert reads.count == 4  # the counter works
        reads.count = 0
        yield reads
