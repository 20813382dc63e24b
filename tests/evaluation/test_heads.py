"""Heads trained on frozen features: what is chosen, from what, and that it is worth something."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from msn.commands.entry import build, compose
from msn.commands.eval_lowshot import without_views
from msn.errors import UserError
from msn.evaluation.features import forward_feature
from msn.evaluation.heads import Choice
from msn.evaluation.lowshot import Protocol
from msn.evaluation.sets import FeatureSet, LabelSet, Trial
from tests.weights.builders import make_trunk


def protocol(name, *overrides):
    config = without_views(
        compose("eval_lowshot", ["checkpoint=x", f"protocol={name}", *overrides])
    )
    return build(config,
                 "protocol", Protocol)  # fmt: skip


def trial(make, counts=(150, 200), feature="last_4_mean"):
    """Three classes; `make` gives the features of images with labels."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for count in counts:
        labels = torch.arange(count) % 3
        sets.append(FeatureSet(make(labels, generator), labels, ["a", "b", "c"]))
    whole = [LabelSet("all", "all", torch.arange(counts[0]))]
    return Trial("x", feature, whole, *sets, torch.device("cpu"))


def only_in(part, width=6):
    """Features of which one sixth, of five, tells the class: tokens of four blocks, then mean."""

    def make(labels, generator):
        rows = torch.randn(len(labels), 5 * width, generator=generator)
        rows[:, part * width : part * width + 3] += 4 * torch.eye(3)[labels]
        return rows

    return make


@pytest.mark.parametrize(("part", "blocks", "mean"), [(3, 1, None), (4, None, True), (0, 4, None)])
def test_the_sweep_finds_where_the_class_is_told(part, blocks, mean):
    (result,) = protocol("sweep").results(trial(only_in(part)))
    row = result.row
    assert (row["classifier"], row["variant"], row["labels"]) == ("linear", "sweep", "all")
    assert row["top1_mean"] > 0.95
    assert blocks in (None, row["chosen"]["blocks"])
    assert mean in (None, row["chosen"]["patch_mean"])


def test_heads_in_one_pass_are_as_alone_and_test_images_take_no_part():
    swept = protocol("sweep")
    given = trial(only_in(3))
    (both,) = swept.results(given)
    other = given._replace(test=given.test._replace(labels=given.test.labels.flip(0)))
    (again,) = swept.results(other)
    assert again.row["chosen"] == both.row["chosen"]
    choices = [Choice(0.1, {}, 18, 24), Choice(0.01, {}, 0, None)]
    positions = torch.arange(150)
    together = swept._train(choices, given.train, positions, given)
    for one, choice in zip(together, choices, strict=True):
        (alone,) = swept._train([choice], given.train, positions, given)
        torch.testing.assert_close(one.weight, alone.weight)


def test_a_long_training_of_one_head_is_logistic_regression():
    swept = protocol("sweep", "protocol.training.epochs=400", "protocol.training.batch_size=150")
    given = trial(lambda labels, g: torch.randn(len(labels), 4, generator=g) + torch.eye(4)[labels])
    (head,) = swept._train([Choice(2.0, {})], given.train, torch.arange(150), given)
    oracle = LogisticRegression(C=1e6, max_iter=5000)
    oracle.fit(given.train.features.numpy(), given.train.labels.numpy())
    ours = head(given.test.features).argmax(1).numpy()
    assert (ours == oracle.predict(given.test.features.numpy())).mean() > 0.97


def test_the_attentive_probe_finds_a_patch_wherever_it_is():
    """A mean over 16 tokens hides what one of them, at any place, says."""

    def make(labels, generator):
        tokens = torch.randn(len(labels), 16, 8, generator=generator)
        where = torch.randint(16, (len(labels),), generator=generator)
        tokens[torch.arange(len(labels)), where] = 6 * torch.eye(8)[labels]
        return tokens.flatten(1)

    given = trial(make, counts=(300, 150), feature="patches")
    overrides = ["protocol.training.batch_size=32", "protocol.num_heads=2"]
    attentive = protocol("attentive", *overrides, "protocol.training.lrs=[0.003]")
    attentive._width = 8
    (result,) = attentive.results(given)
    assert result.row["classifier"] == "attentive"
    assert result.row["top1_mean"] > 0.8


def test_features_of_the_heads_are_those_of_the_others_joined():
    trunk, images = make_trunk(), torch.randn(2, 3, 32, 32)
    side = trunk.img_size
    images = torch.randn(2, 3, side, side)
    joined = forward_feature(trunk, images, "last_2_mean")
    parts = [forward_feature(trunk, images, kind) for kind in ("last_2", "patch_mean")]
    torch.testing.assert_close(joined, torch.cat(parts, dim=1))
    patches = forward_feature(trunk, images, "patches").unflatten(1, (-1, trunk.embed_dim))
    torch.testing.assert_close(patches.mean(dim=1), parts[1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("protocol.blocks=[2]", "largest is N in protocol.features.feature"),
        ("protocol.training.lrs=[]", "list of rates > 0"),
        ("protocol.training.epochs=0", "epochs=0: must be >= 1"),
    ],
)
def test_settings_that_do_not_fit(override, message):
    with pytest.raises(UserError, match=message):
        protocol("sweep", override)
