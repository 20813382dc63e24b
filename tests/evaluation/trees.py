"""A made-up ImageNet: the names, folders and lists of the real one, few classes, tiny images."""

from pathlib import Path

import torch
from PIL import Image

CLASSES = ["n01440764", "n01443537", "n02119022", "n03000684"]
PER_CLASS = 14


class ListedImages:
    """Names and labels of the training images; these are 20 px with their class's hue."""

    groups = None

    def __init__(self, per_class: int = PER_CLASS, *, seed: int = 0, part: str = "") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.classes = list(CLASSES)
        self.labels = torch.arange(len(CLASSES)).repeat_interleave(per_class)
        numbers = torch.randperm(50_000, generator=generator)[: len(self.labels)].tolist()
        self.names = [
            f"{part}{CLASSES[label]}/{CLASSES[label]}_{number}.JPEG"
            for label, number in zip(self.labels.tolist(), numbers, strict=True)
        ]
        palette = torch.rand(len(CLASSES), 3, generator=torch.Generator().manual_seed(99))
        noise = torch.rand(len(self.labels), 20, 20, 3, generator=generator)
        self.pixels = (255 * (0.6 * palette[self.labels][:, None, None] + 0.4 * noise)).byte()
        self.opened: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Image.Image:
        self.opened.add(i)
        return Image.fromarray(self.pixels[i].numpy())


def write_lists(
    directory: Path, images: ListedImages, *, folder: str = "split{}", misnamed: bool = True
) -> None:
    """The ten official lists, nested as the real ones: 1, 2, 5 in three splits, and 1 %."""
    for split in (1, 2, 3):
        below = directory / folder.format(split)
        below.mkdir(parents=True)
        order = [
            [i for i, label in enumerate(images.labels.tolist()) if label == c][split - 1 :]
            for c in range(len(CLASSES))
        ]
        sizes = {1: "1imgs_class", 2: "2imgs_class", 5: "5imgs_class"}
        if split == 3 and misnamed:
            sizes[5] = "3imgs_class"
        if split == 1:
            sizes[7] = "1percent"
        for size, name in sizes.items():
            listed = [images.names[i].rpartition("/")[2] for own in order for i in own[:size]]
            (below / f"{name}.txt").write_text("\n".join(listed) + "\n")


def write_tree(root: Path, images: ListedImages, part: str) -> None:
    """The images as JPEG files at root/part/class/name."""
    for i, name in enumerate(images.names):
        path = root / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        images[i].save(path, format="jpeg", quality=95)
