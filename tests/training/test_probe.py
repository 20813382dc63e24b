"""The probe: kNN where labels are, measures without labels where they are not."""

import numpy as np
import pytest
import torch
from PIL import Image

from msn.commands.entry import build, compose
from msn.errors import UserError
from msn.evaluation.neighbours import knn_predictions, rankme
from msn.files import read_rows
from msn.training.judge import Judge
from msn.training.loggers import MetricsCSV
from msn.training.monitors import Monitors
from msn.training.probe import Probe
from msn.weights.backbone import image_transform
from tests.commands.conftest import TINY


def train(directory, *overrides, epochs=2, **probe):
    """A short run with a probe: data module, module and rows of metrics.csv."""
    tiny = [argument for argument in TINY if not argument.startswith("trainer.max_epochs")]
    config = compose("train", [*tiny, f"trainer.max_epochs={epochs}", *overrides])
    data, module = build(config, "data"), build(config, "module")
    callbacks = [Monitors(), Probe(**probe), Judge(directory=directory, on_collapse="warn")]
    log = MetricsCSV(path=directory / "metrics.csv")
    trainer = build(config, "trainer", callbacks=callbacks, loggers=[log], run_dir=directory)
    module.plan_schedule(epochs=epochs, steps_per_epoch=2)
    trainer.fit(module, datamodule=data)
    return data, module, read_rows(directory / "metrics.csv")


def test_knn_is_that_of_the_target_on_held_out_images(tmp_path):
    data, module, rows = train(tmp_path, epochs=3, every_n_epochs=2, references=300, held_out=70)
    assert [bool(row["probe/knn_top1"]) for row in rows] == [False, True, True]  # and the last
    labelled, held_out = data.labelled_sets()
    transform = image_transform(32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    trunk = module.network.target.trunk.eval()

    def features(images, count):
        chosen = torch.linspace(0, len(images) - 1, count, dtype=torch.float64).round().long()
        pixels = torch.stack([transform(images[i]) for i in chosen.tolist()])
        with torch.no_grad():
            return trunk.forward_intermediates(pixels, 1)[0][:, 0], images.labels[chosen]

    references, labels = features(labelled, 300)
    queries, truth = features(held_out, 70)
    votes = knn_predictions(
        references, labels, queries, neighbours=[10], temperature=None, num_classes=10
    )
    top1 = (votes[0] == truth).double().mean()
    assert float(rows[-1]["probe/knn_top1"]) == pytest.approx(float(top1))
    assert float(rows[-1]["probe/rankme"]) == pytest.approx(rankme(queries), rel=1e-4)


def test_without_labels_views_of_an_image_are_compared(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (36, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    folder = ["data=folder", f"data.root={images}", "data.global_batch_size=8"]
    _, _, rows = train(tmp_path, *folder, epochs=1, every_n_epochs=1, references=9, held_out=9)
    assert "probe/knn_top1" not in rows[-1]
    assert 0 < float(rows[-1]["probe/alignment"]) < 4
    assert -8 < float(rows[-1]["probe/uniformity"]) < 0
    assert 1 <= float(rows[-1]["probe/rankme"]) <= 24
    assert 0 < float(rows[-1]["speed/mfu"]) < 1
    assert (tmp_path / "verdicts.csv").read_text().count("\n") == 2


@pytest.mark.parametrize("name", ["every_n_epochs", "references", "held_out"])
def test_numbers_below_one_are_refused(name):
    settings = {"every_n_epochs": 1, "references": 1, "held_out": 1, name: 0}
    with pytest.raises(UserError, match=f"callbacks.probe.{name}=0: must be >= 1"):
        Probe(**settings)
