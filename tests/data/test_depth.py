"""Which values of images of more than 8 bits are black and white is fixed for a whole set."""

from collections import Counter

import numpy as np
import pytest

from msn.data.pools import PoolSettings, build_pools
from msn.errors import UserError
from msn.images import decode
from msn.images.depth import (
    BeyondWhite,
    check_depth,
    levels_of,
    recorded_depth,
    to_eight_bits,
    trained_depth,
)
from tests.data.datamodules import make_datamodule
from tests.data.photos import make_folder
from tests.data.tiffs import deep_png, tiff

TWELVE = np.linspace(0, 4095, 48 * 64).astype(np.uint16).reshape(48, 64)


def deep_folder(root, values, suffix=".png"):
    """Two classes of eight images; one alone has the largest values."""
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(8):
            shown = values if (label, i) == ("b", 5) else values // 2
            data = deep_png(shown) if suffix == ".png" else tiff(shown)
            (root / label / f"{i}{suffix}").write_bytes(data)
    return root


def pools_of(where, **changes):
    settings = {
        "source": "folder",
        "val_root": None,
        "hold_out": 0.25,
        "split_seed": 0,
        "use_labels": True,
        "download": False,
        "image_size": None,
        "depth": "auto",
    }
    return build_pools(PoolSettings(**{**settings, "root": str(where), **changes}))


@pytest.mark.parametrize(
    ("bits", "suffix"), [(10, ".png"), (12, ".tif"), (14, ".png"), (16, ".tiff")]
)
def test_auto_takes_the_bits_that_a_sample_needs_for_all_images_and_says_so(
    tmp_path, caplog, bits, suffix
):
    caplog.set_level("INFO", "msn")
    values = (TWELVE.astype(np.int64) * (2**bits - 1) // 4095).astype(np.uint16)
    pools = pools_of(deep_folder(tmp_path, values, suffix))
    assert pools.train.source.depth == pools.held_out.source.depth == bits
    brightest = max(int(np.asarray(pools.train.source.rgb(i)).max()) for i in range(16))
    assert brightest == 255
    assert np.asarray(pools.train.source.rgb(0)).max() == 127
    (said,) = [r.getMessage() for r in caplog.records if "data.depth" in r.getMessage()]
    assert f"values from 0 to {2**bits - 1}: data.depth={bits}" in said


def test_signed_values_are_spread_from_the_least_to_the_largest(tmp_path):
    values = TWELVE.astype(np.int32) - 1024
    pools = pools_of(deep_folder(tmp_path, values, ".tif"))
    assert pools.train.source.depth == [-1024, 3071]
    assert np.asarray(pools.train.source.rgb(13))[-1, -1].tolist() == [255] * 3


def test_masks_of_zeros_and_ones_are_black_and_white(tmp_path, caplog):
    caplog.set_level("INFO", "msn")
    pools = pools_of(deep_folder(tmp_path, TWELVE // 2048, ".png"))
    assert pools.train.source.depth == [0, 1]
    assert "data.depth=[0,1], so that 1 is white" in caplog.text
    brightest = [int(np.asarray(pools.train.source.rgb(i)).max()) for i in range(16)]
    assert sorted(set(brightest)) == [0, 255]


def test_held_out_images_are_read_as_those_that_train(tmp_path):
    deep_folder(tmp_path / "train", TWELVE)
    deep_folder(tmp_path / "val", TWELVE // 8)
    pools = pools_of(tmp_path)
    assert pools.held_out.source.depth == 12
    assert np.asarray(pools.held_out.source.rgb(13)).max() == 31


def test_a_sample_that_is_all_black_takes_all_sixteen_bits_and_says_so(tmp_path, caplog):
    pools = pools_of(deep_folder(tmp_path, TWELVE * 0))
    assert pools.train.source.depth == 16
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "are all black" in said
    (tmp_path / "a" / "0.png").write_bytes(deep_png(TWELVE * 16))  # found later, and not clipped
    shown = np.asarray(pools.train.source.rgb(0))
    assert (shown == 255).mean() < 0.01


def test_images_with_values_above_white_are_counted(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "msn")
    monkeypatch.setattr(decode, "_warned", Counter())
    source = pools_of(deep_folder(tmp_path, TWELVE), depth=11).train.source
    for i in [0, 13] * 12:  # only the second one is brighter than 2,047
        source.rgb(i)
    said = [r.getMessage() for r in caplog.records if "makes white" in r.getMessage()]
    assert [line.partition(" ")[0] for line in said] == ["1", "10"]
    assert said[0].endswith("now: values above 2047")


def test_images_of_eight_bits_have_no_depth(tmp_path):
    for suffix in (".png", ".tif", ".jpg"):
        pools = pools_of(make_folder(tmp_path / suffix, suffix=suffix))
        assert pools.train.source.depth is None


def test_a_set_depth_is_taken_without_a_look(tmp_path):
    root = deep_folder(tmp_path, TWELVE)
    assert pools_of(root, depth=14).train.source.depth == 14
    assert np.asarray(pools_of(root, depth=[0, 1023]).train.source.rgb(0)).max() == 255
    assert np.asarray(pools_of(root, depth=16).train.source.rgb(13)).max() == 15


def test_runs_that_name_no_depth_were_read_with_sixteen_bits(tmp_path):
    settings = dict(source="folder", val_root=None, hold_out=0.25, split_seed=0, use_labels=True)
    root = str(deep_folder(tmp_path, TWELVE))
    pools = build_pools(PoolSettings(root=root, download=False, image_size=None, **settings))
    assert levels_of(pools.train.source.depth) == (0, 65_535)


@pytest.mark.parametrize("depth", [7, 33, True, "12", "deep", None, 12.0, [1], [5, 5], [0, 2**40]])
def test_what_is_no_depth_is_refused(depth):
    with pytest.raises(UserError, match=r"data.depth=.*must be auto, a number of bits"):
        check_depth(depth)


def test_digits_have_no_depth():
    with pytest.raises(UserError, match="data.depth=12: digits has 8 bits"):
        pools_of("", root=None, source="digits", image_size=32, depth=12)


@pytest.mark.parametrize("depth", [8, 10, 12, 16, 32, [-1024, 3071], [5, 7]])
def test_levels_are_even_and_end_in_black_and_white(depth):
    low, high = levels_of(depth)
    values = np.array([low - 1, low, (low + high) // 2, high, high + 1])
    with pytest.warns(BeyondWhite, match=f"values above {high}"):
        shown = to_eight_bits(values, (low, high))
    assert shown.tolist() == [0, 0, 127, 255, 255]


def test_an_evaluation_takes_the_depth_of_the_training():
    twelve, none, old, foreign = {"data_depth": 12}, {"data_depth": None}, {"method": {}}, {}
    assert [recorded_depth(about) for about in (twelve, none, old, foreign)] == [12, None, 16, None]
    assert trained_depth("auto", [twelve, foreign, twelve, none]) == 12
    assert trained_depth("auto", [foreign, none]) == "auto"
    assert trained_depth(10, [twelve]) == 10
    with pytest.raises(UserError, match="trained with data.depth=12 and 16: choose one"):
        trained_depth("auto", [twelve, old])


def test_a_run_goes_on_with_the_depth_it_began_with(tmp_path):
    module = make_datamodule(deep_folder(tmp_path, TWELVE))
    state = module.state_dict()
    assert state["fingerprint"]["depth"] == 12
    make_datamodule(tmp_path).load_state_dict(state)
    other = make_datamodule(tmp_path, depth=14)
    with pytest.raises(UserError, match="differ in depth: 12 then, 14 now"):
        other.load_state_dict(state)
    del state["fingerprint"]["depth"]  # of a version that knew sixteen bits alone
    with pytest.raises(UserError, match="differ in depth: 16 then, 12 now"):
        make_datamodule(tmp_path).load_state_dict(state)
    make_datamodule(tmp_path, depth=16).load_state_dict(state)


def test_features_of_another_depth_are_others(tmp_path):
    root = deep_folder(tmp_path, TWELVE)
    plain, deep = (pools_of(root, depth=depth).train for depth in (16, 12))
    assert plain.identity(0) == plain.source.identity(0)
    assert deep.identity(0) != plain.identity(0)
