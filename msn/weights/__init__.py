"""Weights in, weights out: one state-dict language (timm's names), adapters at the edge."""

from msn.weights.backbone import Backbone, load_backbone, save_backbone
from msn.weights.initialise import initialise
from msn.weights.mae import load_mae
from msn.weights.reading import read_weights
from msn.weights.weights import Weights, build_trunk

__all__ = [
    "Backbone",
    "Weights",
    "build_trunk",
    "initialise",
    "load_backbone",
    "load_mae",
    "read_weights",
    "save_backbone",
]
