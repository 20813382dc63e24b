import pytest
import torch
from omegaconf import OmegaConf

from msn.commands import export
from msn.weights import read_weights
from msn.weights.official import official_layout, split_encoder
from tests.weights.builders import make_network, released_layout, save_checkpoint, save_run
from tests.weights.conftest import assert_same


@pytest.mark.parametrize("name", ["default", "no_sinkhorn", "wide"])
@pytest.mark.parametrize("only_target", [False, True])
def test_the_layout_survives_the_round_trip_bit_by_bit(tmp_path, name, only_target):
    layout = released_layout(name, only_target)
    torch.save(layout, tmp_path / "a.pth.tar")
    again = official_layout(read_weights(tmp_path / "a.pth.tar", num_heads=2))
    encoders = ["target_encoder"] if only_target else ["encoder", "target_encoder"]
    assert [key for key in again if key.endswith("encoder")] == encoders
    for encoder in encoders:
        assert_same(again[encoder], layout[encoder])
    assert torch.equal(again["prototypes"], layout["prototypes"])
    assert again.get("epoch") == layout.get("epoch")


def test_our_checkpoint_gets_the_names_of_the_reference(tmp_path):
    network = make_network()
    layout = official_layout(read_weights(save_checkpoint(tmp_path / "a.ckpt", network)))
    trunk, head, ignored = split_encoder(layout["encoder"])
    assert_same(trunk, network.anchor.trunk.state_dict())
    assert_same(head, network.anchor.head.state_dict())
    assert ignored == ()
    assert "module.fc.bn1.running_mean" in layout["target_encoder"]
    assert layout["epoch"] == 5


def test_the_prediction_head_of_the_reference_is_ignored():
    encoder = {"module.pred.fc1.weight": torch.ones(1), "module.norm.bias": torch.ones(2)}
    trunk, head, ignored = split_encoder(encoder)
    assert (list(trunk), head, ignored) == (["norm.bias"], None, ("pred.fc1.weight",))


def test_a_finished_run_is_exported_with_its_anchor_head_and_prototypes(tmp_path):
    network = make_network()
    save_run(tmp_path / "run", network.target.trunk)
    save_checkpoint(tmp_path / "run" / "checkpoints" / "epoch-5-step-50.ckpt", network)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    settings = {"checkpoint": str(tmp_path / "run"), "format": "official", "image_size": None}
    settings |= {"out": str(tmp_path / "out"), "head": None, "overwrite": False}
    export.run(OmegaConf.create({**settings, "model": {"num_heads": None}, "init_key": None}))
    weights = read_weights(tmp_path / "out" / "msn.pth.tar")
    assert_same(weights.trunk, network.target.trunk.state_dict())
    assert_same(weights.anchor_head, network.anchor.head.state_dict())
    assert torch.equal(weights.prototypes, network.prototypes)
