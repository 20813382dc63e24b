"""What a finished run leaves: the backbone, the low-shot table, and the line that says where."""

from typing import Any

from msn.commands.eval_lowshot import baselines, write_table
from msn.commands.run_directory import RunDirectory
from msn.data.datamodule import MSNDataModule
from msn.evaluation.backbones import FrozenBackbone
from msn.evaluation.lowshot import PIXELS, evaluate
from msn.evaluation.protocol import Protocol
from msn.training.module import MSNModule
from msn.weights import save_backbone

BACKBONE_FILE = "backbone.safetensors"


def finish(
    settings: dict[str, Any],
    directory: RunDirectory,
    data: MSNDataModule,
    module: MSNModule,
    protocol: Protocol,
) -> None:
    """Export the target trunk, evaluate it where there are labels, mark the run as finished.

    Raises:
        OSError: if a file cannot be written.
    """
    trunk = module.network.target.trunk.eval()
    save_backbone(directory.path / BACKBONE_FILE, trunk.state_dict(), _meta(module))
    labelled = data.labelled_sets()
    if labelled is None:
        print("no labels: no low-shot table")
    else:
        backbone = FrozenBackbone("msn", trunk, protocol.features.image_size or trunk.img_size)
        results = evaluate(
            protocol,
            [backbone, *baselines(["random", PIXELS], backbone, settings["seed"])],
            *labelled,
            num_workers=data.num_workers,
            device=module.device,
        )
        write_table(directory.path, results, labelled, settings)
    directory.write_status("finished")
    print(f"run directory: {directory.path}")


def _meta(module: MSNModule) -> dict[str, Any]:
    return {
        "model": dict(module.settings["model"]),
        "method": module.settings["method"],
        "epoch": module.current_epoch,
        **module.checkpoint_info,
    }
