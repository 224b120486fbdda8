import subprocess
import sys
from pathlib import Path

import pytest

from titanfunc.config import PRESETS
from titanfunc.config.experiment import from_mapping, to_mapping, unknown_key

TINY = {"model": {"preset": "mac_tiny"}}


def test_nulls_are_the_presets_and_the_tokenizers():
    model = {
        "preset": "mac_tiny",
        "layers": None,
        "vocab_size": None,
        "memory": {"heads": None},
        "mac": {"write": None},
    }
    experiment = from_mapping({"model": model, "data": {"seq_len": None}})
    assert experiment.model == PRESETS["mac_tiny"]
    assert experiment.preset == "mac_tiny"
    assert experiment.data.seq_len == experiment.model.seq_len


def test_overrides_reach_nested_fields():
    model = {"preset": "mac_tiny", "layers": 3, "mac": {"write": "input"}, "memory": {"clip": 2}}
    experiment = from_mapping({"model": model, "optim": {"betas": [0.8, 0.9], "lr": 1}})
    assert (experiment.model.layers, experiment.model.mac.write) == (3, "input")
    assert experiment.model.memory.clip == 2.0
    assert experiment.optim.betas == (0.8, 0.9)
    assert isinstance(experiment.optim.lr, float)


def test_seq_len_follows_the_model_unless_given():
    model = {"preset": "mac_tiny", "seq_len": 128}
    assert from_mapping({"model": model}).data.seq_len == 128
    assert from_mapping({"model": model, "data": {"seq_len": 64}}).data.seq_len == 64


def test_mapping_and_back():
    tree = {"model": {"preset": "transformer_tiny", "window": 32}, "train": {"steps": 7}, "data": {"batch_size": 2}}
    experiment = from_mapping(tree)
    assert from_mapping(to_mapping(experiment)) == experiment


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "model.preset: wanted FAMILY_SIZE or "),
        ({"model": {"preset": "mac_huge"}}, "model.preset: wanted FAMILY_SIZE or "),
        ({**TINY, "trian": {}}, "trian: no such setting; did you mean train?"),
        ({**TINY, "train": {"step": 3}}, "train.step: no such setting; did you mean train.steps"),
        ({**TINY, "train": {"zzz": 3}}, "train.zzz: no such setting; train has steps, accumulate, "),
        ({**TINY, "zzz": 3}, "zzz: no such setting; they begin with model., data., optim., train."),
        ({**TINY, "train": 3}, "train: wanted a group of settings, got 3"),
        ({**TINY, "train": {"steps": None}}, "train.steps: wanted a whole number, got null"),
        ({**TINY, "optim": {"lr": None}}, "optim.lr: wanted a number, got null"),
        ({**TINY, "optim": {"nested": None}}, "optim.nested: wanted a group of settings, got null"),
        ({**TINY, "data": {"stream": None}}, "data.stream: wanted true or false, got null"),
        ({"model": {"preset": "mac_tiny", "memory": None}}, "model.memory: wanted a group of settings, got null"),
        ({"model": {"preset": "mac_tiny", "layers": "abc"}}, "model.layers: wanted a whole number, got 'abc'"),
        ({"model": {"preset": "mac_tiny", "layers": True}}, "model.layers: wanted a whole number, got True"),
        ({"model": {"preset": "mac_tiny", "tie_embeddings": 1}}, "model.tie_embeddings: wanted true or false, got 1"),
        ({"model": {"preset": "mac_tiny", "memory": {"clip": "x"}}}, "model.memory.clip: wanted a number, got 'x'"),
        ({"model": {"preset": "mac_tiny", "memory": 3}}, "model.memory: wanted a group of settings, got 3"),
        ({"model": {"preset": "mac_tiny", "mac": {"write": 3}}}, "model.mac.write: wanted text"),
        ({"model": {"preset": "mac_tiny", "heads": 3}}, "model.heads: wanted a divisor of dim = 128, got 3"),
        ({"model": {"preset": "mac_tiny", "vocab_size": 300}}, "model.vocab_size: wanted 256, as data.tokenizer=bytes"),
        ({"model": {"preset": "mac_tiny", "kernels": "cuda"}}, "model.kernels: wanted one of reference, triton, got"),
        *(
            (
                {"model": {"preset": preset, "kernels": "triton", **changes}},
                f"model.{key}: wanted {wanted} with kernels",
            )
            for preset, changes, key, wanted in (
                ("mac_tiny", {"memory": {"depth": 3}}, "memory.depth", "1 or 2"),
                ("mac_tiny", {"memory": {"bias": True}}, "memory.bias", "false"),
                (
                    "lmm_tiny",
                    {"memory": {"rule": {"write": "chunk", "optimizer": "muon"}}},
                    "memory.rule.optimizer",
                    "gradient",
                ),
                (
                    "lmm_tiny",
                    {"memory": {"rule": {"write": "chunk", "chunk_clip": 1.0}}},
                    "memory.rule.chunk_clip",
                    "0",
                ),
                ("mal_tiny", {"memory": {"rule": {"objective": "huber"}}}, "memory.rule.objective", "l2"),
                ("mag_tiny", {"memory": {"rule": {"loss": "mean"}}}, "memory.rule.loss", "sum"),
                ("mac_tiny", {"heads": 1, "dim": 256}, "heads", "a head size dim / heads among 16, 32, 64, 128"),
                ("mac_tiny", {"attention": "softmax"}, "attention", "sdpa"),
                ("transformer_tiny", {}, "window", "at least 1 token (full attention has no kernel) or precision=fp8"),
            )
        ),
        ({**TINY, "optim": {"name": "nested", "nested": {"anneal": 1}}}, "optim.nested.anneal: wanted true or false"),
        ({**TINY, "optim": {"kernels": "cuda"}}, "optim.kernels: wanted one of reference, triton, got 'cuda'"),
        ({**TINY, "optim": {"kernels": "triton"}}, "optim.kernels: wanted reference (optim.name=adamw has no kernels)"),
        (
            {**TINY, "optim": {"name": "nested", "nested": {"base": "adamw"}, "kernels": "triton"}},
            "optim.kernels: wanted reference (nested over adamw has no kernels)",
        ),
        ({**TINY, "optim": {"betas": 0.9}}, "optim.betas: wanted a list"),
        ({**TINY, "optim": {"lr": -1}}, "optim.lr: wanted a positive number, got -1.0"),
        ({**TINY, "data": {"path": 2024}}, "data.path: wanted text (in quotes"),
        (
            {
                "model": {"preset": "mac_tiny", "layer_code": "shared"},
                "optim": {"name": "nested", "nested": {"mode": "implicit"}},
            },
            "model.layer_code: wanted each, for an optimizer that takes second derivatives",
        ),
        ({**TINY, "train": {"accumulate": 3}}, "train.accumulate: wanted a divisor of data.batch_size = 8, got 3"),
    ],
)
def test_refuses_in_one_line(tree, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        from_mapping(tree)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_unknown_key_names_the_nearest():
    assert unknown_key("model.memory.hed") == (
        "model.memory.hed: no such setting; did you mean model.memory.heads or model.memory.head_dim "
        "or model.memory.hidden?"
    )


def test_no_torch_is_imported():
    code = "import sys, titanfunc.config.runs; sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.mark.parametrize("knobs", [{"unroll": "exact"}, {"unroll": "first_order"}, {"mode": "implicit"}], ids=str)
def test_a_stream_is_not_read_from_its_start_for_every_meta_step(knobs):
    tree = {
        "model": {"preset": "mac_tiny"},
        "data": {"corpus": "files", "path": "rows.jsonl", "stream": True},
        "optim": {"name": "nested", "nested": knobs},
    }
    with pytest.raises(ValueError, match=r"^data\.stream: wanted false \(optim\.nested: .*unroll=online, got True$"):
        from_mapping(tree)
    assert from_mapping({**tree, "optim": {"name": "nested", "nested": {"unroll": "online"}}}).data.stream
    tree["data"]["stream"] = False
    assert from_mapping(tree).optim.held_out
