import math

import pytest
import torch

from titanfunc.ops.cross_entropy import cross_entropy, total_weight


def problem(seed=0):
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 5, generator=source, dtype=torch.float64)
    return logits, torch.randint(5, (2, 3), generator=source), torch.rand(2, 3, generator=source)


def test_the_weighted_mean_by_its_definition():
    logits, targets, weights = problem()
    losses = [
        -logits[i, j].log_softmax(-1)[targets[i, j]].item() * weights[i, j].item() for i in range(2) for j in range(3)
    ]
    wanted = math.fsum(losses) / weights.double().sum().item()
    assert cross_entropy(logits, targets, weights).item() == pytest.approx(wanted, rel=1e-12)


def test_equal_weights_are_no_weights():
    logits, targets, weights = problem()
    plain = cross_entropy(logits, targets)
    for value in (1.0, 0.25):
        torch.testing.assert_close(cross_entropy(logits, targets, torch.full_like(weights, value)), plain)


def test_what_has_no_weight_has_no_gradient():
    logits, targets, weights = problem()
    weights[0, 1] = 0
    grad = torch.func.grad(lambda x: cross_entropy(x, targets, weights))(logits)
    assert (grad[0, 1] == 0).all() and (grad[0, 0] != 0).any()


def test_no_weight_at_all_is_a_loss_of_zero():
    logits, targets, weights = problem()
    loss, grad = torch.func.grad_and_value(lambda x: cross_entropy(x, targets, 0 * weights))(logits)[::-1]
    assert loss.item() == 0 and (grad == 0).all()
    assert total_weight(torch.zeros(3)).item() > 0


def test_half_precision_is_reduced_in_float32():
    logits, targets, weights = problem()
    half = logits.bfloat16()
    got = cross_entropy(half, targets, weights)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, cross_entropy(half.double(), targets, weights).float())
