"""Schedules at their start, turn and end, and the figures the released code ends S/16 at."""

import math

import pytest

from msn.errors import UserError
from msn.method.schedules import Schedule, cosine, linear


def paper(**changes):
    numbers = {
        "start_lr": 2e-4,
        "lr": 1e-3,
        "final_lr": 1e-6,
        "warmup_epochs": 15,
        "weight_decay": 0.04,
        "final_weight_decay": 0.4,
        "momentum": 0.996,
        "final_momentum": 1.0,
        "sharpen_temperature": 0.25,
        "final_sharpen_temperature": 0.25,
        "schedule_stretch": 1.25,
        "epochs": 800,
        "steps_per_epoch": 1251,
    }
    return Schedule(**{**numbers, **changes})


def test_stretched_schedules_end_where_the_released_code_does():
    last = paper().at(800 * 1251 - 1)
    assert last.lr == pytest.approx(9.9e-5, rel=0.01)
    assert last.weight_decay == pytest.approx(0.366, rel=0.002)
    assert last.momentum == pytest.approx(0.9992, abs=1e-6)


def test_unstretched_schedules_finish():
    last = paper(schedule_stretch=1.0).at(800 * 1251 - 1)
    assert last.lr == pytest.approx(1e-6, rel=1e-6)
    assert last.weight_decay == pytest.approx(0.4)
    assert last.momentum == pytest.approx(1.0, abs=1e-8)


def test_learning_rate_rises_linearly_then_falls():
    schedule = paper()
    warmup = 15 * 1251
    assert schedule.at(0).lr == pytest.approx(2e-4 + 8e-4 / warmup)
    assert schedule.at(warmup - 1).lr == pytest.approx(1e-3)
    rates = [schedule.at(step).lr for step in range(warmup, 1_000_000, 5000)]
    assert rates == sorted(rates, reverse=True)


def test_momentum_starts_at_progress_zero_and_decay_does_not():
    first = paper().at(0)
    assert first.momentum == 0.996
    assert first.weight_decay > 0.04


def test_ramps_run_over_the_whole_stretched_length_and_cosines_over_whole_steps():
    """The released code's, of 9 steps: 11.25 for momentum and sharpening, 11 for the cosines."""
    schedule = paper(epochs=3, steps_per_epoch=3, warmup_epochs=0, final_sharpen_temperature=0.5)
    assert schedule.at(8).momentum == pytest.approx(0.996 + 0.004 * 8 / 11.25, abs=1e-12)
    assert schedule.at(8).sharpen_temperature == pytest.approx(0.25 + 0.25 * 8 / 11.25, abs=1e-12)
    assert schedule.at(10).lr == pytest.approx(1e-6)
    assert schedule.at(20).momentum == 1.0


def test_building_blocks_hit_both_ends_and_stay():
    for step, expected in [(0, 2.0), (10, 5.0), (99, 5.0)]:
        assert linear(step, start=2.0, final=5.0, total_steps=10) == expected
        assert cosine(step, start=2.0, final=5.0, total_steps=10) == pytest.approx(expected)
    lengths = {"warmup_epochs": 0, "schedule_stretch": 1, "epochs": 10, "steps_per_epoch": 1}
    middle = paper(start_lr=0, lr=1, final_lr=0, **lengths).at(4)
    assert middle.lr == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"warmup_epochs": 800}, "warm-up"),
        ({"lr": 0.0}, "method.lr"),
        ({"momentum": 1.1}, "method.momentum"),
        ({"sharpen_temperature": 0.0}, "sharpen_temperature"),
        ({"schedule_stretch": 0.5}, "schedule_stretch"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, named):
    with pytest.raises(UserError, match=named):
        paper(**wrong)


def test_a_trunk_that_follows_is_frozen_then_rises_and_stays_below_the_head():
    follows = paper(
        freeze_epochs=2, trunk_lr_scale=0.1, trunk_apart=True, warmup_epochs=1, epochs=9
    )
    rates = [follows.at(step) for step in range(9 * 1251)]
    assert {values.trunk_lr for values in rates[: 2 * 1251]} == {0}
    for step in (0, 624, 1250):
        values = rates[2 * 1251 + step]
        assert values.trunk_lr == pytest.approx(0.1 * values.lr * (step + 1) / 1251)
    assert all(v.trunk_lr == pytest.approx(0.1 * v.lr) for v in rates[3 * 1251 :])
    plain = paper(warmup_epochs=1, epochs=9)
    assert all(plain.at(s) == rates[s]._replace(trunk_lr=None) for s in (0, 2000, 11000))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"freeze_epochs": -1}, r"method.freeze_epochs=-1: must be >= 0"),
        ({"trunk_lr_scale": 0}, r"method.trunk_lr_scale=0: must be in \(0, 1\]"),
        ({"freeze_epochs": 785}, r"for 785 epochs and its warm-up of 15 do not fit .* of 800"),
    ],
)
def test_a_trunk_that_could_not_follow_is_refused(changes, line):
    with pytest.raises(UserError, match=line):
        paper(trunk_apart=True, **changes)


def test_a_warm_up_without_a_length_is_a_twentieth_of_the_training():
    given, none = (paper(epochs=20, warmup_epochs=warmup) for warmup in (1, None))
    assert [given.at(step) for step in range(4000)] == [none.at(step) for step in range(4000)]
    assert paper(epochs=5, steps_per_epoch=4, warmup_epochs=None).warmup_steps == 1
