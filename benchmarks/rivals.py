"""Eight backbones of eight families with random weights, for `benchmarks/rivals.md`.

python benchmarks/rivals.py DIR   # writes DIR/NAME; prints the value of checkpoint=
"""

import sys
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from transformers import AutoConfig, AutoModel, ViTImageProcessor

SIZE = 32
SMALL = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
SMALL |= {"intermediate_size": 768, "image_size": SIZE, "patch_size": 4}
VIT = {"img_size": SIZE, "patch_size": 4, "embed_dim": 192, "depth": 3, "num_heads": 3}
HUGGING_FACE = {
    **{"mae": "vit_mae", "dinov2": "dinov2_with_registers", "dinov3": "dinov3_vit"},
    **{"ijepa": "ijepa", "beit": "beit", "siglip": "siglip_vision_model"},
    "clip": "clip_vision_model",
}
TIMM = {"dino": "vit_small_patch16_224.dino", "eva02": "eva02_small_patch14_224"}
TIMM_CONV = {"convnext": "convnext_atto"}


def main() -> None:
    """Write the directories."""
    root = Path(sys.argv[1])
    torch.manual_seed(0)
    for name, kind in HUGGING_FACE.items():
        AutoModel.from_config(AutoConfig.for_model(kind, **SMALL)).save_pretrained(root / name)
        ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(root / name)
    for name, model in {**TIMM, **TIMM_CONV}.items():
        arguments = VIT if name in TIMM else {}
        net = timm.create_model(model, num_classes=0, **arguments)
        net.pretrained_cfg["input_size"] = (3, SIZE, SIZE)
        save_for_hf(net, root / name, model_args=arguments, safe_serialization=True)
    names = [*HUGGING_FACE, *TIMM, *TIMM_CONV]
    print("[" + ",".join(f"{name}:{root / name}" for name in names) + "]")


if __name__ == "__main__":
    main()
