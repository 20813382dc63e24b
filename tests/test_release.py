"""What a release holds: source and wheel work elsewhere, the site builds, the tutorial runs."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.commands.conftest import TINY
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_site_has_every_page_and_no_warning(tmp_path):
    pytest.importorskip("mkdocs")
    made = subprocess.run(
        [sys.executable, "docs/site.py", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    pages = {str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob("index.html")}
    sources = [*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), ROOT / "docs/tutorial.ipynb"]
    assert {str(path.relative_to(ROOT).with_suffix("")) for path in sources} <= pages
    api = (tmp_path / "docs" / "api" / "index.html").read_text()
    for name in ("pretrain", "evaluate", "embed", "Embeddings.save", "MSNLoss", "MAE"):
        assert re.search(rf'id="msn\.[\w.]*{re.escape(name)}"', api), name
    for line in (tmp_path / "index.html").read_text().splitlines():
        assert not re.search(r'<(link|script)[^>]*(src|href)="https?://(?!arxiv)', line), line


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own shows pictures in it
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    assert (ROOT / "docs" / "tutorial.ipynb").stat().st_size < 500_000
    for cell in notebook.cells:  # the whole training takes minutes
        cell.source = cell.source.replace('"trainer.max_epochs": 25', '"trainer.max_epochs": 2')
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert sum("text/html" in output.get("data", {}) for output in shown) == 1  # the table


def build(kind, tmp_path):
    """The archive that setuptools makes of the repository."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "*.egg-info", "build")
    )
    code = f"from setuptools import build_meta; build_meta.build_{kind}('..')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    return next(path for path in tmp_path.iterdir() if path.suffix in (".gz", ".whl"))


@pytest.mark.slow
def test_the_source_distribution_holds_what_the_readme_names(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    named = set(re.findall(r"\]\(([^)#:]+)\)", README))
    named |= {path for path in re.findall(r"`([\w./]+)`", README) if (ROOT / path).exists()}
    others = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "SECURITY.md")
    named |= {*others, ".ci/run", "docs/weights.md", "docs/mkdocs.yml", "docs/site.py", "train.py"}
    assert len(named) > 15
    assert sorted(path for path in named if path.rstrip("/") not in held) == []


@pytest.mark.slow
def test_the_wheel_verifies_trains_and_exports_from_another_directory(tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        wheel.extractall(site)
    away = tmp_path / "away"
    away.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def python(*arguments):
        made = subprocess.run(
            [sys.executable, *arguments], cwd=away, env=environment, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        return made.stdout

    assert python("-c", "import msn; print(msn.__file__)").startswith(str(site))
    assert "219" in python("-m", "msn", "verify")
    code = (
        "import sys, msn\n"
        "run = msn.pretrain(out='run', **dict(key.split('=', 1) for key in sys.argv[1:]))\n"
        "msn.export(run.path, 'exported')"
    )
    python("-c", code, *TINY, "report=true")
    assert (away / "run" / "report.html").is_file()
    assert (away / "exported" / "parity.json").is_file()
