"""Names by contents: what compilers keep on disk is found again for the same program, and for no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

import titanfunc as tf
from titanfunc import recorded
from titanfunc.train.old_values import copied


def digest(function: Callable[..., Any], *shapes: tuple[int, ...]) -> str | None:
    """The digest of what the function does to tensors of these shapes."""
    with FakeTensorMode():
        leaves = [torch.empty(shape) for shape in shapes or ((3, 3), (3, 3))]
        with recorded.Record(leaves) as record:
            results = function(*leaves)
        return record.digest(results)


def gradient(scale: float) -> Callable[[Tensor, Tensor], tuple[Tensor]]:
    return lambda x, y: (torch.func.grad(lambda z: (scale * (z @ y).tanh()).sum())(x),)


DIFFERENT: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "a sum": lambda x, y: (x + y,),
    "the same, the other way round": lambda x, y: (y + x,),
    "a product": lambda x, y: (x * y,),
    "twice": lambda x, y: (x + y, x + y),
    "once, given twice": lambda x, y: ((x + y),) * 2,
    "a part of the results": lambda x, y: (x + y, x * y)[:1],
    "a constant": lambda x, y: (x + 2.0 * y,),
    "another constant": lambda x, y: (x + 3.0 * y,),
    "a constant tensor": lambda x, y: (x + y * torch.tensor([1.0, 2.0, 3.0]),),
    "another constant tensor": lambda x, y: (x + y * torch.tensor([1.0, 2.0, 4.0]),),
    "in place": lambda x, y: (x.clone().add_(y),),
    "a gradient": gradient(2.0),
    "another gradient": gradient(3.0),
}


def test_what_differs_has_another_digest_and_what_does_not_the_same() -> None:
    found = {name: digest(function) for name, function in DIFFERENT.items()}
    assert None not in found.values()
    assert len(set(found.values())) == len(DIFFERENT)
    assert found == {name: digest(function) for name, function in DIFFERENT.items()}
    assert digest(DIFFERENT["a sum"], (4, 4), (4, 4)) != found["a sum"], "shapes are part of it"


def test_what_cannot_be_told_has_no_digest() -> None:
    large = [float(i) for i in range(2 * recorded.LARGEST)]
    assert digest(lambda x: (x + torch.tensor(large[:1]),), (len(large),)) is not None
    assert digest(lambda x: (x + torch.tensor(large),), (len(large),)) is None
    source = torch.Generator().manual_seed(0)
    assert digest(lambda x: (x + torch.rand(3, generator=source),), (3,)) is None


def test_an_operation_of_others_has_no_digest() -> None:
    """A compiler takes such an operation apart, and its name stays when its code is changed."""
    with torch.library._scoped_library("test_recorded", "FRAGMENT") as library:
        library.define("other(Tensor x) -> Tensor")
        library.impl("other", torch.empty_like, "Meta")
        assert digest(lambda x, y: (torch.ops.test_recorded.other(x),)) is None
    assert digest(lambda x, y: (copied(x),)) is not None


def test_a_models_whole_step_has_a_digest() -> None:
    model = tf.models.build(tf.models.preset("mac_tiny", vocab_size=17, dim=16, layers=1, heads=2, ff=16))
    tx = tf.optim.adamw(1e-3, clip_norm=1.0)
    whole = tf.train.init_state(model, tx), {"tokens": torch.zeros(1, 65, dtype=torch.int64)}
    mode = FakeTensorMode()
    with mode:
        leaves, structure = optree.tree_flatten(optree.tree_map(mode.from_tensor, whole))
        with recorded.Record(leaves) as record:
            results = tf.train.make_train_step(model, tx)(*optree.tree_unflatten(structure, leaves))
        assert record.digest(optree.tree_leaves(results)) is not None


def test_gradients_from_outside_have_no_digest() -> None:
    with FakeTensorMode():
        leaf = torch.empty(3, requires_grad=True)
        with recorded.Record([leaf]) as record:
            result = leaf * 2
        assert record.digest([result]) is None


def state(value: float) -> tf.train.TrainState:
    counts = (torch.zeros((), dtype=torch.int64) for _ in range(3))
    return tf.train.TrainState(next(counts), {"w": torch.full((4, 4), value)}, (), *counts)


def scaled(scale: float) -> Callable[[Any, Any], Any]:
    """A step that no other program has: the weights times the tokens, and a scale."""

    def step(old: Any, batch: Any) -> Any:
        new = {"w": torch.sin(old.params["w"] @ batch["x"]) * scale}
        return old._replace(step=old.step + 1, params=new), {"loss": new["w"].sum()}

    return step


@pytest.mark.slow
def test_a_step_that_was_compiled_before_is_found_and_another_is_not(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = {}
    for name, scale in (("first", 2.0), ("again", 2.0), ("another", 3.0)):
        torch._dynamo.reset()
        counters.clear()
        compiled = tf.train.compile_step(scaled(scale))
        new, metrics = compiled(state(0.3), {"x": torch.eye(4)})
        expected = torch.sin(torch.full((4, 4), 0.3)) * scale
        torch.testing.assert_close(new.params["w"], expected)
        torch.testing.assert_close(metrics["loss"], expected.sum())
        assert int(new.step) == 1
        found[name] = {key: value for key, value in counters["aot_autograd"].items() if "cache" in key}
    assert found["first"].get("autograd_cache_miss") == 1 and not found["first"].get("autograd_cache_bypass")
    assert found["again"].get("autograd_cache_hit") == 1
    assert found["another"].get("autograd_cache_miss") == 1


@pytest.mark.slow
def test_another_shape_of_the_same_step_is_another_program(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def step_with(factor: float) -> Callable[[Any, Any], Any]:
        def step(old: Any, batch: Any) -> Any:
            scale = factor if len(batch["x"]) == 8 else 1.0  # what only one of the shapes takes
            value = (torch.cos(batch["x"]) * scale).sum()
            return old._replace(params={"w": old.params["w"] + value}), {"loss": value}

        return step

    for factor in (5.0, 3.0):  # the second begins with what the first left on disk, as another process would
        torch._dynamo.reset()
        compiled = tf.train.compile_step(step_with(factor))
        for rows in (4, 8, 4):
            _, metrics = compiled(state(0.0), {"x": torch.ones(rows)})
            wanted = torch.cos(torch.ones(rows)).sum() * (factor if rows == 8 else 1.0)
            torch.testing.assert_close(metrics["loss"], wanted)


def test_a_step_with_a_higher_order_operation_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def step(old: Any, batch: Any) -> Any:
        x = batch["x"]
        value = torch.cond(x.sum() > 0, lambda y: y.sum(), lambda y: -y.sum(), (x,))
        return old._replace(params={"w": old.params["w"] + value}), {"loss": value}

    torch._dynamo.reset()
    _, metrics = tf.train.compile_step(step)(state(0.0), {"x": torch.ones(3)})
    assert metrics["loss"] == 3


def test_other_backends_and_modes_are_left_alone() -> None:
    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return leaves

    for backend, options in (("aot_eager", {}), ("inductor", {"mode": "default"}), (None, {})):
        call, further = recorded.kept_by_contents(function, backend, options)
        assert further == options
        assert call(function, (torch.ones(2),))[0].sum() == 2
    _, further = recorded.kept_by_contents(function, "inductor", {"options": {"max_autotune": False}})
    assert further["options"]["max_autotune"] is False and "unsafe_marked_cacheable_functions" in further["options"]
