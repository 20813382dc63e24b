"""Short digits runs made to fail, and healthy ones, get the verdict that they deserve."""

import pytest
from lightning.pytorch import seed_everything

from msn.commands.entry import build, compose
from msn.errors import UserError
from msn.training.judge import Judge, read_verdicts
from msn.training.monitors import Monitors

# Four epochs of 20 steps; the first two are "warming up" by rule.
SHORT = [
    "model.embed_dim=48",
    "model.depth=2",
    "method.num_prototypes=64",
    "method.head.hidden_dim=128",
    "trainer.max_epochs=4",
    "trainer.accelerator=cpu",
]
NO_SINKHORN = ["method.use_sinkhorn=false", "method.me_max_weight=0"]
IDENTICAL_VIEWS = [
    "data.views.rand_scale=[1,1]",
    "data.views.focal_scale=[1,1]",
    "data.views.focal_size=32",
    "data.views.brightness=0",
    "data.views.contrast=0",
    "method.patch_drop=0",
]


def verdicts(directory, *overrides, on_collapse="warn"):
    """Kinds of verdict of a run, epoch by epoch, and the last line."""
    config = compose("train", [*SHORT, *overrides])
    seed_everything(config.seed, verbose=False)
    data, module = build(config, "data"), build(config, "module")
    callbacks = [Monitors(), Judge(directory=directory, on_collapse=on_collapse)]
    trainer = build(config, "trainer", callbacks=callbacks, loggers=[], run_dir=directory)
    steps = len(data.sampler(rank=0, world_size=1))
    module.plan_schedule(epochs=config.trainer.max_epochs, steps_per_epoch=steps)
    trainer.fit(module, datamodule=data)
    rows = read_verdicts(directory / "verdicts.csv")
    return [row["verdict"] for row in rows], rows[-1]["line"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "kind", "told"),
    [
        (NO_SINKHORN, "collapsed", "to 1 of 64 prototypes: raise method.me_max_weight (now 0)"),
        (["method.temperature=10"], "uniform", "sharpen the targets"),
        # Seed 0 hovers about log K at lr 1: rounding decides what its third epoch is called.
        (["method.lr=1", "seed=1"], "diverged", "lower method.lr (now 1)"),
        (["method.lr=10"], "diverged", "lower method.lr (now 10)"),
        (IDENTICAL_VIEWS, "views too alike", "widen data.views"),
    ],
    ids=["me-max 0 without Sinkhorn", "temperature 10", "lr 1", "lr 10", "identical views"],
)
def test_a_run_made_to_fail_is_called_what_it_is(tmp_path, overrides, kind, told):
    kinds, line = verdicts(tmp_path, *overrides)
    assert kinds == ["warming up", "warming up", kind, kind]
    assert told in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["seed=0"], ["seed=1"], ["seed=2"], ["method=msn_no_sinkhorn"]],
    ids=" ".join,
)
def test_healthy_runs_are_not_called_wrong(tmp_path, overrides):
    kinds, _ = verdicts(tmp_path, *overrides)
    assert kinds == ["warming up", "warming up", "learning", "learning"]


@pytest.mark.slow
def test_a_collapsed_run_is_stopped_where_that_is_wished(tmp_path):
    with pytest.raises(UserError, match=r"stopped after epoch 4 .*collapsed to 1 of 64"):
        verdicts(tmp_path, *NO_SINKHORN, "trainer.max_epochs=6", on_collapse="stop")
    assert len(read_verdicts(tmp_path / "verdicts.csv")) == 4
