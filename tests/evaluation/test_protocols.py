import hashlib

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from msn.commands.entry import config_directory
from msn.data.dataset import LabelledImages
from msn.data.pools import PoolSettings, build_pools
from msn.errors import UserError
from msn.evaluation import imagenet as imagenet_module
from msn.evaluation import lowshot, protocols
from msn.evaluation.backbones import random_backbone
from msn.evaluation.finetune import FineTune
from msn.evaluation.heads import Attentive, Sweep
from msn.evaluation.imagenet import OfficialList, is_imagenet, paper_figure
from msn.evaluation.linear import Linear
from msn.evaluation.lowshot import evaluate
from msn.evaluation.protocols import KNN, Fraction, ImageNetLowShot, KShot
from msn.evaluation.table import markdown_table
from tests.evaluation.toys import FEATURES, LOGISTIC, ToyImages, toy_backbone
from tests.evaluation.trees import CLASSES, ListedImages, write_lists, write_tree

CPU = torch.device("cpu")
KINDS = {
    "sweep": Sweep,
    "attentive": Attentive,
    "kshot": KShot,
    "fraction": Fraction,
    "imagenet_lowshot": ImageNetLowShot,
    "knn": KNN,
    "linear": Linear,
    "linear_mae": Linear,
    "finetune": FineTune,
    "finetune_few": FineTune,
    "finetune_mae": FineTune,
}


def run(protocol, train, test, backbones=None):
    return evaluate(
        protocol,
        backbones or [toy_backbone()],
        train,
        test,
        num_workers=0,
        device=CPU,
    )


@pytest.mark.parametrize(
    ("batch_size", "advice"),
    [(64, "protocol.features.batch_size=32 takes less"), (1, "protocol.features.batch_size is 1")],
)
def test_features_out_of_memory_say_what_takes_less(batch_size, advice, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("msn.evaluation.features.forward_feature", full)
    protocol = kshot(features={**FEATURES, "batch_size": batch_size})
    with pytest.raises(UserError) as caught:
        run(protocol, ToyImages(4), ToyImages(2))
    said = str(caught.value)
    assert said.startswith(f"out of memory (2.00 GiB more were wanted): {advice}")


def kshot(**changes):
    settings = {
        "shots": [1, 2],
        "splits": 3,
        "seed": 0,
        "lists": None,
        "write_lists": None,
        "logistic": LOGISTIC,
        "knn_neighbours": 3,
        "features": FEATURES,
    }
    return KShot(**{**settings, **changes})


@pytest.mark.parametrize("name", KINDS)
def test_every_shipped_protocol_is_built_from_its_file(name):
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = hydra.compose("eval_lowshot", [f"protocol={name}", "checkpoint=x"])
    protocol = hydra.utils.instantiate(OmegaConf.create(OmegaConf.to_container(config.protocol)))
    assert type(protocol) is KINDS[name]


def test_every_file_of_the_group_is_a_protocol_or_a_base():
    files = {path.stem for path in (config_directory() / "protocol").glob("*.yaml")}
    assert files == {*KINDS, "base", "logistic", "table"}


def test_kshot_makes_a_row_for_each_k_and_one_for_knn():
    rows = [result.row for result in run(kshot(), ToyImages(6), ToyImages(5, seed=1))]
    assert [(r["classifier"], r["labels"], r["splits"]) for r in rows] == [
        ("logistic", "1", 3),
        ("logistic", "2", 3),
        ("knn", "all", 1),
    ]
    assert [r["labelled_images"] for r in rows] == [3, 6, 18]
    assert rows[0]["split_names"] == ["seed 0", "seed 1", "seed 2"]
    assert rows[0]["top1_mean"] > 0.5  # three hues


def finetune(**changes):
    recipe = {
        **{"epochs": 1, "batch_size": 6, "lr": 0.001, "min_lr": 0.0, "warmup_epochs": 0},
        **{"weight_decay": 0.05, "layer_decay": 0.75, "drop_path": 0.1, "mixup": 0.0},
        **{"cutmix": 0.0, "label_smoothing": 0.1, "auto_augment": None, "random_erasing": 0.0},
        **{"crop_scale": [0.3, 1.0], "flip": 0.5},
        **changes,
    }
    settings = {"shots": None, "fraction": 1.0, "splits": 1, "seed": 0, "features": FEATURES}
    return FineTune(recipe=recipe, **settings)


def linear(augment):
    sgd = {"epochs": 2, "batch_size": 9, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    more = {"warmup_epochs": 0, "lars": False, "batch_norm": False, "interpolation": "bilinear"}
    sgd |= {"augment": augment, "seed": 0, **more}
    return Linear(logistic=None, sgd=sgd, features=FEATURES)


@pytest.mark.parametrize(
    "protocol",
    [kshot(splits=1), linear(augment=True), linear(augment=False), finetune()],
    ids=["kshot", "augmented", "linear", "finetune"],
)
def test_unreadable_images_are_counted_and_those_that_test_are_wrong(protocol):
    train, test = ToyImages(6, unreadable=[1, 7]), ToyImages(1, seed=1, unreadable=[0, 1, 2])
    for result in run(protocol, train, test):
        assert result.row["unreadable_test_images"] == 3
        assert result.row["top1"] == [0.0]
        assert result.row["replaced_images"] == 2


def test_all_backbones_learn_from_the_same_images():
    sets = [kshot().plan(ToyImages(6)).sets for _ in range(2)]
    for one, other in zip(*sets, strict=True):
        assert torch.equal(one.positions, other.positions)


def test_only_images_that_a_classifier_uses_are_opened():
    train = ToyImages(50)
    protocol = kshot(knn_neighbours=None)
    run(protocol, train, ToyImages(2, seed=1))
    drawn = {int(i) for labelled in protocol.label_sets(train) for i in labelled.positions}
    assert set(train.opened) == drawn


def test_lists_replace_draws(tmp_path):
    train = ToyImages(6)
    for number in (0, 1):
        listed = [f"class{c}/{i}.png" for c in range(3) for i in (number, number + 2)]
        (tmp_path / f"{number}.txt").write_text("\n".join(listed))
    protocol = kshot(lists=[str(tmp_path / "0.txt"), str(tmp_path / "1.txt")])
    first, knn = (result.row for result in run(protocol, train, ToyImages(5, seed=1)))
    assert (first["labels"], first["splits"]) == ("2", 2)
    assert knn["classifier"] == "knn"
    assert protocol.label_sets(train)[0].positions.tolist() == [0, 2, 6, 8, 12, 14]


def test_an_uneven_list_is_called_by_its_size_and_says_which_classes_it_lacks(tmp_path, caplog):
    (tmp_path / "l.txt").write_text("class0/0.png\nclass0/1.png\nclass2/3.png\n")
    protocol = kshot(lists=[str(tmp_path / "l.txt")], knn_neighbours=None)
    (result,) = run(protocol, ToyImages(6), ToyImages(5, seed=1))
    assert result.row["labels"] == "3 images"
    assert "lists no image of 1 classes (first: class1)" in caplog.text


def test_a_place_for_lists_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    protocol = kshot(write_lists=str(tmp_path / "file" / "lists"), knn_neighbours=None)
    train = ToyImages(6)
    with pytest.raises(UserError, match=r"file.lists: cannot be written \(Not a directory\)"):
        protocol.check(train.labels, train.classes)
    fine = kshot(write_lists=str(tmp_path / "new" / "lists"), knn_neighbours=None)
    fine.check(train.labels, train.classes)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_drawn_lists_are_written_and_give_the_same_sets_back(tmp_path):
    train = ToyImages(6)
    drawn = kshot(write_lists=str(tmp_path / "lists"), knn_neighbours=None)
    sets = drawn.plan(train).sets
    files = sorted((tmp_path / "lists").rglob("*.txt"))
    assert [str(f.relative_to(tmp_path / "lists")) for f in files] == [
        f"seed_{seed}/{k}imgs_class.txt" for seed in range(3) for k in (1, 2)
    ]
    again = kshot(lists=[str(f) for f in files], knn_neighbours=None)
    read = {(s.labels, s.positions.numel()): s for s in again.label_sets(train)}
    assert len(read) == 2
    for labelled in again.label_sets(train):
        assert any(
            torch.equal(labelled.positions, other.positions)
            for other in drawn.label_sets(train)
            if other.labels == labelled.labels
        )
    assert len(sets) == 6


def test_fraction_makes_a_row_for_each_share():
    protocol = Fraction(
        fractions=[0.5, 0.1, 1.0],
        splits=2,
        seed=0,
        write_lists=None,
        logistic=LOGISTIC,
        knn_neighbours=None,
        features=FEATURES,
    )
    rows = [result.row for result in run(protocol, ToyImages(10), ToyImages(5, seed=1))]
    assert [(r["labels"], r["splits"], r["labelled_images"]) for r in rows] == [
        ("10%", 2, 3),
        ("50%", 2, 15),
        ("100%", 1, 30),
    ]


def test_knn_makes_a_row_for_each_number_of_neighbours():
    protocol = KNN(neighbours=[5, 1], temperature=0.07, features=FEATURES)
    rows = [result.row for result in run(protocol, ToyImages(6), ToyImages(5, seed=1))]
    assert [(r["variant"], r["neighbours"]) for r in rows] == [("k=1", 1), ("k=5", 5)]
    assert rows[0]["top1_mean"] > 0.5


def imagenet(lists, **changes):
    settings = {
        "lists_dir": str(lists),
        "shots": [1, 2, 5],
        "one_percent": True,
        "logistic": LOGISTIC,
        "one_percent_lambd": 0.075,
        "knn_neighbours": None,
        "features": FEATURES,
    }
    return ImageNetLowShot(**{**settings, **changes})


def test_imagenet_lowshot_on_a_made_up_imagenet_from_files_to_rows(tmp_path):
    train, val = ListedImages(), ListedImages(4, seed=1)
    write_tree(tmp_path / "imagenet", train, "train")
    write_tree(tmp_path / "imagenet", val, "val")
    write_lists(tmp_path / "lists", train)
    pools = build_pools(
        PoolSettings(
            source="imagenet",
            root=str(tmp_path / "imagenet"),
            val_root=None,
            hold_out=0.2,
            split_seed=0,
            use_labels=True,
            download=False,
            image_size=None,
        )
    )
    assert pools.labelled is not None
    assert pools.held_out is not None
    labelled = LabelledImages(pools.labelled, "training")
    held_out = LabelledImages(pools.held_out, "held-out")
    rows = [r.row for r in run(imagenet(tmp_path / "lists"), labelled, held_out)]
    count = len(CLASSES)
    assert [(r["labels"], r["splits"], r["labelled_images"], r["lambd"]) for r in rows] == [
        ("1", 3, count, 0.0025),
        ("2", 3, 2 * count, 0.0025),
        ("5", 3, 5 * count, 0.0025),
        ("1%", 1, 7 * count, 0.075),
    ]
    assert rows[2]["split_names"] == ["split 1", "split 2", "split 3"]
    assert rows[2]["test_images"] == 16
    assert rows[3]["top1_mean"] > 0.6  # four hues


def test_imagenet_lowshot_opens_listed_images_alone(tmp_path):
    train = ListedImages()
    write_lists(tmp_path, train)
    run(imagenet(tmp_path, shots=[1], one_percent=False), train, ListedImages(2, seed=1))
    assert len(train.opened) == 3 * len(CLASSES)


def test_imagenet_lowshot_with_knn_keeps_the_order_of_rows(tmp_path):
    train = ListedImages()
    write_lists(tmp_path, train)
    rows = run(imagenet(tmp_path, knn_neighbours=3), train, ListedImages(2, seed=1))
    assert [r.row["labels"] for r in rows] == ["1", "2", "5", "1%", "all"]


def test_the_papers_figures_stand_beside_an_architecture_of_the_paper():
    small = {"embed_dim": 384, "depth": 12, "patch_size": 16}
    figure = paper_figure(small, "logistic", "5")
    assert figure is not None
    assert (figure.model, figure.top1, figure.std) == ("ViT-S/16", 0.628, 0.003)
    assert paper_figure(small, "knn", "all") is None
    assert paper_figure({**small, "patch_size": 8}, "logistic", "5") is None
    large = {**small, "embed_dim": 1024, "depth": 24}
    assert paper_figure(large, "logistic", "5", "mae").top1 == 0.423
    assert paper_figure(large, "linear", "all", "mae").top1 == 0.758
    assert paper_figure(large, "logistic", "5") is None
    assert paper_figure(small, "finetune", "all", "mae") is None
    ids = [f"n{i:08d}" for i in range(1000)]
    assert is_imagenet(ids)
    assert not is_imagenet(ids[:-1])
    assert not is_imagenet([f"class{i}" for i in range(1000)])


def test_the_papers_row_stands_once_and_beside_its_own_protocols_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lowshot, "is_imagenet", lambda classes: True)
    monkeypatch.setitem(imagenet_module._MODELS, (24, 2, 4), "ViT-S/16")
    one, other = toy_backbone(), toy_backbone(1, "other")
    backbones = [one, other, random_backbone(one, seed=0)]
    train, test = ListedImages(), ListedImages(2, seed=1)
    assert all(r.row["paper"] is None for r in run(kshot(), train, test, backbones))
    write_lists(tmp_path, train)
    monkeypatch.setattr(protocols, "are_the_papers", lambda *lists, **wanted: True)
    rows = [r.row for r in run(imagenet(tmp_path), train, test, backbones)]
    found = {
        name: [r["paper"] for r in rows if r["backbone"] == name] for name in ("msn", "random")
    }
    assert [figure["top1"] for figure in found["msn"]] == [0.471, 0.558, 0.628, 0.672]
    assert found["random"] == [None] * 4
    assert markdown_table(rows).count("paper, ViT-S/16") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": []}, "shots must be a list of numbers >= 1"),
        ({"shots": [0]}, "shots must be a list of numbers >= 1"),
        ({"splits": 0}, "splits must be in \\[1, 10000\\]"),
        ({"knn_neighbours": 0}, "knn_neighbours must be >= 1"),
        ({"lists": []}, "name at least one file"),
        ({"logistic": {**LOGISTIC, "typo": 1}}, "unknown key protocol.logistic.typo"),
        ({"logistic": {**LOGISTIC, "folds": "x"}}, "protocol.logistic.folds must be a whole"),
        ({"features": {**FEATURES, "feature": "x"}}, "feature must be native"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        kshot(**change)


def test_an_unknown_policy_of_augmentation_is_refused_when_the_recipe_is_read():
    with pytest.raises(UserError, match="auto_augment=foo: must be a policy of timm"):
        finetune(auto_augment="foo")


def test_images_that_do_not_suffice_are_refused_before_any_work():
    train, test = ToyImages(3), ToyImages(2, seed=1)
    with pytest.raises(UserError, match="shots=5: class class0 has only 3 images"):
        run(kshot(shots=[5]), train, test)
    with pytest.raises(
        UserError,
        match="knn_neighbours=10: .* labelled images, 9; null leaves kNN out",
    ):
        run(kshot(knn_neighbours=10), train, test)
    with pytest.raises(UserError, match="at least two classes are needed, found only class0"):
        run(kshot(), ToyImages(5, 1), ToyImages(2, 1))
    assert train.opened == []


def test_check_needs_labels_alone():
    kshot().check(ToyImages(3).labels, ToyImages(3).classes)
    with pytest.raises(UserError, match="has only 3 images"):
        kshot(shots=[5]).check(ToyImages(3).labels, ToyImages(3).classes)


def test_a_lambda_that_nothing_can_choose_is_refused_before_any_work():
    chosen = {**LOGISTIC, "lambd": None, "lambd_grid": [0.1, 1.0]}
    train = ToyImages(3)
    with pytest.raises(UserError, match="with 1 labels no class has two images"):
        kshot(logistic=chosen).check(train.labels, train.classes)
    with pytest.raises(UserError, match="give protocol.logistic.lambd"):
        run(kshot(logistic=chosen), train, ToyImages(2, seed=1))
    assert train.opened == []
    kshot(logistic=chosen, shots=[2]).check(train.labels, train.classes)


def test_the_shipped_shares_can_be_drawn_from_the_default_data():
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = hydra.compose("eval_lowshot", ["protocol=fraction", "checkpoint=x"])
    protocol = hydra.utils.instantiate(OmegaConf.create(OmegaConf.to_container(config.protocol)))
    protocol.check(torch.arange(10).repeat(130), [str(digit) for digit in range(10)])


def test_one_of_several_processes_writes_the_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "process_index", lambda: 1)
    kshot(write_lists=str(tmp_path / "lists")).plan(ToyImages(6))
    assert not (tmp_path / "lists").exists()


def test_other_lists_than_the_papers_have_no_figures_of_the_paper(tmp_path, caplog):
    train = ListedImages()
    write_lists(tmp_path, train)
    protocol = imagenet(tmp_path)
    assert protocol.is_the_papers
    protocol.label_sets(train)
    assert not protocol.is_the_papers
    assert "10 lists are not those of the paper" in caplog.text
    with_figures = imagenet(tmp_path, shots=[1], one_percent=False)
    files = [tmp_path / f"split{split}" / "1imgs_class.txt" for split in (1, 2, 3)]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    with pytest.MonkeyPatch.context() as patch:
        lists = [OfficialList("1", i + 1, files[i].name, d) for i, d in enumerate(digests)]
        patch.setattr(imagenet_module, "OFFICIAL_LISTS", lists)
        with_figures.label_sets(train)
    assert with_figures.is_the_papers


def test_fine_tuning_says_which_devices_stand_idle(caplog):
    train, two = ToyImages(2), (CPU, CPU)
    evaluate(finetune(), [toy_backbone()], train, ToyImages(1), num_workers=0, device=two)
    assert "fine-tuning uses one of 2 devices" in caplog.text
    assert "torchrun --nproc-per-node=2" in caplog.text
