"""Published files, written here in their layouts, become networks; what does not fit is named."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from titanfunc import rng, tree
from titanfunc.optim.learned import (
    init_small_fc_lopt,
    init_velo,
    init_velo_mlp,
    load_weights,
    save_weights,
    small_fc_lopt,
    velo,
    velo_mlp,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=rng.generator(seed + sum(shape)))


def linear(name, fan_in, fan_out):
    return {f"{name}.weight": draw(fan_out, fan_in), f"{name}.bias": draw(fan_out)}


def meta_mlp(prefix="network."):
    """PyLO's MetaMLP(39, 32, 1)."""
    layers = linear("input", 39, 32) | linear("linear_0", 32, 32) | linear("output", 32, 2)
    return {prefix + name: tensor for name, tensor in layers.items()}


def velo_one():
    """PyLO's VeLOMLP: what is mixed from the bank."""
    return {
        "input_weights": draw(4, 30), "input_bias": draw(4), "hidden_weights.0": draw(4, 4), "hidden_bias.0": draw(4),
        "output_weights": draw(3, 4), "output_bias": draw(3),
    }  # fmt: skip


def velo_bank(bank=5):
    return velo_one() | {
        "input_weights_": draw(bank, 4, 30), "input_bias_": draw(bank, 4), "hidden_weights_.0": draw(bank, 4, 4),
        "hidden_bias_.0": draw(bank, 4), "output_weights_": draw(bank, 3, 4), "output_bias_": draw(bank, 3),
    }  # fmt: skip


def velo_rnn(bank=5, units=8):
    made = linear("lstm.linear", 2 * units, 4 * units) | linear("rnn_to_controls", units, bank)
    made |= linear("step_size", units, 1)
    for name in ("mix_layer1", "mix_layer2", "final_mix_layer"):
        made |= linear(name, 30, units)
    return made | {"lstm_init_state.0": draw(1, units), "lstm_init_state.1": draw(1, units, seed=1)}


OFFSETS = {"momentum_decays": (0.1, 0.05, 0.2), "rms_decays": (0.3,), "adafactor_decays": (-0.1, 0.0, 0.1)}


def offsets():
    return {name: torch.tensor(values) for name, values in OFFSETS.items()}


def decays(learned):
    return [1 - torch.exp(10 * learned[name]) for name in ("momentum", "second", "factored")]


def published(initial, offset):
    """PyLO's and google's formula, in the order that they write it."""
    return 1 - torch.exp(10 * (torch.log(1 - torch.tensor(initial)) / 10 + torch.tensor(offset)))


INITIAL = ((0.9, 0.99, 0.999), (0.999,), (0.9, 0.99, 0.999))
PYLO = ((0.15216392, 0.14245212, 0.06812963), (0.01079706,), (0.18621896, -0.10864615, -0.06185547))


def write(path, tensors):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth", "a.bin", "a.npz"])
@pytest.mark.parametrize("prefix", ["network.", ""])
def test_pylo_small_fc(tmp_path, name, prefix):
    theirs = meta_mlp(prefix)
    network = load_weights(write(tmp_path / name, theirs))
    small_fc_lopt(network)
    x = draw(7, 39)
    wanted = torch.nn.functional.linear(x, theirs[f"{prefix}input.weight"], theirs[f"{prefix}input.bias"])
    torch.testing.assert_close(x @ network["input"]["weight"] + network["input"]["bias"], wanted)
    assert torch.equal(network["hidden"]["weight"], theirs[f"{prefix}linear_0.weight"].T)
    assert torch.equal(network["output"]["bias"], theirs[f"{prefix}output.bias"])
    for ours, initial, offset in zip(decays(network["decays"]), INITIAL, PYLO, strict=True):
        torch.testing.assert_close(ours, published(initial, offset), rtol=1e-5, atol=1e-5)


def test_pylo_small_fc_with_decays_of_its_own(tmp_path):
    network = load_weights(write(tmp_path / "a.pth", {"state_dict": meta_mlp(), "decays": offsets()}))
    small_fc_lopt(network)
    for ours, initial, offset in zip(decays(network["decays"]), INITIAL, OFFSETS.values(), strict=True):
        torch.testing.assert_close(ours, published(initial, offset), rtol=1e-5, atol=1e-5)


def test_googles_small_fc(tmp_path):
    sizes = ((39, 4), (4, 4), (4, 2))
    layers = {f"nn/~/w{k}": draw(*size) for k, size in enumerate(sizes)}
    layers |= {f"nn/~/b{k}": draw(size[1]) for k, size in enumerate(sizes)}
    network = load_weights(write(tmp_path / "a.npz", layers | offsets()))
    small_fc_lopt(network)
    assert torch.equal(network["input"]["weight"], layers["nn/~/w0"])
    assert torch.equal(network["output"]["bias"], layers["nn/~/b2"])
    for ours, initial, offset in zip(decays(network["decays"]), INITIAL, OFFSETS.values(), strict=True):
        torch.testing.assert_close(ours, published(initial, offset), rtol=1e-5, atol=1e-5)


def test_pylo_velo(tmp_path):
    mlp, rnn = velo_bank(), velo_rnn()
    halves = [load_weights(write(tmp_path / name, t)) for name, t in (("m.safetensors", mlp), ("r.safetensors", rnn))]
    network = {**halves[0], **halves[1]}
    velo(network, 10)
    assert torch.equal(network["bank"]["hidden"]["weight"][3], mlp["hidden_weights_.0"][3].T)
    assert torch.equal(network["bank"]["output"]["bias"], mlp["output_bias_"])
    assert torch.equal(network["mix"]["weight"], rnn["mix_layer2.weight"].T)
    assert torch.equal(network["merge"]["bias"], rnn["final_mix_layer.bias"])
    assert torch.equal(network["start"]["cell"], rnn["lstm_init_state.1"])
    for ours, initial in zip(decays(network["decays"]), INITIAL, strict=True):
        torch.testing.assert_close(ours, torch.tensor(initial), rtol=1e-5, atol=1e-5)


def test_pylo_velo_mlp_alone(tmp_path):
    theirs = velo_one()
    network = load_weights(write(tmp_path / "a.pt", theirs))
    velo_mlp(network)
    assert torch.equal(network["input"]["weight"], theirs["input_weights"].T)
    assert torch.equal(network["hidden"]["bias"], theirs["hidden_bias.0"])


@pytest.mark.parametrize(
    "network",
    [
        init_small_fc_lopt(rng.generator(0), hidden=6),
        init_velo_mlp(rng.generator(0)),
        init_velo(rng.generator(0), bank=3, units=5),
    ],
    ids=["small_fc", "velo_mlp", "velo"],
)
def test_our_own_files_come_back(tmp_path, network):
    back = load_weights(save_weights(network, tmp_path / "own.safetensors"))
    assert list(tree.named_leaves(back)) == list(tree.named_leaves(network))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(back), tree.leaves(network), strict=True))


def changed(tensors, **changes):
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


MISTAKES = {
    "a shape": (
        changed(meta_mlp(), **{"network.linear_0.weight": draw(32, 31)}),
        "network.linear_0.weight: wanted [32, 32], got [32, 31]",
    ),
    "features": (
        changed(meta_mlp(""), **{"input.weight": draw(32, 38)}),
        "input.weight: wanted [32, 39], got [32, 38]",
    ),
    "a vector": (
        changed(meta_mlp(), **{"network.input.weight": draw(32)}),
        "network.input.weight: wanted [32, 39], got [32]",
    ),
    "one missing": (
        changed(meta_mlp(), **{"network.output.bias": None}),
        "output.bias: wanted [2], got nothing",
    ),
    "one too many": (
        changed(meta_mlp(), **{"network.linear_1.weight": draw(32, 32)}),
        "network.linear_1.weight: wanted no such tensor in a file of PyLO's MetaMLP",
    ),
    "half of the decays": (
        meta_mlp() | {"decays.rms_decays": torch.zeros(1)},
        "decays.momentum_decays: wanted [3], got nothing",
    ),
    "the bank": (
        changed(velo_bank(), output_weights_=draw(4, 3, 4)),
        "output_weights_: wanted [5, 3, 4], got [4, 3, 4]",
    ),
    "the recurrence": (
        changed(velo_rnn(), **{"lstm.linear.weight": draw(32, 15)}),
        "lstm.linear.weight: wanted [32, 16], got [32, 15]",
    ),
    "another network": (
        {"conv.weight": draw(3, 3)},
        "wanted the tensors of a known learned optimizer, got conv.weight",
    ),
    "nothing": ({}, "wanted the tensors of a known learned optimizer, got none"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_named(tmp_path, name):
    tensors, message = MISTAKES[name]
    path = write(tmp_path / "file.safetensors", tensors)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_weights(path)
    assert str(caught.value) == f"{path}: {message}"


class Opens:
    """What an unpickler would run."""

    def __reduce__(self):
        return (open, ("/tmp/titanfunc_must_not_be_made", "w"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"no tensors", "cannot be read as a file of tensors ("),
        ("a.npz", b"no tensors", "cannot be read as a file of tensors ("),
        ("a.pt", b"no tensors", "cannot be read as a file of tensors ("),
        ("a.pt", b"", "cannot be read as a file of tensors ("),
        ("a.pt", pickle.dumps(Opens(), protocol=2), "cannot be read as a file of tensors ("),
        ("a.txt", b"", "wanted a name that ends in .safetensors, .pt, .pth, .bin or .npz"),
        ("a.pt", None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_weights(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_nothing_is_run_on_loading(tmp_path):
    for name in ("a.pt", "a.npz"):
        if name == "a.pt":
            torch.save({"network.input.weight": Opens()}, tmp_path / name)
        else:
            np.savez(tmp_path / name, w0=np.array([Opens()], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
            load_weights(tmp_path / name)
    torch.save({"network.input.weight": 3}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="is no tensor but of type int"):
        load_weights(tmp_path / "b.pt")
