"""What a finished run leaves: the backbone, the low-shot table, and the line that says where."""

from typing import Any

from msn.commands.eval_lowshot import baselines, table_title
from msn.commands.run_directory import RunDirectory
from msn.data.datamodule import MSNDataModule
from msn.evaluation.lowshot import PIXELS, KShot, evaluate
from msn.evaluation.results import print_table, write_results
from msn.method.vit import VisionTransformer
from msn.training.module import MSNModule
from msn.weights import save_backbone

BACKBONE_FILE = "backbone.safetensors"


def finish(
    settings: dict[str, Any],
    directory: RunDirectory,
    data: MSNDataModule,
    module: MSNModule,
    protocol: KShot,
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
        backbones: dict[str, VisionTransformer | str] = {"msn": trunk}
        rows = evaluate(
            protocol,
            backbones | baselines(["random", PIXELS], trunk, settings["seed"]),
            *labelled,
            image_size=trunk.img_size,
            num_workers=data.num_workers,
            device=module.device,
        )
        print_table(rows, table_title(protocol, *(len(images) for images in labelled)))
        write_results(directory.path / "lowshot.json", rows, settings)
    directory.write_status("finished")
    print(f"run directory: {directory.path}")


def _meta(module: MSNModule) -> dict[str, Any]:
    return {
        "model": dict(module.settings["model"]),
        "method": module.settings["method"],
        "epoch": module.current_epoch,
        **module.checkpoint_info,
    }
