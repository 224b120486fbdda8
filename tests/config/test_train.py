import dataclasses

import pytest

from titanfunc.config import OptimConfig, TrainConfig
from titanfunc.config.optim import MuonConfig, NestedConfig, RoleRates


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sgd"),
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", "fast"),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("min_lr_ratio", 1.1),
        ("clip_norm", -1.0),
        ("clip_norm", True),
        ("schedule", "line"),
        ("decay_steps", -1),
    ],
)
def test_optim_refuses(field, value):
    with pytest.raises(ValueError, match=rf"^optim\.{field}: wanted .*, got ") as error:
        OptimConfig(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MuonConfig(adam_ratio=0), r"optim\.muon\.adam_ratio: wanted a positive number, got 0"),
        (lambda: MuonConfig(momentum=1.0), r"optim\.muon\.momentum: wanted a number in"),
        (lambda: MuonConfig(method="svd"), r"optim\.muon\.method: wanted one of newton_schulz"),
        (lambda: NestedConfig(base="sgd"), r"optim\.nested\.base: wanted one of adamw, muon"),
        (lambda: NestedConfig(meta_lr=-1), r"optim\.nested\.meta_lr: wanted 0 or"),
        (lambda: NestedConfig(k_unroll=3), r"optim\.nested\.k_unroll: wanted 1 with unroll=online"),
        (lambda: NestedConfig(min_lr_mult=2), r"optim\.nested\.min_lr_mult: wanted a number in"),
        (lambda: NestedConfig(cms_frequencies=()), r"optim\.nested\.cms_frequencies: wanted a list"),
        (lambda: RoleRates(head=-1), r"optim\.role_rates\.head: wanted 0 or"),
        (
            lambda: OptimConfig(muon=MuonConfig(steps=4)),
            r"optim\.muon\.steps: wanted its default: optim.name=adamw has",
        ),
        (
            lambda: OptimConfig(name="nested", nested=NestedConfig(base="adamw"), muon=MuonConfig(steps=4)),
            r"optim\.muon\.steps: wanted its default: nested over adamw has",
        ),
        (lambda: OptimConfig(nested=NestedConfig(meta_lr=0.5)), r"optim\.nested\.meta_lr: wanted its default"),
    ],
)
def test_optimizers_own_knobs_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("accumulate", 0),
        ("log_every", 0),
        ("max_skipped", 0),
        ("eval_batches", 0),
        ("keep_checkpoints", 0),
        ("seed", -1),
        ("eval_every", -1),
        ("checkpoint_every", True),
        ("sample_tokens", -1),
        ("sample_prompt", ""),
        ("run_dir", None),
        ("resume", 3),
        ("temperature", -0.1),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("compile", "fast"),
        ("tracker", "paper"),
    ],
)
def test_train_refuses(field, value):
    with pytest.raises(ValueError, match=rf"^train\.{field}: wanted .*, got ") as error:
        TrainConfig(**{field: value})
    assert "\n" not in str(error.value)


def test_zero_turns_things_off():
    OptimConfig(weight_decay=0.0, clip_norm=0.0, warmup_steps=0, min_lr_ratio=0.0)
    TrainConfig(eval_every=0, checkpoint_every=0, sample_tokens=0, sample_prompt="", temperature=0.0)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices(device):
    assert TrainConfig(device=device).device == device


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3
