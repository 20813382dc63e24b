"""Unreadable images are replaced, said once, counted over all processes, and end a run in time."""

import csv
import logging
import multiprocessing
import os

import numpy as np
import pytest
from torch.utils.data import DataLoader

from msn.commands.entry import one_line
from msn.data import dataset
from msn.data.bad_images import BadImage, BadImageLedger
from msn.data.dataset import REPLACED, REPLACEMENT_TRIES
from msn.errors import UserError
from tests.data.datamodules import make_datamodule
from tests.data.photos import make_folder, photo
from tests.images.test_decode import encode, png_bomb

WHOLE = encode(photo(0), "JPEG")
DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(WHOLE[:-200]),
    "no image": lambda path: path.write_bytes(b"words, not pixels"),
    "bomb": lambda path: path.write_bytes(png_bomb()),
    "vanished": lambda path: path.unlink(),
    "permission denied": lambda path: path.chmod(0),
}
REASONS = {
    "empty": "empty file",
    "truncated": "runcated",
    "no image": "not an image",
    "bomb": "DecompressionBombError",
    "vanished": "No such file",
    "permission denied": "Permission denied",
}


def read_rows(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def train_epoch(module):
    """What Lightning does with one epoch of batches, without a network."""
    batches = []
    for batch in module.loader(module.sampler(rank=0, world_size=1)):
        module._record(batch)
        batches.append(batch)
    return batches


@pytest.fixture
def damaged(tmp_path):
    """An indexed folder of 14 images, of which one of every kind is then damaged."""

    def make(*kinds, **settings):
        root = make_folder(tmp_path / "in", classes=2, images=7)
        module = make_datamodule(root, **settings)
        module.run_dir = tmp_path
        for number, kind in enumerate(kinds):
            DAMAGE[kind](root / "class_0" / f"{number}.jpg")
        return module

    return make


def kinds_here():
    return [kind for kind in DAMAGE if kind != "permission denied" or os.geteuid() != 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_is_replaced_said_once_and_written_down(damaged, tmp_path, caplog, workers):
    kinds = kinds_here()
    module = damaged(*kinds, max_bad_fraction=0.5, num_workers=workers, global_batch_size=7)
    with caplog.at_level(logging.WARNING):
        first = train_epoch(module)
        second = train_epoch(module)
    for ours, again in zip(first, second, strict=True):
        assert np.array_equal(ours.pixels, again.pixels)  # the same replacement every time
        assert (ours.sizes > 1).all()
    rows = read_rows(tmp_path / "bad_images.csv")
    found = {row["path"]: row["reason"] for row in rows}
    assert len(rows) == len(found) == len(kinds)
    for number, kind in enumerate(kinds):
        assert REASONS[kind] in found[f"class_0/{number}.jpg"]
        said = [r for r in caplog.records if f"class_0/{number}.jpg" in r.getMessage()]
        assert len(said) == 1


def test_a_file_that_may_not_be_opened_is_a_bad_image(damaged, monkeypatch):
    import builtins

    module = damaged(max_bad_fraction=0.5)
    whole = builtins.open

    def refuse(path, *arguments, **options):
        if str(path).endswith("class_0/3.jpg"):
            raise PermissionError(13, "Permission denied")
        return whole(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refuse)  # root may open everything
    train_epoch(module)
    (bad,) = module.ledger.known.values()
    assert bad[1:] == ("class_0/3.jpg", "Permission denied")


def test_more_than_the_allowed_share_of_the_indexed_files_ends_the_run(damaged):
    with pytest.raises(UserError, match=r"max_bad_fraction=0.1: 2 of 14 images cannot be read"):
        train_epoch(damaged("empty", "no image", max_bad_fraction=0.1, global_batch_size=2))


def test_the_allowed_share_itself_does_not(damaged):
    module = damaged("empty", "no image", max_bad_fraction=2 / 14, global_batch_size=2)
    train_epoch(module)
    assert len(module.ledger.known) == 2


@pytest.mark.parametrize(
    ("images", "allowed"), [(301, 10), (10_000, 10), (50_000, 50), (14, 7), (1, 0)]
)
def test_ten_images_or_a_thousandth_may_be_bad_unless_a_share_is_set(images, allowed):
    book = BadImageLedger(num_images=images, max_fraction=None, strict=False)
    book.add(BadImage(i, f"{i}.jpg", "x") for i in range(allowed))
    book.check()
    book.add([BadImage(images, "last.jpg", "x")])
    message = (
        f"max_bad_fraction=null: {allowed + 1} of {images} images cannot be read, {allowed} may"
    )
    with pytest.raises(UserError, match=message):
        book.check()
    book = BadImageLedger(num_images=images, max_fraction=0.0, strict=False)
    book.add([BadImage(0, "0.jpg", "x")])
    with pytest.raises(UserError, match="max_bad_fraction=0: 1 of"):
        book.check()


def test_the_shipped_default_lets_ten_of_many_be_bad(tmp_path):
    root = make_folder(tmp_path / "in", classes=2, images=12)
    for number in range(10):
        DAMAGE["empty"](root / "class_0" / f"{number}.jpg")
    module = make_datamodule(root, global_batch_size=4)
    train_epoch(module)
    assert len(module.ledger.known) == 10
    DAMAGE["empty"](root / "class_0" / "11.jpg")
    with pytest.raises(UserError, match="max_bad_fraction=null: 11 of 24 images"):
        train_epoch(module)


def test_strict_ends_at_the_first(damaged):
    with pytest.raises(UserError, match=r"data.strict=true: class_0/0.jpg cannot be read \(empty"):
        train_epoch(damaged("empty", max_bad_fraction=1.0, strict=True))


def test_nothing_readable_ends_the_run(damaged, tmp_path):
    module = damaged(max_bad_fraction=0.9)
    for path in (tmp_path / "in").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="max_bad_fraction"):
        train_epoch(module)


def ledger(path, max_fraction=1.0):
    book = BadImageLedger(num_images=1000, max_fraction=max_fraction, strict=False)
    book.file = path
    return book


def test_processes_count_together_and_an_image_once(tmp_path):
    path = tmp_path / "bad_images.csv"
    one, other = ledger(path, 0.003), ledger(path, 0.003)
    assert [b.number for b in one.add([BadImage(1, "a", "x"), BadImage(2, "b", "x")])] == [1, 2]
    assert [b.number for b in other.add([BadImage(2, "b", "x"), BadImage(3, "c", "x")])] == [3]
    other.check()  # three of a thousand
    one.add([BadImage(4, 'd,\n"quoted"', "two\nlines")])
    with pytest.raises(UserError, match="4 of 1000"):
        one.check()
    rows = read_rows(path)
    assert [row["path"] for row in rows] == ["a", "b", "c", 'd,\n"quoted"']
    assert rows[-1]["reason"] == "two lines"


def test_a_resumed_run_goes_on_with_the_file_even_if_its_last_row_was_cut_off(tmp_path):
    path = tmp_path / "bad_images.csv"
    ledger(path).add([BadImage(1, "a", "x"), BadImage(2, "b", "x")])
    path.write_bytes(path.read_bytes()[:-2])  # killed while writing the second
    assert [b.number for b in ledger(path).add([BadImage(1, "a", "x"), BadImage(2, "b", "x")])] == [
        2
    ]
    assert [row["image"] for row in read_rows(path)][-1] == "2"


def _write_many(path, rank):
    book = ledger(path)
    for i in range(60):
        book.add([BadImage(i if i % 2 else 1000 * rank + i, f"p{i}", "r" * 50)])


def test_processes_that_write_at_once_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "bad_images.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, rank)) for rank in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    numbers = [int(row["image"]) for row in read_rows(path)]
    expected = set(range(1, 60, 2)) | {1000 * r + i for r in (1, 2, 3) for i in range(0, 60, 2)}
    assert sorted(numbers) == sorted(expected)


def test_a_file_that_cannot_be_written_does_not_hide_the_count(tmp_path, caplog):
    book = ledger(tmp_path / "no" / "bad_images.csv", 0.0)
    with caplog.at_level(logging.WARNING):
        book.add([BadImage(1, "a", "x")])
    assert "cannot write" in caplog.text
    with pytest.raises(UserError, match="1 of 1000"):
        book.check()
    (tmp_path / "no").mkdir()
    book.add([BadImage(2, "b", "x")])
    assert [row["path"] for row in read_rows(book.file)] == ["a", "b"]


def test_what_a_later_start_can_read_again_does_not_count(damaged, tmp_path):
    settings = {"max_bad_fraction": 0.5, "global_batch_size": 7}
    module = damaged("empty", "no image", "truncated", **settings)
    train_epoch(module)
    (tmp_path / "in" / "class_0" / "1.jpg").write_bytes(WHOLE)
    with (tmp_path / "bad_images.csv").open("a") as file:
        file.write("other/data.jpg,gone,3\nclass_0/6.jpg,cut o")  # and a row that was never ended
    again = make_datamodule(tmp_path / "in", **settings)
    again.run_dir = tmp_path
    again.prepare_data()
    kept = [row["path"] for row in read_rows(tmp_path / "bad_images.csv")]
    assert kept == ["class_0/0.jpg", "class_0/2.jpg"]
    train_epoch(again)
    assert [bad.path for bad in again.ledger.known.values()] == kept


def test_one_damaged_image_of_a_small_class_does_not_end_an_evaluation(tmp_path, caplog):
    module = make_datamodule(
        make_folder(tmp_path / "in", classes=2, images=2), use_labels=True, global_batch_size=2
    )
    _, held_out = module.labelled_sets()
    assert len(held_out) == 2
    (tmp_path / "in" / held_out.name(0)).write_bytes(b"")
    assert held_out[0].info[REPLACED]
    assert REPLACED not in held_out[1].info
    assert held_out.name(0) in caplog.text


@pytest.mark.parametrize("number", [0, 1])
def test_strict_ends_an_evaluation_too(tmp_path, number):
    root = make_folder(tmp_path / "in", classes=2, images=4)
    images = make_datamodule(root, use_labels=True, strict=True).labelled_sets()[number]
    images[0]
    (root / images.name(0)).write_bytes(b"")
    with pytest.raises(
        UserError, match=rf"data.strict=true: {images.name(0)} cannot be read \(emp"
    ):
        images[0]
    # From a worker the line comes with its traceback around it.
    loader = DataLoader(images, batch_size=None, num_workers=1, collate_fn=size_of)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert one_line(caught.value).startswith(f"data.strict=true: {images.name(0)} cannot be read")


def test_names_of_any_bytes_pass_through_the_file_of_bad_images(tmp_path):
    root = make_folder(tmp_path / "in", classes=2, images=12)
    odd = os.fsdecode(os.path.join(os.fsencode(root), b"class_0/caf\xe9,\n.jpg"))
    os.rename(root / "class_0" / "3.jpg", odd)
    module = make_datamodule(root)
    module.run_dir = tmp_path
    os.truncate(odd, 0)
    train_epoch(module)
    (row,) = read_rows(tmp_path / "bad_images.csv")
    assert os.path.join(root, row["path"]) == odd
    again = make_datamodule(root)
    again.run_dir = tmp_path
    again.prepare_data()
    assert len(read_rows(tmp_path / "bad_images.csv")) == 1
    photo(0).save(odd, "JPEG")
    again.prepare_data()
    assert read_rows(tmp_path / "bad_images.csv") == []


def test_a_labelled_image_is_logged_once_however_often_workers_read_it(tmp_path, monkeypatch):
    module = make_datamodule(make_folder(tmp_path / "in", classes=2, images=4), use_labels=True)
    training, held_out = module.labelled_sets()
    for images in (training, held_out):
        (tmp_path / "in" / images.name(0)).write_bytes(b"")
    said = tmp_path / "said"

    def warning(text, *parts):  # caplog does not see workers
        with said.open("a") as file:
            file.write(text % parts + "\n")

    monkeypatch.setattr(dataset.log, "warning", warning)
    for _ in range(2):
        for images in module.labelled_sets():
            list(DataLoader(images, batch_size=None, num_workers=1, collate_fn=size_of))
    assert sorted(said.read_text().splitlines()) == [
        f"replaced an unreadable {what} image: {images.name(0)} (empty file)"
        for what, images in (("held-out", held_out), ("training", training))
    ]


def size_of(image):
    return image.size


def test_a_whole_class_that_is_gone_ends_an_evaluation(tmp_path):
    root = make_folder(tmp_path / "in", classes=2, images=2 * (REPLACEMENT_TRIES + 2))
    _, held_out = make_datamodule(root, hold_out=0.5, use_labels=True).labelled_sets()
    for file in (root / "class_0").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no image of class class_0 can be read"):
        held_out[0]
