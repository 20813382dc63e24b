"""Lists of image files: text with a path a line, or CSV with or without a header."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from msn.data.kinds import SUFFIXES
from msn.errors import UserError

log = logging.getLogger(__name__)

# Names of columns in lower case, the first one there is.
_PATH = ("path", "filepath", "filename", "file", "image")
_LABEL = ("label", "class")


class ListedImage(NamedTuple):
    """A row: path as written, label or "", and the number of its (last) line from 1."""

    path: str
    label: str
    line: int


def read_list(file: str, *, key: str) -> Iterator[ListedImage]:
    """Read the rows of a list one by one; empty rows are passed over.

    The first row is a header if a cell of it is `path`, `filepath`, `filename`, `file` or `image`,
    in whatever case: then the label is the column `label` or `class`. Without a header the first
    column is the path and the second, if there is one, the label.

    Args:
        file: the list; CSV if its name ends in `.csv`.
        key: the setting it came from, for messages.

    Raises:
        UserError: the list is missing, not text, no CSV, or a row has no path.
    """
    where = f"{key}={file}"
    if not os.path.isfile(file):
        raise UserError(f"{where}: there is no such file; must be a list of image paths")
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
        lines = _text_lines(opened, where)
        is_csv = file.lower().endswith(".csv")
        rows = _csv_rows(lines, where) if is_csv else ((n, [line]) for n, line in lines)
        path, label, first = 0, 1, True
        for number, row in rows:
            header = _columns([cell.strip() for cell in row], where) if first else None
            first = first and not any(cell.strip() for cell in row)
            if header is not None:
                path, label = header
                continue
            image = row[path].strip() if path < len(row) else ""
            name = row[label].strip() if 0 <= label < len(row) else ""
            if image:
                yield ListedImage(image, name, number)
            elif any(cell.strip() for cell in row):
                raise UserError(f"{where}: line {number} has no path")


def _text_lines(opened: Iterable[str], where: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1; other encodings than ours are full of zeros."""
    for number, line in enumerate(opened, 1):
        if "\0" in line:
            raise UserError(f"{where}: line {number} is not text in UTF-8; save the list as UTF-8")
        yield number, line


def _csv_rows(lines: Iterator[tuple[int, str]], where: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of CSV with the number of the last line of each."""
    reader = csv.reader((line for _, line in lines), strict=True)  # else the rest is one cell
    begin = 1
    try:
        for row in reader:
            yield reader.line_num, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{where}: the row that begins in line {begin} is no CSV ({error}); is a quote missing?"
        ) from None


def _columns(cells: list[str], where: str) -> tuple[int, int] | None:
    """Columns of path and label (-1: none) if this first row is a header, else None."""
    names = [cell.lower() for cell in cells]
    if any(name.endswith(SUFFIXES) for name in names):
        return None  # a class may be called `image`
    path = next((names.index(name) for name in _PATH if name in names), None)
    label = next((names.index(name) for name in _LABEL if name in names), -1)
    if path is not None:
        others = [name for i, name in enumerate(cells) if i not in (path, label)]
        if label < 0 and others:
            log.info("%s: no column is called label or class; not read: %s", where, others)
        return path, label
    if label >= 0 and len(cells) > 1:
        raise UserError(
            f"{where}: the header names no column of paths; must be one of {', '.join(_PATH)}"
        )
    return None
