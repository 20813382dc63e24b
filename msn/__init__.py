"""Masked Siamese Networks (arXiv 2204.07141): the public names, under semantic versioning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msn.api import (
        Embeddings,
        Run,
        Table,
        embed,
        evaluate,
        export,
        predict,
        pretrain,
        rank,
        show_reconstruction,
        show_views,
        suggest_labels,
    )
    from msn.errors import UserError
    from msn.method.loss import MSNLoss
    from msn.method.mae import MAE
    from msn.method.network import MSN
    from msn.weights import load_backbone, load_mae

__version__ = "0.1.0"
__all__ = [
    "MAE",
    "MSN",
    "Embeddings",
    "MSNLoss",
    "Run",
    "Table",
    "UserError",
    "embed",
    "evaluate",
    "export",
    "load_backbone",
    "load_mae",
    "predict",
    "pretrain",
    "rank",
    "show_reconstruction",
    "show_views",
    "suggest_labels",
]

_HOMES = {name: "msn.api" for name in __all__} | {
    "MAE": "msn.method.mae",
    "MSN": "msn.method.network",
    "MSNLoss": "msn.method.loss",
    "UserError": "msn.errors",
    "load_backbone": "msn.weights",
    "load_mae": "msn.weights",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: commands start without loading torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'msn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
