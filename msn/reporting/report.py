"""report.html: what was run, on what, how long, and what came of it; one run or several."""

import logging
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import torch

from msn.errors import UserError
from msn.reporting.curves import Chart, accuracy_chart, curve_charts, table_of
from msn.reporting.learned import look
from msn.reporting.page import charts_html, details_html, gallery_html, page, table_html
from msn.reporting.pictures import feature_map, galleries
from msn.reporting.record import RunRecord

log = logging.getLogger(__name__)

# verdict -> how it is coloured; the words stand beside the colour everywhere.
_TONES = {
    "learning": "good",
    "loss at its floor": "good",
    "warming up": "wait",
    "views too alike": "warn",
    "few prototypes": "warn",
}


def build_report(records: Sequence[RunRecord], *, images: int, device: torch.device) -> str:
    """The page of one run, or of several side by side.

    Args:
        records: at least one, of different names.
        images: training images of each run to look at for pictures, 0 for none.
        device: that computes their features.

    Returns:
        HTML that needs no other file and no network.
    """
    pieces = [_pictures(record, images, device) for record in records] if images else []
    accuracy = accuracy_chart(records)
    sections = [
        ("verdict", "Is it learning?", "".join(_verdicts(r, len(records) > 1) for r in records)),
        ("run", "What was run", _overview(records) + _differences(records)),
        ("lowshot", "Few labels", _lowshot(records, accuracy)),
        ("curves", "Curves", charts_html(curve_charts(records), wide=len(records) > 1)),
        ("pictures", "What it has learnt", "".join(pieces)),
        ("details", "Configuration and versions", _details(records)),
    ]
    names = ", ".join(record.name for record in records)
    return page(f"MSN pretraining: {names}", sections)


def _pictures(record: RunRecord, images: int, device: torch.device) -> str:
    """Pictures of a run; where weights or images are gone, a line that says so."""
    try:
        learned = look(record.path, record.settings, most=images, device=device)
        found = "".join(gallery_html(gallery) for gallery in galleries(learned))
    except (UserError, OSError) as error:
        log.warning("no pictures of %s: %s", record.name, error)
        return (
            f'<h3>{escape(record.name)}</h3><p class="help">No pictures: {escape(str(error))}</p>'
        )
    return (
        f"<h3>{escape(record.name)}</h3>" + charts_html([feature_map(learned)], wide=True) + found
    )


def _verdicts(record: RunRecord, several: bool) -> str:
    """The last verdict, and when it was which."""
    title = f"<h3>{escape(record.name)}</h3>" if several else ""
    if not record.verdicts:
        return f'{title}<p class="help">No verdict: no epoch was finished.</p>'
    stretches = _stretches(record.verdicts)
    last = record.verdicts[-1]
    bar = "".join(
        f'<i class="{_tone(kind)}" style="flex:{end - start + 1}" title="epochs {start} to {end}: '
        f'{escape(kind)}"></i>'
        for kind, start, end, _ in stretches
    )
    rows = [
        [
            f"{start}" if start == end else f"{start} to {end}",
            f'<span class="{_tone(kind)}-text">{escape(kind)}</span>',
            escape(line),
        ]
        for kind, start, end, line in stretches
    ]
    return (
        f'{title}<div class="verdict {_tone(last["verdict"])}"><b>After {last["epoch"]} epochs: '
        f"{escape(last['verdict'])}</b>{escape(last['line'])}</div>"
        f'<div class="timeline" aria-hidden="true">{bar}</div>'
        + table_html(
            ["epochs", "verdict", "at the end of them"], rows, caption="History of verdicts"
        )
    )


def _stretches(verdicts: Sequence[Mapping[str, str]]) -> list[tuple[str, int, int, str]]:
    """Epochs in a row of the same verdict: kind, first, last, the last one's line."""
    found: list[tuple[str, int, int, str]] = []
    for row in verdicts:
        kind, epoch = row["verdict"], int(row["epoch"])
        start = found.pop()[1] if found and found[-1][0] == kind else epoch
        found.append((kind, start, epoch, row["line"]))
    return found


def _tone(kind: str) -> str:
    return _TONES.get(kind, "bad")


_OVERVIEW: dict[str, Callable[[RunRecord], Any]] = {
    "state": lambda r: r.status.get("status"),
    "experiment": lambda r: r.settings["run"]["experiment"],
    "data": lambda r: _data(r),
    "training images": lambda r: _count(r.facts.get("training_images")),
    "method": lambda r: _method(r.settings["method"]),
    "model": lambda r: _model(r),
    "batch, epochs": lambda r: _length(r),
    "time": lambda r: _time(r),
    "images a second": lambda r: _number(r.last("speed/images_per_s")),
    "machine": lambda r: r.facts.get("device"),
    "processes": lambda r: r.facts.get("processes"),
    "precision": lambda r: r.facts.get("precision"),
    "seed": lambda r: r.settings["seed"],
    "started from": lambda r: r.settings["init"] or "random weights",
    "directory": lambda r: r.path.absolute(),
}


def _overview(records: Sequence[RunRecord]) -> str:
    rows = []
    for title, tell in _OVERVIEW.items():
        cells = [tell(record) for record in records]
        if any(cell is not None for cell in cells):
            rows.append([title, *(escape("" if cell is None else str(cell)) for cell in cells)])
    return table_html(["", *(r.name for r in records)], rows, caption="Run and machine")


def _data(record: RunRecord) -> str:
    data = record.settings["data"]
    return data["source"] if data["root"] is None else f"{data['source']} {data['root']}"


def _method(method: Mapping[str, Any]) -> str:
    sinkhorn = "Sinkhorn" if method["use_sinkhorn"] else "no Sinkhorn"
    return (
        f"{method['num_prototypes']:,} prototypes, {sinkhorn}, me-max {method['me_max_weight']:g}, "
        f"patch drop {method['patch_drop']:g}, lr {method['lr']:g}"
    )


def _model(record: RunRecord) -> str:
    model, parameters = record.settings["model"], record.facts.get("parameters")
    size = "" if parameters is None else f", {parameters / 1e6:.1f} M parameters"
    return (
        f"ViT: width {model['embed_dim']}, depth {model['depth']}, {model['img_size']} px in "
        f"patches of {model['patch_size']}{size}"
    )


def _length(record: RunRecord) -> str:
    epochs, wanted = len(record.verdicts), record.settings["trainer"]["max_epochs"]
    done = f"{wanted}" if epochs >= wanted else f"{epochs} of {wanted}"
    return f"{record.settings['data']['global_batch_size']:,}, {done} epochs"


def _time(record: RunRecord) -> str | None:
    hours = record.last("speed/hours")
    if hours is None:
        return None
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _number(number: float | None) -> str | None:
    return None if number is None else f"{number:,.4g}"


def _differences(records: Sequence[RunRecord]) -> str:
    """Settings in which several runs differ."""
    if len(records) < 2:
        return ""
    flat = [dict(_flat("", record.settings)) for record in records]
    keys = sorted({key for settings in flat for key in settings})
    rows = [
        [escape(key), *(escape(str(settings.get(key, "not there"))) for settings in flat)]
        for key in keys
        if len({repr(settings.get(key, "not there")) for settings in flat}) > 1
        and not key.startswith(("run.", "module."))
        and "._" not in key  # what Hydra builds, not how it is set
    ]
    if not rows:
        return '<p class="help">All settings are the same.</p>'
    return table_html(
        ["setting", *(r.name for r in records)], rows, caption="Settings in which the runs differ"
    )


def _lowshot(records: Sequence[RunRecord], accuracy: Chart | None) -> str:
    several = len(records) > 1
    parts = []
    for record in records:
        columns, rows = table_of(record)
        if rows:
            cells = [[escape(name), *map(_cell, found)] for name, found in rows]
            about = f"{record.name}: " if several else ""
            caption = (
                f"{about}top-1 on held-out images, mean and standard deviation over label sets; "
                "below, the 95 % bootstrap interval over the images, and where there is one the "
                "mean with lambda cross-validated inside each label set (cv)"
            )
            parts.append(table_html(["backbone", *columns], cells, caption=caption))
    if accuracy is not None:
        parts.append(charts_html([accuracy], wide=True))
    return "".join(parts) or '<p class="help">No labels, or the run is not finished: no table.</p>'


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    text = f"{100 * row['top1_mean']:.1f}"
    if row["splits"] > 1:
        text += f" \u00b1 {100 * row['top1_std']:.1f}"
    if interval := row.get("interval"):
        text += f"<br><small>[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]</small>"
    if validated := row.get("cross_validated"):
        text += f"<br><small>cv {100 * validated['top1_mean']:.1f} \u00b1 "
        text += f"{100 * validated['top1_std']:.1f}</small>"
    if paper := row.get("paper"):
        text += f"<br><small>paper {100 * paper['top1']:.1f}</small>"
    return text


def _details(records: Sequence[RunRecord]) -> str:
    parts = [
        details_html(f"config.yaml of {record.name}", record.config_text) for record in records
    ]
    names = sorted({name for r in records for name in r.facts.get("versions", {})})
    if names:
        rows = [
            [escape(name), *(escape(r.facts.get("versions", {}).get(name, "")) for r in records)]
            for name in names
        ]
        parts.append(table_html(["", *(r.name for r in records)], rows, caption="Versions"))
    return "".join(parts)


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(prefix, value)]
    dot = f"{prefix}." if prefix else ""
    return [pair for key, part in value.items() for pair in _flat(f"{dot}{key}", part)]
