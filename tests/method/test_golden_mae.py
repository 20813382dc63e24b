"""The shipped figures of masked autoencoders are those of transformers' model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from msn.commands.verify import load_golden, replay
from msn.method.mae import MAE
from tests.conftest import GOLDEN, SMALL_MODEL
from tests.method.test_mae import transformers_twin

FILE = GOLDEN["default"].with_name("golden_mae.safetensors")
STEPS = 6
CONFIG = {
    "kind": "mae",
    "model": SMALL_MODEL,
    "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "schedule": {
        "start_lr": 0.0,
        "lr": 1e-2,
        "final_lr": 0.0,
        "warmup_epochs": 1.0,
        "weight_decay": 0.05,
        "epochs": 3,
        "steps_per_epoch": 2,
    },
}


def make():
    """Six steps of transformers' model under AdamW and its cosine, weights by our names."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    parts = ("model", "decoder", "mask_ratio", "norm_pix_loss")
    network = MAE(**{name: CONFIG[name] for name in parts}).double()
    for name, parameter in network.named_parameters():  # so that biases and norms count
        if parameter.requires_grad and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    twin, same = transformers_twin(network, CONFIG["mask_ratio"], CONFIG["norm_pix_loss"])
    tensors = {f"init.{name}": value.clone() for name, value in network.state_dict().items()}
    decayed = [p for p in twin.parameters() if p.requires_grad and p.ndim > 1]
    free = [p for p in twin.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    steps = []
    for step in range(STEPS):
        images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        noise = torch.rand(3, 16, dtype=torch.float64)
        out = twin(images, noise=noise)
        optimizer.zero_grad()
        out.loss.backward()
        if step == 0:
            tensors |= {
                f"grad.{name}": torch.cat([part.grad for part in found])
                for name, found in same.items()
                if not name.endswith("pos_embed")
            }
        steps.append({"loss": out.loss.item(), "lr": optimizer.param_groups[0]["lr"]})
        figures = {"images": images, "noise": noise, "prediction": out.logits, "mask": out.mask}
        tensors |= {f"step{step}.{name}": value.detach() for name, value in figures.items()}
        optimizer.step()
        schedule.step()
    final = {name: torch.cat([p.detach() for p in found]) for name, found in same.items()}
    tensors |= {f"final.{name}": value for name, value in final.items()}
    return steps, {name: value.contiguous() for name, value in tensors.items()}


def write():
    """Make the shipped files anew, from a Python prompt."""
    steps, tensors = make()
    save_file(tensors, FILE)
    text = json.dumps({"config": CONFIG, "steps": steps}, indent=1) + "\n"
    FILE.with_suffix(".json").write_text(text)


def test_the_files_are_what_transformers_computes():
    steps, tensors = make()
    stored = load_file(FILE)
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-9, atol=1e-10, msg=name)
    golden = load_golden(FILE)
    assert golden.config == CONFIG
    for ours, theirs in zip(golden.steps, steps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_every_figure_is_reproduced_and_a_wrong_one_is_seen():
    golden = load_golden(FILE)
    differences = list(replay(golden))
    assert len(differences) > 100
    assert [difference for difference in differences if not difference.ok] == []
    name = "final.decoder.pred.weight"
    wrong = {**golden.tensors, name: golden.tensors[name] + 1e-7}
    seen = [d.name for d in replay(golden._replace(tensors=wrong)) if not d.ok]
    assert seen == [name]
