"""Lightning's whole training on the fake CUDA device: data, views, step, guard, monitors.

The host waits where a row is logged and at the end of an epoch, and nowhere else.
"""

import contextlib
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import Strategy

from msn.commands.entry import build, compose
from msn.data.datamodule import MSNDataModule
from msn.method.network import MSN
from msn.training import guard as guarding
from msn.training.guard import Guard
from msn.training.monitors import Monitors
from msn.training.statistics import StepMeans

STEPS = 7
SMALL = ["model.embed_dim=32", "model.depth=1", "model.num_heads=2"]
OF_MSN = ["method.num_prototypes=16", "method.head.hidden_dim=32", "method.head.output_dim=16"]
OF_MAE = [f"method.decoder.{what}" for what in ("embed_dim=32", "depth=1", "num_heads=2")]


@contextlib.contextmanager
def lightning_finds_a_gpu():
    import lightning.fabric.accelerators.cuda as fabric
    import lightning.pytorch.accelerators.cuda as accelerators

    found = accelerators.CUDAAccelerator
    answers = [
        (fabric, "num_cuda_devices", lambda: 1),
        (fabric, "_check_cuda_matmul_precision", lambda *_: None),
        (torch.cuda, "set_device", lambda *_: None),
        (torch.cuda, "empty_cache", lambda: None),
        (Strategy, "teardown", lambda _: None),  # would bring weights back to the host
        (found, "setup", lambda *_: None),
        (found, "setup_device", lambda *_: None),
        (found, "teardown", lambda *_: None),
        ("msn.training.monitors.matrix_rate", None, lambda *_: 1e15),
    ]
    answers += [
        (kind, "is_available", staticmethod(lambda: True))
        for kind in {found, fabric.CUDAAccelerator}
    ]
    with contextlib.ExitStack() as stack:
        for target, name, value in answers:
            patched = (
                mock.patch(target, value)
                if name is None
                else mock.patch.object(target, name, value)
            )
            stack.enter_context(patched)
        yield


def waits_of_steps(gpu, tmp_path, *overrides):
    """What the host waits for between each batch's arrival and the next one's."""
    gpu.strict = False
    config = compose(
        "train",
        [
            f"run.root={tmp_path}", "trainer.max_epochs=1", f"trainer.limit_train_batches={STEPS}",
            "trainer.accelerator=gpu", "trainer.devices=1", "trainer.log_every_n_steps=3",
            "compile=false", "data.num_workers=0", "data.global_batch_size=16",
            "method.warmup_epochs=0", *SMALL, *overrides,
        ],
    )  # fmt: skip
    starts, arrive = [], MSNDataModule.transfer_batch_to_device

    def note(self, *args):
        starts.append(len(gpu.waits))
        return arrive(self, *args)

    with (
        lightning_finds_a_gpu(),
        mock.patch.object(MSNDataModule, "transfer_batch_to_device", note),
    ):
        data, module = build(config, "data"), build(config, "module")
        watching = [Monitors(), Guard(directory=tmp_path, max_skipped=3)]
        trainer = build(config, "trainer", callbacks=watching, loggers=[], run_dir=str(tmp_path))
        assert trainer.precision == "bf16-mixed"
        module.plan_schedule(epochs=1, steps_per_epoch=STEPS)
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == STEPS
    assert module.device.type == "cuda"
    ends = [*starts[1:], len(gpu.waits)]
    return [gpu.waits[start:end] for start, end in zip(starts, ends, strict=True)]


def check_fit(gpu, tmp_path, *overrides):
    waits = waits_of_steps(gpu, tmp_path, *overrides)
    # Rows after steps 3, 6 and 7; the first step brings states to the device.
    quiet = [waits[i] for i in (1, 3, 4)]
    assert quiet == [[], [], []]
    assert all(waits[i] for i in (2, 5))
    ranks = [wait for step in waits for wait in step if "_linalg_eigh" in wait]
    assert len(ranks) == 1  # of the epoch's last row
    assert ranks[0] in waits[-1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=digits", *OF_MSN],
        pytest.param(
            ["experiment=digits", *OF_MSN, "method.prior_exponent=0.25", "chunk_size=8"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["experiment=mae_digits", *OF_MAE], marks=pytest.mark.slow),
    ],
)
def test_a_training_waits_where_a_row_is_logged_and_nowhere_else(gpu, tmp_path, overrides):
    check_fit(gpu, tmp_path, *overrides)


ADD, MOVE = StepMeans.add, MSN.update_target


def read_the_loss(self, values):
    values["train/loss"].item()
    ADD(self, values)


def move_if_the_host_says_so(self, momentum, skip):
    if not skip:
        MOVE(self, momentum, skip)


MUTATIONS = {
    "monitors read": (StepMeans, "add", read_the_loss),
    "EMA reads": (MSN, "update_target", move_if_the_host_says_so),
    "guard copies at once": (
        guarding,
        "_see",
        lambda *a: SEE(*a)._replace(figures=SEE(*a).figures.cuda().cpu()),
    ),
}
SEE = guarding._see


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_check_sees(gpu, tmp_path, monkeypatch, mutation):
    monkeypatch.setattr(*MUTATIONS[mutation])
    with pytest.raises(AssertionError, match=r"\[\[\], \[\], \[\]\]"):
        check_fit(gpu, tmp_path, "experiment=digits", *OF_MSN)
