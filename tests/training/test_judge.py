"""The rules, on rows that were recorded from short digits runs (48 wide, 64 prototypes)."""

import math

import pytest
from lightning.pytorch import seed_everything

from msn.commands.entry import build, compose
from msn.errors import UserError
from msn.training.judge import (
    FAILURES,
    KINDS,
    Facts,
    Judge,
    forgetting,
    judge,
    read_verdicts,
)
from msn.training.monitors import Monitors
from tests.test_files import largest_file

FACTS = Facts(
    num_prototypes=64,
    prior_perplexity=64,
    width=48,
    warmup_epochs=0.9,
    use_sinkhorn=True,
    me_max_weight=1.0,
    lr=3e-3,
    epochs=75,
    from_scratch=True,
)
# What monitors gave at the end of the eighth epoch.
HEALTHY = {
    "train/loss": 3.61,
    "train/cross_entropy": 3.60,
    "train/cross_entropy_floor": 2.67,
    "train/grad_norm": 1.06,
    "collapse/agreement_rand": 0.184,
    "collapse/agreement_focal": 0.137,
    "collapse/prototypes_used": 63.0,
    "collapse/prototype_perplexity": 62.7,
    "collapse/mean_prediction_entropy": 0.998,
    "features/rankme": 2.53,
    "features/std": 0.0976,
    "speed/data_wait": 0.11,
}
ME_MAX_0 = HEALTHY | {
    "train/loss": 0.00107,
    "train/cross_entropy": 0.00107,
    "train/cross_entropy_floor": 5.6e-14,
    "train/grad_norm": 0.00118,
    "collapse/agreement_rand": 1.0,
    "collapse/agreement_focal": 1.0,
    "collapse/prototypes_used": 1.0,
    "collapse/prototype_perplexity": 1.0,
    "collapse/mean_prediction_entropy": 0.00288,
    "features/rankme": 1.79,
    "features/std": 0.0815,
}
TEMPERATURE_10 = HEALTHY | {
    "train/loss": 4.14,
    "train/cross_entropy": 4.14,
    "train/cross_entropy_floor": 4.10,
    "collapse/prototypes_used": 25.0,
    "collapse/prototype_perplexity": 64.0,
    "features/rankme": 1.51,
    "features/std": 0.0546,
}


IDENTICAL_VIEWS = HEALTHY | {
    "train/loss": 1.19,
    "train/cross_entropy": 1.07,
    "train/cross_entropy_floor": 0.564,
    "collapse/agreement_rand": 0.694,
    "collapse/agreement_focal": 0.694,
    "collapse/prototypes_used": 64.0,
    "features/rankme": 1.71,
    "features/std": 0.0458,
}
LR_1 = HEALTHY | {
    "train/loss": 4.29,
    "train/cross_entropy": 4.27,
    "train/cross_entropy_floor": 3.94,
    "train/grad_norm": 0.123,
    "collapse/agreement_rand": 0.0344,
    "collapse/agreement_focal": 0.0391,
    "collapse/prototypes_used": 41.0,
    "collapse/prototype_perplexity": 64.0,
    "features/rankme": 2.67,
    "features/std": 0.106,
}


def verdict(row, *, epoch=8, step=160, first=0.1, **facts):
    return judge([row], FACTS._replace(**facts), epoch=epoch, step=step, first_agreement=first)


def test_a_healthy_run_is_learning_and_the_line_says_how():
    found = verdict(HEALTHY)
    assert (found.kind, found.is_failure) == ("learning", False)
    assert "18% (rand) / 14% (focal)" in found.line
    assert "63 of 64 prototypes" in found.line
    assert "rank 2.5 of 48" in found.line


def test_collapse_is_counted_and_names_what_is_not_set_yet():
    found = verdict(ME_MAX_0, use_sinkhorn=False, me_max_weight=0.0)
    assert found.kind == "collapsed"
    assert found.line.startswith("collapsed to 1 of 64 prototypes: raise method.me_max_weight")
    assert "method.use_sinkhorn=true" in found.line
    assert "use_sinkhorn" not in verdict(ME_MAX_0).line
    three = ME_MAX_0 | {"collapse/prototype_perplexity": 3.2}
    line = verdict(three, num_prototypes=1024, prior_perplexity=1024.0).line
    assert "collapsed to 3 of 1,024 prototypes" in line


def test_few_prototypes_are_a_collapse_if_they_stay_few_or_the_mean_prediction_goes_too():
    row = HEALTHY | {"collapse/prototype_perplexity": 5.0}
    assert verdict(row, epoch=8).kind == "few prototypes"
    assert verdict(row | {"collapse/mean_prediction_entropy": 0.4}, epoch=8).kind == "collapsed"
    assert verdict(row, epoch=14).kind == "few prototypes"
    assert verdict(row, epoch=15).kind == "collapsed"
    assert verdict(row, epoch=15, epochs=800).kind == "few prototypes"
    assert verdict(HEALTHY | {"collapse/prototype_perplexity": 1.9}).kind == "collapsed"


@pytest.mark.parametrize(
    ("knn", "rank", "line"),
    [
        (0.79, 20.0, None),
        (0.75, 20.0, None),  # within two standard errors of 500 images: 5.3 points
        (0.70, 20.0, "10-NN 70.0%, at the start 80.0%"),
        (0.85, 13.9, "effective rank 13.9, at the start 20.0"),
        (0.85, math.nan, "effective rank nan"),
    ],
)
def test_less_than_the_start_is_forgetting(knn, rank, line):
    start = {"probe/knn_top1": 0.8, "probe/rankme": 20.0}
    found = forgetting(start, {"probe/knn_top1": knn, "probe/rankme": rank}, held_out=500)
    assert (found is None) == (line is None)
    if found is not None:
        assert (found.kind, found.is_failure) == ("forgetting", False)
        assert f"forgetting: {line}" in found.line


def test_a_small_loss_of_many_images_is_forgetting_but_not_below_two_points():
    start = {"probe/knn_top1": 0.8, "probe/rankme": 20.0}
    lost = [
        forgetting(start, {"probe/knn_top1": knn, "probe/rankme": 20.0}, held_out=100_000)
        for knn in (0.785, 0.775)
    ]
    assert [found is not None for found in lost] == [False, True]


def test_a_prior_that_uses_few_prototypes_is_no_collapse():
    row = HEALTHY | {"collapse/prototype_perplexity": 5.0}
    assert verdict(row, epoch=15).kind == "collapsed"
    assert verdict(row, epoch=15, prior_perplexity=20.0).kind == "learning"


def test_features_of_one_direction_are_a_collapse_although_sinkhorn_balances_the_targets():
    found = verdict(HEALTHY | {"features/std": 0.004, "features/rankme": 1.02})
    assert found.kind == "features collapsed"
    assert "effective rank 1.0 of 48" in found.line


def test_targets_of_nearly_the_greatest_entropy_are_uniform():
    found = verdict(TEMPERATURE_10)
    assert found.kind == "uniform"
    assert "99% of the greatest entropy" in found.line
    assert "temperature" in found.line


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["train/loss", "train/grad_norm"])
def test_what_is_not_finite_has_diverged_at_once(name, value):
    rows = [HEALTHY, HEALTHY | {name: value}, HEALTHY]
    assert judge(rows, FACTS, epoch=1, step=5, first_agreement=None).kind == "diverged"


def test_no_better_than_knowing_nothing_has_diverged():
    found = verdict(LR_1, lr=1.0)
    assert found.kind == "diverged"
    assert "4.270 is not below log K = 4.159" in found.line
    assert "method.lr (now 1)" in found.line
    assert verdict(LR_1 | {"train/cross_entropy": 4.15}).kind == "learning"


def test_views_that_agree_before_anything_is_learnt_are_too_alike_from_then_on():
    found = verdict(IDENTICAL_VIEWS, first=0.589)
    assert found.kind == "views too alike"
    assert "59% of cases when little was learnt yet (now 69%)" in found.line
    assert verdict(IDENTICAL_VIEWS, first=None).kind == "views too alike"
    # Where few prototypes are in use, views agree by chance.
    few = IDENTICAL_VIEWS | {"collapse/prototype_perplexity": 14.0}
    assert verdict(few, first=None).kind == "learning"
    assert verdict(IDENTICAL_VIEWS, first=0.1).kind == "learning"
    assert verdict(IDENTICAL_VIEWS, first=0.589, from_scratch=False).kind == "learning"


def test_views_are_too_alike_at_any_time_if_every_kind_of_anchor_matches():
    row = HEALTHY | {"collapse/agreement_rand": 0.99}
    assert verdict(row).kind == "learning"
    assert verdict(row | {"collapse/agreement_focal": 0.98}).kind == "views too alike"
    del row["collapse/agreement_focal"]
    assert verdict(row).kind == "views too alike"


def test_a_loss_at_its_floor_is_no_failure():
    found = verdict(HEALTHY | {"train/cross_entropy": 2.70})
    assert (found.kind, found.is_failure) == ("loss at its floor", False)
    assert "0.03 above the targets' own entropy 2.67" in found.line


@pytest.mark.parametrize(
    ("epoch", "step", "warmup", "kind"),
    [
        (1, 1000, 0.9, "warming up"),
        (2, 59, 0.9, "warming up"),
        (2, 60, 0.9, "collapsed"),
        (2, 2500, 40, "warming up"),
        (4, 5000, 40, "collapsed"),
    ],
)
def test_nothing_is_called_a_collapse_too_early(epoch, step, warmup, kind):
    assert verdict(ME_MAX_0, epoch=epoch, step=step, warmup_epochs=warmup).kind == kind


def test_waiting_for_data_is_said_beside_the_verdict():
    found = verdict(HEALTHY | {"speed/data_wait": 0.71})
    assert found.kind == "learning"
    assert "data-bound: 71% waiting" in found.line


def test_an_epoch_is_judged_by_the_mean_of_its_rows():
    rows = [HEALTHY | {"train/cross_entropy": value} for value in (5.0, 3.5, 3.5, 3.5)]
    assert judge(rows, FACTS, epoch=8, step=160, first_agreement=0.1).kind == "learning"


def test_every_failure_is_a_kind_of_verdict():
    assert set(FAILURES) < set(KINDS)


ROW = {"step": "3", "epoch": "1", "verdict": "learning", "line": "a, b"}


def test_a_full_disk_at_a_verdict_ends_nothing_and_the_next_epoch_writes_all(tmp_path, caplog):
    judge = Judge(directory=tmp_path, on_collapse="warn")
    judge._rows = [ROW]
    with largest_file(10):
        judge._write()
    assert "verdicts.csv cannot be written: File too large; training goes on" in caplog.text
    judge._rows.append({**ROW, "step": "6"})
    judge._write()
    assert [row["step"] for row in read_verdicts(tmp_path / "verdicts.csv")] == ["3", "6"]


def test_damaged_verdicts_are_left_out(tmp_path):
    path = tmp_path / "verdicts.csv"
    path.write_bytes(b'step,epoch,verdict,line\n3,1,learning,"a, b"\n6,2\nx,3,warn,c\n\0\0\0\xff')
    assert read_verdicts(path) == [ROW]
    path.write_bytes(b"\0" * 100)
    assert read_verdicts(path) == []


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
CUT_ALIKE = [
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
        (CUT_ALIKE, "views too alike", "widen data.views"),
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
def test_a_collapsed_run_can_be_stopped(tmp_path):
    with pytest.raises(UserError, match=r"stopped after epoch 4 .*collapsed to 1 of 64"):
        verdicts(tmp_path, *NO_SINKHORN, "trainer.max_epochs=6", on_collapse="stop")
    assert len(read_verdicts(tmp_path / "verdicts.csv")) == 4
