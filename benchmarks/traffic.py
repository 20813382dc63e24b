"""What the processes of a training step send one another, counted from the model's numbers alone.

Legend: K prototypes, H hidden width of the head, G groups of anchor views of one size (rand and
focal), N processes. Gradients and statistics are float32 unless the network is float64.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Collective(NamedTuple):
    """One kind of collective, over a whole step."""

    name: str
    kind: str
    """all-reduce or all-gather."""
    calls: int
    """Calls that wait for one another; gradients count as one, they overlap the backward pass."""
    payload: int
    """Bytes that each process brings, over all calls."""


def step_traffic(
    *,
    model: Mapping[str, Any],
    head: Mapping[str, Any],
    num_prototypes: int,
    use_sinkhorn: bool,
    sinkhorn_iterations: int,
    view_groups: int,
    processes: int,
    element_size: int,
) -> list[Collective]:
    """Collectives of one step under DDP; constant in the number of images.

    Args:
        model: the six numbers of `VisionTransformer`.
        head: hidden_dim, output_dim and use_batch_norm of `ProjectionHead`.
        num_prototypes: K.
        use_sinkhorn: whether targets are balanced.
        sinkhorn_iterations: how often.
        view_groups: G, 1 or 2.
        processes: N.
        element_size: bytes of a number, 4 or 8.
    """
    hidden, layers = int(head["hidden_dim"]), 2 if head["use_batch_norm"] else 0
    size = element_size
    trained = encoder_parameters(model, head) + num_prototypes * int(head["output_dim"])
    # Mean and variance together, with an adjoint in the anchor; the target goes forward alone.
    norms, adjoints = layers * (view_groups + 1), layers * view_groups
    sinkhorn = sinkhorn_iterations if use_sinkhorn else 0
    return [
        Collective("gradients", "all-reduce", 1, trained * size),
        Collective("head BatchNorm", "all-gather", norms, norms * 2 * hidden * size),
        Collective("head BatchNorm gradient", "all-reduce", adjoints, adjoints * 2 * hidden * size),
        Collective("Sinkhorn", "all-gather", sinkhorn, sinkhorn * num_prototypes * size),
        Collective("me-max", "all-gather", 1, num_prototypes * size),
        Collective("me-max gradient", "all-reduce", 1, num_prototypes * size),
        Collective("finite check", "all-reduce", 1, processes * 4),
    ]


def encoder_parameters(model: Mapping[str, Any], head: Mapping[str, Any]) -> int:
    """Parameters of trunk and head of the anchor."""
    width, depth = int(model["embed_dim"]), int(model["depth"])
    patch, wide = int(model["patch_size"]), int(width * float(model["mlp_ratio"]))
    tokens = 1 + (int(model["img_size"]) // patch) ** 2
    embedding = width * (3 * patch**2 + 1) + width * (1 + tokens)
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = 2 * width * wide + wide + width
    trunk = embedding + depth * (attention + mlp + 4 * width) + 2 * width
    hidden, output = int(head["hidden_dim"]), int(head["output_dim"])
    norms = 4 * hidden if head["use_batch_norm"] else 0
    return trunk + (width + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * output + norms
