"""Small models of timm and trunks of ours of the same families, with the same random weights."""

import timm
import torch

from msn.method.vit import VisionTransformer

_SIZES = {"embed_dim": 64, "depth": 2, "num_heads": 4}
_V2 = {**_SIZES, "img_size": 56, "patch_size": 14, "mlp_ratio": 4.0, "layer_scale": 1e-5}
_V3 = {**_SIZES, "img_size": 64, "patch_size": 16, "mlp_ratio": 4.0, "layer_scale": 1e-5}
_V3 |= {"layer_norm_eps": 1e-5, "registers": 4, "position": "rope"}
_REGISTERS = {"registers": 4, "class_position": False}
_GIANT = {"embed_dim": 96, "mlp": "swiglu", "mlp_ratio": 8 / 3}

# timm's name: (changes of timm's arguments, ours).
FAMILIES = {
    "vit_small_patch14_dinov2": ({}, _V2),
    "vit_giant_patch14_dinov2": ({"embed_dim": 96}, _V2 | _GIANT),
    "vit_small_patch14_reg4_dinov2": ({}, _V2 | _REGISTERS),
    "vit_giant_patch14_reg4_dinov2": ({"embed_dim": 96}, _V2 | _GIANT | _REGISTERS),
    "vit_small_patch16_dinov3": ({}, _V3 | {"qkv_bias": False}),
    "vit_small_patch16_dinov3_qkvb": ({}, _V3),
    "vit_small_plus_patch16_dinov3": ({}, _V3 | {"qkv_bias": False, "mlp": "swiglu"}),
    "vit_small_plus_patch16_dinov3_qkvb": ({}, _V3 | {"mlp": "swiglu"}),
}


def randomise(model):
    """Weights that a wrong reading would show: no zeros, no ones, no tiny layer scales."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def timm_model(name, **changes):
    """The family's own model of timm, small, for images of any size."""
    arguments = {**_SIZES, "img_size": FAMILIES[name][1]["img_size"], **FAMILIES[name][0]}
    arguments |= {"dynamic_img_size": True, "num_classes": 0, **changes}
    return randomise(timm.create_model(name, **arguments))


def twins(name):
    """timm's model and our trunk."""
    theirs = timm_model(name)
    ours = VisionTransformer(**FAMILIES[name][1]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours
