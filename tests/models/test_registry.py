"""Presets, roles and parameter counts."""

from __future__ import annotations

import pytest

import titanfunc as tf
from tests.models.small import small
from titanfunc import tree
from titanfunc.models.roles import ROLES

MILLIONS = {
    "mac_tiny": 1.09, "mac_24gb": 39.6, "mac_168m": 171.1,
    "transformer_tiny": 0.89, "transformer_24gb": 33.7, "transformer_168m": 151.3,
}  # fmt: skip


def test_every_preset_has_the_size_it_is_known_for():
    counts = {name: tf.models.count_parameters(config) / 1e6 for name, config in tf.models.presets.items()}
    assert counts == pytest.approx(MILLIONS, rel=0.01)


def test_every_parameter_has_a_role_and_only_matrices_decay():
    _, params = small(tie_embeddings=False)
    roles = tree.named_leaves(tf.models.roles(params))
    assert set(roles.values()) == set(ROLES)
    decayed = tree.named_leaves(tf.models.decayed(params))
    for name, leaf in tree.named_leaves(params).items():
        matrix = leaf.ndim - name.startswith("blocks") >= 2
        assert matrix or not decayed[name], name
    assert decayed["blocks.attention.wq"] and not decayed["blocks.memory.initial.w0"]
    with pytest.raises(ValueError, match="no role is declared for mystery"):
        tf.models.roles({"mystery": params["norm"]})


def test_an_unknown_preset_or_field_is_named():
    with pytest.raises(ValueError, match="preset: wanted one of mac_168m"):
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
        ({"tie_embeddings": "no"}, "tie_embeddings: wanted true or false"),
        ({"memory": 5}, "memory: wanted a mapping of its fields"),
        ({"memory": {"clip": "x"}}, "memory.clip: wanted a number"),
        ({"memory": {"conv_width": 2.5}}, "memory.conv_width: wanted a whole number"),
    ],
)
def test_a_value_of_another_kind_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tf.models.preset("mac_tiny", **changes)
