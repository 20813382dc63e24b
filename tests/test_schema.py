"""What a signature says, and what is refused by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import pytest

from msn.errors import UserError
from msn.schema import Range, check_ranges, make, refuse_unknown


@dataclass(frozen=True, kw_only=True)
class Settings:
    count: Annotated[int, Range(1, 5)]
    strength: Annotated[float, Range(0, above_low=True)] = 2.0
    scale: Annotated[Sequence[float], Range(0, 1, above_low=True)] = (0.5, 1)
    name: str | None = None

    def __post_init__(self):
        check_ranges("box", self)


class Box:
    Settings = Settings

    def __init__(self, **settings):
        self.settings = Settings(**settings)


def test_a_class_is_made_from_the_settings_that_it_names():
    box = make("box", {"count": 5, "strength": 0.1, "of_others": 1}, Box)
    assert box.settings == Settings(count=5, strength=0.1)
    refuse_unknown("box", {"count": 1, "name": "x"}, Box)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"box.count is missing"),
        ({"count": 1.5}, r"box.count must be a whole number, got 1.5"),
        ({"count": 0}, r"box.count=0: must be in \[1, 5\]"),
        ({"count": 6}, r"box.count=6: must be in \[1, 5\]"),
        ({"count": 1, "strength": float("nan")}, r"box.strength must be a finite number, got nan"),
        ({"count": 1, "strength": 0}, r"box.strength=0: must be > 0"),
        ({"count": 1, "scale": [0.5]}, r"two numbers, least and greatest, both in \(0, 1\]"),
        ({"count": 1, "scale": [0.5, 0.4]}, r"box.scale=\[0.5, 0.4\]: must be two numbers"),
        ({"count": 1, "scale": [0, 0.5]}, r"box.scale=\[0, 0.5\]: must be two numbers"),
        ({"count": 1, "scale": "ab"}, r"box.scale must be a list of finite numbers, got 'ab'"),
        ({"count": 1, "name": 3}, r"box.name must be text or null, got 3"),
    ],
)
def test_what_a_class_of_settings_does_not_take_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make("box", settings, Box)


def test_unknown_keys_are_refused_with_those_that_are_known():
    with pytest.raises(UserError, match="unknown key box.size: allowed are count, strength, scale"):
        refuse_unknown("box", {"size": 1}, Box)
