"""Generation token by token against the forward pass over the whole text."""

from __future__ import annotations

import pytest
import torch

import titanfunc as tf
from tests.models.small import ORDERS, draw_tokens, small


@pytest.mark.parametrize("order", [*ORDERS, "transformer"])
def test_greedy_tokens_are_those_of_the_whole_forward(order):
    model, params = small(order)
    prompt = draw_tokens(2, 11)
    new = tf.generate(model, params, prompt, 14, temperature=0)
    text = torch.cat([prompt, new], 1)
    logits, _ = model.apply(params, model.init_memory(params, 2), text)
    assert torch.equal(logits[:, 10:-1].argmax(-1), new)


def test_draws_depend_on_the_generator_alone_and_keep_to_top_k_and_top_p():
    model, params = small()
    prompt = draw_tokens(1, 5)

    def draw(seed, **options):
        return tf.generate(model, params, prompt, 30, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    greedy = tf.generate(model, params, prompt, 30, temperature=0)
    assert torch.equal(draw(1, top_k=1), greedy)
    assert torch.equal(draw(1, top_p=1e-6), greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: wanted at least 1"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"temperature": 1.0}, "generator: wanted a torch.Generator"),
    ],
)
def test_bad_arguments_are_named(options, message):
    model, params = small()
    arguments = {"max_new_tokens": 3, "temperature": 0, **options}
    with pytest.raises(ValueError, match=message):
        tf.generate(model, params, draw_tokens(1, 4), **arguments)
