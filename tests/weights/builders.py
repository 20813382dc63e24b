"""Small networks with weights that no initialisation gives, and checkpoints of them."""

import json

import torch
from safetensors.torch import load_file

from msn.method.network import MSN
from msn.method.vit import VisionTransformer
from msn.weights import save_backbone
from tests.conftest import GOLDEN

MODEL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 4,
}
HEAD = {"hidden_dim": 16, "output_dim": 8, "use_batch_norm": True}
PATCH_4 = {**MODEL, "img_size": 16, "patch_size": 4}
PATCH_7 = {**MODEL, "img_size": 28, "patch_size": 7, "mlp_ratio": 2.5}


@torch.no_grad()
def shaken(module, seed=0):
    """Move every parameter and buffer off its initial value: norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("running_var"):
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def make_trunk(seed=0, **changes):
    torch.manual_seed(seed)
    return shaken(VisionTransformer(**{**MODEL, **changes}), seed)


def make_network(seed=0, **changes):
    torch.manual_seed(seed)
    return shaken(MSN(model={**MODEL, **changes}, head=HEAD, num_prototypes=10), seed)


def images(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def save_run(path, trunk, **meta):
    """A run directory with nothing but its backbone."""
    save_backbone(path / "backbone.safetensors", trunk.state_dict(), meta_of(trunk, **meta))
    return path


def meta_of(trunk, **meta):
    return {"model": trunk.model_config, "epoch": 3, "licence": "Apache-2.0", **meta}


def save_checkpoint(path, network, **msn):
    """What training writes, as far as weights go."""
    states = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    header = {"format": 1, "model": network.target.trunk.model_config, "head": HEAD, "epoch": 5}
    header |= {"licence": "Apache-2.0", "init": None, "data": {"source": "digits"}, **msn}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": states, "msn": header, "epoch": 5, "optimizer_states": []}, path)
    return path


def golden(name):
    """Figures of the reference and the configuration that they belong to."""
    return load_file(GOLDEN[name]), json.loads(GOLDEN[name].with_suffix(".json").read_text())[
        "config"
    ]


def released_layout(name, only_target=False):
    """A file as facebookresearch/msn writes it, from the final weights of a golden file."""
    figures, _ = golden(name)

    def encoder(which):
        prefix = f"{which}.final."
        return {
            f"module.{key.removeprefix(prefix)}": value.float()
            if value.is_floating_point()
            else value
            for key, value in figures.items()
            if key.startswith(prefix)
        }

    layout = {
        "target_encoder": encoder("target"),
        "prototypes": figures["prototypes.final"].float(),
    }
    if only_target:
        return layout
    rest = {"opt": {"state": {}, "param_groups": []}, "epoch": 3, "loss": 1.0, "lr": 0.001}
    return {"encoder": encoder("anchor"), **layout, **rest}
