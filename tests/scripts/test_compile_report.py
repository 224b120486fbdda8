"""scripts/compile_report.py from the command line: mistakes in one line, a report, and rows that could not be made."""

import dataclasses
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.scripts.test_mistakes import check
from titanfunc.compile_report.process import in_process, measured
from titanfunc.config.compile_report import CompileReportConfig, prepare, to_mapping

CONF = Path(__file__).parents[2] / "conf"
MISTAKES = {
    "unknown key": (["variant=[eager]"], "variant: no such setting; did you mean variants?"),
    "unknown key, appended": (["+foo=1"], "foo: no such setting; there are variants, kernels, "),
    "unknown key of the model": (["model.layrs=3"], "model.layrs: no such setting; did you mean model.layers?"),
    "unknown model": (["model=mac_huge"], "model=mac_huge: no such choice; wanted FAMILY_SIZE or "),
    "unknown optimizer": (["optim=foo"], "optim=foo: no such choice; wanted one of adamw, "),
    "unknown variant": (["variants=[eager,jax]"], "variants: wanted one of eager, aot_eager, inductor, "),
    "a variant twice": (["variants=[eager,eager]"], "variants: wanted each one once, got ['eager', 'eager']"),
    "no variant": (["variants=[]"], "variants: wanted at least one, got []"),
    "no list": (["variants=eager"], "variants: wanted a list in brackets, as [a,b], got 'eager'"),
    "unknown kernels": (["kernels=[cuda]"], "kernels: wanted one of reference, triton, got 'cuda'"),
    "no equals sign": (["steps"], "'steps': cannot be read; settings are written as name=value, as variants=[eager,"),
    "dashes": (["--variants=[eager]"], "--variants=[eager]: settings are written without dashes, as variants="),
    "a model's value": (["model.heads=3"], "model.heads: wanted a divisor of dim = 128, got 3"),
    "an optimizer's value": (["optim.eps=0"], "optim.eps: wanted a positive number, got 0"),
    "parts": (["accumulate=3"], "accumulate: wanted a divisor of batch_size = 8, got 3"),
    "warm-up": (["warm_up=3"], "warm_up: wanted at least 5 for inductor_cuda_graph, "),
    "time": (["time_limit=0"], "time_limit: wanted a positive number of seconds, got 0"),
    "commit": (["commit=1234567"], "commit: wanted text"),
    "device": (["device=gpu"], "device: wanted auto, cpu, cuda or cuda:N, got 'gpu'"),
}
TINY = [
    "model=mac_tiny", "model.dim=16", "model.layers=1", "model.heads=2", "model.ff=16", "model.seq_len=16",
    "model.memory.heads=1", "model.memory.head_dim=8", "model.memory.hidden=8", "model.memory.chunk_size=8",
    "model.mac.segment=8", "batch_size=1", "warm_up=2", "steps=1", "device=cpu", "kernels=[reference]", "out=mine",
]  # fmt: skip


class Page(HTMLParser):
    """The cells of a page's table, by row; refuses a tag that is not closed, and whatever lies outside of the page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(script, tmp_path, name):
    settings, message = MISTAKES[name]
    check(script(*settings, name="compile_report"), message)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken(script, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "something").touch()
    check(script("out=mine", name="compile_report"), "out: wanted a folder that is new or empty, got 'mine'")


@pytest.mark.slow
def test_a_report(script, tmp_path):
    done = script(*TINY, "variants=[eager,aot_eager]", "commit='0123456'", name="compile_report")
    assert (done.status, done.err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"config.yaml", "report.json", "report.html"}
    report = json.loads((tmp_path / "mine" / "report.json").read_text())
    assert report["commit"] == "0123456"
    eager, compiled = report["rows"]
    assert [row["status"] for row in report["rows"]] == ["measured"] * 2
    assert (eager["graphs"], compiled["graphs"]) == (0, 1)
    assert (compiled["graph_breaks"], compiled["recompiles"], compiled["left_eager"]) == (0, 0, [])
    assert eager["compile_seconds_cold"] is None and compiled["compile_seconds_cold"] > 0
    assert compiled["compile_seconds_warm"] > 0
    assert eager["losses"] == pytest.approx(compiled["losses"], rel=1e-4)
    assert min(eager["kernel_count"], compiled["kernel_count"]) > 100
    assert yaml.safe_load((tmp_path / "mine" / "config.yaml").read_text()) == report["settings"]
    page = Page((tmp_path / "mine" / "report.html").read_text())
    assert page.links == []
    assert [row[0] for row in page.rows] == ["variant", "eager, reference", "aot_eager, reference"]
    assert page.rows[2][1:4] == ["1", "0", "0"]


@pytest.mark.slow
def test_rows_that_could_not_be_made(script, tmp_path):
    """One that the machine cannot run, one that dies (its batch is larger than any memory), and none is lost."""
    huge = ["batch_size=2147483647", "model.seq_len=1048576"]  # no address space has room for it
    settings = [*TINY, *huge, "variants=[eager,inductor_cuda_graph]", "warm_up=5"]
    done = script(*settings, name="compile_report")
    assert (done.status, done.err) == (1, "")
    failed, not_here = json.loads((tmp_path / "mine" / "report.json").read_text())["rows"]
    assert failed["status"] == "failed" and failed["error"].startswith("RuntimeError: ")
    assert (not_here["status"], not_here["error"]) == ("not here", "a CUDA graph needs a CUDA device")
    _, *rows = Page((tmp_path / "mine" / "report.html").read_text()).rows
    assert [row[1].partition(":")[0] for row in rows] == ["failed", "not here"]
    assert "eager, reference: failed" in done.out


@pytest.mark.parametrize(
    ("code", "limit", "status", "said"),
    [
        ("import os; os.abort()", 30, "failed", "ended by SIGABRT"),
        ("import sys; sys.exit('no memory')", 30, "failed", "ended with status 1: no memory"),
        ("import time; time.sleep(60)", 0.3, "timed out", "stopped after 0.3 s (time_limit)"),
        ("raise ValueError('one\\n two')", 30, "failed", "ValueError: one"),
    ],
)
def test_a_process_that_dies_is_a_row(code, limit, status, said):
    row = measured({"variant": "inductor", "kernels": "triton"}, limit, (sys.executable, "-c", code))
    assert row == {"variant": "inductor", "kernels": "triton", "status": status, "error": said}


def test_a_process_has_its_own_caches(tmp_path):
    code = (
        "import json, os, sys; job = json.load(open(sys.argv[1])); "
        "json.dump({name: os.environ[name] for name in job['names']}, open(job['result'], 'w'))"
    )
    names = ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"]
    found = in_process({"names": names}, 30, tmp_path, (sys.executable, "-c", code))
    assert [Path(found[name]).parent for name in names] == [tmp_path] * 2
    assert found["status"] == "measured"


def test_no_torch_before_the_checks(script):
    result = script("steps=0", python=("-X", "importtime"), name="compile_report")
    imported = {line.rpartition("|")[2].strip() for line in result.err.splitlines() if line.startswith("import time")}
    assert {"hydra", "titanfunc.config.compile_report"} <= imported
    assert not imported & {"torch", "numpy", "datasets", "matplotlib"}


def test_the_yaml_file_and_the_dataclass_say_the_same():
    given = yaml.safe_load((CONF / "compile_report.yaml").read_text())
    own = {
        name: list(value) if isinstance(value, tuple) else value for name, value in vars(CompileReportConfig()).items()
    }
    assert {name: given[name] for name in own} == own
    assert set(given) == {*own, "defaults", "hydra"}


def test_a_plan_is_made_again_from_what_is_written():
    plan = prepare({
        "model": {"preset": "mag_170m", "memory": {"depth": 1}},
        "optim": {"name": "muon"}, "variants": ["eager"], "out": "x",
    })  # fmt: skip
    assert plan.model.vocab_size == 32000 and plan.model.memory.depth == 1  # the preset's own tokens
    assert plan.model.memory.hidden == 128 and plan.seq_len == 4096
    assert plan.pairs() == [("eager", "reference"), ("eager", "triton")]
    assert prepare(json.loads(json.dumps(to_mapping(plan)))) == plan
    assert dataclasses.replace(plan.config, seq_len=64).seq_len == 64
