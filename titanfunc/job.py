"""A whole training run in its folder: data, compiled step, loop, sample and plot. What scripts/train.py calls."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.config import Experiment
from titanfunc.config.experiment import to_mapping
from titanfunc.config.runs import Place, differences, make_run_dir
from titanfunc.data import Corpus, Windows, load, validation_batches
from titanfunc.evals import evaluate
from titanfunc.generation import generate
from titanfunc.models import Model, build
from titanfunc.optim import from_config
from titanfunc.report import plot_curves
from titanfunc.train import TrainState, TrainStep, checkpoint, compile_step, init_state, make_eval_step, make_train_step
from titanfunc.train.display import Display
from titanfunc.train.loop import Diverged, Outcome, Writer, train
from titanfunc.train.metrics import MetricsFile
from titanfunc.train.tracker import TensorBoard


class Parts(NamedTuple):
    """What a run is put together from. backend: of torch.compile, or None where nothing is compiled."""

    experiment: Experiment
    place: Place
    device: torch.device
    backend: str | None
    corpus: Corpus
    windows: Windows
    held_out: list[Tensor]
    model: Model
    state: TrainState
    step: TrainStep
    eval_step: Callable[[Any, dict[str, Tensor]], Tensor]


def assemble(experiment: Experiment, place: Place) -> Parts:
    """Read the corpus, build the model and its step (nothing is compiled yet) and load the checkpoint, if any.

    Writes nothing. Raises ValueError, in one line, for a device that is not there, a corpus too small for its
    windows, or a checkpoint that does not fit.
    """
    data, config = experiment.data, experiment.train
    device = resolve_device(config.device)
    backend = resolve_backend(config.compile, device)
    corpus = load(data)
    cut = (data.seq_len, data.batch_size)
    separate = data.separate_documents
    windows = Windows(corpus.train, *cut, seed=data.seed, separate_documents=separate)
    held_out = validation_batches(corpus.validation, *cut, config.eval_batches, separate_documents=separate)
    model = build(experiment.model)
    tx = from_config(experiment.optim, config.steps)
    state = init_state(model, tx, config.seed, device)
    if place.checkpoint:
        checkpoint.load(place.checkpoint, state, experiment.model)
    step = compile_step(make_train_step(model, tx, config.accumulate), backend)
    eval_step = make_eval_step(model)  # not compiled: over its few batches that would take longer than it saves
    return Parts(experiment, place, device, backend, corpus, windows, held_out, model, state, step, eval_step)


def run(parts: Parts) -> int:
    """Train in the run's folder and leave there the settings, metrics, checkpoints, a sample and the curves.

    Returns the exit status: 0, 1 if training diverged, or 128 + the signal that stopped it (after a checkpoint).
    """
    experiment, place = parts.experiment, parts.place
    config = experiment.train
    run_dir = place.run_dir if place.resumes else make_run_dir(place.run_dir, exact=bool(config.run_dir))
    settings = yaml.safe_dump(to_mapping(experiment), sort_keys=False)
    (run_dir / "config.yaml").write_text(settings, encoding="utf-8")
    _announce(parts, run_dir)

    kept = {"data": experiment.data, "optim": experiment.optim, "train": config}
    first = int(parts.state.step)
    writers = _open_writers(run_dir, config.tracker, first if place.resumes else None)
    try:
        state, outcome = train(
            parts.step,
            parts.state,
            parts.windows.batch,
            config,
            save=lambda step, state: checkpoint.save(
                run_dir, step, state, experiment.model, keep=config.keep_checkpoints, **kept
            ),
            evaluate=lambda params: evaluate(parts.eval_step, params, parts.held_out, parts.corpus.bytes_per_token),
            writers=writers,
            display=Display(config.steps, first),
            bytes_per_token=parts.corpus.bytes_per_token,
        )
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for writer in writers:
            writer.close()
    if outcome.stopped_by is not None:
        _say(f"stopped by {outcome.stopped_by.name} at step {outcome.step}; its checkpoint is saved:")
        _say(f"continue with train.resume={run_dir}")
        return 128 + outcome.stopped_by
    _finish(parts, run_dir, state, outcome)
    return 0


def resolve_device(name: str) -> torch.device:
    """The device that a name means; "auto" is the GPU if there is one. Raises ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"train.device: wanted one of the {torch.cuda.device_count()} CUDA devices, got {name!r}")
    return device


def resolve_backend(name: str, device: torch.device) -> str | None:
    """The torch.compile backend that a name means, or None; a device has no say but for "auto".

    "auto" is inductor, but None on a CPU without the C++ compiler that inductor calls there.
    """
    if name == "auto":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        name = "inductor" if device.type == "cuda" or shutil.which(compiler) else "none"
    return None if name == "none" else name


def _open_writers(run_dir: Path, tracker: str, resume_step: int | None) -> list[Writer]:
    writers: list[Writer] = [MetricsFile(run_dir / "metrics.jsonl", resume_step)]
    if tracker == "tensorboard":
        writers.append(TensorBoard(run_dir, resume_step))
    return writers


def _announce(parts: Parts, run_dir: Path) -> None:
    experiment, corpus, windows = parts.experiment, parts.corpus, parts.windows
    model, data = experiment.model, experiment.data
    _say(f"run      {run_dir}")
    _say(f"model    {experiment.preset}: {tree.size(parts.state.params):,} parameters, {model.precision}")
    _say(
        f"data     {data.corpus}: {len(corpus.train.tokens):,} tokens, {len(corpus.validation.tokens):,} held out; "
        f"a step is {data.batch_size} of {windows.windows_per_epoch:,} windows of {data.seq_len}"
    )
    _say(
        f"device   {parts.device}, " + (f"the step as one graph by {parts.backend}" if parts.backend else "uncompiled")
    )
    if parts.place.checkpoint:
        _say(f"resume   {parts.place.checkpoint}")
        for section in ("data", "optim", "train"):
            for name, there, here in differences(parts.place.metadata.get(section, {}), getattr(experiment, section)):
                if f"{section}.{name}" not in ("train.resume", "train.run_dir"):
                    _say(f"         {section}.{name} was {there!r} and is now {here!r}")


def _finish(parts: Parts, run_dir: Path, state: TrainState, outcome: Outcome) -> None:
    config = parts.experiment.train
    written = [f"step_{outcome.step:08d}"]
    if config.sample_tokens:
        text = _sample(parts, state)
        (run_dir / "sample.txt").write_text(text + "\n", encoding="utf-8")
        written.append("sample.txt")
        _say(f"\n{text}\n")
    result = f"{outcome.validation['bits_per_byte']:.3f} bits per byte on held-out text"
    title = f"{parts.experiment.preset}: {result} after {outcome.step} steps"
    plot_curves(run_dir / "metrics.jsonl", run_dir / "curves.png", title)
    written.append("curves.png")
    speed = f", {outcome.tokens / outcome.seconds:,.0f} tokens/s" if outcome.seconds else ""
    _say(f"done     {outcome.step} steps, {outcome.seconds:.0f} s of training{speed}")
    _say(f"result   {result}")
    _say(f"written  {', '.join(written)} in {run_dir}")


def _sample(parts: Parts, state: TrainState) -> str:
    """The prompt and what the model makes of it."""
    config, tokenizer = parts.experiment.train, parts.corpus.tokenizer
    prompt = torch.tensor([tokenizer.encode(config.sample_prompt).tolist()], device=parts.device)
    source = rng.generator(config.seed, parts.device)
    tokens = generate(
        parts.model,
        state.params,
        prompt,
        config.sample_tokens,
        temperature=config.temperature,
        generator=source,
    )
    return config.sample_prompt + tokenizer.decode(tokens[0].tolist())


def _say(text: str) -> None:
    print(text, flush=True)
