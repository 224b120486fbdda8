"""Draws command lines that are wrong, each with what its message has to name: every setting of every script."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from titanfunc.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig
from titanfunc.config.compare import CompareConfig
from titanfunc.config.compile_report import CompileReportConfig
from titanfunc.config.driver import has_driver
from titanfunc.config.evaluate import EvaluateConfig
from titanfunc.config.experiment import to_mapping
from titanfunc.config.meta import MetaConfig


class Line(NamedTuple):
    """words: of the command line, the script's name first. names: one of these stands in the message."""

    words: tuple[str, ...]
    names: tuple[str, ...]


WRONG = {
    bool: ("maybe", "3", "[true]", "{a: 1}"),
    int: ("many", "1.5", "-1", "true", "[1]", "1e400", "{a: 1}", f"{10**23}", f"{10**23}"),
    float: ("much", "-0.5", "true", "[0.1]", "nan", "-inf", "{a: 1}", f"{10**400}"),
    str: ("7", "[a,b]", "true", "1.5", "{a: 1}"),
    tuple: ("5", "word", "{a: 1}", "[[1]]", "[-1]", "[null]"),
}
TEXTS = {
    "sample_prompt", "run_dir", "resume", "path", "cache_dir", "out", "start", "run", "text", "column", "split",
    "name", "subset", "revision", "commit",
}  # fmt: skip
"""Settings that any text may be given to; the others have choices."""


def flat(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield path + key, value


def settings() -> dict[str, Any]:
    """Those of a training run, with their defaults."""
    whole = to_mapping(Experiment("mac_tiny", ModelConfig(), DataConfig(), OptimConfig(), TrainConfig()))
    return dict(flat(whole))


def own(config: Any) -> dict[str, Any]:
    """The settings of a script that has no sections."""
    return {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}


def choices(key: str, default: Any) -> tuple[str, ...]:
    """Wrong values of another type, or out of range."""
    kind = tuple if isinstance(default, list) else type(default)
    chooses = kind is str and key.rpartition(".")[2] not in TEXTS
    more = ("nonsense", *([""] if default else [])) if chooses else ()
    return (*WRONG[kind], *more)


def misspelt(draw: random.Random, key: str) -> str:
    """The key with a letter of its last name doubled, dropped or moved."""
    path, dot, name = key.rpartition(".")
    place = draw.randrange(1, len(name)) if len(name) > 1 else 0
    changed = draw.choice([name[:place] + name[place - 1] + name[place:], name[:place] + "x" + name[place:]])
    return path + dot + changed


def of_fields(draw: random.Random, script: str, fields: dict[str, Any]) -> Iterator[Line]:
    """A line for every setting, with a value that it cannot have."""
    for key, default in fields.items():
        # --run is hydra's own default; said, it composes the settings once and not twice.
        yield Line((script, "--run", f"{key}={draw.choice(choices(key, default))}"), (key,))


def of_names(draw: random.Random, script: str, fields: dict[str, Any], count: int) -> Iterator[Line]:
    """Lines with keys that are none."""
    for key in draw.sample(sorted(fields), count):
        wrong = misspelt(draw, key)
        if wrong not in fields:
            yield Line((script, f"{draw.choice(('', '+'))}{wrong}=1"), (wrong,))


def some(draw: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """Some of every group, as of ``model`` and of ``model.memory``: a command line takes a third of a second, and
    ``tests/config/test_bounds.py`` tries every value of all of them without one."""
    groups: dict[str, list[str]] = {}
    for key in fields:
        groups.setdefault(key.rpartition(".")[0], []).append(key)
    drawn = [draw.sample(keys, 1 if "." in group else 2) for group, keys in groups.items()]
    return {key: fields[key] for keys in drawn for key in keys}


def lines(seed: int = 0) -> list[Line]:
    """All of them, each once."""
    draw = random.Random(seed)
    train = settings()
    report, meta, tests = own(CompileReportConfig()), own(MetaConfig()), own(EvaluateConfig())
    contest = {key: value for key, value in own(CompareConfig()).items() if key != "entries"}
    by_hand = BY_HAND if has_driver() else {**BY_HAND, **WITHOUT_DRIVER}
    found = [
        *of_fields(draw, "train", some(draw, train)),
        *of_names(draw, "train", train, 3),
        *of_fields(draw, "evaluate", tests),
        *of_names(draw, "evaluate", tests, 2),
        *of_fields(draw, "compare", contest),
        *of_names(draw, "compare", contest, 1),
        *of_fields(draw, "compile_report", report),
        *of_names(draw, "compile_report", report, 1),
        *of_fields(draw, "meta_train", meta),
        *of_names(draw, "meta_train", meta, 2),
        *(Line(tuple(words.split()), tuple(names.split())) for words, names in by_hand.items()),
    ]
    once = {line.words: line for line in found}
    return list(once.values())


WITHOUT_DRIVER = {
    "train train.device=cuda": "train.device",
    "train train.device=cuda:1": "train.device",
    "compare train.device=cuda": "train.device",
    "compile_report device=cuda": "device",
    "meta_train device=cuda": "device",
    "train model.kernels=triton": "model.kernels",
    "train optim=velo optim.kernels=triton": "optim.kernels",
    "compare model.kernels=triton": "model.kernels",
}
"""Where there is no GPU."""

LONG = 300 * "a"
"""A name that no file can have."""
PATHS = {
    "train train.run_dir": "train.run_dir",
    "train train.resume": "train.resume",
    "train data=text_folder data.path": "data.path",
    "train data=files data.path": "data.path",
    "train data.tokenizer=bpe data.cache_dir": "data.cache_dir",
    "evaluate run": "run",
    "compare out": "out",
    "compile_report out": "out",
    "meta_train out": "out",
    "meta_train start": "start",
}
"""Settings that are a path, each of which is tried with one that is too long and one where nothing can be made."""

BY_HAND = {
    # Names of groups, presets and sections.
    "train model=mac_tinny": "model=mac_tinny",
    "train model=gpt2": "model=gpt2",
    "train data=sotuu": "data=sotuu",
    "train optim=adam": "optim=adam",
    "train trian.steps=3": "trian.steps",
    "train +model.moe.expert=4": "model.moe.expert",
    "train modell=mac_tiny": "modell",
    "train model.preset=mac_huge": "model.preset",
    "train data=5": "data=5",
    "compare optims=[adamw,sgd]": "optims",
    "compare model=nothing": "model=nothing",
    "compare +optim.lr=1e-3": "optim",
    "compare train.resume=latest": "train.resume",
    "compile_report model=mac_hug": "model=mac_hug",
    "compile_report optim=sgd": "optim=sgd",
    "compile_report model.layers=0": "model.layers",
    "compile_report optim.lr=-1": "optim.lr",
    # Missing values, and words that are no settings.
    "train train.steps=": "train.steps",
    "train optim.lr=": "optim.lr",
    "train model.layers=": "model.layers",
    "train data.task=nothing": "data.task",
    "train steps=5": "steps",
    "train train.steps": "train.steps",
    "train =5": "=5",
    "train optim.betas=[0.9": "optim.betas",
    "train optim.betas=[0.9]": "optim.betas",
    "train --train.steps=5": "--train.steps",
    "evaluate --lengths=[5]": "--lengths",
    "train ~train.steps.foo": "train.steps",
    "train model.layers=${nowhere}": "nowhere",
    # Pairs that cannot be together.
    "train model.heads=3": "model.heads",
    f"train train.seed={10**23}": "train.seed",
    f"train train.steps={10**23}": "train.steps",
    f"train train.sample_tokens={10**20}": "train.sample_tokens",
    f"train model.dim={10**12}": "model.dim",
    f"train data.workers={10**23}": "data.workers",
    f"compare seeds=[{10**23}]": "seeds",
    "train data.batch_size=6 train.accumulate=4": "train.accumulate",
    "train model=mac_tiny model.window=8": "model.window",
    "train model=transformer_tiny model.persistent=4": "model.persistent",
    "train model=transformer_tiny model.memory_layers=[0]": "model.memory_layers",
    "train model.memory_layers=[9]": "model.memory_layers",
    "train model.mac.segment=100": "model.mac.segment",
    "train model.mac.context=inclusive model.mac.write=attention": "model.mac.context",
    "train model.fp8_scaling=row": "model.fp8_scaling",
    "train model=mac_tiny_moe model.moe.kernel=grouped": "model.moe.kernel",
    "train model.moe.top_k=9": "model.moe.top_k",
    "train model.vocab_size=300": "model.vocab_size",
    "train model.memory.rule.chunk_clip=1.0": "model.memory.rule.chunk_clip",
    "train optim=nested_adamw model.layer_code=shared optim.nested.unroll=exact": "model.layer_code",
    "train optim.nested.k_unroll=3": "optim.nested.k_unroll",
    "train data=needle data.seq_len=64": "data.seq_len",
    "train data=mqar data.recall.mqar.max_pairs=2": "data.recall.mqar.max_pairs",
    "train data=mqar optim=nested_adamw optim.nested.unroll=exact": "optim.nested.mode",
    "train data.path=somewhere": "data.path",
    "train train.sample_prompt=": "train.sample_prompt",
    "compare seeds=[0,100]": "tune_seed",
    "compare seeds=[1,1]": "seeds",
    "compare optims=[]": "optims",
    "compare entries=[{optim:adamw,lr:1}]": "entries",
    "compare entries=[{optim:adamw,settings:{lr:-1}}]": "entries",
    "compile_report batch_size=8 accumulate=3": "accumulate",
    "compile_report warm_up=2": "warm_up",
    "compile_report variants=[eager,eager]": "variants",
    "meta_train unroll=50 horizon=20": "unroll",
    "meta_train tasks=[]": "tasks",
    "evaluate lengths=[64,64]": "lengths",
    "evaluate depths=[2.0]": "depths",
    # Nothing, where no preset says what that stands for.
    "train train.steps=null": "train.steps",
    "train optim.lr=null": "optim.lr",
    "train optim.nested=null": "optim.nested",
    "train data.stream=null": "data.stream",
    "train model.memory=null": "model.memory",
    "compare train.steps=null": "train.steps",
    "evaluate run=null": "run",
    # Paths.
    "train data=text_folder": "data.path",
    "train data=text_folder data.path=nowhere": "data.path",
    "train data=text_folder data.path=/dev/null": "data.path",
    "train train.resume=nowhere": "train.resume",
    "train train.resume=latest": "train.resume",
    "train train.run_dir=/dev/null": "train.run_dir",
    "train train.run_dir=/dev/null/run": "train.run_dir",
    "train data.cache_dir=/dev/null": "data.cache_dir",
    "train data.cache_dir=/dev/null/cache": "data.cache_dir",
    "train optim=small_fc_lopt optim.learned.weights=[nowhere]": "optim.learned.weights",
    "train train.device=cuda:x": "train.device",
    "evaluate": "run",
    "evaluate run=nowhere": "run",
    "evaluate runs=[nowhere]": "runs",
    "compare out=/dev/null": "out",
    "compare out=/dev/null/results": "out",
    "compile_report out=/dev/null": "out",
    "compile_report out=/dev/null/report": "out",
    "meta_train out=/dev/null": "out",
    "meta_train out=/dev/null/weights": "out",
    "meta_train start=nowhere": "start",
    **{f"{words}={LONG}": names for words, names in PATHS.items()},
    **{f"{words}=/proc/nope": names for words, names in PATHS.items()},
    "train data.tokenizer=/proc/nope.json": "data.tokenizer",
    f"train data.tokenizer={LONG}.json": "data.tokenizer",
    f"train optim=small_fc_lopt optim.learned.weights=[{LONG}]": "optim.learned.weights",
    # The hub, which does not answer.
    "train data.tokenizer=nope/nope": "data.tokenizer",
    "train data.tokenizer=llama2": "data.tokenizer",
    "train data=fineweb_edu": "data.tokenizer",
    "train data=cosmopedia data.tokenizer=bytes data.stream=true": "data.path",
    "train data=fineweb_edu data.tokenizer=bytes data.revision=v1": "data.path",
    "compare data.tokenizer=nope/nope": "data.tokenizer",
    # What this machine cannot do.
    "train model.kernels=triton train.device=cpu": "model.kernels",
    "compare model.kernels=triton train.device=cpu": "model.kernels",
    f"train data.batch_size={10**9} data.seq_len={10**9}": "data.batch_size",
    f"compare data.batch_size={10**9} data.seq_len={10**9}": "data.batch_size",
    "train data=files data.path=a data.stream=true optim=nested_muon optim.nested.mode=implicit": "data.stream",
    # Hydra's own settings and options, and what it makes of a value.
    "train hydra.verbose=maybe": "hydra.verbose",
    "train hydra.foo=1": "hydra.foo",
    "train +hydra.foo=1": "hydra.foo",
    "train ++hydra.run.foo=1": "hydra.run.foo",
    "train hydra.run=3": "hydra.run",
    "train hydra.mode=nope": "hydra.mode",
    "train hydra/launcher=nope": "hydra/launcher",
    "train hydra.run.dir=/proc/nope": "hydra.run.dir",
    "train hydra.run.dir=/proc/${now:%Y}": "hydra.run.dir",
    f"train hydra.run.dir={LONG}": "hydra.run.dir",
    "train -m hydra.sweep.dir=/proc/nope": "hydra.sweep.dir",
    "evaluate hydra.run.dir=/proc/nope": "hydra.run.dir",
    "compare hydra.run.dir=/proc/nope": "hydra.run.dir",
    "compile_report +hydra.foo=1": "hydra.foo",
    "meta_train hydra.run.dir=/proc/nope": "hydra.run.dir",
    "train --foo": "--foo",
    "train --cfg nope": "--cfg",
    "train --cfg": "--cfg",
    "train --info nope": "--info",
    "train --resolve=3": "--resolve",
    "train --config-name nope": "--config-name",
    "train --config-dir nope": "--config-dir",
    "evaluate --foo": "--foo",
    "compare --cfg=nope": "--cfg",
    "compile_report --foo": "--foo",
    "meta_train -x": "-x",
    "train train.steps=${train.steps}": "train.steps",
    "train train.steps=${oc.env:TITANFUNC_NOPE}": "train.steps",
    "train train.steps=${nope:1}": "train.steps",
    "train train=${optim.lr}": "train",
    "train =": "'='",
    "train @x=3": "'@x=3'",
    "evaluate =": "'='",
    # Options of the benchmark of steps, which takes dashes.
    "bench_step": "--models",
    "bench_step --models": "--models",
    "bench_step --models mac_tinny": "mac_tinny",
    "bench_step --models mac_tiny:layrs=2": "layrs",
    "bench_step --models mac_tiny:layers": "layers",
    "bench_step --models mac_tiny:layers=-1": "layers",
    "bench_step --models mac_tiny@0x8": "--models",
    "bench_step --models mac_tiny@2x2@2x2": "--models",
    "bench_step --models mac_tiny mac_tiny": "--models",
    "bench_step --models mac_tiny --optims sgd": "sgd",
    "bench_step --models mac_tiny --optims adamw:lrr=1": "lrr",
    "bench_step --models mac_tiny --optims nested:nested.unroll=exact": "--optims",
    "bench_step --models mac_tiny --batch 0": "--batch",
    "bench_step --models mac_tiny --batch few": "--batch",
    "bench_step --models mac_tiny --seq -3": "--seq",
    "bench_step --models mac_tiny --steps 10": "--steps",
    "bench_step --models mac_tiny --steps 2.5": "--steps",
    "bench_step --models mac_tiny --lr -1": "--lr",
    "bench_step --models mac_tiny --lr fast": "--lr",
    "bench_step --models mac_tiny --lr nan": "--lr",
    "bench_step --models mac_tiny --lr inf": "--lr",
    "bench_step --models mac_tiny --jobs 0": "--jobs",
    "bench_step --models mac_tiny --time-limit 0": "--time-limit",
    "bench_step --models mac_tiny --time-limit nan": "--time-limit",
    "bench_step --models mac_tiny --device gpu": "--device",
    "bench_step --models mac_tiny --backend gcc": "--backend",
    "bench_step --models mac_tiny --against other": "--against",
    "bench_step --models mac_tiny --out /dev/null/result.json": "--out",
    "bench_step --models mac_tiny --profile /dev/null/traces": "--profile",
    "bench_step --models mac_tiny --caches /dev/null/caches": "--caches",
    "bench_step --model": "--models",
    "bench_step --models mac_tiny --stepps 30": "--stepps",
}
"""Command line -> what its message names, one of several words."""
