"""What a compiler is told of the raw operations, forward and backward: their shapes, and that they alias nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import checks
from tests.kernels.test_devices import CASES


class Calls(TorchDispatchMode):
    """Keeps the arguments of every operation of titanfunc that runs."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "titanfunc":
            self.seen[operation] = args
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("case", CASES)
def test_fakes_have_the_shapes_of_what_is_computed(case):
    function, tensors = CASES[case][1]()
    smooth = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]
    with Calls() as calls:
        checks.slopes_of(function, smooth)(*tensors)
    names = [operation._schema.name for operation in calls.seen]
    assert any(name.endswith("_backward") for name in names) and len(names) >= 2
    for operation, args in calls.seen.items():
        torch.library.opcheck(operation, args, test_utils=("test_schema", "test_faketensor"))
