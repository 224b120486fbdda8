"""scripts/bench_step.py: texts, what a row measures and refuses, processes that take turns, and the table."""

import importlib
import json
import re
import time
from pathlib import Path

import pytest
import torch

import titanfunc as tf
from titanfunc import tree
from titanfunc.bench import options, peers, step, tables, trained
from titanfunc.bench.common import parsed
from titanfunc.bench.step_row import StepRow, rows_of, sizes_of, titans_of
from titanfunc.bench.torch_optim import muon_and_adamw
from titanfunc.bench.torch_transformer import Decoder
from titanfunc.bench.turns import Turns
from titanfunc.models import count_parameters

SMALL = "transformer_tiny@1x32:layers=1,dim=32,ff=64,heads=2"
TORCH = "torch_transformer@1x32:transformer_tiny,layers=1,dim=32,ff=64,heads=2"
TITANS = "titans_pytorch_mac@1x32:num_tokens=256,dim=32,depth=1,segment_len=16,heads=1,dim_head=16"
MISTAKES = {
    "model": (["mac_tinny"], "preset: wanted FAMILY_SIZE or FAMILY_SIZE_moe"),
    "field": (["mac_tiny:layrs=1"], "layrs: no such field"),
    "no value": (["mac_tiny:layers"], "mac_tiny:layers: wanted FIELD=VALUE after the colon"),
    "open bracket": (["mac_tiny:layers=[1"], "mac_tiny:layers=[1: wanted layers as a number or a word"),
    "value": (["mac_tiny:heads=3"], "heads: wanted a divisor of dim = 128"),
    "sizes": (["mac_tiny@4"], "--models: wanted BATCHxLENGTH after an @"),
    "two sizes": (["mac_tiny@4x4@4x4"], "--models: wanted BATCHxLENGTH after an @"),
    "no rows": (["mac_tiny", "--batch", "0"], "--batch: wanted at least 1, got 0"),
    "vocabulary": (["mac_tiny:vocab_size=100"], "mac_tiny:vocab_size=100: wanted a vocabulary of at least 256"),
    "a peer's field": (["titans_pytorch_mac:width=3"], "width: no such field"),
    "a peer's memory": (["titans_pytorch_mac:memory=some"], "memory: wanted one of all, none"),
    "a layer that a peer has not": (["titans_pytorch_mac:memory=[0,7]"], "memory: wanted all, none, or layers from 1"),
    "a peer's family": (["torch_transformer:mac_tiny"], "torch_transformer: wanted the preset of a plain transformer"),
    "a peer without sizes": (["torch_transformer"], "preset: wanted FAMILY_SIZE"),
    "optimizer": (["mac_tiny", "--optims", "adam"], "optim.name: wanted one of adamw, muon"),
    "torch's settings": (["mac_tiny", "--optims", "torch_muon:lr=1"], "--optims: wanted no settings for torch_muon"),
    "held out": (["mac_tiny", "--optims", "nested:nested.unroll=exact"], "--optims: wanted an optimizer that needs no"),
    "steps": (["mac_tiny", "--steps", "10"], "--steps: wanted more than the 10 of the warm-up, got 10"),
    "jobs": (["mac_tiny", "--jobs", "0"], "--jobs: wanted at least 1, got 0"),
    "rate": (["mac_tiny", "--lr", "nan"], "--lr: wanted a positive number"),
    "limit": (["mac_tiny", "--time-limit", "0"], "--time-limit: wanted a positive number of seconds"),
    "device": (["mac_tiny", "--device", "gpu"], "--device: wanted auto, cpu, cuda or cuda:N, got 'gpu'"),
    "twice": (["mac_tiny", "mac_tiny"], "--models: wanted each row once"),
    "against": (["mac_tiny", "--against", "lmm_tiny"], "--against: wanted one of mac_tiny, got 'lmm_tiny'"),
    "option": (["mac_tiny", "--step", "x"], "--steps: wanted a whole number, got 'x'"),
    "a folder to write": (["mac_tiny", "--out", "."], "--out: wanted a file, got the folder '.'"),
    "a file for a folder": (
        ["mac_tiny", "--out", f"{__file__}/x"],
        "--out: wanted a folder that can be made and written",
    ),
    "profile": (
        ["mac_tiny", "--device", "cpu", "--profile"],
        "--profile: wanted a GPU, whose kernels it times, got --dev",
    ),
    "backend": (["mac_tiny", "--backend", "x"], "--backend: wanted one of inductor, aot_eager, eager, none, got 'x'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(monkeypatch, capsys, name):
    options, said = MISTAKES[name]
    monkeypatch.setattr("sys.argv", ["bench_step.py", "--models", *options])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("scripts.bench_step").arguments()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"error: {said}") and told.count("\n") == 1, told


def test_no_torch_before_the_checks(script):
    result = script("--models", "mac_tinny", python=("-X", "importtime"), name="bench_step")
    imported = {line.rpartition("|")[2].strip() for line in result.err.splitlines() if line.startswith("import time")}
    assert result.status == 2 and "titanfunc.bench.step_row" in imported
    assert not imported & {"torch", "numpy", "datasets", "rich"}


def test_texts_mean_rows():
    models = ["mac_tiny:layers=1,memory.heads=1", "mac_tiny@4x65536", "titans_pytorch_mac", TORCH]
    rows = rows_of(models, ["muon", "torch_muon"], None, 128)
    assert [(row.kind, row.optimizer, row.batch, row.seq_len) for row in rows] == [
        ("ours", "muon", 16, 128), ("ours", "torch_muon", 16, 128), ("ours", "muon", 4, 65536),
        ("ours", "torch_muon", 4, 65536), ("titans_pytorch_mac", "muon", 4, 128), ("torch_transformer", "muon", 1, 32),
    ]  # fmt: skip
    assert rows[1].name == "mac_tiny:layers=1,memory.heads=1, torch_muon" and rows[4].name == "titans_pytorch_mac"
    assert sizes_of(rows[0]).memory.heads == 1 and sizes_of(rows[5]).dim == 32
    (titans,) = rows_of(["titans_pytorch_mac"], ["adamw"], None, None)
    assert (titans.batch, titans.seq_len) == (4, 2048)
    assert (titans_of(titans).num_tokens, titans_of(titans).dim, titans_of(titans).depth) == (32000, 512, 6)
    found = rows_of([f"titans_pytorch_mac:memory={each}" for each in ("all", "none", "[2,5]")], ["adamw"], None, None)
    assert [titans_of(row).memory_layers for row in found] == [(1, 2, 3, 4, 5, 6), (), (2, 5)]
    assert parsed("x:a.b=1,a.c=yes")[1] == {"a": {"b": 1, "c": True}}


@pytest.fixture
def measured(tmp_path):
    """What step.measure finds of a text in this process: eagerly on the CPU, if not told otherwise."""

    def run(text, optimizer="adamw", **options):
        (row,) = rows_of([text], [optimizer], None, None)
        job = {"row": row._asdict(), "device": "cpu", "steps": 14, "lr": 3e-3, "backend": None, "cuda_graph": True,
               "profile": None, "began": time.time(), **options}  # fmt: skip
        return step.measure(json.loads(json.dumps(job)), Turns(tmp_path / "lock", tmp_path / "told"))

    return run


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "torch_muon"])
def test_a_row_of_ours_begins_at_the_reference(measured, optimizer):
    row = measured(SMALL, optimizer)
    assert row["loss_first"] == pytest.approx(row["loss_first_eager"], abs=1e-4)
    assert row["loss_last"] < row["loss_first"] and row["graph_breaks"] == row["recompiles"] == 0
    assert 0 < row["step_ms_min_max"][0] <= row["step_ms_median"] <= row["step_ms_min_max"][1]
    assert row["tokens_per_second"] == pytest.approx(32e3 / row["step_ms_median"], rel=0.02)
    assert row["start_seconds"] >= row["first_step_seconds"] > 0 and row["cuda_graph"] is False


@pytest.mark.gpu
def test_a_row_on_a_gpu_knows_its_memory_and_its_graph(measured, tmp_path):
    options = {"device": "cuda", "backend": "inductor", "profile": str(tmp_path / "traces")}
    row = measured(SMALL, **options)
    assert row["cuda_graph"] and row["peak_memory_gib"] >= row["memory_before_steps_gib"] > 0
    assert row["profile"]["launches"] > 0 and row["profile"]["copy_tb_per_s"] > 0
    assert row["profile"]["trace"].startswith(str(tmp_path / "traces"))
    assert json.loads(Path(row["profile"]["trace"]).read_text())["traceEvents"]
    launched = measured(SMALL, **options | {"profile": ""}, cuda_graph=False)
    assert not launched["cuda_graph"] and launched["profile"]["kinds"] and "trace" not in launched["profile"]
    assert not measured(TORCH, **options)["cuda_graph"]


def test_a_replay_is_seen(monkeypatch):
    class Graph:
        replayed = 0

        def replay(self):
            Graph.replayed += 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    assert step.replays(Graph().replay) is False  # bound before it was looked at
    assert step.replays(lambda: Graph().replay()) is True and Graph.replayed == 2
    assert step.replays(lambda: None) is False


def test_a_torch_transformer_trains(measured):
    assert measured(TORCH + ",precision=bf16")["loss_last"] < 5.5
    row = measured(TORCH)
    assert row["loss_first_eager"] is None and row["loss_last"] < row["loss_first"]
    assert row["parameters"] == measured(SMALL)["parameters"]


@pytest.mark.skipif(not peers.installed(), reason="needs titans-pytorch")
@pytest.mark.parametrize("memory", ["", ",memory=none"])
def test_titans_pytorch_trains(measured, memory):
    assert measured(TITANS + memory)["loss_last"] < 5.5


@pytest.mark.parametrize(
    ("losses", "expected", "said"),
    [
        ([5.5, 4.0], 5.6, "first loss: wanted the eager reference's 5.6000, got 5.5000"),
        ([6.6, 4.0], None, "first loss: wanted a guess's 5.55 within 1.0"),
        ([5.5, float("nan")], 5.5, "loss: wanted finite ones"),
        ([5.5, 5.6], 5.5, "loss: wanted it to fall"),
    ],
)
def test_wrong_losses_are_no_row(losses, expected, said):
    step.check([5.5, 5.3], 5.52, 256)
    with pytest.raises(ValueError, match=re.escape(said)):
        step.check(losses, expected, 256)


def test_the_reference_in_pieces_is_that_of_the_whole_batch(monkeypatch):
    model = tf.models.build(sizes_of(rows_of([SMALL], ["adamw"], None, None)[0]))
    params, loss = model.init(tf.rng.generator(0)), tf.train.make_eval_step(model)
    tokens = torch.randint(256, (5, 17), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(trained, "PIECE", 33)  # two rows of 16, and one is left over
    assert trained.in_pieces(loss, params, tokens) == pytest.approx(loss(params, {"tokens": tokens}).item(), abs=1e-6)


@pytest.mark.parametrize("name", ["transformer_tiny", "transformer_168m", "transformer_170m"])
def test_a_torch_transformer_has_the_preset_s_parameters(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in Decoder(tf.models.preset(name)).parameters())
    assert count == pytest.approx(count_parameters(tf.models.preset(name)), rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_a_torch_transformer_is_causal_and_sees_order(tied):
    torch.manual_seed(0)
    model = Decoder(tf.models.preset("transformer_tiny", layers=2, dim=32, ff=64, heads=2, tie_embeddings=tied))
    tokens = torch.randint(256, (2, 12))
    later, swapped = tokens.clone(), tokens.clone()
    later[:, 8:] += 1
    swapped[:, [2, 3]] = swapped[:, [3, 2]]
    with torch.no_grad():
        plain, changed, turned = model(tokens), model(later % 256), model(swapped)
    assert torch.equal(plain[:, :8], changed[:, :8]) and not torch.allclose(plain[:, 8:], changed[:, 8:])
    assert not torch.allclose(plain[:, 11], turned[:, 11], atol=1e-6)


def test_torch_s_muon_moves_as_ours_does():
    config = tf.models.preset("mac_tiny", layers=2, dim=32, ff=64, heads=2)
    params = tf.models.build(config).init(tf.rng.generator(0))
    grads = tree.map(lambda p: 1e-3 * torch.randn(p.shape, generator=tf.rng.generator(p.numel())), params)
    tx = tf.optim.muon(0.02, 0.002, weight_decay=0.1, b1=0.9, b2=0.95)
    ours = tf.optim.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
    theirs = muon_and_adamw(params, lr=0.02, adam_lr=0.002, weight_decay=0.1)
    theirs.give(grads)
    theirs.step()
    for got, want, start in zip(*map(tree.leaves, (theirs.params, ours, params)), strict=True):
        assert (got - want).norm() <= 0.03 * (want - start).norm() and not torch.equal(got, start)
    theirs.give(tree.map(torch.clone, grads), clip_norm=1e-4)
    assert tree.global_norm(grads) > 1e-3


@pytest.mark.slow
def test_the_script_keeps_every_row(script, tmp_path):
    models = [SMALL, TORCH, "mac_tiny@1x20000000", TITANS.replace("@1x32", "@1x20000000")]
    options = ["--backend", "aot_eager", "--steps", "11", "--device", "cpu", "--jobs", "2", "--out", "new/rows.json"]
    done = script("--models", *models, *options, name="bench_step")
    assert done.status == 1, done.err  # as two of its rows, or one, failed
    result = json.loads((tmp_path / "new" / "rows.json").read_text())
    ours, torch_s, failed, titans = result["rows"]
    assert result["jobs"] == 2 and result["torch"] == torch.__version__ and "bench_step" in result["command"]
    assert (ours["graphs"], ours["graph_breaks"], ours["optimizer"]) == (1, 0, "adamw")
    assert (torch_s["graphs"], torch_s["graph_breaks"], torch_s["optimizer"]) == (1, 0, "torch.optim.AdamW")
    assert failed["status"] == "failed" and "data.seq_len: wanted at most" in failed["error"]
    assert titans["status"] == ("failed" if peers.installed() else "titans_pytorch is not installed")
    assert ours["alone"][1] < torch_s["alone"][0] or torch_s["alone"][1] < ours["alone"][0]
    assert all(said in done.out for said in ("transformer_tiny@1x32:", "torch_transformer@1x32:", "data.seq_len"))


def test_a_profile_needs_no_folder(monkeypatch):
    monkeypatch.setattr(options, "has_driver", lambda: True)
    script = importlib.import_module("scripts.bench_step")
    for words, found in ((["--profile"], False), (["--profile", "x"], Path("x")), ([], None)):
        monkeypatch.setattr("sys.argv", ["bench_step.py", "--models", "mac_tiny", *words])
        assert script.arguments()[0].profile == found


def test_ratios_are_to_the_row_that_is_named():
    def row(name, speed):
        return {"name": name, "batch": 1, "seq_len": 2, "tokens_per_second": speed, "loss_first": 5.5, "loss_last": 2}

    rows = [{"name": "bad", "batch": 1, "seq_len": 2, "error": "[x]", "status": "failed"}, row("a", 100), row("b", 250)]
    ratios = [list(next(c for c in tables.of_steps(rows, to).columns if c.header == "ratio").cells) for to in ("", "b")]
    assert ratios == [["-", "1.00", "2.50"], ["-", "0.40", "1.00"]]
    assert "bad: failed; \\[x]" in tables.of_steps(rows).caption


def test_a_row_s_name_makes_a_row():
    assert StepRow("mac_tiny@2x4:layers=1", "adamw", 2, 4).model == "mac_tiny:layers=1"
