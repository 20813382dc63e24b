"""`python docs/site.py OUT`: README, docs/ and benchmarks/ as a website below OUT.

Needs `pip install 'msn-pretraining[docs]'`. A warning, such as a link to nowhere, is an error.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parents[1]


def build_site(out: Path) -> None:
    """Copy the pages to places where the repository's own links between them hold, and build."""
    with tempfile.TemporaryDirectory() as place:
        pages = Path(place)
        for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
            shutil.copy(ROOT / name, pages)
        shutil.copytree(
            ROOT / "docs", pages / "docs", ignore=shutil.ignore_patterns("*.yml", "*.py")
        )
        shutil.copytree(ROOT / "benchmarks", pages / "benchmarks", ignore=_not_pages)
        config = load_config(
            str(ROOT / "docs" / "mkdocs.yml"),
            docs_dir=str(pages),
            site_dir=str(out.absolute()),
            strict=True,
        )
        for section in config["nav"]:
            if "Benchmarks" in section:
                found = sorted((pages / "benchmarks").glob("*.md"))
                section["Benchmarks"] = [f"benchmarks/{page.name}" for page in found]
        build(config)


def _not_pages(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".md")]


if __name__ == "__main__":
    build_site(Path(sys.argv[1]))
