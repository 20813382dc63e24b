"""`msn bench what=all`: how parts that share a machine add up, and which one limits."""

import pytest

from msn.commands.bench_all import combine


def test_on_a_cpu_all_parts_share_the_cores():
    row = combine(worker=0.008, views=0.024, step=0.5, cores=4, on_cuda=False)
    assert row["images_per_s"] == pytest.approx(1 / (0.002 + 0.006 + 0.5))
    assert row["bottleneck"] == "step"
    assert row["limits"] == pytest.approx({"decoding": 500, "views": 1 / 0.006, "step": 2})


def on_cuda(**changes):
    return combine(**{"worker": 0.008, "views": 0.002, "on_cuda": True, **changes})


def test_on_cuda_decoding_goes_on_beside_the_device():
    row = on_cuda(step=0.0005, cores=2)
    assert row["images_per_s"] == pytest.approx(1 / 0.004)
    assert row["bottleneck"] == "decoding"
    assert on_cuda(step=0.003, cores=16)["images_per_s"] == pytest.approx(200)


def test_views_can_be_the_bottleneck():
    assert on_cuda(step=0.0005, cores=64)["bottleneck"] == "views"
