import math

import pytest
import torch

from titanfunc.evals import evaluate

PARAMS = {"w": torch.ones(2)}


def mean_token(params, batch):
    return batch["tokens"].float().mean() * params["w"][0]


def test_means_over_batches_in_three_units():
    batches = [torch.full((2, 3), 1), torch.full((2, 3), 2)]
    values = evaluate(mean_token, PARAMS, batches, bytes_per_token=2.0)
    assert values["loss"] == 1.5
    assert values["bits_per_byte"] == pytest.approx(1.5 / math.log(2) / 2)
    assert values["perplexity"] == pytest.approx(math.exp(1.5))


def test_a_step_may_overwrite_its_output():
    out = torch.zeros(())

    def reused(params, batch):
        return out.copy_(mean_token(params, batch))

    assert evaluate(reused, PARAMS, [torch.full((1, 2), 1), torch.full((1, 2), 3)])["loss"] == 2.0


def test_a_huge_loss_has_infinite_perplexity():
    assert evaluate(mean_token, PARAMS, [torch.full((1, 2), 10_000)])["perplexity"] == math.inf


def test_needs_a_batch():
    with pytest.raises(ValueError, match="batches: wanted at least 1"):
        evaluate(mean_token, PARAMS, [])
