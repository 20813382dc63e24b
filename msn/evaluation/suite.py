"""One table over several data sets: backbones x data sets, with averages and ranks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import rankdata

from msn.evaluation.sets import Row, printable, table_key
from msn.evaluation.table import csv_table, headings, in_markdown, versions
from msn.files import write_bytes

NOTE = (
    "Top-1 on held-out images in %, unless a title says otherwise. mean: over the data sets of the "
    "block. rank: mean of the places among all lines of the block, 1 is best, ties share theirs."
)


class Block(NamedTuple):
    """A column of the usual tables (classifier, labels, figure) over all sets that have it."""

    title: str
    sets: list[str]
    lines: list[dict[str, Any]]
    """`backbone`, `figures` by data set, `mean` and `rank` (None where a data set is missing)."""


def blocks_of(rows: Sequence[Row]) -> list[Block]:
    """Averages and ranks of rows that have their data set in `data`."""
    found = []
    for (key, figure), heading in headings(rows).items():
        value = f"{figure}_mean"
        own = [row for row in rows if table_key(row) == key and value in row]
        sets = list(dict.fromkeys(row["data"] for row in own))
        figures = {(row["backbone"], row["data"]): row[value] for row in own}
        names = list(dict.fromkeys(row["backbone"] for row in own))
        whole = [name for name in names if all((name, one) in figures for one in sets)]
        table = np.array([[figures[name, one] for one in sets] for name in whole])
        table = table.reshape(len(whole), len(sets))
        averages = dict(zip(whole, table.mean(axis=1).tolist(), strict=True))
        places = dict(zip(whole, rankdata(-table, axis=0).mean(axis=1).tolist(), strict=True))
        lines = [
            {
                "backbone": name,
                "figures": {one: figures[name, one] for one in sets if (name, one) in figures},
                "mean": averages.get(name),
                "rank": places.get(name),
            }
            for name in names
        ]
        found.append(Block(" ".join(heading), sets, lines))
    return found


def _cells(block: Block, sets: Sequence[str]) -> list[list[tuple[str, bool]]]:
    """Text of every line, with a mark at the best of each column."""
    columns = [[line["figures"].get(one) for line in block.lines] for one in sets]
    columns.append([line["mean"] for line in block.lines])
    marked = []
    for column in columns:
        best = max((value for value in column if value is not None), default=None)
        marked.append([("", False) if v is None else (f"{100 * v:.1f}", v == best) for v in column])
    ranks = [line["rank"] for line in block.lines]
    least = min((rank for rank in ranks if rank is not None), default=None)
    marked.append([("", False) if r is None else (f"{r:.1f}", r == least) for r in ranks])
    return [list(line) for line in zip(*marked, strict=True)]


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The table for a terminal; the best of each column of a block is bold."""
    table = Table(title=title, title_justify="left", caption=NOTE, caption_justify="left")
    sets = list(dict.fromkeys(row["data"] for row in rows))
    table.add_column("backbone", no_wrap=True)
    for name in [*sets, "mean", "rank"]:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for block in blocks_of(rows):
        table.add_section()
        table.add_row(Text(block.title, style="italic"))
        for line, cells in zip(block.lines, _cells(block, sets), strict=True):
            texts = [Text(text, style="bold" if best else "") for text, best in cells]
            table.add_row(Text(f"  {printable(line['backbone'])}"), *texts)
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The same in markdown."""
    sets = list(dict.fromkeys(row["data"] for row in rows))
    names = ["labels", "backbone", *sets, "mean", "rank"]
    lines = ["| " + " | ".join(names) + " |", "|---|---|" + "---:|" * (len(sets) + 2)]
    for block in blocks_of(rows):
        for line, cells in zip(block.lines, _cells(block, sets), strict=True):
            texts = [f"**{text}**" if best else text for text, best in cells]
            name = in_markdown(printable(line["backbone"]))
            lines.append("| " + " | ".join([block.title, name, *texts]) + " |")
    return "\n".join([*lines, "", NOTE, ""])


def write_suite(
    path: Path, rows: Sequence[Row], failed: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Write `lowshot.json` with averages and failures, .csv and .md beside it, and print the table.

    Args:
        path: the JSON file.
        rows: of all data sets, with `data`.
        failed: why a data set has no rows, by its name.
        config: plain data, kept in the JSON file.

    Raises:
        UserError: if the directory cannot be written.
    """
    blocks = [block._asdict() for block in blocks_of(rows)]
    left_out = [f"\nleft out: {name} ({why})" for name, why in failed.items()]
    text = markdown_table(rows) + "".join(f"{line}\n" for line in left_out)
    write_bytes(path.with_suffix(".csv"), csv_table(rows).encode(errors="replace"))
    write_bytes(path.with_suffix(".md"), text.encode(errors="replace"))
    content = {"rows": rows, "blocks": blocks, "failed": failed, "config": config}
    content["versions"] = versions()
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False, default=str) + "\n").encode())
    if rows:
        table, console = table_of(rows, "top-1 in %, all data sets"), Console()
        needed = Console(width=100_000).measure(table).maximum
        if console.is_terminal and console.width < needed:
            console.print(text, markup=False, highlight=False)
        else:
            Console(width=max(200, needed)).print(table)
