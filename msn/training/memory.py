"""How much memory a training step will take on a device, from numbers alone.

Legend: B images, T tokens of all anchor views, L tokens of one view, D embedding width, V anchor
views, K prototypes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from msn.data.views import ViewSettings
from msn.method import kernels
from msn.method.masking import num_kept_patches
from msn.method.network import MSN


class Memory(NamedTuple):
    """Bytes on one device; `peak` is less than the sum, for gradients come as activations go."""

    weights: float
    """Anchor, target and prototypes."""
    optimiser: float
    """Two moments of everything trained."""
    gradients: float
    """Of everything trained, at the end of the backward pass."""
    views: float
    """Of the batch; the next one may lie beside it while it is being made."""
    activations: float
    """Kept for the backward pass: of the trunk for a chunk (or the batch), of head and loss."""
    workspace: float
    """Passing tensors of one block's backward pass; on the CPU also holes in the heap."""
    peak: float
    """The most at any moment."""


def forecast_memory(
    network: MSN,
    views: ViewSettings,
    *,
    batch_size: int,
    chunk_size: int | None,
    patch_drop: float,
    precision: str,
    use_kernels: bool,
) -> Memory:
    """Forecast the memory of a training step on one device.

    Args:
        network: also on the meta device.
        views: sizes and numbers of the views.
        batch_size: B of this device.
        chunk_size: images a trunk pass, None for all.
        patch_drop: of rand views.
        precision: as Lightning names it, resolved: "32-true", "bf16-mixed", ...
        use_kernels: whether blocks train by `msn.method.kernels` (on the CPU).
    """
    size = 8 if precision == "64-true" else 2 if precision == "bf16-true" else 4
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad) * size
    weights = sum(p.numel() for p in network.parameters()) * size
    pixels = (1 + views.rand_views) * views.rand_size**2 + views.focal_views * views.focal_size**2
    view_bytes = batch_size * 3 * pixels * size
    images = batch_size if chunk_size is None else min(chunk_size, batch_size)
    trunk, workspace = _trunk_bytes(network, views, patch_drop, precision, use_kernels)
    beyond = _head_and_loss_bytes(network, batch_size * (views.rand_views + views.focal_views))
    activations, workspace = images * trunk + beyond, images * workspace
    if use_kernels:
        # The CPU's heap keeps what is freed and has holes: measured as twice the passing tensors,
        # and as four times under chunks.
        workspace *= 3 if chunk_size is None else 5
    standing = weights + 2 * trained + view_bytes
    # Unchunked, gradients grow while activations go; chunked, they stand beside the next chunk's.
    passing = activations + workspace + (trained if chunk_size is not None else 0)
    peak = standing + max(passing, trained)
    return Memory(weights, 2 * trained, trained, view_bytes, activations, workspace, peak)


def suggest_chunk_size(peaks: Mapping[int | None, float], limit: float) -> int | None:
    """The largest chunk that stays below a limit; None if the whole batch does.

    Args:
        peaks: forecast peak for each chunk size, and for None.
        limit: bytes.

    Raises:
        ValueError: if not even the smallest chunk fits.
    """
    if peaks[None] <= limit:
        return None
    fitting = [chunk for chunk, peak in peaks.items() if chunk is not None and peak <= limit]
    return max(fitting)


def _trunk_bytes(
    network: MSN, views: ViewSettings, patch_drop: float, precision: str, use_kernels: bool
) -> tuple[float, float]:
    """Kept and passing bytes of the anchor trunk for one image with all its views."""
    trunk = network.anchor.trunk
    width, ratio = trunk.embed_dim, trunk.mlp_ratio
    large, small = (side // trunk.patch_size for side in (views.rand_size, views.focal_size))
    kept = num_kept_patches(large**2, patch_drop)
    groups = [(views.rand_views, 1 + kept), (views.focal_views, 1 + small**2)]
    tokens = sum(count * length for count, length in groups)
    scores = sum(count * length**2 for count, length in groups) * trunk.num_heads
    use_kernels = use_kernels and max(length for _, length in groups) <= kernels.MAX_LENGTH
    size = 8 if precision == "64-true" else 4
    if precision in ("bf16-mixed", "16-mixed"):
        # Input of both norms in float32; the normed inputs of qkv and MLP, q, k, v, the mixed
        # values (each group's and all together) and the hidden layer in half precision; a compiled
        # block makes the GELU anew.
        block = tokens * width * (2 * 4 + 2 * (2 + 3 + 2 + ratio))
        passing = tokens * width * 2 * (2 * ratio + 4)
    elif use_kernels:
        # As above, the mixed values once, with the attention weights.
        block = tokens * width * size * (2 + 2 + 3 + 1 + ratio) + scores * size
        passing = tokens * width * size * (ratio + 4)
    else:
        block = tokens * width * size * (2 + 2 + 3 + 2 + 2 * ratio)
        passing = tokens * width * size * (2 * ratio + 4)
    # Cut patches, the last block's tokens and their norm.
    ends = tokens * size * (3 * trunk.patch_size**2 + 3 * width)
    return (trunk.depth - 1) * block + ends, passing


def _head_and_loss_bytes(network: MSN, rows: int) -> float:
    """Kept bytes of head and loss for V * B rows, in float32."""
    config: Mapping[str, Any] = network.anchor.head.config
    hidden, prototypes = int(config["hidden_dim"]), network.prototypes.shape[0]
    # Two hidden layers before norm, GELU and next layer; cosines, log-probabilities and their use.
    return 4.0 * rows * (6 * hidden + 4 * prototypes)
