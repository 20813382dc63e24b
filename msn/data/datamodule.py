"""The data module: from settings to batches of views on the training device."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from msn.data.bad_images import BadImage, BadImageLedger
from msn.data.batched_views import make_batched_views
from msn.data.dataset import ImageBatch, LabelledImages, TrainingSet
from msn.data.pools import Pools, PoolSettings, build_pools
from msn.data.reference_views import make_reference_views
from msn.data.sampler import BatchKey, EpochSampler
from msn.data.sources import ArraySource
from msn.data.views import Views, view_settings
from msn.data.workers import make_loader
from msn.errors import UserError
from msn.images.decode import full_size
from msn.images.depth import Depth
from msn.images.kinds import BadImageError
from msn.schema import Range, check_ranges

log = logging.getLogger(__name__)

BACKENDS = ("auto", "batched", "reference")
_MOST_WORKERS = 16  # per process; more rarely help, and each holds batches in memory
_LEAST_LIMIT = 64  # workers that any machine may have


@dataclass(frozen=True, kw_only=True)
class DataSettings(PoolSettings):
    """Everything below `data`; the values live in `configs/data/*.yaml`.

    Raises:
        UserError: a value is out of its range, or the source does not read it.
    """

    global_batch_size: int  # images per step over all processes
    # Worker processes per training process; None takes 0 for images in memory, else one per core
    # that this process may use.
    num_workers: int | None
    prefetch_batches: Annotated[int, Range(1, 1000)]  # that each worker prepares ahead
    seed: int  # of order and views
    max_bad_fraction: float | None  # of the files that may be unreadable, see `BadImageLedger`
    strict: bool  # whether one unreadable image, trained on or held out, ends the run
    backend: str  # one of BACKENDS; `auto` takes `batched`
    views: Mapping[str, Any]  # of `ViewSettings`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend not in BACKENDS:
            raise UserError(f"data.backend={self.backend}: must be one of {', '.join(BACKENDS)}")
        check_ranges("data", self)


class MSNDataModule(LightningDataModule):
    """Images in, views out.

    Args:
        settings: those of `DataSettings`, by keyword.

    Attributes:
        run_dir: where `bad_images.csv` is written; None writes none.
        force_resume: whether a checkpoint of other data is accepted.

    Raises:
        UserError: a setting is wrong, or there are no images.
    """

    Settings = DataSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = own = DataSettings(**settings)
        self.views = view_settings(own.views)
        self.use_reference = own.backend == "reference"
        self.pools: Pools = build_pools(own)
        self.global_batch_size, self.seed = own.global_batch_size, own.seed
        resolve_workers(own.num_workers, in_memory=self._in_memory)  # fails early
        self.ledger = BadImageLedger(
            num_images=len(self.pools.train.source),
            max_fraction=own.max_bad_fraction,
            strict=own.strict,
        )
        self.run_dir: Path | None = None
        self.force_resume = False
        self._sampler: EpochSampler | None = None
        self._position = (0, 0)
        self._labelled: tuple[LabelledImages, LabelledImages] | None = None
        # Lightning then calls `prepare_data` in a single process, and the others wait.
        self.prepare_data_per_node = False
        # Fail on a batch that cannot be cut before anything else is built.
        self.sampler(rank=0, world_size=1)

    @property
    def num_workers(self) -> int:
        """Workers of this process: as set, or the cores of the node divided by its processes."""
        # Lightning's own launcher sets no LOCAL_WORLD_SIZE, as torchrun does.
        processes = 1 if self.trainer is None else self.trainer.num_devices
        return resolve_workers(
            self.settings.num_workers, in_memory=self._in_memory, processes=processes
        )

    @property
    def depth(self) -> Depth | None:
        """Black and white of images of more than 8 bits; None if there are none."""
        return self.pools.train.source.depth

    @property
    def _in_memory(self) -> bool:
        return isinstance(self.pools.train.source, ArraySource)

    def labelled_sets(self) -> tuple[LabelledImages, LabelledImages] | None:
        """Labelled images to fit classifiers on and held-out ones to test; None without labels."""
        if self.pools.labelled is None or self.pools.held_out is None:
            return None
        if self._labelled is None:  # kept, as they know which images have been reported
            strict = self.ledger.strict
            self._labelled = (
                LabelledImages(
                    self.pools.labelled, "training", strict=strict, said=self.ledger.knows
                ),
                LabelledImages(self.pools.held_out, "held-out", strict=strict),
            )
        return self._labelled

    def sampler(self, *, rank: int, world_size: int) -> EpochSampler:
        """The order of the training images for one of several processes."""
        return EpochSampler(
            num_images=len(self.pools.train),
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def prepare_data(self) -> None:
        """Remove from `bad_images.csv` what an earlier start could not read and this one can."""
        self._open_ledger()
        self.ledger.forget(self._can_be_read)

    def _can_be_read(self, image: BadImage) -> bool:
        train = self.pools.train
        if image.number >= len(train) or train.name(image.number) != image.path:
            return True  # resume.force=true: the data are different now
        try:
            train.source.decode(int(train.positions[image.number]), full_size)
        except BadImageError:
            return False
        return True

    def train_dataloader(self) -> DataLoader:
        """Loader of decoded batches, from the position that a checkpoint stored."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        self._sampler = self.sampler(rank=rank, world_size=world)
        if self._sampler.left_out and rank == 0:
            log.info(
                "each epoch leaves out %d of %d images, others each time, because batches of %d do "
                "not divide them",
                *(self._sampler.left_out, len(self.pools.train), self.global_batch_size),
            )
        epoch, batch = self._position
        self._sampler.go_to(epoch, batch)
        return self.loader(self._sampler)

    def loader(self, sampler: EpochSampler) -> DataLoader:
        """A loader over the keys of a sampler; a batch is made whole by one worker."""
        images = TrainingSet(
            self.pools.train, self.views, seed=self.seed, reduce=not self.use_reference
        )
        several = self.num_workers > 0
        return make_loader(
            images,
            num_workers=self.num_workers,
            collate=_as_it_is,
            sampler=sampler,
            batch_size=None,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: making an iterator draws nothing from the global one.
            generator=torch.Generator(),
            persistent_workers=several,
            prefetch_factor=self.settings.prefetch_batches if several else None,
        )

    def transfer_batch_to_device(
        self, batch: ImageBatch, device: torch.device, dataloader_idx: int
    ) -> ImageBatch:
        """Bring the pixels to the device; the small tables stay on the host."""
        return batch._replace(pixels=_to_device(batch.pixels, device))

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> Views:
        """Make the views on the device that holds the pixels, and record the batch."""
        self._record(batch)
        origin = BatchKey(batch.epoch, batch.batch, batch.indices.numpy())
        return self.make_views(batch, self._view_dtype())._replace(origin=origin)

    def _view_dtype(self) -> torch.dtype:
        """Type of the views: bfloat16 under bf16-mixed, where the first layer casts them anyway.

        A method that predicts pixels gets them in the type of the weights.
        """
        if self.trainer is None:
            return torch.float32
        module = self.trainer.lightning_module
        if self.trainer.precision == "bf16-mixed" and not getattr(module, "reads_pixels", False):
            return torch.bfloat16
        return next(module.parameters()).dtype

    def make_views(self, batch: ImageBatch, dtype: torch.dtype = torch.float32) -> Views:
        """Make the views of a batch by the chosen back end."""
        device = batch.pixels.device
        if self.use_reference:
            host = batch._replace(pixels=batch.pixels.cpu())
            return make_reference_views(host, self.views, device=device, dtype=dtype)
        return make_batched_views(batch, self.views, dtype=dtype)

    def _record(self, batch: ImageBatch) -> None:
        self._position = (batch.epoch, batch.batch + 1)
        if batch.bad:
            self._open_ledger()
            self.ledger.add(batch.bad)
            self.ledger.check()

    def _open_ledger(self) -> None:
        if self.run_dir is not None:
            self.ledger.file = Path(self.run_dir) / "bad_images.csv"

    def fingerprint(self) -> dict[str, Any]:
        """Values that must stay the same for a resumed run to see the same batches."""
        train = self.pools.train
        digest = hashlib.sha256()
        step = max(1, len(train) // 1000)
        for i in range(0, len(train), step):
            digest.update(os.fsencode(train.name(i)) + b"\0")
        return {
            "num_images": len(train),
            "names": digest.hexdigest()[:16],
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "depth": 16 if self.depth is None else self.depth,
        }

    def state_dict(self) -> dict[str, Any]:
        """Position in the data and fingerprint of the data; plain values."""
        epoch, batch = self._position
        batches = len(self.sampler(rank=0, world_size=1))
        if self.trainer is not None and self.trainer.num_training_batches < batches:
            batches = int(self.trainer.num_training_batches)
        if batch >= batches:
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a stored position.

        Raises:
            UserError: the checkpoint was trained on other data, and `force_resume` is not set.
        """
        now = self.fingerprint()
        for key, before in {"depth": 16, **state_dict["fingerprint"]}.items():
            if now[key] != before and not self.force_resume:
                raise UserError(
                    f"the checkpoint's data differ in {key}: {before} then, {now[key]} now; "
                    "resume.force=true resumes all the same"
                )
        self._position = (int(state_dict["epoch"]), int(state_dict["batch"]))


def resolve_workers(num_workers: int | None, *, in_memory: bool, processes: int = 1) -> int:
    """The number of worker processes per training process.

    Args:
        num_workers: as set; None chooses.
        in_memory: whether the images are decoded already.
        processes: that train on this node; LOCAL_WORLD_SIZE may say more.

    Raises:
        UserError: a negative number, or one beyond reason for this machine.
    """
    if num_workers is None:
        if in_memory:
            return 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        processes = max(processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return max(1, min(_MOST_WORKERS, (cores or 1) // processes))
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise UserError(f"data.num_workers={num_workers}: must be a whole number >= 0, or null")
    most = max(_LEAST_LIMIT, _MOST_WORKERS * (os.cpu_count() or 1))
    if num_workers > most:
        raise UserError(
            f"data.num_workers={num_workers}: at most {most} processes on this machine's "
            f"{os.cpu_count()} cores"
        )
    return num_workers


def _to_device(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device; on CUDA the copy overlaps the previous step."""
    if device.type != "cuda":
        return pixels.to(device, non_blocking=True)
    step, copies = torch.cuda.current_stream(device), copy_stream(device)
    with torch.cuda.stream(copies):
        pixels = pixels.to(device, non_blocking=True)
    step.wait_stream(copies)
    pixels.record_stream(step)  # the next copy does not take its memory while the step reads it
    return pixels


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies batches to a CUDA device."""
    return torch.cuda.Stream(device)


def _as_it_is(batch: ImageBatch) -> ImageBatch:
    return batch
