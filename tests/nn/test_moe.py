"""The mixture of experts against a loop over tokens, its gradients, its causality and its balance."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.utils import counters

from titanfunc import rng, tree
from titanfunc.nn import init_moe, moe

B, T, D, FF, E = 2, 7, 8, 16, 5
SEED = torch.tensor(3)


def problem(dtype=torch.float64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    params = tree.map(lambda leaf: leaf.to(dtype), init_moe(g, D, FF, E))
    params["router"] = 2 * params["router"]  # decided enough that rounding changes no choice
    return params, torch.randn(B, T, D, generator=g).to(dtype)


def loop(params, x, top_k):
    """The definition, token by token and choice by choice."""
    experts, result = params["experts"], []
    for token in x.reshape(-1, D):
        p = torch.softmax(token @ params["router"], -1)
        best = sorted(range(E), key=lambda e: -p[e].item())[:top_k]
        total = sum(p[e] for e in best) if top_k > 1 else 1.0
        y = torch.zeros(D, dtype=x.dtype)
        for e in best:
            hidden = F.silu(token @ experts["gate"][e]) * (token @ experts["up"][e])
            y = y + p[e] / total * (hidden @ experts["down"][e])
        result.append(y)
    return torch.stack(result).reshape(x.shape)


def close(got, want, rtol=1e-10, atol=1e-10):
    for (name, a), b in zip(tree.named_leaves(got).items(), tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_dense_is_the_loop_over_tokens_with_its_gradients(top_k):
    params, x = problem()
    close(moe(params, x, top_k, torch.float64)[0], loop(params, x, top_k))
    got = torch.func.grad(lambda p, x: moe(p, x, top_k, torch.float64)[0].sin().sum(), argnums=(0, 1))(params, x)
    want = torch.func.grad(lambda p, x: loop(p, x, top_k).sin().sum(), argnums=(0, 1))(params, x)
    close(got, want)
    assert (got[0]["router"].abs() > 0).all()  # K = 1 too


def relative(got, want):
    """The error of each leaf, against its size."""
    pairs = zip(tree.leaves(got), tree.leaves(want), strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def in_bfloat16(kernel, top_k, device="cpu"):
    """(output, gradients of params and x) in bfloat16 of float32 parameters, all in float64 on the CPU."""
    params, x = tree.map(lambda leaf: leaf.to(device, torch.float32), problem())

    def run(params, x):
        return moe(params, x, top_k, torch.bfloat16, kernel=kernel)[0]

    gradient = torch.func.grad(lambda p, x: run(p, x).double().sin().sum(), argnums=(0, 1))(params, x)
    return tree.map(lambda leaf: leaf.double().cpu(), (run(params, x), *gradient))


def exact(top_k):
    params, x = problem()
    gradient = torch.func.grad(lambda p, x: loop(p, x, top_k).sin().sum(), argnums=(0, 1))(params, x)
    return (loop(params, x, top_k), *gradient)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_grouped_is_as_near_the_loop_as_dense_in_the_same_dtype(top_k, device):
    if device == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("no grouped product without a host read")
    want = exact(top_k)
    dense, grouped = (relative(in_bfloat16(kernel, top_k, device), want) for kernel in ("dense", "grouped"))
    for ours, same_precision in zip(grouped, dense, strict=True):
        assert 0 < ours <= 2 * same_precision + 1e-3 and same_precision < 0.02


def test_the_router_works_in_float32_whatever_the_experts_do():
    params, x = problem()
    want = moe(params, x, 2, torch.float64)[1]
    single, activations = tree.map(lambda leaf: leaf.float(), (params, x))
    got = moe(single, activations, 2, torch.bfloat16)[1]
    assert all(leaf.dtype == torch.float32 for leaf in got)
    close(tree.map(lambda leaf: leaf.double(), got), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_expert_without_tokens_has_a_gradient_of_zero(device):
    if device == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("no grouped product without a host read")
    params, x = tree.map(lambda leaf: leaf.to(device, torch.float32), problem())
    params["router"], x = torch.zeros_like(params["router"]), torch.ones_like(x)
    params["router"][:, 0], params["router"][:, 3] = 9.0, 8.0  # experts 0 and 3 take every token

    def total(params, kernel):
        y, balance = moe(params, x, 2, torch.bfloat16, kernel=kernel)
        return y.float().square().sum(), balance.load

    for kernel in ("dense", "grouped"):
        # Memory that held something else before: what is not written shows.
        poison = [torch.full((E, D, FF), float("nan"), device=device, dtype=torch.bfloat16) for _ in range(8)]
        del poison
        gradient, load = torch.func.grad(total, has_aux=True)(params, kernel)
        assert load.tolist() == [0.5, 0, 0, 0.5, 0]
        for leaf in gradient["experts"].values():
            assert (leaf[[1, 2, 4]] == 0).all() and (leaf[[0, 3]].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_tokens_output_depends_on_no_other_token_bit_for_bit(noise, dtype):
    params, x = problem()

    def run(x):
        return moe(params, x, 2, dtype, noise, SEED)[0]

    before = run(x)
    for row, token in ((0, 0), (0, T - 1), (1, 3)):
        changed = x.clone()
        changed[row, token] = -3 * changed[row, token]
        differs = (run(changed) != before).any(-1)
        assert differs[row, token] and differs.sum() == 1


def test_grouped_outputs_keep_to_their_own_token():
    params, x = problem(torch.float32)
    before = moe(params, x, 2, torch.bfloat16, kernel="grouped")[0].double()
    changed = x.clone()
    changed[1, 3] = -3 * changed[1, 3]
    after = moe(params, changed, 2, torch.bfloat16, kernel="grouped")[0].double()
    differs = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert differs[1, 3] > 0.1
    differs[1, 3] = 0
    assert differs.max() < 0.02  # rounding: another size of a group may be summed in another order


def test_balance_is_one_where_even_and_experts_over_choices_where_collapsed():
    params, x = problem()
    uniform = {**params, "router": torch.zeros_like(params["router"])}
    for top_k in (1, 2, 4):
        balance = moe(uniform, x, top_k, torch.float64)[1]
        assert balance.loss.item() == pytest.approx(1) and balance.entropy.item() == pytest.approx(math.log(E))
        assert balance.load.sum().item() == pytest.approx(1)
        collapsed = {**params, "router": torch.zeros_like(params["router"])}
        collapsed["router"][:, :top_k] = 50.0
        balance = moe(collapsed, torch.ones_like(x), top_k, torch.float64)[1]
        assert balance.loss.item() == pytest.approx(E / top_k)
        assert balance.entropy.item() == pytest.approx(math.log(top_k), abs=1e-6)
        assert balance.load.tolist() == pytest.approx([1 / top_k] * top_k + [0] * (E - top_k))


def test_balance_follows_its_formula_and_pushes_the_router_towards_evenness():
    params, x = problem()
    balance = moe(params, x, 2, torch.float64)[1]
    p = torch.softmax(x.reshape(-1, D) @ params["router"], -1)
    load = [(p.topk(2).indices == e).sum().item() / (2 * B * T) for e in range(E)]
    want = E * sum(share * p[:, e].mean().item() for e, share in enumerate(load))
    assert balance.load.tolist() == pytest.approx(load) and balance.loss.item() == pytest.approx(want)
    x = x + 1
    router = params["router"].clone()
    router[:, 0] += 1.0  # expert 0 is everyone's choice
    seen = []
    for _ in range(100):
        gradient, balance = torch.func.grad(
            lambda r: (lambda b: (b.loss, b))(moe({**params, "router": r}, x, 2, torch.float64)[1]), has_aux=True
        )(router)
        router = router - 0.5 * gradient
        seen.append((balance.loss.item(), balance.load.max().item()))
    (first_loss, first_load), (last_loss, last_load) = seen[0], seen[-1]
    assert first_loss > 1.5 and first_load == 0.5 and last_loss < 1.1 and last_load < 0.35


def test_noise_changes_choices_but_only_with_a_seed():
    params, x = problem()
    plain = moe(params, x, 2, torch.float64)
    assert torch.equal(moe(params, x, 2, torch.float64, noise=5.0)[0], plain[0])
    assert torch.equal(moe(params, x, 2, torch.float64, 0.0, SEED)[0], plain[0])
    first, again, other = (moe(params, x, 2, torch.float64, 5.0, torch.tensor(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert not torch.equal(first[1].load, plain[1].load)
    # Its size is the one asked for: the router's logits come back out of the probabilities.
    zero = {**params, "router": torch.zeros_like(params["router"])}
    wide = torch.zeros(4, 2000, D, dtype=torch.float64)
    logits = 0.5 * rng.gaussian(torch.tensor(9), (8000, E)).double()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert moe(zero, wide, 2, torch.float64, 0.5, torch.tensor(9))[1].entropy.item() == pytest.approx(entropy.item())


@pytest.mark.parametrize("kernel", ["dense", "grouped"])
def test_compiled_gradients_are_the_eager_ones_in_one_graph_for_every_seed(kernel):
    torch._dynamo.reset()
    counters.clear()
    params, x = problem(torch.float32)

    def step(params, x, seed):
        def loss(params):
            y, balance = moe(params, x, 2, torch.bfloat16, 0.5, seed, kernel)
            return y.float().square().mean() + 0.01 * balance.loss, balance

        return torch.func.grad(loss, has_aux=True)(params)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(10):
        close(compiled(params, x, torch.tensor(i)), step(params, x, torch.tensor(i)), rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_init_gives_every_part_its_shape_and_scale():
    params = init_moe(torch.Generator().manual_seed(0), 64, 128, 6, gain=0.5)
    shapes = {name: tuple(leaf.shape) for name, leaf in tree.named_leaves(params).items()}
    assert shapes == {
        "router": (64, 6),
        "experts.gate": (6, 64, 128),
        "experts.up": (6, 64, 128),
        "experts.down": (6, 128, 64),
    }
    std = {name: leaf.std().item() for name, leaf in params["experts"].items()}
    assert std == pytest.approx({"gate": 1 / 8, "up": 1 / 8, "down": 0.5 / math.sqrt(128)}, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k: wanted 1 to 5 of 5 experts, got 0"),
        ({"top_k": 6}, "top_k: wanted 1 to 5 of 5 experts, got 6"),
        ({"kernel": "fast"}, "kernel: wanted 'dense' or 'grouped', got 'fast'"),
        ({"kernel": "grouped", "dtype": torch.float32}, "kernel: wanted 'dense' for any dtype but bfloat16"),
        ({"x": torch.zeros(3, D)}, r"x: wanted \[batch, tokens, 8\], got \(3, 8\)"),
    ],
)
def test_mistakes_are_named(arguments, message):
    params, x = problem()
    with pytest.raises(ValueError, match=message):
        moe(params, **{"x": x, "top_k": 2, "dtype": torch.float64, **arguments})


def test_grouped_is_refused_for_odd_sizes_and_on_gpus_that_would_read_back(monkeypatch):
    from titanfunc.nn.moe import _grouped_on

    g = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="sizes 8 does not divide, got 'grouped' for 8 x 12"):
        moe(init_moe(g, 8, 12, 2), torch.zeros(1, 2, 8), 1, torch.bfloat16, kernel="grouped")
    with pytest.raises(ValueError, match="without grouped products, got 'grouped' on meta"):
        moe(
            tree.map(lambda p: p.to("meta"), init_moe(g, 8, 8, 2)),
            torch.zeros(1, 2, 8, device="meta"), 1, torch.bfloat16, kernel="grouped",
        )  # fmt: skip
    offered = {(8, 0): False, (8, 6): False, (8, 9): False, (9, 0): True, (10, 0): True, (12, 0): False}
    for capability, want in offered.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert _grouped_on(torch.device("cuda")) == want
