"""Weights in, weights out: one state-dict language (timm's names), adapters at the edge."""

from msn.weights.backbone import Backbone, save_backbone
from msn.weights.foreign import ForeignBackbone
from msn.weights.initialise import initialise
from msn.weights.loading import load_backbone, open_backbone_of
from msn.weights.mae import load_mae
from msn.weights.reading import read_weights
from msn.weights.weights import Weights, build_trunk

__all__ = [
    "Backbone",
    "ForeignBackbone",
    "Weights",
    "build_trunk",
    "initialise",
    "load_backbone",
    "load_mae",
    "open_backbone_of",
    "read_weights",
    "save_backbone",
]
