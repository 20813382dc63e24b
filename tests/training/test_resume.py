"""Which changes a run may be resumed with, by key."""

import pytest
import torch
from omegaconf import OmegaConf

from msn.commands.entry import compose, to_plain
from msn.errors import UserError
from msn.training.checkpointing import check_same_run, identity_of


@pytest.fixture(scope="module")
def identity():
    config = compose("train", [])

    def of(*changes):
        changed = OmegaConf.merge(config, OmegaConf.from_dotlist(list(changes)))
        return identity_of(to_plain(changed))

    return of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, identity):
    path = tmp_path_factory.mktemp("run") / "epoch-1-step-3.ckpt"
    torch.save({"msn": {"identity": identity()}, "state_dict": {"w": torch.zeros(2, 3)}}, path)
    return path


WEIGHTS = {"w": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", "seed was 0 and is 1"),
        ("method.lr=0.1", "method.lr was 0.003 and is 0.1"),
        ("method.head.hidden_dim=8", "method.head.hidden_dim was 512 and is 8"),
        ("model.depth=3", "model.depth was 4 and is 3"),
        ("data.split_seed=1", "data.split_seed was 0 and is 1"),
        ("data.views.hue=0.1", "data.views.hue was 0.0 and is 0.1"),
        ("data.global_batch_size=32", "data.global_batch_size was 64 and is 32"),
        ("trainer.max_epochs=4", "trainer.max_epochs was 75 and is 4"),
    ],
)
def test_what_changes_numbers_is_refused_and_named(checkpoint, identity, change, message):
    with pytest.raises(UserError, match="resume.force=true") as refusal:
        check_same_run(checkpoint, identity(change), WEIGHTS, force=False)
    assert message in str(refusal.value)
    check_same_run(checkpoint, identity(change), WEIGHTS, force=True)


def test_what_changes_no_numbers_is_not(checkpoint, identity):
    free = ["data.num_workers=3", "trainer.devices=2", "chunk_size=8", "data.prefetch_batches=4"]
    check_same_run(checkpoint, identity(*free), WEIGHTS, force=False)


@pytest.mark.parametrize("weights", [{"w": torch.ones(2, 4)}, {}, {**WEIGHTS, "v": torch.ones(1)}])
def test_weights_that_do_not_fit_are_refused_though_forced(checkpoint, identity, weights):
    with pytest.raises(UserError, match="with another model.depth its weights do not fit"):
        check_same_run(checkpoint, identity("model.depth=3"), weights, force=True)
