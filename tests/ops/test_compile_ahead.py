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


def test_what_the_other_process_compiled_is_found(monkeypatch):
    x = torch.randn(3, 5)
    # Lies in no cache yet, though the folder is the one in use: in an empty one the headers are compiled first.
    factor = 1.0 + random.SystemRandom().random()
    graph = make_fx(lambda x: [torch.full([3, 5], factor) * torch.nn.functional.silu(x)])(x)
    torch.set_float32_matmul_precision("high")
    try:
        compile_ahead(graph, like(x))()
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", None)
            compile_ahead(graph, like(x))()  # done once: no process
        counters.clear()
        run = compile_graph(graph, [x], "inductor")
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(run(x)[0], factor * torch.nn.functional.silu(x))
    assert counters["inductor"]["fxgraph_cache_hit"] == 1 and not counters["inductor"]["fxgraph_cache_miss"]


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
    compile_ahead(graph, like(x))()


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
    compile_ahead(graph, like(x, position))()
    assert begun[0].returncode not in (0, None)
    monkeypatch.setattr(module, "SECONDS", 0.1)
    monkeypatch.setattr(sys, "executable", "sleep")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen(["sleep", "60"], **options))
    compile_ahead(graph, like(x, position))()
    assert begun[1].returncode == -9
