"""Tiny made-up copies of data sets in the folders where torchvision looks for them."""

import json
import pickle

import numpy as np
import scipy.io
from PIL import Image

CLASSES = ["Aye Bee", "Cee Dee", "Eff"]
FLOWERS = 102  # torchvision's list of names is fixed


def make_copies(root, monkeypatch, *, count=4, side=16, classes=CLASSES):
    """`count` images per class to learn from (two parts of half of them where there are two), and
    `count` to test; their colour tells the class. Checksums of the real files are not asked for."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    draw = _Draw(side, len(classes))
    slugs = [name.replace(" ", "_").lower() for name in classes]
    every = [(c, i) for c in range(len(classes)) for i in range(count)]
    half = count // 2
    _dtd(root / "dtd/dtd", draw, slugs, every, half)
    _aircraft(root / "fgvc-aircraft-2013b/data", draw, classes, every)
    _cars(root / "stanford_cars", draw, classes, every)
    for name, key in (("cifar-10-batches-py", "label"), ("cifar-100-python", "fine_label")):
        _cifar(root / name, key, draw, classes, every)
    _flowers(root / "flowers-102", draw)
    _food(root / "food-101", draw, slugs, every)
    _pets(root / "oxford-iiit-pet", draw, slugs, every)


class _Draw:
    def __init__(self, side, classes):
        self.side, self.classes, self.random = side, classes, np.random.default_rng(0)

    def pixels(self, c, side=None):
        side = side or self.side
        base = np.array([200 * c / self.classes, 100, 255 - 200 * c / self.classes])
        noise = self.random.normal(0, 5, (side, side, 3))
        return np.clip(base + noise, 0, 255).astype(np.uint8)

    def save(self, path, c):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.pixels(c)).save(path)


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _dtd(place, draw, slugs, every, half):
    parts = {"train": [], "val": [], "test": []}
    for c, i in every:
        for part in ("val" if i < half else "train", "test"):
            name = f"{slugs[c]}/{slugs[c]}_{part}_{i}.jpg"
            draw.save(place / "images" / name, c)
            parts[part].append(name)
    for part, names in parts.items():
        _write(place / "labels" / f"{part}1.txt", names)


def _aircraft(place, draw, classes, every):
    _write(place / "variants.txt", classes)
    for part in ("trainval", "test"):
        lines = [f"{part}{c}{i:03d} {classes[c]}" for c, i in every]
        _write(place / f"images_variant_{part}.txt", lines)
        for c, i in every:
            draw.save(place / "images" / f"{part}{c}{i:03d}.jpg", c)


def _cars(place, draw, classes, every):
    (place / "devkit").mkdir(parents=True)
    names = np.array(classes, dtype=object)
    scipy.io.savemat(place / "devkit/cars_meta.mat", {"class_names": names})
    files = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for part, file in files.items():
        kind = [("fname", object), ("class", "u2")]
        rows = np.array([(f"{c}{i:03d}.jpg", c + 1) for c, i in every], dtype=kind)
        scipy.io.savemat(place / file, {"annotations": rows})
        for c, i in every:
            draw.save(place / f"cars_{part}" / f"{c}{i:03d}.jpg", c)


def _cifar(place, key, draw, classes, every):
    place.mkdir(parents=True)
    ten = key == "label"
    batches = (
        [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    )
    for name in batches:
        pixels = np.stack([draw.pixels(c, 32).transpose(2, 0, 1).reshape(-1) for c, _ in every])
        batch = {"data": pixels, f"{key}s": [c for c, _ in every]}
        (place / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": classes} if ten else {"fine_label_names": classes}
    (place / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta))


def _flowers(place, draw):
    parts = {
        part: np.arange(1, FLOWERS + 1) + k * FLOWERS
        for k, part in enumerate(("trnid", "valid", "tstid"))
    }
    labels = np.tile(np.arange(1, FLOWERS + 1), 3)
    for number, label in enumerate(labels, start=1):
        draw.save(place / "jpg" / f"image_{number:05d}.jpg", label % draw.classes)
    scipy.io.savemat(place / "setid.mat", parts)
    scipy.io.savemat(place / "imagelabels.mat", {"labels": labels})


def _food(place, draw, slugs, every):
    for part in ("train", "test"):
        meta = {slug: [] for slug in slugs}
        for c, i in every:
            meta[slugs[c]].append(f"{slugs[c]}/{part}{i}")
            draw.save(place / "images" / slugs[c] / f"{part}{i}.jpg", c)
        _write(place / "meta" / f"{part}.json", [json.dumps(meta)])


def _pets(place, draw, slugs, every):
    for part in ("trainval", "test"):
        _write(
            place / "annotations" / f"{part}.txt",
            [f"{slugs[c]}_{part}{i} {c + 1} 1 1" for c, i in every],
        )
        for c, i in every:
            draw.save(place / "images" / f"{slugs[c]}_{part}{i}.jpg", c)
