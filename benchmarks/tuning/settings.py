"""Changing constants of titanfunc_kernels for a while.

A setting is a path and a value. Paths: ``module.NAME`` is a constant, wherever else it was imported (or stands under
the same name with the same value); ``module.NAME.KEY`` an entry of a dict; ``module.function`` what the function
returns; ``module.function.parameter`` its default. A dict as a value changes only those entries of a dict, or those
fields of a NamedTuple.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

PACKAGE = "titanfunc_kernels"


def merged(old: Any, value: Any) -> Any:
    """``value``, or ``old`` with the entries or fields that the dict ``value`` names."""
    if isinstance(value, dict) and isinstance(old, dict):
        return old | value
    if isinstance(value, dict) and hasattr(old, "_replace"):
        return old._replace(**value)
    return value


def _holders(name: str, value: Any) -> list[ModuleType]:
    """The package's modules in which ``name`` is ``value``: where it stands, and where it was imported."""
    loaded = [module for title, module in list(sys.modules.items()) if title.startswith(PACKAGE)]
    return [module for module in loaded if getattr(module, name, None) is value]


def _replace(name: str, old: Any, new: Any) -> Callable[[], None]:
    """Puts ``new`` in the place of ``old`` in every module; the result puts it back."""
    holders = _holders(name, old)
    for module in holders:
        setattr(module, name, new)

    def undo() -> None:
        for module in holders:
            setattr(module, name, old)

    return undo


def _refill(entries: dict, new: dict) -> Callable[[], None]:
    """Gives a dict, which others may have imported, other entries; the result puts the old ones back."""
    old = dict(entries)

    def fill(with_these: dict) -> None:
        entries.clear()
        entries.update(with_these)

    fill(new)
    return functools.partial(fill, old)


def _default(function: Any, parameter: str, value: Any) -> Callable[[], None]:
    """Gives a function's parameter another default; the result puts the old one back."""
    positional, named = function.__defaults__, function.__kwdefaults__
    found = inspect.signature(function).parameters[parameter]
    if found.default is inspect.Parameter.empty:
        raise AttributeError(f"{function.__name__}: {parameter} has no default")
    if named and parameter in named:
        function.__kwdefaults__ = named | {parameter: value}
    else:
        every = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        those = [p.name for p in every if p.default is not inspect.Parameter.empty]
        function.__defaults__ = tuple(
            value if name == parameter else old for name, old in zip(those, positional, strict=True)
        )

    def undo() -> None:
        function.__defaults__, function.__kwdefaults__ = positional, named

    return undo


def _change(path: str, value: Any) -> Callable[[], None]:
    module_name, name, *rest = path.split(".", 2)
    module = importlib.import_module(f"{PACKAGE}.{module_name}")
    old = getattr(module, name)
    if isinstance(old, FunctionType):
        if rest:
            return _default(old, rest[0], value)
        return _replace(name, old, lambda *args, **options: merged(old(*args, **options), value))
    if isinstance(old, dict):
        if not rest:
            return _refill(old, merged(old, value))
        key = next((key for key in old if str(key).removeprefix("torch.") == rest[0]), None)
        if key is None:
            raise AttributeError(f"{path}: wanted one of {[str(key) for key in old]}")
        return _refill(old, old | {key: merged(old[key], value)})
    if rest:
        raise AttributeError(f"{path}: {name} has no entries")
    return _replace(name, old, merged(old, value))


@contextlib.contextmanager
def changed(settings: Mapping[str, Any]) -> Iterator[None]:
    """While it is entered, the package's constants are these; after that, what they were. AttributeError: no such."""
    undo: list[Callable[[], None]] = []
    try:
        for path, value in settings.items():
            undo.append(_change(path, value))
        yield
    finally:
        for back in reversed(undo):
            back()
