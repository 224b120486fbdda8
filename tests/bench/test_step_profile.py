"""Where a step's time goes, on made-up times, and the least that its work takes."""

import pytest

import titanfunc as tf
from titanfunc import tree
from titanfunc.bench import roofline, step_profile


def test_the_work_of_a_step():
    config = tf.models.preset("transformer_tiny", layers=2, dim=32, ff=64, heads=2)
    params = tf.models.build(config).init(tf.rng.generator(0))
    found = roofline.of_model(config, params, [params, params], batch=3, tokens=8)
    multiplied = 256 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert found.products == 6 * multiplied * 24 and found.attention == 12 * 36 * 32 * 2 * 3
    assert found.state_bytes == 7 * 4 * tree.size(params)


@pytest.mark.parametrize("tokens", [5, 8, 11])
def test_pairs_are_those_that_see_each_other(tokens):
    window = tf.models.preset("mal_tiny", window=4, persistent=3)
    assert roofline.pairs(window, tokens) == sum(min(t + 1, 4) + 3 for t in range(tokens))
    segments = tf.models.preset("mac_tiny", mac={"segment": 4}, memory={"chunk_size": 4}, persistent=3)
    assert roofline.pairs(segments, tokens) == sum(2 * (t % 4 + 1) + 3 for t in range(tokens))
    assert roofline.pairs(tf.models.preset("lmm_tiny"), tokens) == 0


def test_every_kernel_has_the_kind_that_its_name_says():
    names = {
        "nvjet_sm90_tst_256x128": "matrix products", "sm80_xmma_gemm_f32f32": "matrix products",
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>": "attention",
        "_attend": "attention", "by_keys": "attention", "pull_kernel": "memory", "trace_kernel": "memory",
        "triton_poi_fused_add_cat": "inductor's own", "Memcpy DtoD (Device -> Device)": "copies", "what": "other",
    }  # fmt: skip
    assert {name: step_profile.kind_of(name) for name in names} == names


def test_the_summary_adds_up_and_knows_overlaps_from_the_whole():
    kernels = [("nvjet_a", 0.0, 3000.0), ("nvjet_a", 4000.0, 5000.0), ("pull_kernel", 4500.0, 8000.0)]
    found = step_profile.summary(kernels, flops=790e9)
    assert found["step_ms"] == 8.0 and found["launches"] == 3
    assert found["kinds"] == [
        {"kind": "matrix products", "ms": 4.0, "launches": 2},
        {"kind": "memory", "ms": 3.5, "launches": 1},
    ]
    assert found["products_at_the_roof_ms"] == 1.0 and found["floors_ms"] == {"matrix products": 1.0}
    assert found["kernels"][0] == {"name": "nvjet_a", "ms": 4.0, "launches": 2}


def test_the_roofline_stands_beside_each_kind():
    kernels = [("nvjet_a", 0.0, 3e3), ("_attend", 3e3, 5e3), ("triton_a", 5e3, 6e3), ("pull_kernel", 6e3, 9e3)]
    found = step_profile.summary(kernels, 790e9, attention=395e9, state_bytes=2e9, copy_tb_per_s=4.0)
    assert found["floors_ms"] == {"matrix products": 1.0, "attention": 0.5, "all others together": 0.5}
    lines = [line.split() for line in step_profile.table(found).splitlines()]
    assert lines[2:6] == [
        ["3.000", "1.000", "1", "launches", "matrix", "products"],
        ["3.000", "1", "launches", "memory"],
        ["2.000", "0.500", "1", "launches", "attention"],
        ["1.000", "1", "launches", "inductor's", "own"],
    ]
    assert lines[6] == ["4.000", "0.500", "2", "launches", "all", "others", "together"]
    assert "the state's traffic at 4 TB/s; not the memory's work" in step_profile.table(found)
