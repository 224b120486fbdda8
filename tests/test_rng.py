"""Draws as a function of a seed tensor: against the algorithm in whole numbers, statistics, compilation."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from titanfunc import rng

N = 100_000
LIMIT = 4 / math.sqrt(N)  # four standard errors of a correlation
DRAWS = (rng.uniform, rng.gaussian)


def seed(value: int):
    return torch.tensor(value, dtype=torch.int64)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].abs().item()


def splitmix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


@pytest.mark.parametrize("value", [0, 1, -5, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("stream", [0, 3])
def test_uniform_is_splitmix_in_whole_numbers(value, stream):
    golden = 0x9E3779B97F4A7C15
    key = splitmix((splitmix((value * golden + 0xBF58476D1CE4E5B9) % 2**64) + 2 * stream * golden) % 2**64)
    want = [(splitmix((key ^ i) * golden % 2**64) >> 40) / 2**24 for i in range(12)]
    got = rng.uniform(seed(value), (3, 4), stream)
    assert got.dtype == torch.float32 and got.shape == (3, 4) and got.flatten().tolist() == want


def test_uniform_fills_the_unit_interval_evenly():
    u = rng.uniform(seed(0), (N,))
    assert 0 <= u.min().item() < 1e-4 and 1 - 1e-4 < u.max().item() < 1
    counts = torch.histc(u, 100, 0, 1)
    # Chi squared with 99 degrees of freedom: mean 99, standard deviation 14.
    assert 50 < ((counts - N / 100) ** 2 / (N / 100)).sum().item() < 155
    low = (u * 2**24).to(torch.int64) & 0xFF  # the last bits of the mantissa are as good as the first
    assert 170 < ((low.bincount(minlength=256) - N / 256) ** 2 / (N / 256)).sum().item() < 345


def test_gaussian_has_the_moments_of_a_normal_distribution():
    z = rng.gaussian(seed(0), (N,)).double()
    error = 4 / math.sqrt(N)
    assert abs(z.mean().item()) < error and abs(z.var().item() - 1) < error * math.sqrt(2)
    assert abs((z**3).mean().item()) < error * math.sqrt(15) and abs((z**4).mean().item() - 3) < error * math.sqrt(96)
    inside = [(z.abs() < bound).double().mean().item() for bound in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.006) and torch.isfinite(z).all()


@pytest.mark.parametrize(("bits", "want"), [(0, 0.0), (-1, math.sqrt(48 * math.log(2)))])
def test_gaussian_is_finite_at_both_ends_of_the_interval(bits, want, monkeypatch):
    monkeypatch.setattr(rng, "_bits", lambda seed, shape, stream, device: torch.full(shape, bits))
    assert rng.gaussian(seed(0), (1,)).item() == pytest.approx(want) and want < 5.8


@pytest.mark.parametrize("draw", DRAWS)
def test_neighbouring_seeds_streams_and_elements_are_unrelated(draw):
    first = draw(seed(7), (N,))
    for other in (draw(seed(8), (N,)), draw(seed(-7), (N,)), draw(seed(7), (N,), 1), draw(seed(8), (N,), 1)):
        assert correlation(first, other) < LIMIT
    for lag in (1, 2, 3, 16, 128, 1024):
        assert correlation(first[lag:], first[:-lag]) < LIMIT
    u, z = rng.uniform(seed(7), (N,)), rng.gaussian(seed(7), (N,))
    assert correlation(u, z) < LIMIT and correlation(u, z.abs()) < LIMIT
    # The same element of consecutive seeds: what a training run sees of one weight, step by step.
    steps = torch.stack([draw(seed(i), (2,)) for i in range(4000)])
    error = 4 / math.sqrt(4000)
    assert correlation(steps[1:, 0], steps[:-1, 0]) < error and correlation(steps[:, 0], steps[:, 1]) < error
    mean, spread = (0.5, math.sqrt(1 / 12)) if draw is rng.uniform else (0.0, 1.0)
    assert abs(steps.mean().item() - mean) < error * spread


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_depend_on_seed_stream_and_place_alone(draw):
    whole = draw(seed(3), (40, 50), 2)
    torch.manual_seed(5)
    assert torch.equal(draw(seed(3), (2000,), 2).view(40, 50), whole)
    assert torch.equal(draw(seed(3), (100,), 2), whole.flatten()[:100])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_draws_are_the_eager_ones_and_a_new_seed_compiles_nothing(backend):
    torch._dynamo.reset()
    counters.clear()

    def both(s):
        return rng.uniform(s, (1000,), 1), rng.gaussian(s, (1000,), 1)

    compiled = torch.compile(both, fullgraph=True, backend=backend)
    for i in (*range(10), -1, 2**62):
        (u, z), (want_u, want_z) = compiled(seed(i)), both(seed(i))
        assert torch.equal(u, want_u)
        if backend == "inductor":  # its own logarithm and cosine
            torch.testing.assert_close(z, want_z, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(z, want_z)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_draws_work_inside_a_gradient():
    s, x = seed(4), torch.ones(50)
    gradient = torch.func.grad(lambda x: (x * rng.uniform(s, (50,)) + x**2 * rng.gaussian(s, (50,))).sum())(x)
    assert torch.equal(gradient, rng.uniform(s, (50,)) + 2 * rng.gaussian(s, (50,)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_a_gpu_draws_the_cpus_numbers(backend):
    torch._dynamo.reset()
    draws = [lambda s: rng.uniform(s, (N,), 1), lambda s: rng.gaussian(s, (N,), 1)]
    if backend:
        draws = [torch.compile(draw, fullgraph=True, backend=backend) for draw in draws]
    assert torch.equal(draws[0](seed(9).cuda()).cpu(), rng.uniform(seed(9), (N,), 1))
    torch.testing.assert_close(draws[1](seed(9).cuda()).cpu(), rng.gaussian(seed(9), (N,), 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.tensor(1.0), torch.tensor([1])])
def test_a_seed_of_another_kind_is_refused(wrong):
    with pytest.raises(ValueError, match="seed: wanted a 0-d int64 tensor, got torch"):
        rng.uniform(wrong, (3,))
