import pytest
import torch

from msn.data.subsets import (
    fraction_of_each_class,
    k_shot,
    positions_of,
    read_names,
    write_names,
)
from msn.errors import UserError

CLASSES = ["cat", "dog", "owl"]
LABELS = torch.tensor([0] * 12 + [1] * 7 + [2] * 30)[
    torch.randperm(49, generator=torch.Generator().manual_seed(0))
]


def test_k_shot_takes_k_of_every_class():
    for k, positions in k_shot(LABELS, [1, 2, 5], seed=3, classes=CLASSES).items():
        assert torch.bincount(LABELS[positions]).tolist() == [k] * 3
        assert positions.tolist() == sorted(set(positions.tolist()))


def test_smaller_sets_are_part_of_larger_ones():
    sets = k_shot(LABELS, [5, 1, 2], seed=0, classes=CLASSES)
    assert set(sets[1].tolist()) < set(sets[2].tolist()) < set(sets[5].tolist())


def test_every_image_of_a_class_is_drawn_equally_often():
    draws = [k_shot(LABELS, [2], seed=s, classes=CLASSES)[2] for s in range(700)]
    counts = torch.bincount(torch.cat(draws), minlength=len(LABELS)).double()
    dogs = counts[LABELS == 1]  # seven, of which two are drawn: 200 times each on average
    # Standard deviation of such a count is 12.
    assert (dogs - 200).abs().max() < 50


def test_a_draw_depends_on_the_seed_alone():
    first = k_shot(LABELS, [3], seed=7, classes=CLASSES)[3]
    assert torch.equal(first, k_shot(LABELS, [3, 4], seed=7, classes=CLASSES)[3])
    assert not torch.equal(first, k_shot(LABELS, [3], seed=8, classes=CLASSES)[3])


def test_too_few_images_name_the_class():
    with pytest.raises(UserError, match="shots=8: class dog has only 7 images"):
        k_shot(LABELS, [1, 8], seed=0, classes=CLASSES)


@pytest.mark.parametrize("classes", [[], ["cat"]])
def test_a_single_class_is_refused(classes):
    with pytest.raises(UserError, match="at least two classes"):
        k_shot(torch.zeros(5, dtype=torch.long), [1], seed=0, classes=classes)


def test_zero_shots_are_refused():
    with pytest.raises(UserError, match="shots must be >= 1"):
        k_shot(LABELS, [0], seed=0, classes=CLASSES)


def test_a_fraction_keeps_the_shares_of_classes_and_one_image_at_least():
    positions = fraction_of_each_class(LABELS, 0.1, seed=0, classes=CLASSES)
    assert torch.bincount(LABELS[positions]).tolist() == [1, 1, 3]
    assert len(fraction_of_each_class(LABELS, 1.0, seed=0, classes=CLASSES)) == len(LABELS)


def test_smaller_fractions_are_part_of_larger_ones():
    small, large = (
        set(fraction_of_each_class(LABELS, f, seed=5, classes=CLASSES).tolist()) for f in (0.2, 0.5)
    )
    assert small < large


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_fractions_outside_the_range_are_refused(fraction):
    with pytest.raises(UserError, match=r"fraction must be in \(0, 1\]"):
        fraction_of_each_class(LABELS, fraction, seed=0, classes=CLASSES)


def test_a_class_without_images_is_named():
    with pytest.raises(UserError, match="class owl has no image"):
        fraction_of_each_class(LABELS[LABELS < 2], 0.5, seed=0, classes=CLASSES)


def test_lists_are_read_as_they_were_written(tmp_path):
    listed = ["train/cat/1.jpg", "train/dog/with space.jpg", "owl\udcff.jpg"]
    write_names(tmp_path / "lists" / "a.txt", listed)
    assert read_names(tmp_path / "lists" / "a.txt") == listed
    assert [p.name for p in (tmp_path / "lists").iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n \n", "lists no image"), ("a.jpg\nb.jpg\na.jpg\n", "lists an image twice: a.jpg")],
)
def test_useless_lists_are_refused(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_names(tmp_path / "list.txt")


def test_a_missing_list_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="cannot read this list"):
        read_names(tmp_path / "none.txt")


NAMES = ["train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg", "train/dog/d.jpg"]


def test_images_are_found_by_full_or_bare_name():
    found = positions_of(["d.jpg", "train/cat/1.jpg"], NAMES, classes=["cat", "dog"], where="list")
    assert found.tolist() == [0, 3]


def test_missing_images_are_counted_and_the_first_five_named():
    listed = [f"cat/{i}.jpg" for i in range(9)]
    with pytest.raises(UserError) as error:
        positions_of(listed, NAMES, classes=["cat", "dog"], where="list.txt")
    assert str(error.value) == (
        "list.txt: 9 of 9 listed images are not in the data: "
        "cat/0.jpg, cat/1.jpg, cat/2.jpg, cat/3.jpg, cat/4.jpg, ..."
    )


@pytest.mark.parametrize("listed", ["n01440764_1.JPEG", "n01440764/n01440764_1.JPEG"])
def test_missing_classes_are_named(listed):
    with pytest.raises(UserError, match="1 listed classes are not in the data: n01440764"):
        positions_of([listed], NAMES, classes=["n02", "n03"], where="list.txt")


def test_a_bare_name_of_several_images_is_refused():
    with pytest.raises(UserError, match=r"several images have a listed name: 1\.jpg"):
        positions_of(["1.jpg"], NAMES, classes=["cat", "dog"], where="list.txt")


def test_one_image_by_two_names_is_refused():
    with pytest.raises(UserError, match="by different names"):
        positions_of(["d.jpg", NAMES[3]], NAMES, classes=["cat", "dog"], where="list.txt")
