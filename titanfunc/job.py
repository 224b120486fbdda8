"""A whole training run in its folder: data, compiled step, loop, sample and plot. What scripts/train.py calls."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.config import Experiment, TrainConfig, checkpoints
from titanfunc.config._check import require
from titanfunc.config.experiment import to_mapping
from titanfunc.config.failures import LOWER_STATE, advising, reading
from titanfunc.config.files import naming, write_text
from titanfunc.config.lock import RunTaken, hold
from titanfunc.config.runs import CURVES, METRICS, Place, commit_of, differences, make_run_dir
from titanfunc.data import Source, open_source
from titanfunc.data.ahead import make_ahead
from titanfunc.data.same import keep, require_same
from titanfunc.device import require_kernels_run, require_optimizer_runs, resolve_backend, resolve_device
from titanfunc.evals import evaluate, evaluate_answers, show_answers
from titanfunc.generation import generate
from titanfunc.models import Model, build
from titanfunc.optim import GradientTransformation, from_config
from titanfunc.train import (
    CompiledStep,
    TrainState,
    checkpoint,
    compile_step,
    init_state,
    make_answer_step,
    make_eval_step,
    make_train_step,
)
from titanfunc.train.determinism import same_each_time
from titanfunc.train.display import Display
from titanfunc.train.ending import Documents, end
from titanfunc.train.feed import AHEAD
from titanfunc.train.first_steps import FirstSteps
from titanfunc.train.loop import Outcome, Writer, train
from titanfunc.train.metrics import MetricsFile
from titanfunc.train.reading import Batches, Remembered, naming_documents
from titanfunc.train.saver import Saver
from titanfunc.train.signals import StopSignals
from titanfunc.train.tracker import TensorBoard


class Parts(NamedTuple):
    """What a run is put together from. backend: of torch.compile, or None where nothing is compiled. evaluate: the
    validation numbers of params.
    """

    experiment: Experiment
    place: Place
    device: torch.device
    backend: str | None
    source: Source
    model: Model
    state: TrainState
    step: CompiledStep
    evaluate: Callable[[Any], dict[str, float]]


def assemble(experiment: Experiment, place: Place) -> Parts:
    """Read the corpus, build the model and its step (nothing is compiled yet) and load the checkpoint, if any.

    Writes nothing. Raises ValueError, in one line, for a device that is not there, a corpus too small for its
    windows, rows too short for their recall task, or a checkpoint that does not fit; NoData for files that cannot be
    read.
    """
    config = experiment.train
    device = resolve_device(config.device)
    require_kernels_run(experiment.model, device)
    require_optimizer_runs(experiment.optim, device)
    backend = resolve_backend(config.compile, device)
    began = place.checkpoint.resolve().parent.parent if place.checkpoint else None
    commit = commit_of(began, experiment.data) if began else ""
    with reading():
        source = open_source(experiment.data, config.eval_batches, commit=commit)
    if began:
        trained_on = None if place.resumes else place.metadata.get("data", {})
        require_same(began, experiment.data, source, trained_on)
    _require_prompt(config, source)
    model, tx, step = make_step(experiment, backend)
    with advising(LOWER_STATE):
        state = _drawn(model, tx, config.seed, device, backend)
    if place.checkpoint:
        checkpoint.load(place.checkpoint, state, experiment.model, verify=False)  # prepare() has read it all
    return Parts(experiment, place, device, backend, source, model, state, step, validation(model, source))


def _require_prompt(config: TrainConfig, source: Source) -> None:
    """The sample is written when all steps are done: a prompt that it cannot go on from is refused before the first."""
    if not config.sample_tokens or source.task or source.corpus is None:
        return
    tokenizer, prompt = source.corpus.tokenizer, config.sample_prompt
    try:
        tokens = len(tokenizer.encode(prompt))
    except ValueError as error:
        raise ValueError(f"train.sample_prompt: wanted a text of tokens, got {prompt!r} ({error})") from None
    require(tokens > 0, "train.sample_prompt", f"a text that is a token at least of {tokenizer.name}", prompt)


def _drawn(
    model: Model, tx: GradientTransformation, seed: int, device: torch.device, backend: str | None
) -> TrainState:
    """The first state, drawn while the compiler is imported: both take seconds."""
    with ThreadPoolExecutor(1) as pool:
        state = pool.submit(init_state, model, tx, seed, device)
        if backend == "inductor":
            importlib.import_module("torch._inductor.compile_fx")
        return state.result()


def make_step(experiment: Experiment, backend: str | None) -> tuple[Model, GradientTransformation, CompiledStep]:
    """The model, the optimizer and the train step of a configuration; nothing is compiled yet."""
    config = experiment.train
    model = build(experiment.model)
    tx = from_config(experiment.optim, config.steps, experiment.model)
    return model, tx, compile_step(make_train_step(model, tx, config.accumulate), backend)


def run(parts: Parts) -> int:
    """Train in the run's folder and leave there the settings, metrics, checkpoints, a sample and the curves.

    Returns the exit status: 0, 128 + the signal that stopped it (after a checkpoint), or one of
    ``titanfunc.config.failures`` after a line on stderr, such as for steps that are not finite, data that cannot be
    read, a full disk, or too little memory. Raises RunTaken if another process has begun in a new run's folder.
    """
    place = parts.place
    run_dir = place.run_dir
    batches, documents = _reading(parts)
    try:
        if not place.resumes:
            with naming(run_dir):
                run_dir = make_run_dir(run_dir, exact=bool(parts.experiment.train.run_dir))
            hold(run_dir, new=True)
        return _run(parts, run_dir, batches)
    except RunTaken:
        raise
    except Exception as error:
        return end(error, run_dir, parts.experiment.train.steps, documents)


def _reading(parts: Parts) -> tuple[Batches, Documents | None]:
    """The batches of the run's steps, and the names of what they were cut from."""
    config, data, source = parts.experiment.train, parts.experiment.data, parts.source
    if not data.stream:
        return make_ahead(batches_of(source, parts.experiment), config.steps, data.workers), source.documents
    kept = config.log_every + config.max_skipped + AHEAD + 2  # of those not read yet, and of the feed's
    named = batches_of(naming_documents(source), parts.experiment)
    remembered = Remembered(make_ahead(named, config.steps, data.workers), kept)
    return remembered.batch, remembered.documents


def _run(parts: Parts, run_dir: Path, batches: Batches) -> int:
    experiment, place = parts.experiment, parts.place
    config = experiment.train
    settings = yaml.safe_dump(to_mapping(experiment), sort_keys=False)
    write_text(run_dir / "config.yaml", settings)
    keep(run_dir, experiment.data, parts.source)
    first_steps = _first_steps(parts)
    _announce(parts, run_dir, first_steps.last())

    kept = {"data": experiment.data, "optim": experiment.optim, "train": config}
    first = int(parts.state.step)
    writers = _open_writers(run_dir, config.tracker, first if place.resumes else None)
    writers += [first_steps] if parts.backend else []
    saver = Saver(run_dir, experiment.model, keep=config.keep_checkpoints, keep_best=config.keep_best, **kept)
    writers.append(saver)  # for the validation loss of what it saves
    try:
        if parts.backend:
            first_steps.begin()
        with StopSignals() as signals, saver, same_each_time(parts.device, config.deterministic):
            state, outcome = train(
                parts.step,
                parts.state,
                batches,
                config,
                save=saver.save,
                evaluate=parts.evaluate,
                writers=writers,
                display=Display(config.steps, first),
                bytes_per_token=parts.source.bytes_per_token,
                signals=signals,
                resumed=place.metadata.get(checkpoints.SUMS, {}) if place.resumes else None,
            )
    finally:
        for writer in writers:
            writer.close()
    if outcome.stopped_by is not None:
        _say(f"stopped by {outcome.stopped_by.name} at step {outcome.step}; its checkpoint is saved:")
        _say(f"continue with train.resume={run_dir}")
        return 128 + outcome.stopped_by
    _finish(parts, run_dir, state, outcome)
    return 0


def batches_of(source: Source, experiment: Experiment) -> Callable[[int], Any]:
    """A step -> its batch: a dict of tokens [B, T + 1] and what else there is.

    Where the optimizer learns on batches of its own, "held_out" [K, B, T + 1] joins them at every
    ``meta_update_freq``-th step from ``meta_start`` on: windows of the training text, those after the run's last step
    (which come again, where a run is longer than the text).
    """
    count, steps, knobs = experiment.optim.held_out, experiment.train.steps, experiment.optim.nested
    period = knobs.meta_update_freq
    if not count:
        return source.batches

    def batches(step: int) -> Any:
        batch = source.batches(step)
        if step < knobs.meta_start or step % period:
            return batch
        first = steps + step // period * count
        return {**batch, "held_out": torch.stack([source.batches(first + i)["tokens"] for i in range(count)])}

    return batches


def validation(model: Model, source: Source) -> Callable[[Any], dict[str, float]]:
    """params (leaves of any shapes) -> the numbers on held-out batches; of a recall task, those of its answers.

    Not compiled: over its few batches that would take longer than it saves.
    """
    if source.task:
        answer_step = make_answer_step(model)
        return lambda params: evaluate_answers(answer_step, params, source.held_out)
    eval_step = make_eval_step(model)
    texts: list[Tensor] = [batch["tokens"] for batch in source.held_out]
    return lambda params: evaluate(eval_step, params, texts, source.bytes_per_token or 1.0)


def _open_writers(run_dir: Path, tracker: str, resume_step: int | None) -> list[Writer]:
    writers: list[Writer] = [MetricsFile(run_dir / METRICS, resume_step)]
    if tracker == "tensorboard":
        writers.append(TensorBoard(run_dir, resume_step))
    return writers


def _first_steps(parts: Parts) -> FirstSteps:
    """How long the first step of such a run took."""
    whole = to_mapping(parts.experiment)
    compiled = {name: whole[name] for name in ("model", "optim")}
    batch = [parts.experiment.data.batch_size, parts.experiment.data.seq_len, parts.experiment.train.accumulate]
    return FirstSteps({**compiled, "batch": batch, "backend": parts.backend}, parts.device, _say)


def _how_compiled(parts: Parts, seconds: float | None) -> str:
    """What is compiled and how, and how long that took last time."""
    if not parts.backend:
        return "uncompiled"
    shared = ", blocks that are alike sharing code" if parts.experiment.model.layer_code == "shared" else ""
    took = "not compiled before" if seconds is None else f"the first step took {seconds:.0f} s last time"
    return f"{parts.step.how(parts.device)}{shared} ({took})"


def _announce(parts: Parts, run_dir: Path, first_step: float | None) -> None:
    experiment, model = parts.experiment, parts.experiment.model
    _say(f"run      {run_dir}")
    _say(f"model    {experiment.preset}: {tree.size(parts.state.params):,} parameters, {model.precision}")
    _say(f"data     {parts.source.summary}")
    _say(f"device   {parts.device}, {_how_compiled(parts, first_step)}")
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
        write_text(run_dir / "sample.txt", text + "\n")
        written.append("sample.txt")
        _say(f"\n{text}\n")
    if parts.source.task:
        result = f"{outcome.validation['accuracy']:.1%} of the answers' tokens right on held-out rows"
    else:
        result = f"{outcome.validation['bits_per_byte']:.3f} bits per byte on held-out text"
    title = f"{parts.experiment.preset}: {result} after {outcome.step} steps"
    from titanfunc.report import plot_curves  # matplotlib comes with it, which the first step need not wait for

    with naming(run_dir / CURVES):
        plot_curves(run_dir / METRICS, run_dir / CURVES, title)
    written.append(CURVES)
    speed = f", {outcome.tokens / outcome.seconds:,.0f} tokens/s" if outcome.seconds else ""
    _say(f"done     {outcome.step} steps, {outcome.seconds:.0f} s of training{speed}")
    _say(f"result   {result}")
    _say(f"written  {', '.join(written)} in {run_dir}")


def _sample(parts: Parts, state: TrainState) -> str:
    """The prompt and what the model makes of it; of a recall task, some questions with its answers."""
    config, data, source = parts.experiment.train, parts.experiment.data, parts.source
    if source.task:
        return show_answers(parts.model, state.params, source.task, data.task, data.recall)
    assert source.corpus is not None
    tokenizer = source.corpus.tokenizer
    prompt = torch.tensor([tokenizer.encode(config.sample_prompt).tolist()], device=parts.device)
    tokens = generate(
        parts.model,
        state.params,
        prompt,
        config.sample_tokens,
        temperature=config.temperature,
        generator=rng.generator(config.seed, parts.device),
    )
    return config.sample_prompt + tokenizer.decode(tokens[0].tolist())


def _say(text: str) -> None:
    print(text, flush=True)
