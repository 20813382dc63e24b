"""Lists of image files: text with a path a line, or a table with or without a header."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from msn.data.kinds import SUFFIXES, UNREAD_SUFFIXES
from msn.errors import UserError

log = logging.getLogger(__name__)

# Names of columns in lower case, the first one there is.
_PATH = (
    *("path", "filepath", "filename", "file", "image", "img", "file_path", "file_name"),
    *("image_path", "image_name", "image_id", "img_path"),
)
_LABEL = ("label", "class")
_SHOWN = 8  # columns that a message names
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}


class ListedImage(NamedTuple):
    """A row: path as written, label or "", and the number of its (last) line from 1."""

    path: str
    label: str
    line: int


class _Layout(NamedTuple):
    """How to read a list: separator ("": a line is a path), columns from 0, header or []."""

    separator: str
    path: int
    label: int  # -1: none
    header: list[str]


def read_list(file: str, *, key: str) -> Iterator[ListedImage]:
    """Read the rows of a list one by one; empty rows are passed over.

    The first row decides. If it names an image, its first column is the path and the second, if
    there is one, the label. If a cell of it is one of `path`, `filename`, `image` and the like, in
    whatever case, it is a header: then the label is the column `label` or `class`. Everything else
    is refused, so that a header is never taken for an image.

    Args:
        file: the list. Columns are separated by commas, semicolons or tabs; in a file that is
            called neither `.csv` nor `.tsv` a line may be a path as it is.
        key: the setting it came from, for messages.

    Raises:
        UserError: the list is missing, not text, no table, or a row has no path.
    """
    where = f"{key}={file}"
    if not os.path.isfile(file):
        raise UserError(f"{where}: there is no such file; must be a list of image paths")
    layout = _find_layout(file, where)
    if layout is None:
        return  # lists nothing
    header = layout.header
    for number, row in _rows(file, layout.separator, where):
        cells = [cell.strip() for cell in row]
        if header and cells == header:
            continue  # also further down, where lists were put one behind the other
        image = cells[layout.path] if layout.path < len(cells) else ""
        name = cells[layout.label] if 0 <= layout.label < len(cells) else ""
        if image:
            yield ListedImage(image, name, number)
        elif any(cells):
            raise UserError(f"{where}: line {number} has no path")


def _rows(file: str, separator: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of the last line of each, from 1."""
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
        lines = _text_lines(opened, where)
        if separator:
            yield from _table_rows(lines, separator, where)
        else:
            yield from ((number, [line]) for number, line in lines)


def _text_lines(opened: Iterable[str], where: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1; other encodings than ours are full of zeros."""
    for number, line in enumerate(opened, 1):
        if "\0" in line:
            raise UserError(f"{where}: line {number} is not text in UTF-8; save the list as UTF-8")
        yield number, line


def _table_rows(
    lines: Iterator[tuple[int, str]], separator: str, where: str
) -> Iterator[tuple[int, list[str]]]:
    # Without `strict` the rest after a missing quote is one cell.
    reader = csv.reader((line for _, line in lines), delimiter=separator, strict=True)
    begin = 1
    try:
        for row in reader:
            yield reader.line_num, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{where}: the row that begins in line {begin} is no CSV ({error}); is a quote missing?"
        ) from None


def _find_layout(file: str, where: str) -> _Layout | None:
    """The way to read a list in which its first row is a header or an image; None: it is empty.

    Of several ways in which it is an image the first one in which that image is there counts.
    """
    ending = os.path.splitext(file)[1].lower()
    order = {".csv": [",", ";", "\t"], ".tsv": ["\t", ",", ";"]}.get(ending, ["", "\t", ",", ";"])
    firsts = {separator: _first_row(file, separator, where) for separator in order}
    for separator, cells in firsts.items():
        if not cells:
            return None
        if not _is_image(cells[0]) and any(cell.lower() in _PATH for cell in cells):
            return _from_header(separator, cells, where)
    folder = os.path.dirname(os.path.abspath(file))
    there = [s for s, cells in firsts.items() if os.path.isfile(os.path.join(folder, cells[0]))]
    named = [s for s, cells in firsts.items() if _is_image(cells[0])]
    if there or named:
        return _Layout((there or named)[0], 0, 1, [])
    cells = max(firsts.values(), key=len)
    at = next((f" (column {i} may be)" for i, cell in enumerate(cells, 1) if _is_image(cell)), "")
    raise UserError(
        f"{where}: the first row is no image{at} and no header that names the column of paths; "
        f"columns seen: {', '.join(map(repr, cells[:_SHOWN]))}; separators tried: "
        f"{', '.join(_SEPARATORS.values())}; the header must name one of {', '.join(_PATH)}"
    )


def _first_row(file: str, separator: str, where: str) -> list[str]:
    rows = ([cell.strip() for cell in row] for _, row in _rows(file, separator, where))
    return next((row for row in rows if any(row)), [])


def _is_image(cell: str) -> bool:
    return cell.lower().endswith((*SUFFIXES, *UNREAD_SUFFIXES))


def _from_header(separator: str, cells: list[str], where: str) -> _Layout:
    names = [cell.lower() for cell in cells]
    path = next(names.index(name) for name in _PATH if name in names)
    label = next((names.index(name) for name in _LABEL if name in names), -1)
    others = [name for i, name in enumerate(cells) if i not in (path, label)]
    if label < 0 and others:
        log.info("%s: no column is called label or class; not read: %s", where, others)
    return _Layout(separator, path, label, cells)
