"""The cost of a training step: operations, memory, and this machine's matrix rate.

Legend: B images, N patches, L = 1 + registers + N tokens of one view, T tokens of all anchor views,
D embedding width, P projection width, V anchor views, K prototypes.

A multiply-add counts as two operations. The count is nominal: kept patches through all blocks in
full, backward = 2 x forward; softmax, norms, GELU, loss, optimiser and EMA count nothing. So exact
savings (the last block computes class tokens only) count as speed, and recomputation under
`chunk_size` as slowness.
"""

import os
import time
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from msn.data.views import ViewSettings
from msn.method.mae import MAE
from msn.method.masking import num_kept_patches
from msn.method.network import MSN, Network


class Flops(NamedTuple):
    """Floating-point operations per image and training step, by kind of view."""

    target: float  # the target view, forward
    rand: float  # all rand anchors, forward and backward
    focal: float  # all focal anchors, forward and backward

    @property
    def total(self) -> float:
        """Of the whole step for one image."""
        return self.target + self.rand + self.focal


class MAEFlops(NamedTuple):
    """Floating-point operations per image and training step of MAE, forward and backward."""

    encoder: float  # the trunk, on the kept patches
    decoder: float  # with its projection to pixels, on all patches

    @property
    def total(self) -> float:
        """Of the whole step for one image."""
        return self.encoder + self.decoder


Operations = Flops | MAEFlops


def mae_flops_per_image(
    *, model: Mapping[str, Any], decoder: Mapping[str, Any], num_kept: int
) -> MAEFlops:
    """Nominal operations per image and training step of MAE.

    The trunk costs what an anchor view of `num_kept` patches costs without a head. The decoder of
    width E costs, forward: 2 (1 + num_kept) D E (embedding) + depth (24 L E^2 + 4 L^2 E) (blocks)
    + 2 L E 3 patch_size^2 (pixels).

    Args:
        model: the numbers of `VisionTransformer`.
        decoder: embed_dim, depth, num_heads of `msn.method.mae.Decoder`.
        num_kept: patches that the trunk sees.
    """
    width, depth = int(decoder["embed_dim"]), int(decoder["depth"])
    length = 1 + (int(model["img_size"]) // int(model["patch_size"])) ** 2
    embedding = 2.0 * (1 + num_kept) * int(model["embed_dim"]) * width
    blocks = depth * (24 * length * width**2 + 4 * length**2 * width)
    pixels = 2 * length * width * 3 * int(model["patch_size"]) ** 2
    return MAEFlops(
        encoder=3 * trunk_flops(model, num_kept), decoder=3 * (embedding + blocks + pixels)
    )


def flops_per_image(
    *,
    model: Mapping[str, Any],
    head: Mapping[str, Any],
    num_prototypes: int,
    patch_drop: float,
    rand_views: int,
    focal_views: int,
    rand_size: int,
    focal_size: int,
) -> Flops:
    """Nominal operations per image and training step of MSN.

    A view of N kept patches costs, forward:
    2 N 3 patch_size^2 D (patch embedding) + depth (2 L D^2 (4 + 2 mlp_ratio) + 4 L^2 D) (blocks)
    + 2 (D hidden + hidden^2 + hidden P) (head) + 2 P K (prototypes); an anchor view three times
    that. SwiGLU has 3 mlp_ratio instead of 2; turning queries and keys counts nothing.

    Args:
        model: the arguments of `VisionTransformer`.
        head: hidden_dim and output_dim of `ProjectionHead`.
        num_prototypes: K.
        patch_drop: share of patches removed from rand anchors, in [0, 1).
        rand_views: R, >= 0.
        focal_views: F, >= 0.
        rand_size: side of target and rand views, px.
        focal_size: side of focal views, px.

    Raises:
        UserError: if no patch would be left.
    """
    large, small = (size // int(model["patch_size"]) for size in (rand_size, focal_size))
    kept = num_kept_patches(large**2, patch_drop)
    shared = _head_flops(model, head, num_prototypes)
    return Flops(
        target=trunk_flops(model, large**2) + shared,
        rand=3 * rand_views * (trunk_flops(model, kept) + shared),
        focal=3 * focal_views * (trunk_flops(model, small**2) + shared),
    )


def trunk_flops(model: Mapping[str, Any], num_patches: int) -> float:
    """Forward operations of the trunk for one view of `num_patches` embedded patches."""
    width, tokens = int(model["embed_dim"]), 1 + int(model.get("registers", 0)) + num_patches
    matrices = 3 if model.get("mlp") == "swiglu" else 2
    embedding = 2 * num_patches * 3 * int(model["patch_size"]) ** 2 * width
    linear = 2 * tokens * width**2 * (4 + matrices * float(model["mlp_ratio"]))
    attention = 4 * tokens**2 * width
    return embedding + int(model["depth"]) * (linear + attention)


def _head_flops(model: Mapping[str, Any], head: Mapping[str, Any], num_prototypes: int) -> float:
    hidden, projection = int(head["hidden_dim"]), int(head["output_dim"])
    layers = int(model["embed_dim"]) * hidden + hidden**2 + hidden * projection
    return 2.0 * (layers + projection * num_prototypes)


class Memory(NamedTuple):
    """Bytes on one device; `peak` is less than the sum: gradients come as activations go."""

    weights: float  # of all networks; of a sharded one its part and the blocks whole at a time
    optimiser: float  # two moments of all trained parameters
    gradients: float  # after the backward pass; under DDP its buckets, which stay
    views: float  # of the batch
    activations: float  # kept for the backward pass: of the trunk per chunk, of head and loss
    workspace: float  # temporary tensors of one block's backward pass
    peak: float  # the most at any moment


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
        chunk_size: images per trunk pass, None for all.
        patch_drop: of rand views.
        precision: of Lightning, resolved: "32-true", "bf16-mixed", ...
        compiled: whether the blocks are; this matters in mixed precision.
        processes: number of processes, each on its own device.
        sharded: whether the network is sharded over them (FSDP2); else it is DDP's.
    """
    size = _bytes_a_number(precision)
    view_bytes = bytes_of_views(views, batch_size, 2 if precision == "bf16-mixed" else size)
    images = batch_size if chunk_size is None else min(chunk_size, batch_size)
    kept, last, passing = _trunk_bytes(network, views, patch_drop, precision, compiled)
    rows = batch_size * (views.rand_views + views.focal_views)
    return _total(
        _held_bytes(network, size, processes, sharded),
        view_bytes,
        kept=images * kept + _cast_bytes(network.anchor.trunk, precision),
        last=images * last,
        workspace=images * passing,
        beyond=_head_and_loss_bytes(network, rows) + _cast_bytes(network.anchor.head, precision),
        chunked=chunk_size is not None,
    )


def forecast_mae_memory(
    network: MAE,
    *,
    batch_size: int,
    chunk_size: int | None,
    precision: str,
    compiled: bool,
    processes: int,
    sharded: bool,
) -> Memory:
    """As `forecast_memory`, of MAE, whose only view is the target."""
    size, trunk, decoder = _bytes_a_number(precision), network.trunk, network.decoder
    images = batch_size if chunk_size is None else min(chunk_size, batch_size)
    patches, pixels = (trunk.img_size // trunk.patch_size) ** 2, 3 * trunk.patch_size**2
    seen, whole = images * (1 + network.num_kept), images * (1 + patches)
    half = 2 if precision == "bf16-mixed" else size
    kept = float(images * network.num_kept * pixels * half)
    workspace = 0.0
    for tokens, blocks, norm, model in (
        (seen, trunk.blocks, trunk.norm, trunk.model_config),
        (whole, decoder.blocks, decoder.norm, {"mlp_ratio": 4.0}),
    ):
        width = norm.normalized_shape[0]
        block, passing = _block_bytes(tokens * width, model, precision, compiled)
        kept += len(blocks) * block + tokens * width * (size + half)  # and the norm
        workspace = max(workspace, passing)
    numbers = images * patches * pixels
    return _total(
        _held_bytes(network, size, processes, sharded),
        float(batch_size * 3 * trunk.img_size**2 * size),
        kept=kept + _cast_bytes(network, precision),
        # What the prediction is off by, which is kept, and pixels as they are and as wanted.
        last=3.0 * numbers * size,
        workspace=workspace,
        beyond=0.0,
        chunked=chunk_size is not None,
    )


def _total(
    held: "_Held",
    view_bytes: float,
    *,
    kept: float,
    last: float,
    workspace: float,
    beyond: float,
    chunked: bool,
) -> Memory:
    """The peak of a step from its parts.

    Args:
        held: all that has the size of the network.
        view_bytes: of the batch.
        kept: before the last block, of a chunk if there are any.
        last: of what comes last, of a chunk.
        workspace: passing in the backward pass of a block.
        beyond: of head and loss, which see the whole batch.
        chunked: whether there are chunks.
    """
    standing = held.weights + held.optimiser + held.buckets + view_bytes
    # The backward pass has left head, loss and last block when it comes to a whole block.
    if not chunked:  # gradients grow while activations go
        most = max(kept + max(last + beyond, workspace), held.gradients)
    else:  # head and loss come before the chunks, gradients stand beside every chunk but the first
        most = max(beyond, kept + max(last, workspace) + held.gradients)
    return Memory(
        weights=held.weights,
        optimiser=held.optimiser,
        gradients=held.gradients + held.buckets,
        views=view_bytes,
        activations=kept + last + beyond,
        workspace=workspace,
        peak=standing + most,
    )


def _bytes_a_number(precision: str) -> int:
    return 8 if precision == "64-true" else 2 if precision == "bf16-true" else 4


def bytes_of_views(views: ViewSettings, images: int, size: int) -> int:
    """Bytes of all views of some images, `size` bytes per number."""
    pixels = (1 + views.rand_views) * views.rand_size**2 + views.focal_views * views.focal_side**2
    return images * 3 * pixels * size


def memory_installed() -> float:
    """Bytes of the host's memory, used or free."""
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
    buckets: float  # of DDP, which hold the gradients from the first step on


def _held_bytes(network: Network, size: int, processes: int, sharded: bool) -> _Held:
    every = size * sum(p.numel() for p in network.parameters())
    trained = size * sum(p.numel() for p in network.parameters() if p.requires_grad)
    if processes == 1 or not sharded:
        several = processes > 1
        return _Held(every, 2 * trained, *((0, trained) if several else (trained, 0)))
    # FSDP2 gathers block by block, the next one while one computes, and leaves what is outside the
    # blocks whole from its first use to the end of the backward pass.
    blocks = [[*block.parameters()] for block in chain(*network.stacks)]
    block = size * max(sum(p.numel() for p in own) for own in blocks)
    inside = [p for own in blocks for p in own]
    whole = every - size * sum(p.numel() for p in inside) + 2 * block
    whole_gradients = trained - size * sum(p.numel() for p in inside if p.requires_grad) + block
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
) -> tuple[float, float, float]:
    """Bytes of the anchor trunk for one image with all its views.

    Returns:
        Kept before the last block, kept by it, and temporary in a block's backward pass.
    """
    trunk = network.anchor.trunk
    width = trunk.embed_dim
    large, small = (side // trunk.patch_size for side in (views.rand_size, views.focal_side))
    kept = num_kept_patches(large**2, patch_drop)
    first = trunk.num_prefix_tokens
    groups = [(views.rand_views, first + kept), (views.focal_views, first + small**2)]
    tokens = sum(count * length for count, length in groups)
    size = 8 if precision == "64-true" else 4
    patches = tokens * 3 * trunk.patch_size**2 * (2 if precision == "bf16-mixed" else size)
    # Eager, a norm under autocast keeps a copy of its input in float32.
    stream = 2 if trunk.half_stream and compiled else 4
    block, passing = _block_bytes(tokens * width, trunk.model_config, precision, compiled, stream)
    if precision == "bf16-mixed":
        # The last block takes its scores in float32, eager from a copy of the normed tokens.
        last = tokens * width * (stream + (4 if compiled else 8))
    else:
        last = tokens * width * size * 3  # tokens and their norm
    return (trunk.depth - 1) * block + patches, last, passing


def _block_bytes(
    numbers: int, model: Mapping[str, Any], precision: str, compiled: bool, stream: int = 4
) -> tuple[float, float]:
    """Bytes of a block for tokens of `numbers` elements: kept, and temporary in backward.

    Under autocast the residual stream takes `stream` bytes per element.
    """
    ratio = float(model["mlp_ratio"])
    # The MLP's layer and its GELU; or gate and value, the gate's SiLU, the product.
    hidden = ratio * (4 if model.get("mlp") == "swiglu" else 2)
    # Turned queries and keys; what attention and MLP add, before the layer scale.
    more = 2 * (model.get("position") == "rope") + 2 * ("layer_scale" in model)
    if precision == "bf16-mixed":
        # In half precision the normed inputs of qkv and MLP, q, k, v, the mixed values (each
        # group's and all together), the hidden layer and its GELU: the compiler makes the GELU
        # anew only if no product of the backward pass reads it, and fc2's weight gradient does
        # (`ban_recompute_materialized_backward` of torch._functorch). The input of norm 1 is of
        # the stream; that of norm 2 too where blocks are eager, compiled ones make it anew from the
        # projection in half precision. Checked against what autograd keeps under bf16 autocast on
        # a CPU; not measured on CUDA.
        second = 2 if compiled else stream
        block = numbers * (stream + second + 2 * (2 + 3 + 2 + hidden + more))
        return block, numbers * 2 * (hidden + 4)
    size = 8 if precision == "64-true" else 4
    # Gradients of the residual stream, the hidden layer and its GELU, which is gone itself.
    return numbers * size * (2 + 2 + 3 + 2 + hidden + more), numbers * size * (hidden - ratio + 2)


def _cast_bytes(module: nn.Module, precision: str) -> float:
    """Bytes of the weights' copies in half precision, kept for the backward pass."""
    if precision != "bf16-mixed":
        return 0.0
    return 2.0 * sum(p.numel() for p in module.parameters())


def _head_and_loss_bytes(network: MSN, rows: int) -> float:
    """Bytes that head and loss keep for V * B rows, in float32."""
    config: Mapping[str, Any] = network.anchor.head.config
    hidden, prototypes = int(config["hidden_dim"]), network.prototypes.shape[0]
    # Two hidden layers before norm, GELU and next layer; cosines, log-probabilities and their use.
    return 4.0 * rows * (6 * hidden + 4 * prototypes)


_SECONDS_A_TRY, _TRIES = 0.25, 3
# A CPU without bfloat16 may take minutes for a product of full size.
_LONGEST_PRODUCT, _LEAST_SIDE = 1.0, 256


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product on a device.

    Takes about a second, up to six on a slow device. The best of a few tries counts, as other
    programs only slow it down.

    Args:
        device: of the product, with torch's number of threads.
        dtype: of the factors.
    """
    side = 8192
    if device.type == "cpu":
        side = _LEAST_SIDE
        while side < 2048 and 8 * side**3 * 2 / _rate(device, dtype, side, 0.0) < _LONGEST_PRODUCT:
            side *= 2
    return max(_rate(device, dtype, side, _SECONDS_A_TRY) for _ in range(_TRIES))


def _rate(device: torch.device, dtype: torch.dtype, side: int, least_seconds: float) -> float:
    own = torch.Generator(
        device
    )  # a resumed run measures again; the run's generators must not move
    left, right = (
        torch.randn(side, side, device=device, dtype=dtype, generator=own) for _ in range(2)
    )
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    synchronise(device)
    products, start = 0, time.perf_counter()
    while True:
        torch.mm(left, right, out=out)
        synchronise(device)
        products += 1
        seconds = time.perf_counter() - start
        if seconds >= least_seconds:
            return 2 * side**3 * products / seconds


def synchronise(device: torch.device) -> None:
    """Wait for all work on the device; for timing, never within a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
