"""What is said of every test of kernels: their marker, and numbers of few bits under the interpreter."""

import os

import pytest
import torch

from tests.kernels.interpreter import right_bfloat16, right_float8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker("kernel")


@pytest.fixture(autouse=True, scope="session")
def few_bits_as_on_the_device():
    """bfloat16 and 8-bit numbers under the interpreter round and multiply as on a GPU, in every test of kernels."""
    if torch.cuda.is_available():
        yield
    else:
        with right_bfloat16(), right_float8():
            yield
