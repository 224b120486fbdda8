"""What only a CUDA device can show: `make test-gpu`."""

from __future__ import annotations

import gc

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import titanfunc as tf
from tests.kernels.test_models import SIZES as KERNEL_SIZES
from tests.kernels.test_models import both
from tests.memory.problems import assert_same_tree, problem
from tests.models.small import MEMORY, MODELS, VOCAB, draw_tokens, small
from tests.train import test_donation
from titanfunc import rng, tree
from titanfunc.generation import make_decode_step

pytestmark = pytest.mark.gpu


def cuda(value):
    return tree.map(lambda leaf: leaf.cuda(), value)


@pytest.mark.parametrize(
    "rule", [{}, {"objective": "huber"}, {"write": "chunk"}, {"write": "chunk", "optimizer": "muon"}]
)
@pytest.mark.parametrize("kind", ["mlp1", "mlp2", "mlp3b", "module"])
def test_scan_on_the_gpu_equals_the_cpus(kind, rule):
    net, state, q, k, v, gates = problem(kind, tokens=23)
    options = {"clip": 0.5, "rule": tf.memory.WriteRule(**rule)}
    want = tf.memory.scan(net, state, q, k, v, gates, 8, **options)
    got = tf.memory.scan(net, cuda(state), q.cuda(), k.cuda(), v.cuda(), cuda(gates), 8, **options)
    assert_same_tree(tree.map(lambda leaf: leaf.cpu(), got), want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_before_a_changed_token_are_bit_equal(name, precision):
    model, params = small(name, precision=precision)
    params = cuda(tree.map(lambda leaf: leaf.float(), params))
    tokens = draw_tokens(3, 30).cuda()
    changed = tokens.clone()
    changed[1, 13] = (changed[1, 13] + 1) % VOCAB
    memory = model.init_memory(params, 3)
    before, after = (model.apply(params, memory, t, aligned=True)[0] for t in (tokens, changed))
    assert torch.equal(after[1, :13], before[1, :13]) and torch.equal(after[[0, 2]], before[[0, 2]])
    assert (after[1, 13:] != before[1, 13:]).any()


VARIANTS = {
    **{name: (name, {}) for name in MODELS},
    "muon": ("lmm", {"memory": {**MEMORY, "rule": {"write": "chunk", "optimizer": "muon"}}}),
    "cms": ("mal", {"feed_forward": "cms"}),
    "moe": ("mag", {"feed_forward": "moe", "moe": {"noise": 0.0}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compiled_step_is_one_graph_that_trains_like_eager(variant):
    torch._dynamo.reset()
    counters.clear()
    name, changes = VARIANTS[variant]
    model, _ = small(name, **changes)
    tx = tf.optim.adamw(tf.optim.warmup_cosine(1e-3, 3, 20), mask=tf.models.decayed, clip_norm=1.0)
    step = tf.train.make_train_step(model, tx, accumulate=2)
    compiled = tf.train.compile_step(step)
    eager, donated = (tf.train.init_state(model, tx, device="cuda") for _ in range(2))
    for i in range(5):
        batch = {"tokens": draw_tokens(4, 17, seed=i).cuda()}
        eager, want = step(eager, batch)
        donated, got = compiled(donated, batch)
        assert_same_tree(got, want, rtol=1e-4, atol=1e-5)
    # Adam makes steps of one size out of gradients of any: where one is near zero, its rounding shows.
    assert_same_tree(donated.params, eager.params, rtol=1e-4, atol=5e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.fixture
def deterministic():
    """Without it the embedding's gradient adds atomically, and no two compiled runs are bit-equal."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_50_replayed_steps_are_bit_equal_to_plain_ones_and_their_metrics_are_kept(deterministic, kernels):
    runs = []
    sizes = {**KERNEL_SIZES, "layers": 1, "precision": "bf16", "mac": {"segment": 32, "write": "input"}}
    model = tf.models.build(tf.models.preset("mac_tiny", **sizes, kernels=kernels))
    tx = tf.optim.adamw(tf.optim.warmup_cosine(1e-2, 3, 50))
    for cuda_graph in (False, True):
        torch._dynamo.reset()
        step = tf.train.compile_step(tf.train.make_train_step(model, tx), cuda_graph=cuda_graph)
        for _ in range(2):  # a fresh state in other buffers is recorded anew, and trains the same
            state, losses = tf.train.init_state(model, tx, device="cuda"), []
            for i in range(50):
                state, metrics = step(state, {"tokens": draw_tokens(2, 65, seed=i).cuda()})
                losses.append(metrics["loss"])  # read only at the end: a replay must not overwrite it
            runs.append([torch.stack(losses), state.step, *tree.leaves(state.params)])
    assert runs[0][0].isfinite().all() and runs[0][0][-1] < runs[0][0][0] and runs[0][1].item() == 50
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("name", ["mac", "mag", "lmm"])
def test_replayed_generation_draws_the_tokens_of_the_plain_one_and_holds_one_state(name):
    (_, model), params = both(name)

    def texts(decode):
        return [
            tf.generate(
                model, params, draw_tokens(rows, 37, seed).cuda(), 60, generator=rng.generator(seed), decode=decode
            )
            for rows, seed in ((2, 0), (2, 1), (3, 2), (2, 0))
        ]

    torch._dynamo.reset()
    options = {"temperature": 0.9, "top_k": 9, "backend": "inductor"}
    replayed = make_decode_step(model, **options)
    wanted, found = texts(make_decode_step(model, **options, cuda_graph=False)), texts(replayed)
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])
    gc.collect()
    held = torch.cuda.memory_allocated()
    again = texts(replayed)
    assert all(torch.equal(got, want) for got, want in zip(again, wanted, strict=True))
    del again
    gc.collect()
    assert torch.cuda.memory_allocated() <= held
    memory, token, kept = replayed.take(model.init_memory(params, 2)), draw_tokens(2, 1).cuda(), []
    for seed in range(8):
        token, memory = replayed.run(params, memory, token, torch.tensor(seed, device="cuda"))
        kept.append((token, token.clone()))
    assert all(torch.equal(token, then) for token, then in kept)  # no replay wrote over an earlier one's


@pytest.mark.parametrize("variant", test_donation.VARIANTS)
@pytest.mark.parametrize("family", ["transformer", "lmm"])
def test_a_recorded_step_holds_no_second_state(family, variant):
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated()
    sizes = {"dim": 1024, "ff": 4096, "layers": 4}
    step, state, batch, bound = test_donation.problem(family, variant, 64, "cuda", **sizes)
    for _ in range(3):
        step(state, batch)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # a graph's memory is allocated, and counted, where it is recorded: in the fourth step
        step(state, batch)
    beside = torch.cuda.max_memory_allocated() - others - test_donation.size(state)
    assert 0.9 * test_donation.size(state.params) < beside < bound


@pytest.mark.parametrize("name", [name for name in MODELS if name != "transformer"])
def test_a_bf16_model_stays_finite_over_65536_tokens(name):
    model, params = small(name, precision="bf16")
    params = cuda(tree.map(lambda leaf: leaf.float(), params))
    memory = model.init_memory(params, 1)
    logits, memory = model.apply(params, memory, draw_tokens(1, 65_536).cuda(), aligned=True)
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(memory) if leaf.is_floating_point())
