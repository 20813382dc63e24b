"""Lists of image files: text with a path per line, or a table with or without a header.

A list is read once in little memory and cached until it changes.
"""

from __future__ import annotations

import csv
import logging
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple, NoReturn

import numpy as np

from msn.data.index import RealPaths
from msn.data.layout import UNLABELLED, refuse_odd_numbers
from msn.data.tables import KEEP_FROM, StringTable, Table, keep_table, kept_table, stamp
from msn.errors import UserError
from msn.images.kinds import SUFFIXES, UNREAD_SUFFIXES
from msn.progress import Progress

log = logging.getLogger(__name__)

# Names of columns in lower case, with _ for spaces; the first that exists is taken.
_PATH = (
    *("path", "filepath", "filename", "file", "image", "img", "file_path", "file_name"),
    *("image_path", "image_name", "image_id", "img_path", "image_file", "image_filename"),
    *("img_name", "image_index"),
)
_LABEL = (
    *("label", "class", "labels", "class_name", "category", "target", "class_label", "label_name"),
    *("category_name", "species", "class_id", "label_id"),
)
_SHOWN = 8  # columns that a message names
_SHOW_EVERY = 10_000  # rows


class Columns(NamedTuple):
    """Names of a table's columns, as set; None finds images and labels by common names."""

    image: str | None = None
    label: str | None = None
    suffix: str = ""  # of the images where the table leaves it out, with its dot
    group: str | None = None  # None, or a name that no column has, reads no groups


BY_NAME = Columns()


class ListIndex(NamedTuple):
    """The images of a list; fields as of `msn.data.sources.FileSource`."""

    paths: StringTable  # as they are written
    labels: np.ndarray | None
    classes: list[str]
    why: str
    groups: np.ndarray | None = None
    group_names: list[str] = []


def index_list(
    file: str,
    *,
    key: str,
    base: str,
    use_labels: bool,
    columns: Columns = BY_NAME,
    cache_from: int = KEEP_FROM,
) -> ListIndex:
    """Read a list, or its cached index.

    A file that is listed twice, by whatever links, counts once; otherwise it could be trained on
    and held out.

    Args:
        file: the list, see `read_list`.
        key: the setting it came from, for messages.
        base: folder of relative paths.
        use_labels: False ignores the labels.
        columns: names of columns, and the images' suffix, as set.
        cache_from: number of images from which on the result is cached.

    Raises:
        UserError: the list is missing, damaged or empty, or has two labels for one image.
    """
    started, base = time.time_ns(), os.path.abspath(base)
    kept = f"list {os.path.abspath(file)} in {base}, labels {use_labels}, {columns}"
    where = f"{key}={file}"
    table = kept_table(kept)
    if table is not None:
        classes, names = list(table.strings["classes"]), list(table.strings["groups"])
        labels = table.arrays["labels"] if classes else None
        groups = table.arrays["groups"] if names else None
        _say(where, table.facts["repeated"], labels)
        paths, why = table.strings["paths"], table.facts["why"]
        return ListIndex(paths, labels, classes, why, groups, names)
    watched = {file: stamp(file)} if os.path.isfile(file) else {}
    rows = _Rows(where, base, use_labels)
    index = rows.read(read_list(file, key=key, columns=columns))
    _say(where, rows.repeated, index.labels)
    if len(index.paths) >= cache_from:
        nothing = np.empty(0, np.int64)
        arrays = {
            "labels": nothing if index.labels is None else index.labels,
            "groups": nothing if index.groups is None else index.groups,
        }
        strings = {
            "paths": index.paths,
            "classes": StringTable.from_strings(index.classes),
            "groups": StringTable.from_strings(index.group_names),
        }
        facts = {"repeated": rows.repeated, "why": index.why}
        keep_table(kept, Table(arrays, strings, facts), watched, started)
    return index


def _say(where: str, repeated: int, labels: np.ndarray | None) -> None:
    if repeated:
        log.warning("%s: %d rows repeat an earlier image; duplicates ignored", where, repeated)
    without = 0 if labels is None else int((labels == UNLABELLED).sum())
    if labels is not None and without:
        log.warning(
            "%s: %d of %d rows have no label: their images train and are not evaluated",
            *(where, without, len(labels)),
        )


class _Rows:
    """The rows of a list, without a Python object per row.

    Args:
        where: name of the list in messages.
        base: folder of relative paths, absolute.
        use_labels: False ignores the labels.

    Attributes:
        repeated: number of rows left out because an earlier one has their image.
    """

    def __init__(self, where: str, base: str, use_labels: bool) -> None:
        self._where, self._base, self._use_labels = where, base, use_labels
        self._text, self._ends = bytearray(), array("q", [0])
        self._lines, self._hashes, self._labels = array("q"), array("q"), array("q")
        self._numbers: dict[str, int] = {}
        self._groups, self._group_numbers = array("q"), dict[str, int]()
        self._real = RealPaths()
        self.repeated = 0

    def read(self, rows: Iterator[ListedImage]) -> ListIndex:
        """Collect the rows and check them together."""
        with Progress("reading the list") as progress:
            for row in rows:
                self._add(row)
                if len(self._lines) % _SHOW_EVERY == 0:
                    progress.advance(title=f"reading the list: {len(self._lines)} images")
        if not self._lines:
            raise UserError(f"{self._where}: lists no image")
        ends = np.frombuffer(self._ends, np.int64)
        self._paths = StringTable(np.frombuffer(self._text, np.uint8), ends)
        labels = np.frombuffer(self._labels, np.int64)
        repeated = self._repeated()
        self.repeated = len(repeated)
        stays = np.ones(len(labels), bool)
        stays[repeated] = False
        index = self._with_classes(self._paths.where(stays), labels[stays])
        if not self._group_numbers:
            return index
        groups = np.frombuffer(self._groups, np.int64)[stays]
        return index._replace(groups=groups, group_names=list(self._group_numbers))

    def _add(self, row: ListedImage) -> None:
        self._text += os.fsencode(row.path)
        self._ends.append(len(self._text))
        self._lines.append(row.line)
        self._hashes.append(hash(self._plain(row.path)))
        if row.group is not None:
            if not row.group:
                raise UserError(f"{self._where}: line {row.line} has no group (data.group)")
            numbers = self._group_numbers
            self._groups.append(numbers.setdefault(row.group, len(numbers)))
        if row.label and self._use_labels:
            self._labels.append(self._numbers.setdefault(row.label, len(self._numbers)))
        else:
            self._labels.append(UNLABELLED)

    def _plain(self, path: str) -> str:
        """The real path: the same text for all ways to name a file."""
        return self._real.of(os.path.join(self._base, path))

    def _repeated(self) -> list[int]:
        """Rows that repeat the image of an earlier row; UserError if their labels differ."""
        hashes = np.frombuffer(self._hashes, np.int64)
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        first: dict[str, int] = {}
        repeated = []
        for i in np.flatnonzero(counts[inverse] > 1).tolist():
            before = first.setdefault(self._plain(self._paths[i]), i)
            if before != i:
                self._check_same_label(before, i)
                repeated.append(i)
        return repeated

    def _check_same_label(self, first: int, later: int) -> None:
        labels = [self._labels[first], self._labels[later]]
        if labels[0] != labels[1]:
            one, other = ([*self._numbers, ""][number] for number in labels)
            raise UserError(
                f"{self._where}: {self._paths[later]} is there twice, with the labels {one!r} "
                f"(line {self._lines[first]}) and {other!r} (line {self._lines[later]})"
            )

    def _with_classes(self, paths: StringTable, labels: np.ndarray) -> ListIndex:
        """Number the classes by their sorted names."""
        refuse_odd_numbers(list(self._numbers), self._where)
        if len(self._numbers) < 2:
            return ListIndex(paths, None, [], self._why())
        classes = sorted(self._numbers)
        number = np.empty(len(classes), np.int64)
        number[[self._numbers[name] for name in classes]] = np.arange(len(classes))
        # -1 of a row without a label takes the last entry.
        return ListIndex(paths, np.append(number, UNLABELLED)[labels], classes, "")

    def _why(self) -> str:
        if not self._use_labels:
            return "data.use_labels=false"
        if self._numbers:
            return f"all rows have the label {next(iter(self._numbers))}, and two are needed"
        return (
            "no row has a label: it stands in the column that the header calls label or class, in "
            "a list without a header in the second"
        )


class ListedImage(NamedTuple):
    """A row of a list."""

    path: str  # as written
    label: str  # or ""
    line: int  # number of its last line, from 1
    group: str | None = None  # None without a column of groups


class _Layout(NamedTuple):
    """Format of a list; columns count from 0, -1 means that there is none."""

    separator: str  # "": a line is a path
    path: int
    label: int
    header: list[str]  # [] without a header
    group: int = -1


def read_list(file: str, *, key: str, columns: Columns = BY_NAME) -> Iterator[ListedImage]:
    """Read the rows of a list one by one; empty rows are skipped.

    The first row decides. If it names an image, its first column is the path and the second, if
    there is one, the label. If one of its cells is `path`, `filename`, `image` or similar, in any
    case, it is a header, and the label is the column `label`, `class` or similar. Everything else
    is refused, so that a header is never taken for an image.

    Args:
        file: the list. Columns are separated by commas, semicolons or tabs; in a file that is
            neither `.csv` nor `.tsv` a whole line may be a path.
        key: the setting it came from, for messages.
        columns: names of columns, and the images' suffix, as set.

    Raises:
        UserError: the list is missing, not text, not a table, lacks a column, or a row has no path.
    """
    where = f"{key}={file}"
    if not os.path.isfile(file):
        raise UserError(f"{where}: there is no such file; it must be a list of image paths")
    layout = _find_layout(file, where, columns)
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
            ending = "" if image.lower().endswith(columns.suffix.lower()) else columns.suffix
            group = cells[layout.group] if layout.group < len(cells) else ""
            yield ListedImage(image + ending, name, number, group if layout.group >= 0 else None)
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
    """Numbered lines, from 1; a zero character means UTF-16 or UTF-32."""
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
            f"{where}: the row from line {begin} on is not CSV ({error}); is a quote missing?"
        ) from None


def _find_layout(file: str, where: str, columns: Columns) -> _Layout | None:
    """The format in which the first row is a header or an image; None if the list is empty.

    If several do, the first one whose image exists is taken.
    """
    ending = os.path.splitext(file)[1].lower()
    order = {".csv": [",", ";", "\t"], ".tsv": ["\t", ",", ";"]}.get(ending, ["", "\t", ",", ";"])
    firsts = {separator: _first_row(file, separator, where) for separator in order}
    for separator, cells in firsts.items():
        if not cells:
            return None
        if {columns.image, columns.label, columns.group} & set(cells):
            return _from_header(separator, cells, where, columns)
        if not _is_image(cells[0]) and any(_plain_name(cell) in _PATH for cell in cells):
            return _from_header(separator, cells, where, columns)
    if columns.image or columns.label:
        _refuse_column(columns, max(firsts.values(), key=len), where)
    folder = os.path.dirname(os.path.abspath(file))
    there = [s for s, cells in firsts.items() if os.path.isfile(os.path.join(folder, cells[0]))]
    cells = max(firsts.values(), key=len)
    least = len(cells) if ending in (".csv", ".tsv") else 1  # there, no whole row is a path
    named = [s for s, row in firsts.items() if _is_image(row[0]) and len(row) >= least]
    if there or named:
        separator = (there or named)[0]
        if len(firsts[separator]) > 2:
            raise UserError(
                f"{where}: without a header, a list has a path and a label per row; "
                f"{_seen(firsts[separator])}; a first line such as path,label names them"
            )
        return _Layout(separator, 0, 1, [])
    at = next((f" (column {i} may be)" for i, cell in enumerate(cells, 1) if _is_image(cell)), "")
    raise UserError(
        f"{where}: the first row is no image{at} and no header that names the column of paths; "
        f"{_seen(cells)}; separators tried: comma, semicolon, tab; the header must name one of "
        f"{', '.join(_PATH)}, or data.image_column=NAME says which"
    )


def _seen(cells: list[str]) -> str:
    return f"columns seen: {', '.join(map(repr, cells[:_SHOWN]))}"


def _first_row(file: str, separator: str, where: str) -> list[str]:
    rows = ([cell.strip() for cell in row] for _, row in _rows(file, separator, where))
    return next((row for row in rows if any(row)), [])


def _is_image(cell: str) -> bool:
    return cell.lower().endswith((*SUFFIXES, *UNREAD_SUFFIXES))


def _from_header(separator: str, cells: list[str], where: str, columns: Columns) -> _Layout:
    names = [_plain_name(cell) for cell in cells]
    path = _column(cells, columns.image, [names.index(name) for name in _PATH if name in names])
    label = _column(cells, columns.label, [names.index(name) for name in _LABEL if name in names])
    if path < 0 or (columns.label is not None and label < 0):
        _refuse_column(columns, cells, where)
    group = _column(cells, columns.group, [])
    others = [name for i, name in enumerate(cells) if i not in (path, label, group)]
    if others:
        found = "no column is called label or class" if label < 0 else f"labels: {cells[label]!r}"
        log.info("%s: paths: %r; %s; not read: %s", where, cells[path], found, others)
    return _Layout(separator, path, label, cells, group)


def _plain_name(cell: str) -> str:
    return cell.lower().replace(" ", "_").replace("-", "_")


def _column(cells: list[str], wanted: str | None, found: list[int]) -> int:
    """Number of a column, -1 if there is none."""
    if wanted is None:
        return found[0] if found else -1
    return cells.index(wanted) if wanted in cells else -1


def _refuse_column(columns: Columns, cells: list[str], where: str) -> NoReturn:
    named = {"image_column": columns.image, "label_column": columns.label}
    missing = [f"data.{k}={name}" for k, name in named.items() if name and name not in cells]
    key = missing[0] if missing else "data.image_column=NAME is needed"
    raise UserError(
        f"{key}: the header of {where} has no such column of images or labels; {_seen(cells)}"
    )
