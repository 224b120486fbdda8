"""Weighted batches and auxiliary losses in the train step."""

from __future__ import annotations

import pytest
import torch

import titanfunc as tf
from tests.memory.problems import assert_same_tree
from tests.models.small import VOCAB, draw_tokens, small
from titanfunc import tree
from titanfunc.models import Model
from titanfunc.optim.transforms import scale_by_learning_rate
from titanfunc.train.step import accuracy

ROWS, LENGTH = 8, 12


def batch(seed: int = 0):
    """Rows of very different weights, one without any."""
    weights = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(seed)) * 1.5
    weights = torch.where(weights < 0.5, 0.0, torch.where(weights < 1, 0.25, 1.0))
    weights[:3] *= 0.0
    weights[2, 4] = 1.0
    return {"tokens": draw_tokens(ROWS, LENGTH + 1, seed=seed), "weights": weights.double()}


def training(model, accumulate=1):
    tx = tf.optim.adamw(1e-2, clip_norm=1.0)
    return tf.train.init_state(model, tx), tf.train.make_train_step(model, tx, accumulate)


def test_parts_of_a_weighted_batch_add_up_to_the_whole():
    model, params = small("transformer")
    results = []
    for accumulate in (1, 2, 4):
        state, step = training(model, accumulate)
        state = state._replace(params=params, opt_state=tf.optim.adamw(1e-2, clip_norm=1.0).init(params))
        for _ in range(8):
            state, metrics = step(state, batch())
        results.append((state.params, metrics))
    assert 0 < results[0][1]["accuracy"].item() < 1
    for other in results[1:]:
        assert_same_tree(other, results[0], rtol=1e-6, atol=1e-9)


def test_loss_and_accuracy_by_their_definition():
    model, params = small("transformer")
    given = batch()
    loss, metrics = tf.train.loss_fn(model, params, given["tokens"], given["weights"])
    logits, _ = model.apply(params, (), given["tokens"][:, :-1], aligned=True)
    targets, weights = given["tokens"][:, 1:], given["weights"]
    each = -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(loss, (each * weights).sum() / weights.sum())
    torch.testing.assert_close(metrics["accuracy"], accuracy(logits, targets, weights))
    plain, plain_metrics = tf.train.loss_fn(model, params, given["tokens"])
    assert "accuracy" not in plain_metrics and not torch.isclose(plain, loss)


def test_accuracy_is_of_the_answers_alone():
    targets = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])
    likeliest = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(likeliest, 3).double()
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.5, 1.0, 0.0, 0.99]])
    assert accuracy(logits, targets, weights).item() == 0.5
    assert accuracy(logits, targets, torch.zeros(2, 4)).item() == 0.0


def test_weights_of_another_shape_are_refused():
    model, params = small("transformer")
    given = batch()
    with pytest.raises(ValueError, match=r"weights: wanted \(8, 12\), one a prediction, got \(8, 13\)"):
        tf.train.loss_fn(model, params, given["tokens"], torch.ones(8, 13))


def test_weights_go_through_the_compiled_step(graphs):
    backend, seen = graphs
    model, _ = small("input", layers=1)
    eager, step = training(model, 2)
    donated, _ = training(model, 2)
    compiled = tf.train.compile_step(step, backend)
    for i in range(3):
        given = {name: leaf.float() if leaf.is_floating_point() else leaf for name, leaf in batch(i).items()}
        eager, want = step(eager, given)
        donated, got = compiled(donated, given)
        assert_same_tree(got, want, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def fake_model(config, seeds=None):
    """Logits from a table of parameters, with an auxiliary loss on it, noting the seeds that it is given."""

    def init(generator):
        return {"table": torch.randn(VOCAB, VOCAB, generator=generator)}

    def apply(params, memory, tokens, *, aligned=False, with_metrics=False, seed=None, **rest):
        if seeds is not None:
            seeds.append(seed)
        logits = params["table"][tokens]
        auxiliary = 0.1 * (params["table"] ** 2).sum()
        return (logits, memory, {"auxiliary_loss": auxiliary}) if with_metrics else (logits, memory)

    return Model(init, lambda params, batch_size: (), apply, config)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_auxiliary_loss_is_minimised_and_told_beside_the_loss(weighted, accumulate):
    model = fake_model(tf.models.preset("transformer_tiny"))
    tx = scale_by_learning_rate(1.0)  # the update is minus the gradient
    given = {"tokens": batch()["tokens"], **({"weights": batch()["weights"].float()} if weighted else {})}
    state = tf.train.init_state(model, tx)
    table = state.params["table"]

    def objective(table):
        loss, metrics = tf.train.loss_fn(model, {"table": table}, given["tokens"], given.get("weights"))
        return loss + metrics["auxiliary_loss"], loss

    grad, loss = torch.func.grad(objective, has_aux=True)(table)
    new, metrics = tf.train.make_train_step(model, tx, accumulate)(state, given)
    torch.testing.assert_close(metrics["loss"], loss)
    torch.testing.assert_close(metrics["auxiliary_loss"], 0.1 * (table**2).sum())
    torch.testing.assert_close(new.params["table"], table - grad)


def test_only_a_mixture_is_given_a_seed_and_another_each_time():
    for feed_forward, wanted in (("swiglu", [None] * 4), ("moe", [0, 1, 2, 3])):
        seeds: list = []
        model = fake_model(tf.models.preset("transformer_tiny", feed_forward=feed_forward), seeds)
        state, step = training(model, accumulate=2)
        for i in range(2):
            state, _ = step(state, {"tokens": batch(i)["tokens"]})
        assert [seed if seed is None else int(seed) for seed in seeds] == wanted
        seeds.clear()
        tf.train.make_eval_step(model)(state.params, {"tokens": batch()["tokens"]})
        assert seeds == [None]


def test_the_answer_step_is_the_loss_without_gradients():
    model, params = small("transformer")
    given = batch()
    values = tf.train.make_answer_step(model)(params, given)
    loss, metrics = tf.train.loss_fn(model, params, given["tokens"], given["weights"])
    assert set(values) == {"loss", "accuracy"} and not any(leaf.requires_grad for leaf in tree.leaves(values))
    assert torch.equal(values["loss"], loss) and torch.equal(values["accuracy"], metrics["accuracy"])
