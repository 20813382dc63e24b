"""docs/monitoring.md and the report know every figure that a run logs, and every verdict."""

from msn.reporting.curves import PANELS
from msn.training.judge import KINDS
from tests.conftest import ROOT
from tests.training.test_probe import train

PAGE = (ROOT / "docs" / "monitoring.md").read_text()


def test_every_logged_figure_is_explained_and_shown(tmp_path):
    _, _, rows = train(tmp_path, epochs=1, every_n_epochs=1, references=20, held_out=20)
    logged = set(rows[-1]) - {"step", "epoch"}
    # Eigenvalues take about as long as a step.
    assert [bool(row["features/rankme"]) for row in rows] == [False] * (len(rows) - 1) + [True]
    assert {name for name in logged if f"`{name}`" not in PAGE} == set()
    shown = {name for panel in PANELS for name in panel.series}
    assert logged - shown == {"speed/hours"}  # stands among the facts of the run
    only_of_adaptation = {"schedule/trunk_lr"}
    only_without_labels = {"probe/alignment", "probe/uniformity"}
    only_of_mae = {"reconstruction/error_of_means", "reconstruction/error_std"}
    assert {name for name in only_of_mae | only_of_adaptation if f"`{name}`" not in PAGE} == set()
    assert shown - logged == only_without_labels | only_of_mae | only_of_adaptation


def test_every_verdict_is_explained():
    assert {kind for kind in KINDS if f"| {kind} |" not in PAGE} == set()
