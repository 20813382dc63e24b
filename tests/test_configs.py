"""Every shipped configuration composes and builds; large networks on the meta device."""

import re

import pytest
import timm
import torch
from omegaconf import OmegaConf

from msn.commands.entry import build, compose, config_directory, options
from msn.data.views import ViewSettings
from msn.method.masking import PatchDrop
from msn.method.vit import VisionTransformer

RELEASED = {
    "num_prototypes": 1024,
    "head": {"hidden_dim": 2048, "output_dim": 256, "use_batch_norm": True},
    "patch_drop": 0.15,
    "temperature": 0.1,
    "sharpen_temperature": 0.25,
    "final_sharpen_temperature": 0.25,
    "use_sinkhorn": True,
    "me_max_weight": 1.0,
    "entropy_weight": 0.0,
    "start_lr": 2e-4,
    "lr": 1e-3,
    "final_lr": 1e-6,
    "warmup_epochs": 15,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
    "momentum": 0.996,
    "final_momentum": 1.0,
    "schedule_stretch": 1.25,
    "clip_grad_norm": 3.0,
}
EXPERIMENTS = sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))


MAE = [name for name in EXPERIMENTS if name.startswith("mae_")]
# `adapt` takes its trunk from a file: tests/commands/test_adaptation.py.
MSN = [name for name in EXPERIMENTS if name not in MAE and name != "adapt"]


@pytest.mark.parametrize("experiment", MAE)
def test_every_experiment_of_masked_autoencoders_builds(experiment):
    config = compose("train", [f"experiment={experiment}"])
    with torch.device("meta"):
        module = build(config, "module")
    views = ViewSettings(**config.data.views)
    module.check_settings(views, batch_size=config.data.global_batch_size, accumulated=2)
    assert views.num_views == 1
    assert (list(views.rand_scale), config.data.views.blur_probability) == ([0.2, 1.0], 0)
    module.plan_schedule(epochs=config.trainer.max_epochs, steps_per_epoch=10)
    assert module.schedule.at(0).lr == 0
    side, patches = views.rand_size, (views.rand_size // views.patch_size) ** 2
    errors = module.network.learn(
        torch.empty(2, 3, side, side, device="meta"), torch.empty(2, patches, device="meta")
    )
    assert errors.patches.shape == (2, patches)
    assert module.network.num_kept == patches // 4
    text = (config_directory() / "experiment" / f"{experiment}.yaml").read_text()
    assert f"mask_ratio {config.method.mask_ratio}" in text
    assert f"ffective batch {config.data.global_batch_size:,}" in text
    assert f"{config.trainer.max_epochs} epochs" in text


@pytest.mark.parametrize("experiment", ["mae_vitb16", "mae_vitl16", "mae_vith14"])
def test_masked_autoencoders_are_the_paper_s(experiment):
    """arXiv 2111.06377, Table 8."""
    config = compose("train", [f"experiment={experiment}"])
    method, batch = config.method, config.data.global_batch_size
    assert (batch, config.trainer.max_epochs, method.warmup_epochs) == (4096, 1600, 40)
    assert method.lr == pytest.approx(1.5e-4 * batch / 256)
    assert (list(method.betas), method.weight_decay) == ([0.9, 0.95], 0.05)
    assert dict(method.decoder) == {"embed_dim": 512, "depth": 8, "num_heads": 16}
    assert (method.norm_pix_loss, config.data.views.flip_probability) == (True, 0.5)


@pytest.mark.parametrize("experiment", MSN)
def test_every_experiment_builds_and_its_parts_fit(experiment):
    config = compose("train", [f"experiment={experiment}"])
    assert config.run.experiment == experiment
    with torch.device("meta"):
        module = build(config, "module")
    views = ViewSettings(**config.data.views)
    patches = (views.rand_size // config.model.patch_size) ** 2
    drop = PatchDrop(
        patch_drop=config.method.patch_drop, patch_drop_scope=config.method.patch_drop_scope
    )
    kept = drop.draw(patches, rand_views=1, images=range(2), global_batch_size=2, key=0)
    assert kept is None or 0 < kept.shape[-1] < patches
    module.plan_schedule(epochs=config.trainer.max_epochs, steps_per_epoch=10)
    out = module.network(
        torch.empty(2, 3, views.rand_size, views.rand_size, device="meta"),
        torch.empty(1, 2, 3, views.rand_size, views.rand_size, device="meta"),
        torch.empty(views.focal_views, 2, 3, views.focal_side, views.focal_side, device="meta"),
        None,
    )
    assert out.anchor.shape == (1 + views.focal_views, 2, config.method.head.output_dim)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_says_what_to_expect(experiment):
    text = (config_directory() / "experiment" / f"{experiment}.yaml").read_text()
    head = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    assert "python train.py" in head
    assert "Hardware:" in head
    assert "Table" in head or "not a row of" in head


@pytest.mark.parametrize(
    ("experiment", "patch_drop", "epochs", "kept"),
    [
        ("msn_vits16", 0.15, 800, 166),
        ("msn_vitb16", 0.3, 600, 137),
        ("msn_vitb8", 0.3, 600, 548),
        ("msn_vitb4", 0.7, 300, 940),
        ("msn_vitl16", 0.5, 600, 98),
        ("msn_vitl7", 0.7, 200, 307),
    ],
)
def test_presets_are_the_paper_s(experiment, patch_drop, epochs, kept):
    config = compose("train", [f"experiment={experiment}"])
    views = config.data.views
    assert config.method.patch_drop == patch_drop
    assert config.trainer.max_epochs == epochs
    assert config.data.global_batch_size == 1024
    assert (views.rand_views, views.focal_views, views.rand_size) == (1, 10, 224)
    assert int((224 // config.model.patch_size) ** 2 * (1 - patch_drop)) == kept
    assert config.method.use_sinkhorn
    assert config.method.schedule_stretch == 1.25


def test_the_method_s_numbers_are_those_of_the_released_file():
    """Configuration msn_vits16.yaml of the released code and paper, App. A.1."""
    config = compose("train", ["experiment=msn_vits16"])
    method = OmegaConf.to_container(config.method)
    assert {key: method[key] for key in RELEASED} == RELEASED
    views = ViewSettings(**config.data.views)
    assert (views.rand_size, views.focal_side) == (224, 96)
    assert (list(views.rand_scale), list(views.focal_scale)) == ([0.3, 1.0], [0.05, 0.3])
    assert config.trainer.max_epochs == 800


@pytest.mark.parametrize("experiment", MSN)
def test_the_head_comment_of_an_experiment_says_what_is_composed(experiment):
    text = (config_directory() / "experiment" / f"{experiment}.yaml").read_text()
    config = compose("train", [f"experiment={experiment}"])
    assert f"ffective batch {config.data.global_batch_size:,}" in text
    assert f"{config.trainer.max_epochs} epochs" in text
    assert f"patch_drop {config.method.patch_drop}" in text
    assert "Hardware: " in text
    assert re.search(r"minutes|days", text)


def test_methods_differ_in_what_they_say_and_nothing_else():
    msn, plain, pmsn = (
        compose("train", [f"method={name}", "experiment=msn_vits16"]).method
        for name in ("msn", "msn_no_sinkhorn", "pmsn")
    )
    differing = {key for key in msn if msn[key] != plain[key]}
    assert differing == {"use_sinkhorn", "me_max_weight"}
    assert (plain.use_sinkhorn, plain.me_max_weight) == (False, 5.0)
    assert {key for key in plain if plain[key] != pmsn[key]} == {"prior_exponent"}


@pytest.mark.parametrize("name", ["data", "logger", "method", "model", "protocol"])
def test_every_option_of_every_group_composes(name):
    for option in options(name):
        assert compose("train", [f"{name}={option}"]) is not None


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (config_directory() / "model").glob("dino*"))
)
def test_presets_of_dinov2_and_dinov3_are_timm_s_models(name):
    path = config_directory() / "model" / f"{name}.yaml"
    model = dict(OmegaConf.load(path))
    twin = re.search(r"timm: (\w+)", path.read_text())[1]
    with torch.device("meta"):
        ours = VisionTransformer(**model)
        theirs = timm.create_model(twin, img_size=model["img_size"], num_classes=0)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.num_heads == theirs.blocks[0].attn.num_heads
    assert ours.norm.eps == theirs.norm.eps
