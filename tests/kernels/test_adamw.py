"""The AdamW update of many leaves."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import checks
from tests.kernels.checks import DEVICE, DTYPES, draw
from titanfunc import optim
from titanfunc.ops import _by_reference
from titanfunc.ops.adamw import adamw_update

SHAPES = [(3, 5), (1,), (2, 1030), (0, 4), (7,), (16,), (2049,), (4, 4, 4), (33,), (9,)]  # more than one launch takes
LARGE = [(50_304, 768), (1000, 1001), (13,), (12, 768, 3072)]
B1, B2, EPS = 0.9, 0.95, 1e-8
DECAY = 0.1


def scalars(step=3, clip=0.7):
    rates = (2e-2, clip, 1 / (1 - B1**step), 1 / (1 - B2**step))
    return [torch.tensor(rate, device=DEVICE) for rate in rates]


def leaves(shapes, dtype=torch.float32):
    """params, grads, first and second, one after another."""
    drawn = [[draw(*shape, dtype=dtype, seed=20 * k + i) for i, shape in enumerate(shapes)] for k in range(4)]
    return [*drawn[0], *drawn[1], *drawn[2], *(leaf.square() + 0.01 for leaf in drawn[3])]


def update(kernels, count, apply=False):
    """The update as a function of the four scalars and the leaves."""
    decays = [DECAY if i % 2 == 0 else 0.0 for i in range(count)]

    def run(*tensors):
        groups = [tensors[4 + i * count : 4 + (i + 1) * count] for i in range(4)]
        moved = adamw_update(*groups, *tensors[:4], decays=decays, b1=B1, b2=B2, eps=EPS, apply=apply, kernels=kernels)
        return tuple(leaf for group in moved for leaf in group)

    return run


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, apply):
    count = len(SHAPES)
    tensors = [*scalars(), *leaves(SHAPES, dtype)]
    checks.check_against_float64(update("triton", count, apply), update("reference", count, apply), tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_leaves(dtype):
    count = len(LARGE)
    tensors = [*scalars(), *leaves(LARGE, dtype)]
    checks.check_against_float64(update("triton", count), update("reference", count), tensors, gradients=False)


def test_leaves_that_lie_strided_or_off_the_alignment():
    p, g, m, v = draw(9, 6), draw(9, 12, seed=1)[:, ::2], draw(55, seed=2)[1:].view(6, 9), draw(9, 6, seed=3).square()
    tensors = [*scalars(), p.mT, g.mT, m, v.mT]
    checks.check_against_float64(update("triton", 1), update("reference", 1), tensors, gradients=False)


def test_a_leaf_without_axes():
    tensors = [*scalars(), *(leaf.reshape(()) for leaf in leaves([(1,)]))]
    checks.check_against_float64(update("triton", 1), update("reference", 1), tensors, gradients=False)


def test_a_gradient_of_zeros_and_a_fresh_state():
    zeros = torch.zeros(5, device=DEVICE)
    fresh = scalars(step=1)
    for g in (zeros, draw(5), 1e-20 * draw(5)):
        tensors = [*fresh, draw(5, seed=1), g, zeros, zeros]
        checks.check_against_float64(update("triton", 1), update("reference", 1), tensors, gradients=False)


def test_it_is_the_chain_of_transformations():
    shapes = {"a": (3, 4), "b": (5,)}
    params = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tx = optim.adamw(2e-2, B1, B2, EPS, DECAY, clip_norm=1.0)
    state, ours = tx.init(params), dict(params)
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = dict(first)
    for t in range(1, 4):
        grads = {name: draw(*shape, seed=100 * t + i) for i, (name, shape) in enumerate(shapes.items())}
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        groups = [list(tree.values()) for tree in (ours, grads, first, second)]
        moved = adamw_update(
            *groups, *scalars(t, 1.0)[:1], 1 / norm.clamp(min=1), *scalars(t)[2:],
            decays=[DECAY] * 2, b1=B1, b2=B2, eps=EPS, apply=True, kernels="triton",
        )  # fmt: skip
        ours, first, second = (dict(zip(shapes, group, strict=True)) for group in moved)
        for name, p in params.items():
            torch.testing.assert_close(ours[name], p, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(second[name], state[1].second[name], rtol=1e-5, atol=1e-7)


def test_compiled_mapped_and_second_derivative():
    tensors = [*scalars(), *leaves([(3, 5), (7,)])]
    smooth = (0, 1, *range(4, 12))
    checks.check_compiled(update("triton", 2), tensors, smooth)
    checks.check_second(update("triton", 2), update("reference", 2), tensors, smooth)
    stacked = [*tensors[:4], *(torch.stack([t, 2 * t], -1) for t in tensors[4:])]
    checks.check_vmap(update("triton", 2), stacked, [None] * 4 + [-1] * 8, (0, 1, 4, 5, 6))


def test_the_backward_that_was_bound_runs():
    tensors = [*scalars(), *leaves([(3, 5)])]
    checks.check_backward_that_runs(_by_reference, "gradients", update("triton", 1), tensors, range(8))


def test_a_rate_that_changes_compiles_once(graphs):
    backend, seen = graphs
    compiled = torch.compile(update("triton", 1), fullgraph=True, backend=backend)
    state = leaves([(3, 5)])
    for step in range(1, 4):
        compiled(*scalars(step, 1 / step), *state)
    assert len(seen) == 1


def test_what_is_refused():
    p, rates = draw(3), scalars()

    def call(*groups, rates=rates, decays=(0.0,), kernels="triton"):
        return adamw_update(*groups, *rates, decays=decays, kernels=kernels)

    with pytest.raises(ValueError, match="grads: wanted 1, one a parameter, got 2"):
        call([p], [p, p], [p], [p])
    with pytest.raises(ValueError, match="decays: wanted 1, one a parameter, got 0"):
        call([p], [p], [p], [p], decays=())
    with pytest.raises(ValueError, match=r"second: wanted a leaf of shape \(3,\), got \(2,\)"):
        call([p], [p], [p], [p[:2]])
    with pytest.raises(ValueError, match=r"clip: wanted a 0-d tensor, got shape \(3,\)"):
        call([p], [p], [p], [p], rates=[rates[0], p, *rates[2:]])
    with pytest.raises(ValueError, match="adamw: params: wanted float32 or bfloat16 with kernels=triton"):
        call(*[[p.double()]] * 4)
    with pytest.raises(ValueError, match="adamw: first: wanted the parameter's torch"):
        call([p], [p], [p.bfloat16()], [p])
    with pytest.raises(ValueError, match="adamw: params: wanted a leaf at least"):
        call([], [], [], [], decays=())
    with pytest.raises(ValueError, match="adamw: clip: wanted float32"):
        call([p], [p], [p], [p], rates=[rate.double() if i == 1 else rate for i, rate in enumerate(rates)])


def test_a_cpu_that_interprets_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    p = torch.ones(2)
    with pytest.raises(ValueError, match="adamw: learning_rate: wanted a CUDA tensor"):
        adamw_update([p], [p], [p], [p], *[torch.ones(())] * 4, decays=[0.0], kernels="triton")
