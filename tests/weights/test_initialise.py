import copy
import dataclasses

import pytest
import torch

from msn.errors import UserError
from msn.method.network import MSN
from msn.method.positions import resize_position_embeddings
from msn.weights import initialise, read_weights
from tests.weights.builders import make_network, released_layout, save_checkpoint
from tests.weights.conftest import assert_same, make_weights

HEAD = {"hidden_dim": 8, "output_dim": 4, "use_batch_norm": True}


def fresh(**changes):
    torch.manual_seed(5)
    return MSN(model={**make_weights().model, **changes}, head=HEAD, num_prototypes=6)


def test_a_bare_trunk_goes_into_both_encoders_and_the_rest_stays_fresh(weights):
    network, before = fresh(), fresh().state_dict()
    rows = dict(initialise(network, weights))
    assert_same(network.anchor.trunk.state_dict(), weights.trunk)
    assert_same(network.target.trunk.state_dict(), weights.trunk)
    assert torch.equal(network.prototypes, before["prototypes"])
    assert rows["prototypes"].startswith("initialised")
    assert rows["target head"].startswith("initialised")


def test_a_whole_network_goes_on_with_its_own_anchor_target_heads_and_prototypes(tmp_path):
    before = make_network()
    weights = read_weights(save_checkpoint(tmp_path / "a.ckpt", before))
    network = make_network(seed=1)
    rows = dict(initialise(network, weights))
    assert_same(network.state_dict(), before.state_dict())
    assert {rows[part] for part in ("target head", "anchor head", "prototypes")} == {"loaded"}


def test_a_published_file_gives_both_encoders_the_target_and_its_prototypes(tmp_path):
    torch.save(released_layout("default", only_target=True), tmp_path / "a.pth.tar")
    weights = read_weights(tmp_path / "a.pth.tar", num_heads=2)
    head = {"hidden_dim": 32, "output_dim": 16, "use_batch_norm": True}
    network = MSN(model=weights.model, head=head, num_prototypes=10)
    rows = dict(initialise(network, weights))
    for encoder in (network.anchor, network.target):
        assert_same(encoder.trunk.state_dict(), weights.trunk)
        assert_same(encoder.head.state_dict(), weights.head)
    assert torch.equal(network.prototypes, weights.prototypes)
    assert "the file has no anchor" in rows["anchor trunk"]


def test_what_was_assumed_is_said(weights):
    found = dataclasses.replace(weights, notes=("attention heads: 2 assumed",))
    assert ("note", "attention heads: 2 assumed") in initialise(fresh(), found)


def test_another_eps_of_the_file_is_said(weights):
    model = {**weights.model, "layer_norm_eps": 1e-12}
    rows = dict(initialise(fresh(), dataclasses.replace(weights, model=model)))
    assert rows["LayerNorm's eps"] == "1e-06 here, 1e-12 in the file"
    assert "LayerNorm's eps" not in dict(initialise(fresh(), weights))


def test_prototypes_and_heads_of_another_shape_stay_fresh_and_are_named(weights):
    network, before = fresh(), fresh().state_dict()
    other = MSN(model=weights.model, head={**HEAD, "output_dim": 5}, num_prototypes=7)
    found = dataclasses.replace(
        weights, prototypes=other.prototypes.detach(), head=other.target.head.state_dict()
    )
    rows = dict(initialise(network, found))
    assert torch.equal(network.prototypes, before["prototypes"])
    assert "[7, 5], not [6, 4]" in rows["prototypes"]
    assert "does not fit" in rows["target head"]


def test_position_embeddings_are_resized_without_antialias(weights):
    network = fresh(img_size=24)
    rows = dict(initialise(network, weights))
    expected = resize_position_embeddings(weights.trunk["pos_embed"], (6, 6))
    assert torch.equal(network.anchor.trunk.pos_embed, expected)
    assert "resized from 16 to 24 px" in rows["target trunk"]


def test_another_architecture_is_refused_and_the_network_unchanged(weights):
    for changes, message in (({"depth": 3}, "blocks.2"), ({"num_heads": 4}, "attention heads")):
        network = fresh(**changes)
        before = copy.deepcopy(network.state_dict())
        with pytest.raises(UserError, match=message):
            initialise(network, weights)
        assert_same(network.state_dict(), before)


def test_what_has_no_place_is_listed_by_group(weights):
    found = dataclasses.replace(
        weights, ignored=("decoder.a.weight", "decoder.b.weight", "pos.mask")
    )
    said = initialise(fresh(), found)
    assert ("decoder.*", "ignored") in said
    assert ("pos.mask", "ignored") in said
