"""The steps that `msn bench what=step` compares."""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

import msn
from msn.commands.lightly_step import LightlyStep
from msn.data.batched_views import make_batched_views
from msn.data.dataset import Subset, TrainingSet
from msn.data.sampler import BatchKey
from msn.data.sources import ArraySource
from msn.data.views import Views, ViewSettings
from msn.method import optim
from msn.method.optim import BufferGuard, FiniteCheck
from msn.training.cost import Flops, flops_per_image, synchronise
from msn.training.module import MSNModule

PARTS = ("views", "target", "anchors", "loss", "backward", "optimiser", "ema")
_MAX_SKIPPED = 3
_EPOCHS, _STEPS_PER_EPOCH = 1000, 100  # only so that schedules have values
_IMAGE_HEIGHT, _IMAGE_WIDTH = 375, 500  # px, of the decoded images that views are cut from


class Case(NamedTuple):
    """What is measured; plain data, for it travels to the processes."""

    model: dict[str, Any]
    method: dict[str, Any]
    views: dict[str, Any]
    batch_size: int
    chunk_size: int | None
    compile: bool | str
    precision: str
    device: str


def step_flops(case: Case) -> Flops:
    """Nominal operations of one step, see `msn.training.cost`."""
    views = ViewSettings(**case.views)
    an_image = flops_per_image(
        model=case.model,
        head=case.method["head"],
        num_prototypes=case.method["num_prototypes"],
        patch_drop=case.method["patch_drop"],
        rand_views=views.rand_views,
        focal_views=views.focal_views,
        rand_size=views.rand_size,
        focal_size=views.focal_side,
    )
    return Flops(*(case.batch_size * part for part in an_image))


class Step(Protocol):
    """One method, ready to step."""

    def step(self) -> None:
        """Forward, backward, optimiser, EMA."""


class MsnStep:
    """The product's step, as `MSNModule` and Lightning take it."""

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        self.module = MSNModule(
            model=case.model,
            method=case.method,
            seed=0,
            chunk_size=case.chunk_size,
            compile=case.compile,
        ).to(self.device, weight_type(case.precision))
        self.module.plan_schedule(epochs=_EPOCHS, steps_per_epoch=_STEPS_PER_EPOCH)
        self.module.network.train()
        # Which training has by default.
        self.check = self.module.finite_check = FiniteCheck(_MAX_SKIPPED)
        self.compiled = self.module.make_fast(self.device)
        self.optimizer = self.module.configure_optimizers()
        self.views = random_views(case, dtype=product_type(case.precision))

    def step(self) -> None:
        """As in training, the views already made."""
        with self._autocast():
            loss = self.module.training_step(self.views, 0)["loss"]
        loss.backward()
        self._finish_step()
        self._update_target()

    def parts(self) -> dict[str, float]:
        """Seconds of each part of one more step, waiting for the device after each of them."""
        network, chunk = self.module.network, self.case.chunk_size
        seconds: dict[str, float] = {}

        def timed(name: str, run: Callable[[], Any]) -> Any:
            synchronise(self.device)
            start = time.perf_counter()
            result = run()
            synchronise(self.device)
            seconds[name] = time.perf_counter() - start
            return result

        target, rand, focal = timed("views", self._make_views)
        kept = self.module.draw_kept_patches(rand)
        with self._autocast():
            wanted = timed("target", lambda: network.project_target(target, chunk))
            anchors = timed("anchors", lambda: network.project_anchors(rand, focal, kept, chunk))
            terms = timed(
                "loss", lambda: self.module.loss(anchors, wanted, network.prototypes, 0.25)
            )
        timed("backward", terms.loss.backward)
        timed("optimiser", self._finish_step)
        timed("ema", self._update_target)
        return seconds

    def _finish_step(self) -> None:
        assert self.module.schedule is not None
        self._buffers = BufferGuard(self.module.network)
        self.module.configure_gradient_clipping(self.optimizer)
        optim.set_values(self.optimizer, self.module.schedule.at(1))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _update_target(self) -> None:
        assert self.module.schedule is not None
        self.module.network.update_target(self.module.schedule.at(1).momentum, self.check.skip)
        self._buffers.restore_if(self.check.skip)

    def _make_views(self) -> Views:
        if not hasattr(self, "_decoded"):
            settings = ViewSettings(**self.case.views)
            shape = (self.case.batch_size, _IMAGE_HEIGHT, _IMAGE_WIDTH, 3)
            pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            source = ArraySource(where="noise", pixels=pixels, labels=None, classes=[])
            images = TrainingSet(Subset(source), settings, seed=0, reduce=True)
            batch = images[BatchKey(0, 0, np.arange(self.case.batch_size))]
            self._decoded = batch._replace(pixels=batch.pixels.to(self.device)), settings
            self._cut_views()
        return self._cut_views()

    def _cut_views(self) -> Views:
        return make_batched_views(*self._decoded, dtype=product_type(self.case.precision))

    def _autocast(self) -> torch.autocast:
        half = self.case.precision == "bf16-mixed"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)


class YardstickStep:
    """`benchmarks/yardstick.py`, eager and in float32, whatever the product does."""

    def __init__(self, case: Case) -> None:
        yardstick, method = _yardstick(), case.method
        device = torch.device(case.device)
        self.model = yardstick.Yardstick(
            model=case.model, head=method["head"], num_prototypes=method["num_prototypes"]
        ).to(device)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.optimizer = self.model.train().build_optimizer()
        self.numbers = yardstick.Numbers(
            lr=method["lr"],
            weight_decay=method["weight_decay"],
            momentum=method["momentum"],
            temperature=method["temperature"],
            sharpen_temperature=method["sharpen_temperature"],
            sinkhorn_iterations=method["sinkhorn_iterations"] if method["use_sinkhorn"] else 0,
            me_max_weight=method["me_max_weight"],
            clip_grad_norm=method["clip_grad_norm"] or float("inf"),
        )
        self.views = random_views(case)
        side = self.views.rand.shape[-1] // case.model["patch_size"]
        kept = int(side**2 * (1 - method["patch_drop"]))
        self.kept = torch.randperm(side**2)[:kept].to(device)

    def step(self) -> None:
        """One plain step."""
        self.model.step(self.optimizer, tuple(self.views), self.kept, self.numbers)


def _lightly_step(case: Case) -> LightlyStep:
    views = tuple(random_views(case))
    return LightlyStep(case.model, case.method, views, torch.device(case.device))


# Travel by name to the processes, so each must be a class or function of a module.
METHODS: dict[str, Callable[[Case], Step]] = {
    "msn": MsnStep,
    "eager_yardstick": YardstickStep,
    "lightly": _lightly_step,
}


def available() -> list[str]:
    """Methods that can be measured here: the yardstick from a checkout, lightly if installed."""
    found = {
        "msn": True,
        "eager_yardstick": _yardstick_path().is_file(),
        "lightly": importlib.util.find_spec("lightly") is not None,
    }
    return [name for name, there in found.items() if there]


def weight_type(precision: str) -> torch.dtype:
    """What a network's weights are in; under autocast products are taken in less."""
    return torch.float64 if precision == "64-true" else torch.float32


def product_type(precision: str) -> torch.dtype:
    """What products of matrices are taken in, and views are made in."""
    return torch.bfloat16 if precision == "bf16-mixed" else weight_type(precision)


def random_views(case: Case, *, dtype: torch.dtype = torch.float32) -> Views:
    """Normal noise in the shapes of the case's views, on its device."""
    settings, batch = ViewSettings(**case.views), case.batch_size
    large, small = settings.rand_size, settings.focal_side

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=case.device, dtype=dtype)

    return Views(
        noise(batch, 3, large, large),
        noise(settings.rand_views, batch, 3, large, large),
        noise(settings.focal_views, batch, 3, small, small),
    )


def _yardstick_path() -> Path:
    return Path(msn.__file__).parents[1] / "benchmarks" / "yardstick.py"


def _yardstick() -> ModuleType:
    spec = importlib.util.spec_from_file_location("msn_yardstick", _yardstick_path())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
