import os
from typing import Any

import pytest
import torch

from tests.train.states import MODEL, leaves, make_state, same
from titanfunc.config import ModelConfig, TrainConfig, checkpoints
from titanfunc.train import checkpoint


def test_round_trip_is_exact_and_in_place(tmp_path):
    saved, like = make_state(7), make_state(2)
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
    place = checkpoint.save(tmp_path, 7, make_state(7), MODEL, train=TrainConfig(steps=9))
    metadata = checkpoints.read_metadata(place)
    assert metadata["step"] == 7
    assert metadata["model"]["layers"] == 2
    assert metadata["train"]["steps"] == 9
    assert metadata["torch"] == torch.__version__


def test_leaves_have_readable_names(tmp_path):
    from safetensors import safe_open

    place = checkpoint.save(tmp_path, 0, make_state(0), MODEL)
    with safe_open(place / checkpoints.TENSORS, framework="pt") as file:
        names = set(file.keys())
    assert names == {"step", "params.a", "params.block.w", "params.block.b", "opt_state.0.mean.w"}


def test_names_the_first_difference(tmp_path):
    place = checkpoint.save(tmp_path, 1, make_state(1), MODEL)
    wider = make_state(2, width=4)
    with pytest.raises(ValueError, match=r"params\.block\.w: wanted float32 \[4, 2\], got float32 \[3, 2\]"):
        checkpoint.load(place, wider)
    assert same(wider, make_state(2, width=4))

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
    checkpoint.save(tmp_path, 11, make_state(11), MODEL)
    assert len(checkpoints.checkpoints(tmp_path)) == 3


def test_never_overwrites(tmp_path):
    place = checkpoint.save(tmp_path, 1, make_state(1), MODEL)
    before = (place / checkpoints.TENSORS).read_bytes()
    with pytest.raises(ValueError, match="has no checkpoint yet, got 1"):
        checkpoint.save(tmp_path, 1, make_state(1), MODEL)
    assert (place / checkpoints.TENSORS).read_bytes() == before
    with pytest.raises(ValueError, match=r"^step: wanted that of the state, 3, got 2$"):
        checkpoint.save(tmp_path, 2, make_state(3), MODEL)


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
    saved, like = make_state(7), make_state(2)
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


def test_the_best_stay_beside_the_newest(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 1.0, 6: 9.0}
    for step, loss in losses.items():
        checkpoint.save(tmp_path, step, make_state(step), MODEL, keep=1, keep_best=2, validation_loss=loss)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)] == [2, 5, 6]
    assert checkpoints.validation_loss(checkpoints.checkpoint_dir(tmp_path, 2)) == 1.0
    names = {path.name for path in (tmp_path / checkpoints.CHECKPOINTS).iterdir()}
    assert names == {"step_00000002", "step_00000005", "step_00000006", "latest"}
    assert (tmp_path / checkpoints.CHECKPOINTS / "latest").read_text() == "step_00000006\n"


def test_safetensors_itself_reads_what_is_written(tmp_path):
    from safetensors.torch import load_file

    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8,
             torch.bool, torch.float8_e4m3fn)  # fmt: skip
    wanted = {str(kind): torch.arange(7).to(kind) for kind in kinds} | {
        "none": torch.zeros(0, 3),
        "0-d": torch.ones(()),
    }
    place = checkpoint.save(tmp_path, 1, wanted, MODEL)
    got = load_file(place / checkpoints.TENSORS)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert got[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist(), name


def test_format_1_as_it_was_written_is_read(tmp_path):
    from safetensors.torch import save_file

    saved, like = make_state(7), make_state(2)
    place = checkpoint.save(tmp_path, 7, saved, MODEL)
    (place / checkpoints.MANIFEST).unlink()
    metadata = (place / checkpoints.METADATA).read_text().replace('"format": 2', '"format": 1')
    (place / checkpoints.METADATA).write_text(metadata)
    tensors = {name: leaf.contiguous() for name, leaf in checkpoint.named_leaves(saved).items()}
    save_file(tensors, place / checkpoints.TENSORS)
    assert same(checkpoint.load(place, like, MODEL), saved)


def test_a_dtype_that_the_format_has_not(tmp_path):
    with pytest.raises(ValueError, match=r"^z: wanted one of torch.float64, .*, got torch.complex64"):
        checkpoint.save(tmp_path, 1, {"z": torch.zeros(2, dtype=torch.complex64)}, MODEL)
    assert list((tmp_path / checkpoints.CHECKPOINTS).iterdir()) == []


def test_parameters_that_would_not_fit_are_refused_without_their_memory(tmp_path):
    place = checkpoint.save(tmp_path, 1, make_state(1), MODEL)
    checkpoint.require_params(place, lambda: make_state(2).params)
    with pytest.raises(ValueError, match=r"params.block.w: wanted float32 \[1099511627776, 2\], got float32 \[3, 2\]"):
        checkpoint.require_params(place, lambda: make_state(2, width=2**40).params)
    with pytest.raises(ValueError, match=r"params.a: wanted nothing, got float64 \[\]"):
        checkpoint.require_params(place, lambda: {"block": make_state(2).params["block"]})
