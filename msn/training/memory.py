"""How much memory a training step will take on a device, from numbers alone.

Legend: B images, T tokens of all anchor views, L tokens of one view, D embedding width, V anchor
views, K prototypes.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from msn.data.views import ViewSettings
from msn.method.masking import num_kept_patches
from msn.method.network import MSN

_MIXED = ("bf16-mixed", "16-mixed")


class Memory(NamedTuple):
    """Bytes on one device; `peak` is less than the sum, for gradients come as activations go."""

    weights: float
    """Anchor, target and prototypes; of a cut network its part and what is whole at a time."""
    optimiser: float
    """Two moments of everything trained."""
    gradients: float
    """Of everything trained, at the end of the backward pass; under DDP its buckets as well."""
    views: float
    """Of the batch; the next one may lie beside it while it is being made."""
    activations: float
    """Kept for the backward pass: of the trunk for a chunk (or the batch), of head and loss."""
    workspace: float
    """Passing tensors of one block's backward pass."""
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
    compiled: bool = True,
    processes: int = 1,
    sharded: bool = False,
) -> Memory:
    """Forecast the memory of a training step on one device.

    Args:
        network: also on the meta device.
        views: sizes and numbers of the views.
        batch_size: B of this device.
        chunk_size: images a trunk pass, None for all.
        patch_drop: of rand views.
        precision: as Lightning names it, resolved: "32-true", "bf16-mixed", ...
        compiled: whether the blocks are; it makes a difference in mixed precision.
        processes: that train together, each on a device of its own.
        sharded: whether the network is cut over them (`msn.training.sharding`); else it is DDP's.
    """
    size = 8 if precision == "64-true" else 2 if precision == "bf16-true" else 4
    held = _held_bytes(network, size, processes, sharded)
    view_bytes = bytes_of_views(views, batch_size, 2 if precision in _MIXED else size)
    images = batch_size if chunk_size is None else min(chunk_size, batch_size)
    trunk, workspace = _trunk_bytes(network, views, patch_drop, precision, compiled)
    rows = batch_size * (views.rand_views + views.focal_views)
    beyond = _head_and_loss_bytes(network, rows) + _cast_weights_bytes(network, precision)
    activations, workspace = images * trunk + beyond, images * workspace
    standing = held.weights + held.optimiser + held.buckets + view_bytes
    # Unchunked, gradients grow while activations go; chunked, they stand beside the next chunk's.
    passing = activations + workspace + (held.gradients if chunk_size is not None else 0)
    return Memory(
        weights=held.weights,
        optimiser=held.optimiser,
        gradients=held.gradients + held.buckets,
        views=view_bytes,
        activations=activations,
        workspace=workspace,
        peak=standing + max(passing, held.gradients),
    )


def bytes_of_views(views: ViewSettings, images: int, size: int) -> int:
    """Of all views of some images, `size` bytes a number."""
    pixels = (1 + views.rand_views) * views.rand_size**2 + views.focal_views * views.focal_size**2
    return images * 3 * pixels * size


def memory_installed() -> float:
    """Bytes of the host, taken or not."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


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


class _Held(NamedTuple):
    """Bytes of all that has the size of the network."""

    weights: float
    optimiser: float
    gradients: float
    buckets: float
    """In which DDP sends gradients: Lightning leaves them a copy, there from the first step on."""


def _held_bytes(network: MSN, size: int, processes: int, sharded: bool) -> _Held:
    every = size * sum(p.numel() for p in network.parameters())
    trained = size * sum(p.numel() for p in network.parameters() if p.requires_grad)
    if processes == 1 or not sharded:
        return _Held(every, 2 * trained, trained, trained if processes > 1 else 0)
    # FSDP2 gathers block by block, the next one while one computes, and leaves what is outside the
    # blocks whole from its first use to the end of the backward pass. Not measured on a device.
    trunk = network.anchor.trunk
    block = size * sum(p.numel() for p in trunk.blocks[0].parameters())
    in_blocks = block * len(trunk.blocks)
    whole = every - 2 * in_blocks + 2 * block
    whole_gradients = trained - in_blocks + block
    return _Held(
        weights=every / processes + whole,
        optimiser=2 * trained / processes,
        gradients=trained / processes + whole_gradients,
        buckets=0,
    )


def _trunk_bytes(
    network: MSN,
    views: ViewSettings,
    patch_drop: float,
    precision: str,
    compiled: bool,
) -> tuple[float, float]:
    """Kept and passing bytes of the anchor trunk for one image with all its views."""
    trunk = network.anchor.trunk
    width, ratio = trunk.embed_dim, trunk.mlp_ratio
    large, small = (side // trunk.patch_size for side in (views.rand_size, views.focal_size))
    kept = num_kept_patches(large**2, patch_drop)
    groups = [(views.rand_views, 1 + kept), (views.focal_views, 1 + small**2)]
    tokens = sum(count * length for count, length in groups)
    size = 8 if precision == "64-true" else 4
    # Beside the blocks: cut patches, the last block's tokens and their norm.
    ends = tokens * size * (3 * trunk.patch_size**2 + 3 * width)
    if precision in _MIXED:
        # In half precision the normed inputs of qkv and MLP, q, k, v, the mixed values (each
        # group's and all together), the hidden layer and its GELU: the compiler makes the GELU
        # anew only if no product of the backward pass reads it, and fc2's weight gradient does
        # (`ban_recompute_materialized_backward` of torch._functorch). The input of norm 1 is in
        # float32; that of norm 2 too where blocks are eager, compiled ones make it anew from the
        # projection in half precision. Checked against what autograd keeps under bf16 autocast on
        # a CPU; not measured on CUDA.
        second = 2 if compiled else 4
        block = tokens * width * (4 + second + 2 * (2 + 3 + 2 + 2 * ratio))
        passing = tokens * width * 2 * (2 * ratio + 4)
        # The last block takes its scores in float32, eager from a copy of the normed tokens.
        ends = tokens * (2 * 3 * trunk.patch_size**2 + (8 if compiled else 12) * width)
    else:
        block = tokens * width * size * (2 + 2 + 3 + 2 + 2 * ratio)
        passing = tokens * width * size * (2 * ratio + 4)
    return (trunk.depth - 1) * block + ends, passing


def _cast_weights_bytes(network: MSN, precision: str) -> float:
    """Copies of the anchor's weights in half precision: products of the backward pass read them."""
    if precision not in _MIXED:
        return 0.0
    return 2.0 * sum(p.numel() for p in network.anchor.parameters())


def _head_and_loss_bytes(network: MSN, rows: int) -> float:
    """Kept bytes of head and loss for V * B rows, in float32."""
    config: Mapping[str, Any] = network.anchor.head.config
    hidden, prototypes = int(config["hidden_dim"]), network.prototypes.shape[0]
    # Two hidden layers before norm, GELU and next layer; cosines, log-probabilities and their use.
    return 4.0 * rows * (6 * hidden + 4 * prototypes)
