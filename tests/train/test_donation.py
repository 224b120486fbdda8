"""What a donated step holds beside its state: gradients and activations, and no second copy of the state."""

from __future__ import annotations

import pytest
import torch

import titanfunc as tf
from tests.models.small import draw_tokens
from titanfunc import tree

VARIANTS = {"plain": (1, "none"), "accumulated": (2, "none"), "rematerialised": (1, "layer")}
"""(accumulate, remat) of a step."""


def size(values):
    """Bytes of a tree."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(values))


def problem(family, variant, tokens, device="cpu", **sizes):
    """(compiled step, its state, a batch of one row of ``tokens`` a part, the bytes that it may hold beside the state).

    Gradients are as large as the parameters; where parts are accumulated, those of one lie beside the sum. A token's
    activations take less than (24 dim + 8 ff) numbers a layer, and the parameters are so many more that half of their
    size is ample. A second copy of the state, three times their size, is not.
    """
    accumulate, remat = VARIANTS[variant]
    memory = {"heads": 1, "head_dim": 16, "hidden": 16, "chunk_size": 16}
    options = {"vocab_size": 17, "heads": 4, "remat": remat, "memory": memory, **sizes}
    model, tx = tf.models.build(tf.models.preset(f"{family}_tiny", **options)), tf.optim.adamw(1e-3, clip_norm=1.0)
    state = tf.train.init_state(model, tx, device=device)
    parameters, config = size(state.params), model.config
    activations = 4 * config.layers * tokens * (24 * config.dim + 8 * config.ff)
    assert activations < parameters / 3 and size(state) > 3 * parameters
    step = tf.train.compile_step(tf.train.make_train_step(model, tx, accumulate))
    batch = {"tokens": draw_tokens(accumulate, tokens + 1).to(device)}
    return step, state, batch, (accumulate + 0.5) * parameters


def most_allocated(call):
    """The most bytes of a CPU's memory that ``call`` held at once, of what it allocated itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_inductor_writes_the_new_state_over_the_old_one(variant):
    torch._dynamo.reset()
    step, state, batch, bound = problem("transformer", variant, 4, dim=128, ff=512, layers=1)
    step(state, batch)
    assert 0.9 * size(state.params) < most_allocated(lambda: step(state, batch)) < bound
