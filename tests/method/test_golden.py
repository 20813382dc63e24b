"""The reference's figures, reproduced; and broken on purpose, to see that they can fail."""

import pytest
import torch
from torch import nn

from msn.commands.verify import compare, load_golden, replay
from msn.method import network as network_module
from msn.method import optim, vit
from msn.method.network import MSN
from tests.conftest import GOLDEN


def out_of_tolerance(name):
    return [d.name for d in replay(load_golden(GOLDEN[name])) if not d.ok]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_figure_of_the_reference_is_reproduced(name):
    differences = list(replay(load_golden(GOLDEN[name])))
    assert [d for d in differences if not d.ok] == []
    kinds = {d.name.split(".")[0] for d in differences}
    wanted = {"anchor", "target", "prototypes", "features", "sinkhorn"}
    assert wanted | {f"step{i}" for i in range(6)} == kinds


def test_a_difference_that_is_not_a_number_is_not_ok():
    nan = torch.tensor([float("nan")])
    assert not compare("x", nan, torch.ones(1)).ok


def test_freezing_the_prototypes_is_seen(monkeypatch):
    forward = MSN.forward

    def frozen(self, *args):
        self.prototypes.requires_grad_(True)
        self.prototypes.register_hook(torch.zeros_like)
        return forward(self, *args)

    monkeypatch.setattr(MSN, "forward", frozen)
    assert {"prototypes.grad", "prototypes.final"} <= set(out_of_tolerance("default"))


def test_masking_the_focal_views_is_seen(monkeypatch):
    forward = MSN.forward

    def masked(self, target, rand, focal, kept, chunk_size=None):
        encoder_forward = self.anchor.forward

        def mask_all(views, keeps, chunk):
            grid = focal.shape[-1] // self.anchor.trunk.patch_size
            few = torch.arange(grid * grid - 1)
            return encoder_forward(views, [keeps[0], few], chunk)

        monkeypatch.setattr(self.anchor, "forward", mask_all)
        try:
            return forward(self, target, rand, focal, kept, chunk_size)
        finally:
            monkeypatch.setattr(self.anchor, "forward", encoder_forward)

    monkeypatch.setattr(MSN, "forward", masked)
    assert "step0.anchor_out" in out_of_tolerance("default")


def test_antialiased_position_embeddings_are_seen(monkeypatch):
    interpolate = vit.F.interpolate

    def antialiased(image, **kwargs):
        return interpolate(image, **{**kwargs, "antialias": True})

    monkeypatch.setattr(vit.F, "interpolate", antialiased)
    failed = out_of_tolerance("default")
    assert "step0.anchor_out" in failed
    assert "features.8.out" in failed


def test_ema_of_buffers_is_seen(monkeypatch):
    update = MSN.update_target

    def with_buffers(self, momentum):
        update(self, momentum)
        for ours, theirs in zip(self.target.buffers(), self.anchor.buffers(), strict=True):
            if ours.is_floating_point():
                ours.lerp_(theirs, 1 - momentum)

    monkeypatch.setattr(MSN, "update_target", with_buffers)
    assert "target.final.head.bn1.running_var" in out_of_tolerance("default")


def test_clipping_the_prototypes_is_seen(monkeypatch):
    def clip_all(encoder, max_norm):
        return nn.utils.clip_grad_norm_([*encoder.parameters(), *prototypes], max_norm)

    prototypes = []
    build = optim.build_optimizer

    def remember(network, **kwargs):
        prototypes.append(network.prototypes)
        return build(network, **kwargs)

    monkeypatch.setattr(optim, "build_optimizer", remember)
    monkeypatch.setattr(optim, "clip_encoder", clip_all)
    failed = out_of_tolerance("default")
    assert "step0.grad_norm" in failed
    assert "prototypes.final" in failed


def test_a_target_in_eval_mode_is_seen(monkeypatch):
    forward = MSN.forward

    def target_in_eval(self, *args):
        self.target.eval()
        return forward(self, *args)

    monkeypatch.setattr(MSN, "forward", target_in_eval)
    assert "step0.target_out" in out_of_tolerance("default")


def test_one_head_batch_for_all_view_sizes_is_seen(monkeypatch):
    forward = network_module.Encoder.forward

    def one_batch(self, views, kept, chunk_size=None):
        if len(views) == 1:
            return forward(self, views, kept, chunk_size)
        tokens = self.trunk(views, kept)
        return [self.head(torch.cat(tokens))]

    monkeypatch.setattr(network_module.Encoder, "forward", one_batch)
    assert "step0.anchor_out" in out_of_tolerance("default")
