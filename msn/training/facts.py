"""What a run keeps of its circumstances beside its settings, for its report."""

import platform
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from msn.data.datamodule import MSNDataModule
from msn.evaluation.table import versions
from msn.training.module import MSNModule


def facts(trainer: Trainer, data: MSNDataModule, module: MSNModule) -> dict[str, Any]:
    """Machine, sizes and versions, plain data."""
    assert module.schedule is not None
    steps = len(data.sampler(rank=trainer.global_rank, world_size=trainer.world_size))
    limit = trainer.limit_train_batches
    return {
        "device": _device_name(trainer.strategy.root_device),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "training_images": len(data.pools.train),
        "steps_per_epoch": min(steps, limit) if isinstance(limit, int) else int(steps * limit),
        "parameters": sum(p.numel() for p in module.network.anchor.trunk.parameters()),
        "versions": versions(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{device.type.upper()}, {name}, {torch.get_num_threads()} threads"
