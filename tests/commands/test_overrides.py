"""Whatever a person types ends in one line before anything is made, or starts a run."""

import os
import random
import signal

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from msn.commands import eval_lowshot, train
from msn.commands.entry import MISTAKES, compose, one_line
from msn.commands.run_directory import RunDirectory
from msn.method.vit import VisionTransformer
from tests.commands.conftest import TINY
from tests.conftest import SMALL_MODEL

# Of wrong types, out of any range, empty, lists, groups, other alphabets, Hydra's and YAML's own.
VALUES = [
    *("abc", "", "null", "true", "nan", "inf", "-inf", "-1", "0", "1", "0.5", "-0.001", "1e-300"),
    *("1e308", "1e9", "1000000", "100000000", "-1000000000000", "99999999999999999999999"),
    *("[]", "[1,a]", "[null]", "[[1],[2]]", "[nan]", "[1e308]", "{}", "{a:b}", "{1:2}", "ü", "名"),
    *("'x y'", "''", '"', "'", "a=b", "a,b", "[", "{", "???", "${seed}", "${nope}", "${", "\\"),
    *("last_99", "auto", "a\0b", "\udce9", "\n", "~", "/", "..", "1_1", "0x10", "007", "x" * 5000),
]
GROUPS = {
    "train": "model method data trainer logger callbacks resume protocol experiment data/views",
    "eval_lowshot": "data protocol logger",
}
LIMIT = 60  # s an override; what is slower hangs


class Started(Exception):
    """Everything is checked and a run would begin."""


class Hangs(BaseException):
    """An override took too long."""


@pytest.fixture
def started(monkeypatch):
    """Commands end where a run would make its directory, or evaluate."""

    def start(*arguments, **settings):
        raise Started

    def hang(number, frame):
        raise Hangs

    monkeypatch.setattr(RunDirectory, "create", start)
    monkeypatch.setattr(eval_lowshot, "evaluate", start)
    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.signal(signal.SIGALRM, before)
    torch.use_deterministic_algorithms(False)


def keys_of(config):
    """Every key of a configuration, groups and what stands in them."""
    found = []
    for key, value in config.items():
        found.append(key)
        found += [f"{key}.{inner}" for inner in keys_of(value)] if isinstance(value, dict) else []
    return found


def outcome(command, module, given, override):
    """None where an override starts a run, plans one or ends in a line, else what is wrong."""
    signal.alarm(LIMIT)
    try:
        module.run(compose(command, [*given, override]))  # returns from plan=true
    except Started:
        pass
    except MISTAKES as error:
        line = one_line(error)
        return None if line.strip() and len(line) < 7000 else f"says {line!r}"
    except (Exception, Hangs) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "module", "count"), [("train", train, 400), ("eval_lowshot", eval_lowshot, 200)]
)
def test_no_override_ends_in_a_traceback_or_never(
    command, module, count, started, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSN_CACHE_DIR", str(tmp_path / "cache"))
    weights = tmp_path / "weights.safetensors"
    save_file(VisionTransformer(**SMALL_MODEL).state_dict(), weights)
    given = TINY if command == "train" else [f"checkpoint={weights}", "model.num_heads=2"]
    keys = keys_of(OmegaConf.to_container(compose(command, given)))
    keys += GROUPS[command].split()
    random.seed(int(os.environ.get("MSN_TEST_SEED", "0")))
    # Each key once, the rest at random.
    drawn = [*keys, *random.choices(keys, k=max(0, count - len(keys)))]
    overrides = [f"{key}={random.choice(VALUES)}" for key in drawn]
    wrong = {}
    for override in overrides:
        if (found := outcome(command, module, given, override)) is not None:
            wrong[override[:200]] = found
    assert not wrong, "\n".join(f"{name!r}: {what}" for name, what in wrong.items())
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == [weights.name]
