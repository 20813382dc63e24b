"""Data modules over small folders, set up like the shipped configuration."""

from omegaconf import OmegaConf

from msn.commands.entry import build, compose


def make_datamodule(root, **changes):
    """The module that `train.py data=folder data.root=ROOT` would have, with small views."""
    settings = {
        "root": None if root is None else str(root),
        "global_batch_size": 6,
        "num_workers": 0,
        "views": {"rand_size": 32, "focal_size": 16, "focal_views": 2, "patch_size": 8},
        "use_labels": False,
        **changes,
    }
    config = compose("train", ["experiment=photos"])
    OmegaConf.set_struct(config, False)
    config.data = OmegaConf.merge(config.data, settings)
    return build(config, "data")
