"""Build report.html, one page about one run or several side by side.

It says what was run, on what, how long, and with which result. The page needs no network and fits
light and dark, wide and narrow screens.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import torch
from plotly.offline import get_plotlyjs

from msn.errors import UserError
from msn.evaluation.outcomes import is_unbalanced
from msn.reporting.curves import Chart, accuracy_chart, curve_charts, table_of
from msn.reporting.learned import look
from msn.reporting.mistakes import (
    class_caption,
    class_lines,
    confusion_picture,
    main_row,
    worst_images,
)
from msn.reporting.pictures import Gallery, Picture, feature_map, galleries
from msn.reporting.reconstruction import SHOWN, reconstruction_gallery
from msn.reporting.record import RunRecord
from msn.schema import flat
from msn.weights import load_mae
from msn.weights.card import floors_note

log = logging.getLogger(__name__)

# verdict -> colour; the words always stand beside it.
_TONES = {
    "learning": "good",
    "loss at its floor": "good",
    "learning, not above floors": "warn",
    "warming up": "wait",
    "views too alike": "warn",
    "few prototypes": "warn",
}


def build_report(records: Sequence[RunRecord], *, images: int, device: torch.device) -> str:
    """The page of one run, or of several side by side.

    Args:
        records: at least one, of different names.
        images: number of training images per run for the pictures, 0 for none.
        device: computes their features.

    Returns:
        HTML that needs no other file and no network.
    """
    pieces = [_pictures(record, images, device) for record in records] if images else []
    accuracy = accuracy_chart(records)
    sections = [
        ("verdict", "Is it learning?", "".join(_verdicts(r, len(records) > 1) for r in records)),
        ("run", "What was run", _overview(records) + _differences(records)),
        ("lowshot", "Few labels", _lowshot(records, accuracy)),
        ("mistakes", "What goes wrong", "".join(_mistakes(r, images) for r in records)),
        ("curves", "Curves", charts_html(curve_charts(records), wide=len(records) > 1)),
        ("pictures", "What it has learnt", "".join(pieces)),
        ("details", "Configuration and versions", _details(records)),
    ]
    names = ", ".join(record.name for record in records)
    return page(f"Pretraining: {names}", sections)


def _pictures(record: RunRecord, images: int, device: torch.device) -> str:
    """Pictures of a run, or a line that says why there are none."""
    try:
        learned = look(record.path, record.settings, most=images, device=device)
        shown = galleries(learned)
        if record.settings["method"].get("kind") == "mae":
            mae = load_mae(record.path, num_heads=record.settings["model"]["num_heads"])
            shown.insert(0, reconstruction_gallery(mae, learned.inputs(SHOWN)))
        found = "".join(map(gallery_html, shown))
    except (UserError, OSError) as error:
        log.warning("no pictures of %s: %s", record.name, error)
        return (
            f'<h3>{escape(record.name)}</h3><p class="help">No pictures: {escape(str(error))}</p>'
        )
    return (
        f"<h3>{escape(record.name)}</h3>" + charts_html([feature_map(learned)], wide=True) + found
    )


def _mistakes(record: RunRecord, images: int) -> str:
    """Recall of each class, confusions, and if pictures are wanted the worst images."""
    row = main_row(record)
    if row is None:
        return ""
    lines = [[escape(cell) for cell in line] for line in class_lines(row)]
    heads = ["class", "held-out images", "recall"]
    parts = [table_html(heads, lines, caption=class_caption(record, row))]
    try:
        found = [confusion_picture(record), worst_images(record, row) if images else None]
        parts += [gallery_html(gallery) for gallery in found if gallery is not None]
    except (UserError, OSError) as error:
        log.warning("no worst images of %s: %s", record.name, error)
        parts.append(f'<p class="help">No worst images: {escape(str(error))}</p>')
    return "".join(parts)


def _verdicts(record: RunRecord, several: bool) -> str:
    """The last verdict, and the history of verdicts."""
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
            ["epochs", "verdict", "after the last of them"], rows, caption="History of verdicts"
        )
    )


def _stretches(verdicts: Sequence[Mapping[str, str]]) -> list[tuple[str, int, int, str]]:
    """Stretches of epochs with one verdict: kind, first and last epoch, the last one's line."""
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
    "data": lambda r: " ".join(filter(None, (r.settings["data"][k] for k in ("source", "root")))),
    "training images": lambda r: _count(r.facts.get("training_images")),
    "method": lambda r: _method(r.settings["method"]),
    "model": lambda r: _model(r),
    "batch, epochs": lambda r: _length(r),
    "time": lambda r: _time(r.last("speed/hours")),
    "images per second": lambda r: _number(r.last("speed/images_per_s")),
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


def _method(method: Mapping[str, Any]) -> str:
    if method.get("kind") == "mae":
        decoder = method["decoder"]
        return (
            f"masked autoencoder: mask ratio {method['mask_ratio']:g}, decoder of width "
            f"{decoder['embed_dim']} and depth {decoder['depth']}, lr {method['lr']:g}"
        )
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


def _time(hours: float | None) -> str | None:
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
    all_settings = [dict(flat("", record.settings)) for record in records]
    keys = sorted({key for settings in all_settings for key in settings})
    rows = [
        [escape(key), *(escape(str(settings.get(key, "not there"))) for settings in all_settings)]
        for key in keys
        if len({repr(settings.get(key, "not there")) for settings in all_settings}) > 1
        and not key.startswith(("run.", "module."))
        and "._" not in key  # Hydra's own, such as _target_
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
                "below, the 95 % bootstrap interval over the images and, if there is one, the mean "
                "with lambda cross-validated inside each label set (cv)"
            )
            parts.append(table_html(["backbone", *columns], cells, caption=caption))
            notes = floors_note(record.lowshot["rows"] if record.lowshot else [])
            parts += [f'<p class="help"><b>{escape(line)}.</b></p>' for line in notes]
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
    if is_unbalanced(row):
        low, high = row["balanced_interval"]
        text += f"<br><small>balanced {100 * row['balanced_mean']:.1f} "
        text += f"[{100 * low:.1f}, {100 * high:.1f}]</small>"
    if validated := row.get("cross_validated"):
        text += f"<br><small>cv {100 * validated['top1_mean']:.1f} \u00b1 "
        text += f"{100 * validated['top1_std']:.1f}</small>"
    if paper := row.get("paper"):
        text += f"<br><small>paper {100 * paper['top1']:.1f}</small>"
    return text


def _details(records: Sequence[RunRecord]) -> str:
    parts = [
        f"<details><summary>config.yaml of {escape(record.name)}</summary>"
        f"<pre>{escape(record.config_text)}</pre></details>"
        for record in records
    ]
    names = sorted({name for r in records for name in r.facts.get("versions", {})})
    if names:
        rows = [
            [escape(name), *(escape(r.facts.get("versions", {}).get(name, "")) for r in records)]
            for name in names
        ]
        parts.append(table_html(["", *(r.name for r in records)], rows, caption="Versions"))
    return "".join(parts)


# Strips wider than this (px) scroll on a phone; the others shrink to fit.
_LONG = 560
# Keys of a trace that hold names from the user's data.
_NAMED = ("name", "text")


def page(title: str, sections: Iterable[tuple[str, str, str]]) -> str:
    """The whole page.

    Args:
        title: of the window and the page.
        sections: anchor, heading and HTML of each, in order; empty ones are left out.
    """
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in shown)
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(heading)}</h2>{content}</section>'
        for anchor, heading, content in shown
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_asset("report.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><nav aria-label="Sections">{links}</nav></header>
<main>{body}</main>
<noscript>Curves need JavaScript; tables and pictures do not.</noscript>
<script>{get_plotlyjs()}</script>
<script>{_asset("report.js")}</script>
</body>
</html>
"""


def charts_html(charts: Sequence[Chart], *, wide: bool = False) -> str:
    """Charts in a grid, each in a box of fixed height so that nothing moves while they load."""
    return f'<div class="charts{" wide" if wide else ""}">{"".join(map(_chart, charts))}</div>'


def gallery_html(gallery: Gallery) -> str:
    """Pictures with their captions, under a heading of their own."""
    figures = "".join(map(_picture, gallery.pictures))
    return (
        f'<h3>{escape(gallery.title)}</h3><p class="help">{escape(gallery.help)}</p>'
        f'<div class="gallery">{figures}</div>'
    )


def table_html(header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str) -> str:
    """A table that scrolls sideways in its box on a narrow page.

    Args:
        header: column titles, plain text.
        rows: cells, already HTML; the first one is the row's heading.
        caption: says what the table shows.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<p class="help">{escape(caption)}</p><div class="table" tabindex="0">'
        f'<table aria-label="{escape(caption)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _picture(picture: Picture) -> str:
    kind = "strip long" if picture.width > _LONG else "strip"
    return (
        f'<figure><div class="{kind}"><img src="{picture.data}" alt="{escape(picture.alt)}" '
        f'width="{picture.width}" height="{picture.height}" decoding="async"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _chart(chart: Chart) -> str:
    traces = [
        {name: _as_text(value) if name in _NAMED else value for name, value in trace.items()}
        for trace in chart.figure["data"]
    ]
    figure = {**chart.figure, "data": traces}
    # A "<" could end the script, or begin a comment in it, in the middle of a name.
    data = json.dumps(figure, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><h3>{escape(chart.title)}</h3>'
        f'<div class="plot" role="img" aria-label="{escape(chart.alt)}"></div>'
        f'<script type="application/json">{data}</script>'
        f"<figcaption>{escape(chart.help)}</figcaption></figure>"
    )


def _as_text(value: str | list[str]) -> str | list[str]:
    """Escape names, in which plotly would read tags and entities."""
    if isinstance(value, list):
        return [escape(name, quote=False) for name in value]
    return escape(value, quote=False)


def _asset(name: str) -> str:
    return files("msn.reporting").joinpath(name).read_text(encoding="utf-8")
