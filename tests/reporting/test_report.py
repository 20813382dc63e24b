"""The page says all of a run, needs nothing but itself, and stands still in a browser."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from msn.commands.report import open_run, write_report
from msn.errors import UserError
from msn.reporting.curves import MOST_POINTS, PANELS, thin
from msn.reporting.report import build_report
from tests.reporting.runs import EPOCHS, make_run

CPU = torch.device("cpu")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def html(run):
    return build_report([open_run(run, "one")], images=40, device=CPU)


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self._skipped = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._skipped = tag

    def handle_endtag(self, tag):
        if tag == self._skipped:
            self._skipped = None

    def handle_data(self, data):
        if self._skipped is None:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_needs_no_other_file_and_no_network(html):
    page = Page(html)
    loads = [
        attributes[name]
        for tag, attributes in page.tags
        for name in ("src", "href", "srcset", "data")
        if attributes.get(name)
    ]
    assert loads
    assert all(link.startswith(("#", "data:")) for link in loads)
    assert not re.search(r"url\(|@import", re.search(r"<style>(.*?)</style>", html, re.S)[1])
    assert len(html.encode()) < 10e6


def test_the_page_tells_what_was_run_and_what_came_of_it(html, run):
    text = Page(html).text
    for told in (
        *("1,297", "16 prototypes, Sinkhorn, me-max 1", f"{EPOCHS} epochs", str(run), "2.15.0"),
        *(f"After {EPOCHS} epochs: learning", "3 to 5 collapsed collapsed: <line> of epoch 5"),
        *("msn 55.0 \u00b1 3.0 [40.0, 80.0]", "logistic, 5 images per class"),
        *("num_prototypes: 16", "Images nearest to prototypes", "Map of features"),
    ):
        assert told in text, told
    assert all(panel.title in text for panel in PANELS)


def test_every_picture_and_chart_has_a_text_and_a_place_of_its_own(html):
    tags = Page(html).tags
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    assert len(pictures) >= 1 + 1 + 8  # views, prototypes, attention
    assert all(len(picture["alt"]) > 20 for picture in pictures)
    assert all(int(picture["width"]) > 0 and int(picture["height"]) > 0 for picture in pictures)
    charts = [attributes for _, attributes in tags if attributes.get("class") == "plot"]
    assert len(charts) == len(PANELS) + 2  # accuracy against labels, map of features
    assert all(len(chart["aria-label"]) > 20 for chart in charts)


def test_several_runs_stand_side_by_side(tmp_path, run):
    other = make_run(tmp_path / "two", "method.lr=0.5")
    html = build_report([open_run(run, "one"), open_run(other, "two")], images=0, device=CPU)
    text = Page(html).text
    assert "method.lr 0.003 0.5" in text
    assert "method.num_prototypes" not in text.partition("Configuration and versions")[0]
    assert html.count('"name":"one: loss"') == html.count('"name":"two: loss"') == 1


def test_where_images_are_gone_the_rest_is_told_all_the_same(tmp_path):
    run = make_run(tmp_path / "run", "data=folder", f"data.root={tmp_path / 'gone'}")
    text = Page(build_report([open_run(run, "run")], images=40, device=CPU)).text
    assert "No pictures: " in text
    assert "gone" in text
    assert "Agreement of views" in text


HOSTILE = ("<!--<script>", "<b>x<br>&amp;", "a|b $x$")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run on classes and files whose names are markup, or no UTF-8."""
    directory = tmp_path_factory.mktemp("hostile")
    for c, name in enumerate(HOSTILE):
        (directory / "images" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (40, 36), (80 * c, 10 * i, 255 - 80 * c))
            image.save(os.fsencode(directory / "images" / name) + b"/caf\xe9 <i>%d.png" % i)
    run = make_run(directory / "run", "data=folder", f"data.root={directory / 'images'}")
    table = json.loads((run / "lowshot.json").read_text())
    for row in table["rows"]:
        row["backbone"] = row["backbone"].replace("msn", HOSTILE[2] + HOSTILE[0])
    (run / "lowshot.json").write_text(json.dumps(table))
    return run


def test_names_that_are_markup_or_no_text_stay_names(hostile, tmp_path):
    out = tmp_path / "report.html"
    write_report([open_run(hostile, HOSTILE[0])], out, images=12, device=CPU)
    html = out.read_text(encoding="utf-8")
    charts = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert len(charts) == len(PANELS) + 2
    assert not any("<" in chart for chart in charts)
    traces = [trace for chart in charts for trace in json.loads(chart)["data"]]
    assert {escape(name, quote=False) for name in HOSTILE} <= {trace["name"] for trace in traces}
    assert all("<" not in text for trace in traces for text in trace.get("text", []))
    own = html.partition("<body>")[2].partition("<noscript>")[0]
    assert not re.search(r"<!--|<(b|i|br)>x", own)
    assert f"caf? &lt;i&gt;0.png ({escape(HOSTILE[0])})" in own


def test_damaged_files_of_a_run_are_passed_over_or_named_in_a_line(tmp_path):
    run = make_run(tmp_path / "run")
    metrics, verdicts = run / "metrics.csv", run / "verdicts.csv"
    whole = open_run(run, "run")
    metrics.write_bytes(metrics.read_bytes() + b"\0" * 9 + b"\n17,x\xff\n")
    verdicts.write_bytes(verdicts.read_bytes() + b"\0\0\n180,9\n")
    record = open_run(run, "run")
    assert (record.series("train/loss"), record.verdicts) == (
        whole.series("train/loss"),
        whole.verdicts,
    )
    build_report([record], images=0, device=CPU)
    for name, content in (("run.json", "{"), ("run.json", "[" * 10**5), ("lowshot.json", "[]")):
        before = (run / name).read_text()
        (run / name).write_text(content)
        with pytest.raises(UserError, match=name):
            open_run(run, "run")
        (run / name).write_text(before)
    for content in (b"\xff\xfe: [", b"a: [", b"[]", b"data: 1\nmethod: 2"):
        (run / "config.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"config.yaml|not a pretraining run"):
            open_run(run, "run")


def test_long_curves_are_averaged_in_bins():
    x, y = thin(range(1, 30_001), [float(i % 20) for i in range(30_000)])
    assert len(x) == MOST_POINTS
    assert (x[0], x[-1]) == (20, 30_000)
    assert set(y) == {9.5}
    assert thin([1, 2], [0.123456, 2.0]) == ([1, 2], [0.12346, 2.0])


# Runs before everything else in the page; what it finds is read off the page's end.
_WATCH = """<script>
window.found = {errors: [], shift: 0};
addEventListener("error", (e) => found.errors.push(e.message));
for (const kind of ["error", "warn"])
  console[kind] = (...words) => found.errors.push(words.join(" "));
new PerformanceObserver((list) => list.getEntries().forEach((e) => { found.shift += e.value; }))
  .observe({type: "layout-shift", buffered: true});
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  found.charts = document.querySelectorAll(".plot .main-svg").length > 0 && root.dataset.charts;
  found.lines = document.querySelectorAll(".scatterlayer .trace").length;
  found.sideways = root.scrollWidth - root.clientWidth;
  found.wide = [...document.querySelectorAll(".plot")].filter((box) =>
    box.querySelector(".main-svg").getBoundingClientRect().right
      > box.parentElement.getBoundingClientRect().right + 1).length;
  found.legends = [...document.querySelectorAll(".legendtext")].map((text) => text.textContent);
  found.ground = getComputedStyle(document.body).backgroundColor;
  found.ink = getComputedStyle(document.querySelector(".plot .xtick text")).fill;
  found.buttons = [...document.querySelectorAll(".modebar-btn")].map((b) => b.dataset.title
    || b.getAttribute("aria-label"));
  const pre = document.createElement("p");
  pre.id = "found"; pre.textContent = JSON.stringify(found); document.body.append(pre);
}, 1500));
</script>"""


_OFFLINE = (
    *("--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def look(path, *flags):
    """What a browser finds in the page."""
    command = [
        *(
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            *_OFFLINE,
            "--virtual-time-budget=6000",
        ),
        *(*flags, "--dump-dom", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<p id="found">(.*?)</p>', done.stdout)
    return json.loads(unescape(found[1]))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_names_that_are_markup_as_they_are(hostile, tmp_path):
    path = tmp_path / "report.html"
    write_report([open_run(hostile, HOSTILE[0])], path, images=12, device=CPU)
    path.write_text(path.read_text().replace("<head>", f"<head>{_WATCH}", 1))
    found = look(path, "--window-size=1280,900")
    assert (found["errors"], found["charts"]) == ([], str(len(PANELS) + 2))
    assert {*HOSTILE, HOSTILE[2] + HOSTILE[0]} <= set(found["legends"])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_all_charts_without_errors_shifts_or_sideways_scrolling(html, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html.replace("<head>", f"<head>{_WATCH}", 1))
    desktop = look(path, "--window-size=1280,900")
    phone = look(path, "--window-size=500,900")
    dark = look(
        path,
        "--window-size=1280,900",
        "--force-dark-mode",
        "--blink-settings=preferredColorScheme=0",
    )
    for found in (desktop, phone, dark):
        assert found["errors"] == []
        assert found["charts"] == str(len(PANELS) + 2)
        assert found["lines"] >= sum(len(panel.series) for panel in PANELS)
        assert found["shift"] == 0
        assert found["buttons"]
        assert not [title for title in found["buttons"] if "hare" in title or "loud" in title]
        assert found["sideways"] == found["wide"] == 0
    assert desktop["ground"] != dark["ground"]
    assert desktop["ink"] != dark["ink"]
