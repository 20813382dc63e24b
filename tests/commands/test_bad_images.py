"""A folder with damaged images is trained through where that is allowed, and refused where not."""

import pytest

from tests.commands.conftest import TINY
from tests.data.photos import make_folder
from tests.data.test_bad_images import DAMAGE, read_rows

KINDS = ["empty", "truncated", "no image", "bomb"]  # those that are there before a run begins
RUN = [*TINY[:5], "trainer.max_epochs=1", "trainer.accelerator=cpu", "data=folder"]
RUN += ["data.global_batch_size=50", "data.num_workers=2", "data.use_labels=false"]


def test_an_image_is_named_once_in_training_and_evaluation(command, tmp_path, caplog):
    root = make_folder(tmp_path / "in", classes=2, images=12)
    for name in ("class_0/3.jpg", "class_1/8.jpg"):
        DAMAGE["truncated"](root / name)
    run = [*RUN[:-1], "data.global_batch_size=8", "data.hold_out=0.2", "protocol.shots=[1]"]
    run += ["protocol.knn_neighbours=3", "protocol.splits=1", "baselines=[]", "report=false"]
    code, out, err = command("train", *run, f"data.root={root}", f"run.dir={tmp_path / 'run'}")
    assert code == 0, err
    for name in ("class_0/3.jpg", "class_1/8.jpg"):
        assert caplog.text.count(name) == 1
    assert "others of the class replace them" in " ".join(out.split())


# Who may not open a file is shown in tests/data/test_bad_images.py: root may open everything.
@pytest.mark.slow
def test_one_percent_of_every_kind(command, tmp_path):
    root = make_folder(tmp_path / "in", classes=8, images=50)  # 400 images, 5 damaged
    for number, kind in enumerate(KINDS):
        DAMAGE[kind](root / f"class_{number}" / "7.jpg")
    gone = root / f"class_{len(KINDS)}" / "7.jpg"
    gone.unlink()
    gone.symlink_to(tmp_path / "nowhere")
    where = [f"data.root={root}", f"run.dir={tmp_path / 'run'}"]
    code, _, err = command("train", *RUN, *where, "data.max_bad_fraction=0.001")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "data.max_bad_fraction=0.001: " in line

    code, out, _ = command("train", *RUN, *where[:1], f"run.dir={tmp_path / 'two'}")
    assert code == 0
    assert out.splitlines()[-1] == f"run directory: {tmp_path / 'two'}"
    rows = read_rows(tmp_path / "two" / "bad_images.csv")
    assert sorted(row["path"] for row in rows) == [
        f"class_{i}/7.jpg" for i in range(len(KINDS) + 1)
    ]
