"""Graphs that another process compiles: what it is given, and that its work is found."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

from titanfunc.ops import compile_ahead as module
from titanfunc.ops.compile_ahead import compile_ahead, compile_graph
from titanfunc.ops.joint_graph import Like, trace_joint
from titanfunc.train.determinism import same_each_time


def work(x, position):
    """With an operation on no argument, one of ours, a list of tensors, whole numbers and a constant."""
    ones = torch.full([4, 8], 0.5, dtype=x.dtype)
    table = torch.ops.titanfunc.test_ahead([x + ones, x])
    return [torch.cat([table[0], x * torch.tensor([2.0] * 8)], 1).to(torch.bfloat16), position + 1]


@pytest.fixture(scope="module", autouse=True)
def operation():
    made = torch.library.custom_op(
        "titanfunc::test_ahead", lambda tensors: [sum(tensors)], mutates_args=(), schema="(Tensor[] t) -> Tensor[]"
    )
    made.register_fake(lambda tensors: [torch.empty_like(tensors[0])])


def test_a_graph_comes_back_as_it_was():
    x, position = torch.randn(4, 8), torch.tensor(3)
    graph = make_fx(work)(x, position)
    again = module._unpacked(*module._packed(graph))
    assert [(n.op, n.name, str(n.target)) for n in again.graph.nodes] == [
        (n.op, n.name, str(n.target)) for n in graph.graph.nodes
    ]
    for ours, theirs in zip(again(x, position), graph(x, position), strict=True):
        assert torch.equal(ours, theirs)
    assert any("full" in str(node.target) for node in again.graph.nodes)


def like(*tensors):
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]


@pytest.mark.parametrize("products", [None, "high"])
def test_what_the_other_process_compiled_is_found(products, monkeypatch):
    """In both of torch's caches, for a view too and under the settings of a run; "high" is no default anywhere."""
    # Where pickle would find torch.contiguous_format, and with it torch's caches what they go by.
    monkeypatch.delitem(sys.modules, "tests.conftest", raising=False)
    x = torch.randn(2, 3, 5)[1]  # as a block's parameters lie: a program for one that begins anywhere is another
    # Lies in no cache yet, though the folder is the one in use: in an empty one the headers are compiled first.
    factor = 1.0 + random.SystemRandom().random()
    graph = trace_joint(lambda given: ([factor * torch.nn.functional.silu(given[0])], None), [Like.of(x)], []).forward
    before = module._Settings.now()
    try:
        with same_each_time(torch.device("cpu"), True):
            if products:
                torch.set_float32_matmul_precision(products)
            processes, seconds = module.so_far()
            compile_ahead(graph, like(x)).wait()
            assert module.so_far()[0] == processes + 1 and module.so_far()[1] > seconds + 0.5
            with monkeypatch.context() as patch:
                patch.setattr(subprocess, "Popen", None)
                assert compile_ahead(graph, like(x)) == module.Ahead()  # done once: no process
            counters.clear()
            with torch.no_grad():
                run = compile_graph(graph, [x], "inductor")
                got = run(x)[0]
    finally:
        before.apply()
    torch.testing.assert_close(got, factor * torch.nn.functional.silu(x))
    found = {name: counters[name] for name in ("inductor", "aot_autograd")}
    assert found["inductor"]["fxgraph_cache_hit"] == 1 and not found["inductor"]["fxgraph_cache_miss"]
    assert found["aot_autograd"]["autograd_cache_hit"] == 1 and not found["aot_autograd"]["autograd_cache_miss"]


def test_settings_that_are_as_they_should_be_stay():
    """Setting the default precision of products once more would give it another name, by which the caches go."""
    code = (
        "from torch.utils import deterministic\n"
        "from titanfunc.ops.compile_ahead import _Settings\n"
        "before = _Settings.now()\n"
        "before.apply()\n"
        "assert _Settings.now() == before\n"
        "products = ('tf32', False, True, 'tf32')\n"
        "changed = before._replace(fills_memory=False, float32_products='high', products=products)\n"
        "changed.apply()\n"
        "assert _Settings.now() == changed and not deterministic.fill_uninitialized_memory\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # in a process where nothing was ever set


@pytest.mark.parametrize("broken", ["executable", "folder", "graph", "cap"])
def test_what_cannot_be_begun_costs_nothing(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(3)
    graph = make_fx(lambda x: [x + 1])(x)
    if broken == "executable":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    if broken == "folder":
        monkeypatch.setattr(module.tempfile, "TemporaryDirectory", lambda: (tmp_path / "no" / "folder").mkdir())
    if broken == "graph":
        next(node for node in graph.graph.nodes if node.op == "call_function").target = lambda x, y: x
    if broken == "cap":
        monkeypatch.setattr(module, "_running", [type("Process", (), {"poll": lambda self: None})()] * 1000)
        monkeypatch.setattr(subprocess, "Popen", None)
    ahead = compile_ahead(graph, like(x))
    ahead.wait()
    ahead.keep()
    if broken in ("executable", "cap"):  # this process compiled it: none begins it again
        assert compile_ahead(graph, like(x)) == module.Ahead()


def test_a_process_ends_with_its_parent(tmp_path):
    """A parent that is killed does not tell its children."""
    code = (
        "import os, subprocess, sys, time\n"
        "child = 'import os; from titanfunc.ops.compile_ahead import _end_with; _end_with(int(os.environ[\"P\"]))'\n"
        "p = subprocess.Popen([sys.executable, '-c', child], env={**os.environ, 'P': str(os.getpid())})\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(300):
        if not _alive(child):
            break
        time.sleep(0.1)
    assert not _alive(child)


def _alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_process_that_fails_or_hangs_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, position = torch.randn(4, 8), torch.tensor(3)
    graph = make_fx(work)(x, position)  # of an operation that the other process does not know
    begun = []
    original = subprocess.Popen

    def popen(command, **options):
        begun.append(original(command, **options))
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    ahead = compile_ahead(graph, like(x, position))
    ahead.wait()
    assert begun[0].returncode not in (0, None)
    monkeypatch.setattr(module, "SECONDS", 0.1)
    monkeypatch.setattr(sys, "executable", "sleep")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen(["sleep", "60"], **options))
    compile_ahead(graph, like(x, position)).wait()
    assert begun[1].returncode == -9
    ahead.keep()  # as this process compiled it then, the next start waits for none
    assert compile_ahead(graph, like(x, position)) == module.Ahead() and len(begun) == 2
