"""How the training loop runs. Frozen dataclasses, checked when they are made; no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from titanfunc.config._check import (
    SEED,
    STEPS,
    is_number,
    require,
    require_choice,
    require_positive,
    require_whole,
)
from titanfunc.config.files import require_path

COMPILERS = ("auto", "inductor", "aot_eager", "none")
TRACKERS = ("none", "tensorboard")
LONGEST_SAMPLE = 2**24


@dataclass(frozen=True)
class TrainConfig:
    """The loop. Everything named ``*_every`` is in steps.

    steps: optimizer steps in all. accumulate: equal parts of a batch whose gradients are averaged
    inside the compiled graph.
    seed: of the initial weights and of the sample.
    log_every: how often the device is read. max_skipped: skipped steps in a row (their loss or gradient was
    not finite) after which a run gives up.
    eval_every: how often the validation loss is measured (0: only at the end). eval_batches: on how many batches.
    checkpoint_every: how often the state is saved (0: only at the end). keep_checkpoints: how many of the
    newest stay. keep_best: how many of the lowest validation loss stay beside them (of those saved at a step that was
    validated too).
    sample_tokens: length of the text written at the end (0: none; a recall task writes some answers instead).
    sample_prompt: what that text goes on from.
    temperature: of that text; 0 takes the likeliest token.
    run_dir: the run's folder ("": a new one under runs/, named by time and preset).
    resume: "" (begin anew), "latest", or a run's or checkpoint's folder.
    device: "auto", "cpu", "cuda" or "cuda:N". compile: one of COMPILERS ("auto": inductor where it has a
    compiler to call, else none). deterministic: sums in one order on a GPU too, at the cost of some time, so that
    a run comes out the same, bit for bit, each time; on a CPU it always does. tracker: one of TRACKERS, beside
    metrics.jsonl.
    """

    steps: int = 250
    accumulate: int = 1
    seed: int = 0
    log_every: int = 10
    max_skipped: int = 10
    eval_every: int = 125
    eval_batches: int = 16
    checkpoint_every: int = 125
    keep_checkpoints: int = 2
    keep_best: int = 1
    sample_tokens: int = 300
    sample_prompt: str = "My fellow citizens, "
    temperature: float = 0.8
    run_dir: str = ""
    resume: str = ""
    device: str = "auto"
    compile: str = "auto"
    deterministic: bool = False
    tracker: str = "none"

    def __post_init__(self) -> None:
        require_positive(self, ("steps", "log_every", "max_skipped"), "train.", STEPS)
        require_positive(self, ("accumulate", "eval_batches", "keep_checkpoints"), "train.")
        require_whole(self, ("seed",), "train.", SEED)
        require_whole(self, ("eval_every", "checkpoint_every"), "train.", STEPS)
        require_whole(self, ("keep_best",), "train.")
        require_whole(self, ("sample_tokens",), "train.", LONGEST_SAMPLE)
        require(isinstance(self.sample_prompt, str), "train.sample_prompt", "text", self.sample_prompt)
        for field in ("run_dir", "resume"):
            require_path(getattr(self, field), f"train.{field}")
        if self.sample_tokens:
            require(self.sample_prompt != "", "train.sample_prompt", "some text to go on from", self.sample_prompt)
        ok = is_number(self.temperature) and self.temperature >= 0
        require(ok, "train.temperature", "0 (the likeliest token) or a positive number", self.temperature)
        require_device(self.device, "train.device")
        require(isinstance(self.deterministic, bool), "train.deterministic", "true or false", self.deterministic)
        require_choice(self.compile, "train.compile", COMPILERS)
        require_choice(self.tracker, "train.tracker", TRACKERS)


def require_device(name: Any, field: str) -> None:
    """Raise ``ValueError`` unless ``name`` is how a device is written; whether it is there is seen later."""
    ok = isinstance(name, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None
    require(ok, field, "auto, cpu, cuda or cuda:N", name)
