"""Presets, roles and parameter counts."""

from __future__ import annotations

import pytest

import titanfunc as tf
from tests.models.small import MODELS, small
from titanfunc import tree
from titanfunc.models.roles import ROLES

SIZES = ("tiny", "recall", "24gb", "168m", "170m", "340m", "400m", "760m")
MILLIONS = {
    "mac": (1.09, 2.474, 39.60, 171.0, 174.6, 345.7, 408.3, 739.2),
    "mag": (1.06, 2.343, 38.56, 170.5, 171.1, 335.3, 395.8, 715.6),
    "mal": (1.06, 2.343, 38.56, 170.5, 171.1, 335.2, 395.7, 715.6),
    "lmm": (0.79, 1.816, 30.10, 137.4, 142.6, 251.0, 294.7, 526.3),
    "transformer": (0.89, 1.771, 33.69, 168.1, 155.3, 289.7, 341.1, 615.5),
}
MILLIONS_MOE = {
    "mac": (2.87, 6.017, 115.1, 548.6, 408.2, 864.9, 1031.4, 1871.9),
    "mag": (2.83, 5.886, 114.1, 548.1, 404.7, 854.5, 1018.8, 1848.3),
    "mal": (2.83, 5.886, 114.1, 548.1, 404.7, 854.5, 1018.8, 1848.3),
    "lmm": (2.57, 5.359, 105.6, 515.0, 376.2, 770.2, 917.7, 1659.0),
    "transformer": (2.66, 5.314, 109.2, 545.6, 389.0, 808.9, 964.2, 1748.2),
}


def test_every_preset_has_the_size_it_is_known_for():
    known = {}
    for family in MILLIONS:
        known |= {f"{family}_{size}": count for size, count in zip(SIZES, MILLIONS[family], strict=True)}
        known |= {f"{family}_{size}_moe": count for size, count in zip(SIZES, MILLIONS_MOE[family], strict=True)}
    counts = {name: tf.models.count_parameters(config) / 1e6 for name, config in tf.models.presets.items()}
    assert counts == pytest.approx(known, rel=0.005)
    # The paper's names are those of its models: ours come within 4 % of them.
    for size in ("168m", "170m", "340m", "400m", "760m"):
        assert counts[f"mac_{size}"] == pytest.approx(float(size[:-1]), rel=0.04)


def test_every_parameter_has_a_role_and_only_matrices_decay():
    found = set()
    for name in MODELS:
        for feed_forward in ("swiglu", "moe", "cms"):
            _, params = small(name, tie_embeddings=False, feed_forward=feed_forward)
            found |= set(tree.leaves(tf.models.roles(params)))
    assert found == set(ROLES)
    _, params = small(tie_embeddings=False)
    decayed = tree.named_leaves(tf.models.decayed(params))
    for name, leaf in tree.named_leaves(params).items():
        matrix = leaf.ndim - name.startswith("blocks") >= 2
        assert matrix or not decayed[name], name
    assert decayed["blocks.attention.wq"] and not decayed["blocks.memory.initial.w0"]
    with pytest.raises(ValueError, match="no role is declared for mystery"):
        tf.models.roles({"mystery": params["norm"]})


def test_an_unknown_preset_or_field_is_named():
    with pytest.raises(ValueError, match=r"preset: wanted FAMILY_SIZE .* \(did you mean mac_"):
        tf.models.preset("mac_huge")
    with pytest.raises(ValueError, match=r"memory\.colour: no such field"):
        tf.models.preset("mac_tiny", memory={"colour": 1})
    with pytest.raises(ValueError, match="heads: wanted a divisor of dim = 128, got 3"):
        tf.models.preset("mac_tiny", heads=3)
    with pytest.raises(ValueError, match=r"mac\.segment: wanted a multiple of memory\.chunk_size"):
        tf.models.preset("mac_tiny", mac={"segment": 50})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"persistent": "a"}, "persistent: wanted a whole number"),
        ({"window": 64}, "window: wanted 0"),
        ({"family": "mag"}, "window: wanted at least 1 token"),
        ({"family": "lmm"}, "persistent: wanted 0"),
        ({"memory_layers": (4,)}, "memory_layers: wanted whole numbers from 0 to 3"),
        ({"memory_layers": (1, 0)}, "memory_layers: wanted each layer once, in order"),
        ({"feed_forward": "dense"}, "feed_forward: wanted one of swiglu, moe, cms"),
        ({"moe": {"top_k": 9}}, "moe.top_k: wanted at most moe.experts = 8"),
        ({"feed_forward": "moe", "moe": {"kernel": "grouped"}}, "moe.kernel: wanted dense"),
        ({"cms": {"periods": (1, 0)}}, "cms.periods: wanted a list of whole numbers"),
        ({"mac": {"context": "prefix"}}, "mac.context: wanted one of read, residual, inclusive"),
        ({"mac": {"write": "attention", "context": "inclusive"}}, "mac.context: wanted read or residual"),
        ({"memory": {"rule": {"chunk_clip": 1.0}}}, "rule.chunk_clip: wanted 0"),
        ({"memory": {"initial_forget": 0.0}}, "memory.initial_forget: wanted a number between"),
        ({"tie_embeddings": "no"}, "tie_embeddings: wanted true or false"),
        ({"memory": 5}, "memory: wanted a mapping of its fields"),
        ({"memory": {"clip": "x"}}, "memory.clip: wanted a number"),
        ({"memory": {"conv_width": 2.5}}, "memory.conv_width: wanted a whole number"),
    ],
)
def test_a_value_of_another_kind_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tf.models.preset("mac_tiny", **changes)
