"""Compiling a graph in a process of its own, while this one goes on: for GPUs, whose compilers keep what they make on
disk.

The other process compiles the graph and runs it once on numbers of no meaning, so that inductor's program, its choice
of launches and the kernels behind our operations all lie in their caches when this process asks for them. Whatever
goes wrong there costs time alone: this process compiles what it does not find.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import operator
import os
import pickle
import pkgutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import deterministic

import titanfunc.ops

SECONDS = 300.0  # that a process may take
PARENT = "TITANFUNC_COMPILES_FOR"
log = logging.getLogger(__name__)
_running: list[subprocess.Popen[bytes]] = []
_waits: list[float] = []  # seconds waited for each process that was begun


def compile_graph(graph: GraphModule, tensors: Sequence[Tensor], backend: Any) -> Callable[..., Any]:
    """The graph compiled for tensors like these (any shapes), past Dynamo, and with inductor's cache on disk.

    Where the tensors lie is no part of it: a view into a larger one would make another program, and be looked for in
    the cache as another, than a tensor of its own that another process compiles for.
    """
    # The cache wants the shapes' environment, of which there is none outside of a trace.
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    with mode:
        like = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors]
    with tracing(TracingContext(mode)):
        compiled: Callable[..., Any] = lookup_backend(backend)(GraphModule(graph, graph.graph), like)
    return compiled


def so_far() -> tuple[int, float]:
    """How many processes this one has begun, and for how many seconds it has waited for them."""
    return len(_waits), sum(_waits)


def _nothing() -> None:
    """There is nothing to do."""


class Ahead(NamedTuple):
    """A graph that may be in another process's hands. wait: for that process's end. keep: notes that the graph is
    compiled and has run here, so that no later process begins it again, whatever became of the other."""

    wait: Callable[[], None] = _nothing
    keep: Callable[[], None] = _nothing


def compile_ahead(graph: GraphModule, like: Sequence[tuple[Any, ...]]) -> Ahead:
    """Begins to compile the graph for tensors of (shape, stride, dtype, device).

    What was compiled so once, and lies in inductor's folder of caches, is not begun again. No more processes run at
    once than a quarter of the processors.
    """
    try:
        return _begun(graph, like)
    except Exception as error:
        log.info("not compiled ahead: %s: %s", type(error).__name__, error)
        return Ahead()


def _begun(graph: GraphModule, like: Sequence[tuple[Any, ...]]) -> Ahead:
    if config.force_disable_caches or not config.fx_graph_cache:
        return Ahead()  # nobody would find what another process compiled
    contents = pickle.dumps((_packed(graph), list(like), _Settings.now()))
    mark = Path(cache_dir()) / "titanfunc" / hashlib.sha256(contents + _versions()).hexdigest()
    if mark.exists():
        return Ahead()
    keep = functools.partial(_keep, mark)
    _running[:] = [process for process in _running if process.poll() is None]
    if len(_running) >= max(1, (os.cpu_count() or 1) // 4):
        return Ahead(keep=keep)
    try:
        return Ahead(_process(contents, mark), keep)
    except Exception as error:
        log.info("not compiled ahead: %s: %s", type(error).__name__, error)
        return Ahead(keep=keep)


def _keep(mark: Path) -> None:
    with contextlib.suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _process(contents: bytes, mark: Path) -> Callable[[], None]:
    """Starts the other process; returns how to wait for it."""
    folder = tempfile.TemporaryDirectory()
    job = Path(folder.name) / "job"
    job.write_bytes(contents)
    code = "import sys; from titanfunc.ops.compile_ahead import run_job; run_job(sys.argv[1], sys.argv[2])"
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(job), str(mark)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder.name,
        env={**os.environ, "PYTHONPATH": paths, PARENT: str(os.getpid())},
    )  # fmt: skip
    _running.append(process)
    number = len(_waits)
    _waits.append(0.0)

    def end() -> None:
        process.kill()
        process.wait()
        folder.cleanup()

    def wait() -> None:
        begun = time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS)
        end()
        _waits[number] += time.perf_counter() - begun
        if process.returncode:
            log.info("not compiled ahead: the process ended with %d", process.returncode)
        atexit.unregister(end)

    atexit.register(end)
    return wait


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, or it has run for too long."""
    begun = time.monotonic()
    while os.getppid() == parent and time.monotonic() - begun < SECONDS:
        time.sleep(1)
    os._exit(1)


@functools.cache
def _versions() -> bytes:
    """Of what compiles, and of the kernels behind our operations."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    triton = importlib.util.find_spec("triton") and importlib.metadata.version("triton")
    found = hashlib.sha256(repr((torch.__version__, torch.version.cuda, triton, devices)).encode())
    package = importlib.util.find_spec("titanfunc_kernels")
    for folder in (package and package.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.py")):
            found.update(file.read_bytes())
    return found.digest()


PRODUCTS = (
    "cuda.matmul.fp32_precision", "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction", "mkldnn.matmul.fp32_precision",
)  # fmt: skip
"""Of torch.backends."""


class _Settings(NamedTuple):
    """What of torch's settings is part of what its caches go by."""

    deterministic: bool
    only_warns: bool
    fills_memory: bool
    float32_products: str
    products: tuple[Any, ...]
    dtype: torch.dtype

    @classmethod
    def now(cls) -> _Settings:
        memory: Any = deterministic  # mypy sees no properties of modules
        return cls(
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            memory.fill_uninitialized_memory, torch.get_float32_matmul_precision(),
            tuple(operator.attrgetter(name)(torch.backends) for name in PRODUCTS), torch.get_default_dtype(),
        )  # fmt: skip

    def apply(self) -> None:
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.only_warns)
        memory: Any = deterministic
        memory.fill_uninitialized_memory = self.fills_memory
        # Setting what is set already is no matter of course: "highest" becomes another name in PRODUCTS.
        if torch.get_float32_matmul_precision() != self.float32_products:
            torch.set_float32_matmul_precision(self.float32_products)
        for name, value in zip(PRODUCTS, self.products, strict=True):
            if operator.attrgetter(name)(torch.backends) != value:
                place, _, last = name.rpartition(".")
                setattr(operator.attrgetter(place)(torch.backends), last, value)
        torch.set_default_dtype(self.dtype)


class _Result(NamedTuple):
    """Stands for a node in another's arguments."""

    name: str


def _packed(graph: GraphModule) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """The graph's nodes and its constants. A pickled GraphModule is traced anew when it is read, and what then depends
    on no argument becomes a constant."""
    nodes = []
    for node in graph.graph.nodes:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda given: _Result(given.name))
        target = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target
        nodes.append((node.op, node.name, target, args, kwargs))
    constants = {node.target: getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    return nodes, constants


def _unpacked(nodes: list[tuple[Any, ...]], constants: dict[str, Any]) -> GraphModule:
    graph, made = torch.fx.Graph(), dict[str, torch.fx.Node]()

    def filled(value: Any) -> Any:
        if isinstance(value, _Result):
            return made[value.name]
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return type(value)(filled(item) for item in value) if isinstance(value, (list, tuple)) else value

    for op, name, target, args, kwargs in nodes:
        if op == "call_function" and isinstance(target, str):
            namespace, packet, overload = target.split(".")
            target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        made[name] = graph.create_node(op, target, filled(args), filled(kwargs), name)
    return GraphModule(constants, graph)


def run_job(job: str, mark: str) -> None:
    """What the other process does, with the file that :func:`compile_ahead` wrote; ``mark`` says that it is done."""
    for found in pkgutil.iter_modules(titanfunc.ops.__path__, "titanfunc.ops."):
        importlib.import_module(found.name)  # registers its operations
    threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    packed, like, settings = pickle.loads(Path(job).read_bytes())
    Path(job).unlink()  # a parent that is killed leaves nothing behind
    settings.apply()
    graph = _unpacked(*packed)
    for device in [device for *_, device in like if device.type == "cuda"][:1]:
        torch.cuda.set_device(device)  # Triton launches on the current one
    tensors = []
    for shape, stride, dtype, device in like:
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        tensors.append(tensor.normal_(0, 0.02) if dtype.is_floating_point else tensor.zero_())
    with torch.no_grad():
        compile_graph(graph, tensors, "inductor")(*tensors)
    if tensors and tensors[0].is_cuda:
        torch.cuda.synchronize()
    _keep(Path(mark))
