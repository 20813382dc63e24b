"""`benchmarks/monitors.py` times what it says."""

import json
import time

from benchmarks import monitors
from msn.training.monitors import Monitors
from tests.commands.conftest import TINY


def test_time_in_monitors_is_theirs_and_no_step_s(script, tmp_path, monkeypatch):
    add = Monitors._add

    def slow(*arguments):
        time.sleep(0.05)
        add(*arguments)

    monkeypatch.setattr(Monitors, "_add", slow)
    tiny = [argument for argument in TINY if not argument.startswith("trainer.")]
    code, _, err = script(
        monitors,
        *("epochs=1", "steps=8", f"json={tmp_path / 'rows.json'}"),
        f"overrides={[*tiny, 'trainer.accelerator=cpu']}",
    )
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["step", "monitors, a step", "verdict, an epoch", "probe, a time"]
    assert rows["monitors, a step"]["milliseconds"] >= 50
    ratio = rows["monitors, a step"]["milliseconds"] / rows["step"]["milliseconds"]
    assert rows["monitors, a step"]["share"] == ratio
    code, _, err = script(monitors, "steps=1")
    assert (code, "steps must be a whole number >= 6" in err) == (2, True)
