import pytest
import torch

from tests.data.recall.problems import make
from tests.evals.oracle import PARAMS, oracle
from titanfunc.config.recall import MQARConfig
from titanfunc.evals import Reading, evaluate_answers, make_reader, score
from titanfunc.train import make_answer_step


def test_an_answer_counts_as_a_whole():
    # Row 0: answers at 0-1 and 3; row 1: one at 0-2 (which begins where row 0 ended) and one at 4.
    weights = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0, 1.0]])
    right = torch.tensor([[True, True, False, True, False], [True, False, True, True, True]])
    loss = torch.arange(10.0).reshape(2, 5)
    found = score(Reading(loss, right), weights)
    assert found.answers == 4
    assert found.accuracy == 0.5  # 0-1 of row 0 and 4 of row 1
    assert found.token_accuracy == 0.75
    assert found.loss == pytest.approx((0 + 1 + 3 + 4 + 5 + 6 + 7 + 9) / 8)


def test_text_of_less_weight_is_no_answer():
    weights = torch.tensor([[0.25, 1.0, 0.25]])
    found = score(Reading(torch.ones(1, 3), torch.tensor([[False, True, False]])), weights)
    assert (found.answers, found.accuracy) == (1, 1.0)
    with pytest.raises(ValueError, match="weights: wanted an answer"):
        score(Reading(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)), torch.full((1, 3), 0.25))


@pytest.mark.parametrize("length", [96, 300])
def test_who_looks_a_key_up_has_every_answer_right_and_none_without_its_memory(length):
    tokens, weights = make("mqar").examples(length, 16, 10)
    on, off = (score(make_reader(oracle(), write=write)(PARAMS, tokens), weights) for write in (True, False))
    assert (on.answers, on.accuracy, off.accuracy) == (160, 1.0, 0.0)


def test_validation_is_over_all_rows_as_one():
    task = make("mqar", batch_size=4, mqar=MQARConfig(min_pairs=2, max_pairs=30))
    batches = [task.batch(step) for step in range(3)]
    assert len({batch["weights"].sum().item() for batch in batches}) == 3  # batches count unequally
    # Wrong by construction in the first batch.
    batches[0]["tokens"][:, 1:][batches[0]["weights"] > 0] = 1
    values = evaluate_answers(make_answer_step(oracle()), PARAMS, batches)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in ("tokens", "weights")}
    wanted = make_answer_step(oracle())(PARAMS, whole)
    assert 0 < values["accuracy"] < 1
    assert values["accuracy"] == pytest.approx(wanted["accuracy"].item())
    assert values["loss"] == pytest.approx(wanted["loss"].item(), rel=1e-5)
    with pytest.raises(ValueError, match="batches: wanted at least 1"):
        evaluate_answers(make_answer_step(oracle()), PARAMS, [])
