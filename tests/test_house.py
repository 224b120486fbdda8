"""The house rules: imports go down the floors, and public functions say what they take."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "titanfunc"

# From the ground up; a package may import itself and what stands before it.
FLOORS = (
    "titanfunc.config", "titanfunc.caches", "titanfunc.uncollected", "titanfunc.tree", "titanfunc.rng",
    "titanfunc.recorded", "titanfunc.fullgraph", "titanfunc.ops", "titanfunc.folding", "titanfunc.device",
    "titanfunc.nn", "titanfunc.data", "titanfunc.memory", "titanfunc.models", "titanfunc.optim", "titanfunc.train",
    "titanfunc.generation", "titanfunc.evals", "titanfunc.report", "titanfunc.job", "titanfunc.evaluation",
    "titanfunc.comparison", "titanfunc.meta_training", "titanfunc.compile_report", "titanfunc.bench",
)  # fmt: skip
ONLY_PLACE = {"datasets": "titanfunc.data", "hydra": "scripts", "omegaconf": "scripts"}
SOURCES = sorted(path for folder in ("titanfunc", "scripts", "kernels") for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int | None:
    names = [i for i, name in enumerate(FLOORS) if module == name or module.startswith(name + ".")]
    return names[0] if names else None


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "titanfunc" else [node.module]
            )
    return found


def test_every_module_has_a_floor():
    below = {module_of(path) for path in PACKAGE.rglob("*.py")} - {"titanfunc"}
    assert [module for module in sorted(below) if floor(module) is None] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    module = module_of(path)
    own = floor(module)
    for name in imports(path):
        if module.startswith("titanfunc_kernels"):
            assert name.split(".")[0] in {
                "__future__",
                "collections",
                "typing",
                "math",
                "torch",
                "triton",
                "titanfunc_kernels",
            }, name
            continue
        above = floor(name)
        if own is not None and above is not None:
            assert above <= own, f"{module} imports {name}, which stands above it"
        assert not name.startswith(("scripts", "titanfunc.scripts")) or module.startswith("scripts"), name
        place = ONLY_PLACE.get(name.split(".")[0])
        assert place is None or module.startswith(place), f"{name} belongs in {place} alone"


def test_config_needs_no_torch():
    for path in (PACKAGE / "config").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "numpy", "optree"}, path


def public_functions():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield path, node
                if isinstance(node, ast.ClassDef):
                    for inner in node.body:
                        if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                            yield path, inner


SHAPE = re.compile(r"\[[^\]]*\]|0-d|shape|leaves|leaf", re.IGNORECASE)


@pytest.mark.parametrize(("path", "node"), list(public_functions()), ids=lambda x: getattr(x, "name", None) or str(x))
def test_public_functions_and_classes_are_documented_with_shapes(path, node):
    text = ast.get_docstring(node)
    assert text, f"{path}: {node.name} has no docstring"
    signature = (
        ast.unparse(node.args) + ast.unparse(node.returns or ast.Constant(None))
        if isinstance(node, ast.FunctionDef)
        else ""
    )
    if re.search(r"\bTensor\b", signature):
        assert SHAPE.search(text), f"{path}: {node.name} takes or returns tensors and names no shape"
