"""One self-contained HTML page from pieces: no network, light and dark, wide and narrow."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

from msn.reporting.curves import Chart
from msn.reporting.pictures import Gallery, Picture

# Strips wider than this (px) scroll on a phone; the others shrink to fit.
_LONG = 560
# What stands in a trace of names that are not ours.
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
    """Charts in a grid; each stands in a box of fixed height, so that nothing moves later."""
    return f'<div class="charts{" wide" if wide else ""}">{"".join(map(_chart, charts))}</div>'


def gallery_html(gallery: Gallery) -> str:
    """Pictures with their captions, under a heading of their own."""
    figures = "".join(map(_picture, gallery.pictures))
    return (
        f'<h3>{escape(gallery.title)}</h3><p class="help">{escape(gallery.help)}</p>'
        f'<div class="gallery">{figures}</div>'
    )


def table_html(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, row_heads: bool = True
) -> str:
    """A table that scrolls sideways inside its box where the page is narrow.

    Args:
        header: column titles, plain text.
        rows: cells, already HTML.
        caption: says what the table is.
        row_heads: whether the first cell of a row is its heading.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{_cells(row, row_heads)}</tr>" for row in rows)
    return (
        f'<p class="help">{escape(caption)}</p><div class="table" tabindex="0">'
        f'<table aria-label="{escape(caption)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details_html(summary: str, text: str) -> str:
    """Long text that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _cells(row: Sequence[str], row_heads: bool) -> str:
    first, *rest = row
    start = f'<th scope="row">{first}</th>' if row_heads else f"<td>{first}</td>"
    return start + "".join(f"<td>{cell}</td>" for cell in rest)


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
    """Names as they are: plotly reads tags and entities in them."""
    if isinstance(value, list):
        return [escape(name, quote=False) for name in value]
    return escape(value, quote=False)


def _asset(name: str) -> str:
    return files("msn.reporting").joinpath(name).read_text(encoding="utf-8")
