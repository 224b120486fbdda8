"""What a traced function does, as one short text: programs that differ have different ones, in any process.

Compilers that keep their work on disk ask what it is the work of. torch knows that of its own operations, but not of a
function that it is told to trace as a whole; its operations, with what they were given and what they made, are the
answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST = 1024  # numbers in a constant; one that is larger is not looked into
NAMED = ("aten", "prim", "prims", "titanfunc")
"""Of whose operations the name says what they do: a compiler may look into others, and what is there may change."""
PLAIN = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format
)  # fmt: skip
_seen: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def __getattr__(name: str) -> Any:
    """The function that was named by its contents: torch's caches pickle what they go by, and pickle looks it up."""
    if name not in _seen:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _seen[name]


class Record(TorchDispatchMode):
    """While entered, notes every operation on tensors without data: its name, constants, arguments and results.

    inputs: the tensors that the function is given (any shapes). Tensors are told apart by when they were first seen,
    and described by shape, strides, dtype and device; constants among them by their numbers.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._hash = hashlib.sha256()
        self._numbers: dict[int, int] = {}
        self._held: list[Tensor] = []  # else an identity would come again
        self._whole = not any(tensor.requires_grad for tensor in inputs)
        self._note("inputs", list(inputs))

    def digest(self, results: Sequence[Any]) -> str | None:
        """64 hex digits for all that was noted and these results, or None where something could not be told."""
        self._note("results", list(results))
        return self._hash.hexdigest() if self._whole else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation's results, noted."""
        results = func(*args, **(kwargs or {}))
        if func.namespace not in NAMED:
            self._whole = False
        self._note(str(func), [args, kwargs or {}, results])
        return results

    def _note(self, name: str, values: Any) -> None:
        self._hash.update(f"{name} {self._described(values)}\n".encode())

    def _described(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}({','.join(map(self._described, value))})"
        if isinstance(value, dict):
            return "{" + ",".join(f"{key!r}:{self._described(item)}" for key, item in value.items()) + "}"
        if not isinstance(value, PLAIN):
            self._whole = False
        return f"{type(value).__name__} {value!r}"

    def _of_tensor(self, tensor: Tensor) -> str:
        number = self._numbers.get(id(tensor))
        if number is not None:
            return f"%{number}"
        self._held.append(tensor)
        self._numbers[id(tensor)] = number = len(self._numbers)
        text = f"%{number}={tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}{tensor.device}{tensor.storage_offset()}"
        if isinstance(tensor, FakeTensor):
            return text
        if type(tensor) is not Tensor or tensor.numel() > LARGEST:
            self._whole = False
            return text
        with torch.utils._python_dispatch._disable_current_modes():
            return f"{text}{tensor.tolist()}"


@contextlib.contextmanager
def _compiling_nothing() -> Iterator[None]:
    """While entered, torch.compile raises RuntimeError in this thread: higher-order operations call it to trace what
    they are given, and would trace the record too."""
    here, plain = threading.get_ident(), torch.compile

    def refused(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == here:
            raise RuntimeError("a higher-order operation cannot be recorded")
        return plain(*args, **kwargs)

    with mock.patch.object(torch, "compile", refused):
        yield


def kept_by_contents(
    function: Callable[..., tuple[Tensor, ...]], backend: Any, options: Mapping[str, Any]
) -> tuple[Callable[..., tuple[Tensor, ...]], dict[str, Any]]:
    """Lets inductor keep on disk what AOTAutograd makes of a function that Dynamo traces as a whole.

    function: leaves (any shapes) -> results. Returns (a call (the function that Dynamo sees, leaves) -> results, the
    options of torch.compile with what it takes). Whenever Dynamo runs it on tensors without data, its operations are
    noted, and the function that Dynamo sees is named by them: torch's caches go by the name. One whose operations could
    not all be told has a name that they do not know.
    """
    if backend != "inductor" or "mode" in options:
        return lambda seen, leaves: function(*leaves), dict(options)
    named: dict[str, str] = {}  # what Dynamo traced last, alone: the compiler asks about it next

    def call(seen: Any, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not all(isinstance(leaf, FakeTensor) for leaf in leaves):
            return function(*leaves)
        named.clear()
        results = digest = None
        # What is raised in here is of a higher-order operation, or the function's own, which it raises again.
        with contextlib.suppress(Exception), _compiling_nothing(), Record(leaves) as record:
            results = function(*leaves)
            digest = record.digest(results)
        if results is None:
            results = function(*leaves)
        seen.__module__, seen.__name__ = __name__, f"traced_{digest}"
        seen.__qualname__ = seen.__name__
        if digest:
            _seen[seen.__name__] = seen
            named[f"{__name__}.{seen.__name__}"] = digest
        return results

    given = {**(options.get("options") or {}), "unsafe_marked_cacheable_functions": named}
    return call, {**options, "options": given}
