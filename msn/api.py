"""The commands from Python: the same keys, the same files, mistakes as `UserError`.

Further keywords are keys of the command, `**{"trainer.max_epochs": 5}`; see docs/keys.md.
"""

import contextlib
import csv
import json
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from msn.errors import UserError


class Table(Sequence[dict[str, Any]]):
    """Rows of an evaluation, as its JSON file holds them; a notebook shows the table."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a line per row; pandas must be installed."""
        return import_module("pandas").DataFrame(self.rows)

    def __str__(self) -> str:
        return str(self._layout.markdown_table(self.rows))

    @property
    def _layout(self) -> Any:
        keys = {key for row in self.rows for key in row}
        if "rankme" in keys:
            return import_module("msn.commands.rank")
        return import_module(f"msn.evaluation.{'suite' if 'data' in keys else 'table'}")

    def _repr_html_(self) -> str:
        from msn.evaluation.drawing import html_table

        return html_table(self._layout.table_of(self.rows, ""))


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @property
    def metrics(self) -> list[dict[str, str]]:
        """Lines of `metrics.csv`, one per logged step; `pandas.read_csv` reads the file too."""
        return _lines(self.path / "metrics.csv")

    @property
    def verdicts(self) -> list[dict[str, str]]:
        """Lines of `verdicts.csv`: step, epoch, verdict, and the verdict in words."""
        return _lines(self.path / "verdicts.csv")

    @property
    def table(self) -> Table | None:
        """The low-shot table at the end of the run; None without labels."""
        return _read_table(self.path)

    @property
    def backbone(self) -> Any:
        """The target trunk as an `msn.weights.Backbone`."""
        from msn.weights import load_backbone

        return load_backbone(self.path)

    def report(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Make the page of this run again, at `out` or in the run directory; returns its path."""
        place = self.path / "report.html" if out is None else Path(out)
        _run("report", {"runs": [self.path], "out": place}, quiet=True)
        return place

    def _repr_html_(self) -> str:
        table = self.table
        return f"<code>{self.path}</code>" + ("" if table is None else table._repr_html_())


@dataclass(frozen=True)
class Embeddings:
    """Features of images."""

    names: list[str]
    """Paths of the images, relative to the folder or list."""
    features: Any
    """Float32 tensor [n, D], in the order of `names`."""
    labels: list[str | None] | None
    """Names of the classes, None where an image has none; None if the data have no labels."""
    about: dict[str, Any]
    """Plain data: feature, checkpoint, root, model, licence."""

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write them as `.parquet`, `.npz`, `.csv` or `.safetensors`; returns `out`.

        Raises:
            UserError: the ending is another, or Parquet's library is not installed.
        """
        from msn.commands.embed import Embedded, write_embeddings

        write_embeddings(Path(out), Embedded(self.names, self.labels, self.features, self.about))
        return Path(out)


def pretrain(
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    experiment: str | None = None,
    **keys: Any,
) -> Run:
    """`python train.py`: pretrain, export the backbone, evaluate it where there are labels.

    Args:
        data: a folder, a list file, or a name of `configs/data`; None is the experiment's own.
        out: run directory; an unfinished run there continues. None makes `runs/EXPERIMENT/NUMBER`.
        experiment: a preset of `configs/experiment`; None is `digits`, a small network at 32 px.
        keys: any key of the command.

    Raises:
        UserError: a key, a value, a path or a file is wrong.
        SystemExit: a signal has interrupted the run; it is saved, and the same call continues it.
    """
    if keys.get("plan"):
        raise UserError("plan trains nothing, so there is no run: python train.py plan=true")
    given = {"experiment": experiment, "run.dir": out}
    given = {key: value for key, value in given.items() if value is not None}
    return Run(_run("train", {**given, **_data(data), **keys}).absolute())


def evaluate(
    checkpoint: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    data: str | os.PathLike[str] | None = None,
    *,
    protocol: str = "kshot",
    out: str | os.PathLike[str] | None = None,
    **keys: Any,
) -> Table:
    """`python eval_lowshot.py`: label few images and measure any backbone with them.

    Args:
        checkpoint: a run, checkpoint or export; several as `{name: path}`.
        data: a folder, a list file, or a name of `configs/data`; None is the command's default.
        protocol: one of `configs/protocol`.
        out: directory for `lowshot.json`, pictures and heads; None keeps no files.
        keys: any key of the command; `suite="lejepa"` measures several data sets.

    Returns:
        The table; an empty one in all but the first of several processes.

    Raises:
        UserError: a key, a value, a path or a file is wrong, or the data have no labels.
    """
    given: dict[str, Any] = {"checkpoint": _named(checkpoint), "protocol": protocol}
    with tempfile.TemporaryDirectory() as place:
        given["run.dir"] = Path(place) / "table" if out is None else out
        directory = _run("eval_lowshot", {**given, **_data(data), **keys}, quiet=True)
        table = None if directory is None else _read_table(directory)
    return Table([]) if table is None else table


def rank(
    checkpoint: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    data: str | os.PathLike[str] | None = None,
    **keys: Any,
) -> Table:
    """`python -m msn rank`: a row of measures per checkpoint; no labels needed, none is reliable.

    A run stands for all its checkpoints. Arguments and errors are those of `evaluate`.
    """
    return Table(
        _run("rank", {"checkpoint": _named(checkpoint), **_data(data), **keys}, quiet=True)
    )


def embed(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    **keys: Any,
) -> Embeddings:
    """`python -m msn embed`: one feature row per image; unreadable images are left out.

    Args:
        checkpoint: a run, checkpoint or export.
        data: a folder, a list file, or a name of `configs/data`, such as hf.
        out: a `.parquet`, `.npz`, `.csv` or `.safetensors` file to keep; None keeps none.
        keys: any key of the command.

    Raises:
        UserError: a key, a value, a path or a file is wrong, or no image can be read.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "features.safetensors" if out is None else Path(out)
        given = {"checkpoint": checkpoint, **_data(data), "out": file}
        return Embeddings(**_run("embed", {**given, **keys}, quiet=True)._asdict())


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "timm",
    **keys: Any,
) -> Path:
    """`python -m msn export`: a backbone for timm, Hugging Face, torch or ONNX; returns `out`.

    Raises:
        UserError: see `msn.weights.export.export`.
    """
    _run("export", {"checkpoint": checkpoint, "out": out, "format": format, **keys}, quiet=True)
    return Path(out)


def show_views(data: str | os.PathLike[str], out: str | os.PathLike[str], **keys: Any) -> Path:
    """`python -m msn show_views`: a picture of what the networks see; returns `out`.

    Raises:
        UserError: a key, a value, a path or a file is wrong.
    """
    _run("show_views", {**_data(data), "out": out, **keys}, quiet=True)
    return Path(out)


def show_reconstruction(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    **keys: Any,
) -> Path:
    """`python -m msn show_reconstruction`: what a MAE makes of images; returns `out`.

    Args:
        checkpoint: a run with `method=mae`, or anything with a decoder that `load_mae` takes.
        data: a folder, a list file, or a name of `configs/data`, such as hf.
        out: picture to write: .png, .jpg or .webp.

    Raises:
        UserError: a key, a value, a path or a file is wrong, or the file holds no decoder.
    """
    given = {"checkpoint": checkpoint, **_data(data), "out": out}
    _run("show_reconstruction", {**given, **keys}, quiet=True)
    return Path(out)


def suggest_labels(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    budget: int,
    **keys: Any,
) -> list[dict[str, str]]:
    """`python -m msn suggest_labels`: which images to label first.

    Args:
        checkpoint: a run, checkpoint or export.
        data: a folder, a list file, or a name of `configs/data`, such as hf.
        out: a new directory for `suggested.csv` and a contact sheet.
        budget: number of images, >= 1.
        keys: any key of the command.

    Returns:
        Lines of `suggested.csv`, with an empty column `label` to fill in.

    Raises:
        UserError: a key, a value, a path or a file is wrong.
    """
    given = {"checkpoint": checkpoint, **_data(data), "out": out, "budget": budget}
    _run("suggest_labels", {**given, **keys}, quiet=True)
    return _lines(Path(out) / "suggested.csv")


def predict(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    labels: str | os.PathLike[str] | Mapping[str, str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    **keys: Any,
) -> list[dict[str, Any]]:
    """`python -m msn predict`: learn from some labels, predict the class of all other images.

    Args:
        checkpoint: a run, checkpoint or export.
        data: a folder, a list file, or a name of `configs/data`, such as hf.
        labels: a list with the columns path and label, or `{path: label}`, of some of the images;
            None takes those of the data.
        out: a `.csv` file to keep; None keeps none.
        keys: any key of the command.

    Returns:
        Per image without a label `path`, `prediction`, `probability` and `probabilities` (of the
        classes in the order of their names; None for more than 100).

    Raises:
        UserError: a key, a value, a path or a file is wrong, or there are not two classes.
    """
    with tempfile.TemporaryDirectory() as place:
        if isinstance(labels, Mapping):
            rows = [("path", "label"), *labels.items()]
            labels = Path(place) / "labels.csv"
            with labels.open("w", newline="", errors="surrogateescape") as file:
                csv.writer(file).writerows(rows)
        given = {"checkpoint": checkpoint, **_data(data), "labels": labels, "out": out}
        found: list[dict[str, Any]] = _run("predict", {**given, **keys})
        return found


def _run(command: str, keys: Mapping[str, Any], *, quiet: bool = False) -> Any:
    from msn.commands.command_line import in_hydras_grammar
    from msn.commands.entry import compose, explained

    overrides = [f"{key}={in_hydras_grammar(value)}" for key, value in keys.items()]
    with _undisturbed():
        config = compose(command, overrides)
        job = explained(import_module(f"msn.commands.{command}").run)
        with _quiet() if quiet else contextlib.nullcontext():
            return job(config)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a command prints for a terminal to itself, also from a notebook's display."""
    from msn.progress import Held

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(Held(sys.stdout)))
        if "IPython" in sys.modules:
            capture = import_module("IPython.utils.capture")
            stack.enter_context(capture.capture_output(stdout=False, stderr=False))
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the process as it was: random states, switches, environment, warnings, levels."""
    drawn = random.getstate()  # some libraries draw when they are imported
    import numpy as np
    import torch
    from hydra.core.singleton import Singleton

    names = ("lightning.pytorch", "lightning.fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    environment, hydra = dict(os.environ), Singleton.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    numbers = np.random.get_state()  # noqa: NPY002  # the global one, which a seed sets
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # tqdm's, without widgets; its bars are text then.
            warnings.filterwarnings("ignore", "IProgress not found")
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(numbers)  # noqa: NPY002  # put back
        torch.use_deterministic_algorithms(deterministic)
        Singleton.set_state(hydra)
        os.environ.clear()
        os.environ.update(environment)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _named(checkpoint: Any) -> Any:
    several = isinstance(checkpoint, Mapping)
    return [f"{n}:{path}" for n, path in checkpoint.items()] if several else checkpoint


def _data(data: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Keys for a folder, a list file or a name of `configs/data`."""
    if data is None:
        return {}
    from msn.commands.entry import config_directory

    path = Path(data).expanduser()
    if not path.exists() and (config_directory() / "data" / f"{data}.yaml").is_file():
        return {"data": str(data)}
    if not path.exists():
        raise UserError(f"data={data}: no such file or folder, and no name in configs/data")
    rows = path.suffix.lower() in (".parquet", ".arrow")
    return {"data": "hf" if rows else "list" if path.is_file() else "folder", "data.root": path}


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def _read_table(directory: Path) -> Table | None:
    path = directory / "lowshot.json"
    return Table(json.loads(path.read_text())["rows"]) if path.is_file() else None
