"""`msn bench what=all`: how parts that share a machine add up, and which one limits."""

import pytest

from msn.commands.bench_all import combine

DATA = {"worker": 0.008, "batched_views_cpu": 0.032, "batched_views_cuda": 0.010}


def test_on_a_cpu_all_parts_share_the_cores():
    row = combine(DATA, 0.5, cores=4, on_cuda=False)
    assert row["images_per_s"] == pytest.approx(1 / (0.002 + 0.006 + 0.5))
    assert row["bottleneck"] == "step"
    assert row["limits"] == pytest.approx({"decoding": 500, "views": 1 / 0.006, "step": 2})


def test_on_cuda_decoding_goes_on_beside_the_device():
    row = combine(DATA, 0.0005, cores=2, on_cuda=True)
    assert row["images_per_s"] == pytest.approx(1 / 0.004)
    assert row["bottleneck"] == "decoding"
    assert combine(DATA, 0.003, cores=16, on_cuda=True)["images_per_s"] == pytest.approx(200)


def test_views_can_be_the_bottleneck():
    assert combine(DATA, 0.0005, cores=64, on_cuda=True)["bottleneck"] == "views"
