"""Hugging Face data sets give the images and labels of their rows, whatever wrote them."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msn.commands import make_shards
from msn.commands.suggest_labels import images_of
from msn.data.pools import PoolSettings, build_pools, whole_source
from msn.errors import UserError
from msn.images.kinds import BadImageError
from tests.data.photos import photo
from tests.data.test_pools import SETTINGS

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()
CLASSES = ["cat", "dog", "owl"]


def encoded(number):
    data = io.BytesIO()
    photo(number).save(data, "PNG")
    return data.getvalue()


def rows(count, **columns):
    """Images, their classes and further columns."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    found = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": encoded(i), "path": None} for i in range(count)],
            "label": [i % 3 for i in range(count)],
        },
        features=datasets.Features(features),
    )
    for name, values in columns.items():
        found = found.add_column(name, values)
    return found


def pools(root, **settings):
    return build_pools(PoolSettings(**{**SETTINGS, "source": "hf", "root": str(root), **settings}))


def save(data, kind, folder):
    if kind == "parquet":
        folder.mkdir()
        data.to_parquet(folder / "train.parquet")
        return folder / "train.parquet"
    if kind == "folder of parquet":
        folder.mkdir()
        data.to_parquet(folder / "train-00000.parquet")
    elif kind == "images":
        for i, row in enumerate(data):
            path = folder / "train" / CLASSES[row["label"]] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": data}).save_to_disk(folder)
    else:
        data.save_to_disk(folder)
        if kind == "arrow":
            return next(folder.glob("*.arrow"))
    return folder


@pytest.mark.parametrize(
    "kind", ["saved", "saved splits", "parquet", "folder of parquet", "arrow", "images"]
)
def test_every_layout_gives_the_same_images_and_classes(tmp_path, kind):
    found = pools(save(rows(12), kind, tmp_path / "data"), use_labels=True)
    source = found.train.source
    assert source.classes == CLASSES
    assert np.bincount(source.labels).tolist() == [4, 4, 4]
    pixels = {source.rgb(i).tobytes(): CLASSES[source.labels[i]] for i in range(12)}
    assert pixels == {photo(i).convert("RGB").tobytes(): CLASSES[i % 3] for i in range(12)}
    assert found.held_out is not None
    assert not set(found.train.positions) & set(found.held_out.positions)


def test_a_split_with_labels_is_held_out_and_one_without_is_not(tmp_path):
    unlabelled = rows(6).map(lambda row: {"label": -1})
    splits = {"train": rows(9), "validation": unlabelled, "test": rows(6)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    found = pools(tmp_path / "d", use_labels=True)
    assert found.held_out.source.splits == {"test": 6}
    assert len(found.train) == 9
    named = pools(tmp_path / "d", use_labels=True, val_root="validation")
    assert named.held_out is None
    assert "no row has a value" in named.why
    rows(6).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="must not be trained on"):
        pools(tmp_path / "one", use_labels=True, val_root=str(tmp_path / "one"))


def test_columns_are_found_or_named(tmp_path):
    data = rows(6, fine=["x", "y"] * 3, weight=[0.5 * i for i in range(6)]).rename_column(
        "label", "coarse"
    )
    data = data.map(lambda row: {"second": row["image"]}).rename_column("image", "scan")
    data.save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match="several columns of images .*; data.image_column"):
        pools(tmp_path / "d", use_labels=True)
    found = pools(tmp_path / "d", image_column="scan", use_labels=True)
    assert found.train.source.classes == CLASSES  # the only ClassLabel
    found = pools(tmp_path / "d", image_column="scan", label_column="fine", use_labels=True)
    assert found.train.source.classes == ["x", "y"]
    for column, reason in {"weight": "holds no classes", "nope": "no such column"}.items():
        with pytest.raises(UserError, match=rf"{column}.*{reason}.*columns seen: .*scan"):
            pools(tmp_path / "d", image_column="scan", label_column=column, use_labels=True)


def test_rows_without_a_label_train_and_are_not_evaluated(tmp_path):
    data = rows(12)
    data.map(
        lambda row, i: {"label": row["label"] if i < 9 else None}, with_indices=True
    ).save_to_disk(tmp_path / "d")
    found = pools(tmp_path / "d", use_labels=True)
    known = {*found.labelled.positions, *found.held_out.positions}
    assert known == set(range(9))
    assert set(found.train.positions) == set(range(12)) - set(found.held_out.positions)


def test_a_row_without_an_image_is_a_bad_image(tmp_path):
    data = rows(4)
    data.map(lambda row, i: {"image": row["image"] if i else None}, with_indices=True).save_to_disk(
        tmp_path / "d"
    )
    source = pools(tmp_path / "d", use_labels=False).train.source
    with pytest.raises(BadImageError, match="no image"):
        source.read(0)
    assert source.rgb(1).size == photo(1).size


@pytest.mark.slow
def test_identities_are_the_same_in_another_process(tmp_path):
    rows(4).to_parquet(tmp_path / "d.parquet")
    here = pools(tmp_path / "d.parquet", use_labels=False).train
    code = (
        "import sys; from msn.data.hf import hf_sources; from msn.data.lists import BY_NAME\n"
        "train, _ = hf_sources(sys.argv[1], None, columns=BY_NAME, use_labels=False)\n"
        "print(train.identity(2))"
    )
    there = subprocess.check_output([sys.executable, "-c", code, tmp_path / "d.parquet"], text=True)
    assert there.strip() == here.source.identity(2)
    rows(5).to_parquet(tmp_path / "e.parquet")
    other = pools(tmp_path / "e.parquet", use_labels=False).train
    assert other.source.identity(2) != here.source.identity(2)


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("nothing-here", "no such file or folder, and no name on the Hub"),
        ("x.csv", "a file must be .parquet or .arrow"),
        ("broken.parquet", "datasets cannot open it"),
        ("tabular.parquet", "no column of images.*columns seen: a .int64."),
    ],
)
def test_what_is_no_data_set_of_images_is_one_line(tmp_path, root, reason):
    (tmp_path / "x.csv").write_text("path\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(50))
    datasets.Dataset.from_dict({"a": [1, 2]}).to_parquet(tmp_path / "tabular.parquet")
    with pytest.raises(UserError, match=reason) as caught:
        pools(tmp_path / root, use_labels=True)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    import huggingface_hub

    def unreachable(self, name, **options):
        raise ConnectionError("cannot connect\nwith details")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(UserError, match=r"data.root=a/b: .*\(cannot connect\); HF_HUB_OFFLINE"):
        pools("a/b", use_labels=True)


def test_all_splits_are_read_one_behind_the_other(tmp_path):
    train = rows(9, kind=["x", "y", "y"] * 3).remove_columns("label")
    test = rows(6, kind=["z", "y", None] * 2).remove_columns("label")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "d")
    (tmp_path / "e").mkdir()
    assert images_of({**SETTINGS, "root": str(tmp_path / "e")})["source"] == "folder"
    data = images_of({**SETTINGS, "root": str(tmp_path / "d"), "label_column": "kind"})
    whole = whole_source(PoolSettings(**data))
    assert [whole.name(i) for i in (0, 8, 9, 14)] == ["train/0", "train/8", "test/0", "test/5"]
    assert [whole.read(i) for i in range(15)] == [encoded(i % 9) for i in range(15)]
    known = [None if label < 0 else whole.classes[label] for label in whole.labels]
    assert known == ["x", "y", "y"] * 3 + ["z", "y", None] * 2
    assert len({whole.identity(i) for i in range(15)}) == 15
    assert whole_source(PoolSettings(**{**data, "use_labels": False})).labels is None


def test_a_data_set_becomes_shards_with_the_same_images(tmp_path):
    datasets.DatasetDict({"train": rows(9), "test": rows(6)}).save_to_disk(tmp_path / "d")
    from omegaconf import OmegaConf

    settings = {"root": str(tmp_path / "d"), "out": str(tmp_path / "s"), "source": "hf"}
    make_shards.run(OmegaConf.create({**settings, "images_per_shard": 4, "use_labels": True}))
    ours, packed = (
        pools(tmp_path / "d", use_labels=True),
        pools(tmp_path / "s", source="shards", use_labels=True),
    )
    for one, other in ((ours.train, packed.train), (ours.held_out, packed.held_out)):
        assert one.source.classes == other.source.classes
        assert one.labels.tolist() == other.labels.tolist()
        assert [one.source.read(i) for i in range(len(one))] == [
            other.source.read(i) for i in range(len(other))
        ]


def test_a_column_of_groups_keeps_its_images_on_one_side(tmp_path):
    patients = [f"p{i // 6}" for i in range(30)]
    data = rows(30, patient=patients, missing=[None, *patients[1:]])
    data.save_to_disk(str(tmp_path / "rows"))
    found = pools(tmp_path / "rows", group="patient")

    def seen(part):
        return {patients[i] for i in part.positions}

    assert seen(found.held_out)
    assert not seen(found.held_out) & seen(found.train)
    for group, reason in (("pat", "no such column"), ("missing", "a row .* has no group")):
        with pytest.raises(UserError, match=f"data.group={group}: .*{reason}|{group}: {reason}"):
            pools(tmp_path / "rows", group=group)
    both = datasets.DatasetDict(train=data, test=data.select(range(3)))
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match="the group p0 is in"):
        pools(tmp_path / "both", group="patient")
    settings = {**SETTINGS, "source": "hf", "root": str(tmp_path / "both"), "group": "patient"}
    whole = whole_source(PoolSettings(**settings))
    assert [whole.group_names[i] for i in whole.groups] == [*patients, "p0", "p0", "p0"]


MILLION = """
import sys, time
start = time.process_time()
from pathlib import Path
from msn.data.pools import PoolSettings, build_pools
settings = dict(source="hf", root=sys.argv[1], val_root=None, hold_out=0.2, split_seed=0,
                use_labels=True, download=False, image_size=None)
pools = build_pools(PoolSettings(**settings))
imports = time.process_time() - start
start, began = time.process_time(), time.perf_counter()
pools = build_pools(PoolSettings(**settings))
opened, wall = time.process_time() - start, time.perf_counter() - began
from torch.utils.data import DataLoader, Dataset
from msn.images.decode import full_size
class Images(Dataset):
    def __len__(self):
        return len(pools.train.source)
    def __getitem__(self, i):
        return int(pools.train.source.decode(i * 7919 % len(self), full_size).pixels.sum())
batches = iter(DataLoader(Images(), batch_size=1000, num_workers=2))
for _ in range(40):
    next(batches)
own = []
for worker in batches._workers:
    lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
    own.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")))
print(len(pools.train.source), imports, opened, wall, max(own) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.slow
def test_a_million_rows_open_quickly_and_workers_share_them(tmp_path):
    images = []
    for i in range(1000):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(data, "PNG")
        images.append({"bytes": data.getvalue(), "path": None})
    part = datasets.Dataset.from_dict(
        {"image": images, "label": [i % 3 for i in range(1000)]}, features=rows(1).features
    )
    datasets.concatenate_datasets([part] * 1000).save_to_disk(tmp_path / "million")
    code = [sys.executable, "-c", MILLION, str(tmp_path / "million")]
    out = subprocess.check_output(code, text=True, cwd=Path(__file__).parents[2])
    count, imports, opened, wall, megabytes = map(float, out.split())
    print(
        f"opened in {opened:.1f} s of processor time ({wall:.1f} s), {imports:.1f} s with imports; "
        f"{megabytes:.0f} MB per worker"
    )
    assert count == 1_000_000
    assert opened < 5
    assert megabytes < 200
