import os
from typing import Any, NamedTuple

import pytest
import torch

from titanfunc.config import ModelConfig, TrainConfig, checkpoints
from titanfunc.train import checkpoint

MODEL = ModelConfig(layers=2)


class Moments(NamedTuple):
    mean: Any
    nothing: tuple[()]


class State(NamedTuple):
    step: torch.Tensor
    params: Any
    opt_state: Any


def make_state(seed: int, width: int = 3) -> State:
    source = torch.Generator().manual_seed(seed)
    params = {
        "block": {"w": torch.randn(width, 2, generator=source), "b": torch.randn(2, generator=source).bfloat16()},
        "a": torch.randn((), generator=source, dtype=torch.float64),
    }
    moments = Moments({"w": torch.randn(2, width, generator=source).mT}, ())
    return State(torch.tensor(seed), params, (moments, ()))


def leaves(state: State) -> list[torch.Tensor]:
    moments = state.opt_state[0]
    return [state.step, *state.params["block"].values(), state.params["a"], moments.mean["w"]]


def test_round_trip_is_exact_and_in_place(tmp_path):
    saved, like = make_state(1), make_state(2)
    place = checkpoint.save(tmp_path, 7, saved, MODEL, train=TrainConfig(steps=9))
    assert place == checkpoints.checkpoint_dir(tmp_path, 7)
    before = leaves(like)
    loaded = checkpoint.load(place, like, MODEL)
    assert loaded is like
    for got, buffer, wanted in zip(leaves(loaded), before, leaves(saved), strict=True):
        assert got is buffer
        assert torch.equal(got, wanted)
        assert got.dtype == wanted.dtype


def test_json_says_what_it_is(tmp_path):
    place = checkpoint.save(tmp_path, 7, make_state(1), MODEL, train=TrainConfig(steps=9))
    metadata = checkpoints.read_metadata(place)
    assert metadata["step"] == 7
    assert metadata["model"]["layers"] == 2
    assert metadata["train"]["steps"] == 9
    assert metadata["torch"] == torch.__version__


def test_leaves_have_readable_names(tmp_path):
    from safetensors import safe_open

    place = checkpoint.save(tmp_path, 0, make_state(1), MODEL)
    with safe_open(place / checkpoints.TENSORS, framework="pt") as file:
        names = set(file.keys())
    assert names == {"step", "params.a", "params.block.w", "params.block.b", "opt_state.0.mean.w"}


def untouched(like: State, wanted: State) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(like), leaves(wanted), strict=True))


def test_names_the_first_difference(tmp_path):
    place = checkpoint.save(tmp_path, 1, make_state(1), MODEL)
    wider = make_state(2, width=4)
    with pytest.raises(ValueError, match=r"params\.block\.w: wanted float32 \[4, 2\], got float32 \[3, 2\]"):
        checkpoint.load(place, wider)
    assert untouched(wider, make_state(2, width=4))

    missing = make_state(2)._replace(params={**make_state(2).params, "extra": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"params\.extra: wanted float32 \[2\], got nothing"):
        checkpoint.load(place, missing)

    fewer = make_state(2)._replace(opt_state=())
    with pytest.raises(ValueError, match=r"opt_state\.0\.mean\.w: wanted nothing, got float32"):
        checkpoint.load(place, fewer)

    other_dtype = make_state(2)._replace(step=torch.tensor(0, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"step: wanted int32 \[\], got int64 \[\]"):
        checkpoint.load(place, other_dtype)


def test_refuses_another_model(tmp_path):
    place = checkpoint.save(tmp_path, 1, make_state(1), MODEL)
    with pytest.raises(ValueError, match=r"another model: model\.layers is 2 there and 3 here") as error:
        checkpoint.load(place, make_state(2), ModelConfig(layers=3))
    assert "\n" not in str(error.value)


def test_refuses_damage(tmp_path):
    place = checkpoint.save(tmp_path, 1, make_state(1), MODEL)
    tensors = place / checkpoints.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        checkpoint.load(place, make_state(2))


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, make_state(step), MODEL, keep=2)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["step_00000003", "step_00000010"]
    checkpoint.save(tmp_path, 11, make_state(1), MODEL)
    assert len(checkpoints.checkpoints(tmp_path)) == 3


def test_never_overwrites(tmp_path):
    place = checkpoint.save(tmp_path, 1, make_state(1), MODEL)
    before = (place / checkpoints.TENSORS).read_bytes()
    with pytest.raises(ValueError, match="has no checkpoint yet, got 1"):
        checkpoint.save(tmp_path, 1, make_state(2), MODEL)
    assert (place / checkpoints.TENSORS).read_bytes() == before


@pytest.mark.parametrize("crash_in", ["tensors", "json", "manifest", "rename"])
def test_a_crash_leaves_the_last_checkpoint_and_no_half_one(tmp_path, monkeypatch, crash_in):
    kept = checkpoint.save(tmp_path, 1, make_state(1), MODEL, keep=1)

    def crash(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        target = {
            "tensors": (checkpoint, "write_tensors"),
            "json": (checkpoint, "write_text"),
            "manifest": (checkpoints, "manifest_text"),
            "rename": (os, "rename"),
        }
        patch.setattr(*target[crash_in], crash)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(tmp_path, 2, make_state(2), MODEL, keep=1)
    assert checkpoints.checkpoints(tmp_path) == [kept]

    checkpoint.save(tmp_path, 2, make_state(2), MODEL, keep=1)  # what the crash left behind does not stand in the way
    names = {path.name for path in (tmp_path / checkpoints.CHECKPOINTS).iterdir()}
    assert names == {"step_00000002", "latest"}


def test_the_parameters_alone(tmp_path):
    saved, like = make_state(1), make_state(2)
    place = checkpoint.save(tmp_path, 7, saved, MODEL)
    loaded = checkpoint.load_params(place, like.params, MODEL)
    assert loaded is like.params
    for name in ("w", "b"):
        assert torch.equal(loaded["block"][name], saved.params["block"][name])
    assert torch.equal(loaded["a"], saved.params["a"])
    with pytest.raises(ValueError, match=r"params.block.w: wanted float32 \[5, 2\], got float32 \[3, 2\]"):
        checkpoint.load_params(place, make_state(2, width=5).params)
    with pytest.raises(ValueError, match=r"params.a: wanted nothing, got float64"):
        checkpoint.load_params(place, {"block": like.params["block"]})
