"""Float32 numbers in two halves, of which one is the number rounded: nothing is lost."""

import torch
import triton
import triton.language as tl
from titanfunc_kernels import memory_wide_state

from tests.kernels import checks

_store, _load = memory_wide_state.store_state, memory_wide_state.load_state
TIES = [1 + 2.0**-8, -1 - 2.0**-8, 1 + 3 * 2.0**-8]  # midway between two numbers of bfloat16
EDGES = [
    0.0,
    -0.0,
    1e-42,
    -1e-42,
    torch.finfo(torch.float32).max,
    -torch.finfo(torch.float32).max,
    torch.inf,
    -torch.inf,
]


@triton.jit
def _there_and_back(x, high, low, out, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    _store(high, low, at, tl.load(x + at, mask=at < size), at < size)
    tl.store(out + at, _load(high, low, at, at < size), mask=at < size)


def there_and_back(x, dtype):
    with checks.poison():
        high, out, low = torch.empty_like(x, dtype=dtype), torch.empty_like(x), memory_wide_state.lower_halves(x, dtype)
        _there_and_back[(1,)](x, high, low, out, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return high, out


def numbers():
    powers = checks.draw(500, seed=1, scale=30).exp2()
    return torch.cat([powers * checks.draw(500), torch.tensor([*TIES, *EDGES], device=checks.DEVICE)])


def test_halves_make_the_number():
    x = numbers()
    high, out = there_and_back(x, torch.bfloat16)
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))
    small = x.abs() < 3e38
    off = (high.double() - x.double()).abs()
    assert (off[small] <= (x.bfloat16().double() - x.double()).abs()[small]).all()
    assert torch.equal(high[~small], x[~small].bfloat16())


def test_a_nan_stays_one():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32, device=checks.DEVICE)
    for half in there_and_back(bits.view(torch.float32), torch.bfloat16):
        assert half.isnan().all()


def test_float32_is_kept_as_it_is():
    x = numbers()
    for whole in there_and_back(x, torch.float32):
        assert torch.equal(whole.view(torch.int32), x.view(torch.int32))
