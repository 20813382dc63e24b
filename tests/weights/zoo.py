"""Small models of many families with random weights, as their libraries save them."""

import json

import timm
import timm.data
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, ViTImageProcessor

from tests.weights.builders import shaken

SIZE = 32
# Numbers that all vision transformers of transformers take.
_SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": 8,
}
_TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
_PYRAMID = {"image_size": SIZE, "hidden_sizes": [8] * 4, "depths": [1] * 4}
HUGGING_FACE = {
    **dict.fromkeys(("vit", "vit_msn", "vit_mae", "dinov2", "dinov2_with_registers"), _SMALL),
    **dict.fromkeys(("deit", "ijepa", "beit", "data2vec-vision", "aimv2_vision_model"), _SMALL),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model", "pixio"), _SMALL),
    "dinov3_vit": {**_SMALL, "num_register_tokens": 2},
    "dinov2_swiglu": {**_SMALL, "use_swiglu_ffn": True},
    "clip": {"vision_config": _SMALL, "text_config": _TEXT},
    "siglip": {"vision_config": _SMALL, "text_config": _TEXT},
    "vit_quick_gelu": {**_SMALL, "hidden_act": "quick_gelu"},
    "swin": {"image_size": SIZE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1]},
    "convnextv2": _PYRAMID,
}
if "pixio" not in CONFIG_MAPPING:  # transformers 4 has none
    del HUGGING_FACE["pixio"]
HUGGING_FACE["swin"] |= {"num_heads": [1, 2], "window_size": 4}
_ViT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
TIMM = {
    **dict.fromkeys(("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"), _ViT),
    **dict.fromkeys(("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"), _ViT),
    **dict.fromkeys(("eva02_small_patch14_224", "beit_base_patch16_224"), _ViT),
    **dict.fromkeys(("vit_base_patch16_siglip_224", "vit_base_patch16_clip_224"), _ViT),
    **dict.fromkeys(("vit_base_patch16_clip_quickgelu_224", "vit_huge_patch14_gap_224"), _ViT),
    **dict.fromkeys(("deit3_small_patch16_224", "deit_small_distilled_patch16_224"), _ViT),
    "vit_small_patch16_224.dino": _ViT,
    "swin_tiny_patch4_window7_224": {
        **{"img_size": SIZE, "patch_size": 2, "embed_dim": 8, "depths": (1, 1)},
        **{"num_heads": (1, 2), "window_size": 4},
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "resnet10t": {},
}


def save_timm(path, name, **more):
    """A directory as `timm.models.save_for_hf` writes it, and its model without classifier."""
    torch.manual_seed(0)
    arguments = {**TIMM[name], **more}
    model = shaken(timm.create_model(name, num_classes=0, **arguments))
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, path / "model.safetensors"
    )
    data = {**model.pretrained_cfg, "input_size": [3, SIZE, SIZE], "num_classes": 0}
    data = {k: v for k, v in data.items() if k not in ("url", "file", "hf_hub_id")}
    content = {
        "architecture": name.partition(".")[0],
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": data,
    }
    (path / "config.json").write_text(json.dumps(content))
    return model


def save_hugging_face(path, name, **more):
    """A directory as `save_pretrained` writes it, with a processor, and its model."""
    torch.manual_seed(0)
    kind = {"dinov2_swiglu": "dinov2", "vit_quick_gelu": "vit"}.get(name, name)
    config = AutoConfig.for_model(kind, **{**HUGGING_FACE[name], **more})
    model = shaken(AutoModel.from_config(config))
    model.save_pretrained(path)
    size = {"height": SIZE, "width": SIZE}
    ViTImageProcessor(size=size, resample=3, image_mean=[0.4] * 3).save_pretrained(path)
    return model
