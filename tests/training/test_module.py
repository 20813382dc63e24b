"""The trained path is the proven one: Lightning's loop over the reference's steps."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from msn.commands.entry import compose
from msn.commands.verify import _compare_final, build, load_golden, load_network, step_views
from msn.data.views import Views, ViewSettings
from msn.errors import UserError
from msn.training.module import MSNModule
from msn.training.trainer import build_trainer, resolve_precision
from tests.conftest import GOLDEN, SMALL_HEAD, SMALL_MODEL


def module_of(config, *, chunk_size=None, **changes):
    trunk = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    method = {
        "num_prototypes": config["num_prototypes"],
        "head": {
            "hidden_dim": config["hidden_dim"],
            "output_dim": config["output_dim"],
            "use_batch_norm": config["use_bn"],
        },
        "patch_drop": config["patch_drop"],
        "patch_drop_scope": "batch",
        "temperature": config["temperature"],
        "sharpen_temperature": config["sharpen"],
        "final_sharpen_temperature": config["sharpen"],
        "use_sinkhorn": config["use_sinkhorn"],
        "sinkhorn_iterations": 3,
        "me_max_weight": config["memax_weight"],
        "prior_exponent": 0.0,
        "entropy_weight": config["ent_weight"],
        "start_lr": config["start_lr"],
        "lr": config["lr"],
        "final_lr": config["final_lr"],
        "warmup_epochs": config["warmup_epochs"],
        "weight_decay": config["weight_decay"],
        "final_weight_decay": config["final_weight_decay"],
        "momentum": config["ema_start"],
        "final_momentum": config["ema_end"],
        "schedule_stretch": config["ipe_scale"],
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "clip_grad_norm": config["clip_grad"],
        **changes,
    }
    model = {name: config[name] for name in trunk}
    return MSNModule(model=model, method=method, seed=0, chunk_size=chunk_size, compile=False)


def test_both_trunks_take_the_stream_in_bf16_where_that_is_set():
    config = load_golden(GOLDEN["default"]).config
    for wanted in (False, True):
        network = module_of(config, bf16_stream=wanted).network
        assert [each.trunk.half_stream for each in (network.anchor, network.target)] == [wanted] * 2


def trainer_of(tmp_path, **changes):
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": "64-true",
        "deterministic": False,
        "log_every_n_steps": 1,
        "limit_train_batches": None,
        "accumulate_grad_batches": 1,
        "callbacks": [],
        "loggers": [],
        "run_dir": tmp_path,
    }
    return build_trainer(**{**settings, **changes})


class TargetLeftInEval(Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.network.target.eval()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in GOLDEN),
        ("default", {"chunk_size": 3}),  # loss, gradients, optimiser and EMA as of whole batches
    ],
)
def test_lightning_s_loop_reproduces_the_reference_s_weights(tmp_path, monkeypatch, name, settings):
    golden = load_golden(GOLDEN[name])
    module = module_of(golden.config, **settings)
    load_network(module.network.double(), golden.tensors)
    module.plan_schedule(
        epochs=golden.config["epochs"], steps_per_epoch=golden.config["steps_per_epoch"]
    )
    monkeypatch.setattr(
        module,
        "draw_kept_patches",
        lambda rand: golden.tensors[f"step{module.global_step}.kept_patches"],
    )
    batches = [
        Views(*step_views(golden.config, golden.tensors, i)) for i in range(len(golden.steps))
    ]
    trainer = trainer_of(tmp_path, callbacks=[TargetLeftInEval()])
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert [d for d in _compare_final(module.network, golden.tensors) if not d.ok] == []


def test_build_gives_what_the_module_builds():
    config = load_golden(GOLDEN["default"]).config
    network, _, _ = build(config)
    ours = module_of(config).network.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


def test_masks_are_a_function_of_seed_and_step():
    module = module_of(load_golden(GOLDEN["default"]).config)
    rand = torch.empty(1, 4, 3, 16, 16)
    assert torch.equal(module.draw_kept_patches(rand), module.draw_kept_patches(rand))
    assert module.draw_kept_patches(rand).shape == (12,)


def test_accumulation_is_refused_and_says_what_to_use():
    module = module_of(load_golden(GOLDEN["default"]).config)
    views = ViewSettings(**compose("train", []).data.views)
    with pytest.raises(UserError, match="chunk_size"):
        module.check_settings(views, batch_size=8, accumulated=2)


def test_checkpoints_hold_plain_data_and_describe_themselves(tmp_path):
    golden = load_golden(GOLDEN["default"])
    module = module_of(golden.config)
    module.plan_schedule(epochs=3, steps_per_epoch=4)
    batches = [Views(*(v.float() for v in step_views(golden.config, golden.tensors, 0)))]
    trainer = trainer_of(tmp_path, precision="32-true")
    trainer.fit(module, DataLoader(batches, batch_size=None))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["msn"]["format"] == 1
    assert content["msn"]["model"] == {**SMALL_MODEL, "mlp_ratio": 4}
    assert content["msn"]["head"] == SMALL_HEAD
    assert "network.target.trunk.cls_token" in content["state_dict"]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["x.ckpt"]


def test_a_resumed_run_keeps_the_licence_of_its_first_weights():
    config = load_golden(GOLDEN["default"]).config
    first, resumed = module_of(config), module_of(config)
    first.checkpoint_info["licence"] = "CC BY-NC 4.0"
    checkpoint = {"msn": dict(first.checkpoint_info)}
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.checkpoint_info["licence"] == "CC BY-NC 4.0"
    resumed.on_load_checkpoint({"msn": {}})  # of weights drawn anew
    assert resumed.checkpoint_info["licence"] == "CC BY-NC 4.0"


@pytest.mark.parametrize(
    ("capability", "precision"), [((8, 0), "bf16-mixed"), ((7, 5), "32-true"), (None, "32-true")]
)
def test_precision_is_bf16_where_cuda_has_it_by_default(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    setting = compose("train", []).trainer.precision
    assert resolve_precision(setting, "auto") == precision
    assert resolve_precision(setting, "cpu") == "32-true"
