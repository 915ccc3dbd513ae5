"""The report in a real browser: headless Chromium draws it, measures it, and asks for nothing from anywhere."""

import functools
import html
import json
import re
import shutil
import struct
import subprocess
import zlib

import pytest
from support.runs import write_run

from megacode.tools.report.page import make_page
from megacode.tools.report.run import read_run

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the package `chromium` (apt-get install chromium)")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
]
EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
SCHEMES = {"light": 1, "dark": 0}

MEASURE = """
const box = e => { const {x, y, width, height} = e.getBoundingClientRect(); return {x, y, width, height}; };
const colors = text => text.match(/[\\d.]+/g).map(Number);
const luminance = rgb => {
  const [r, g, b] = rgb.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)];
  return (Math.max(x, y) + .05) / (Math.min(x, y) + .05); };
const ground = e => { for (; e; e = e.parentElement) {
  const c = colors(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0) return c; } };
const texts = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && !["SCRIPT", "title"].includes(e.tagName));
const svgs = [...document.querySelectorAll("svg.chart")];
const figures = [...document.querySelectorAll("figure > script")].map(s => s.parentElement);
for (const f of figures) {
  const b = f.querySelector(".plot").getBoundingClientRect();
  const at = {clientX: b.x + b.width / 2, clientY: b.y + b.height / 2};
  f.querySelector("svg.chart").dispatchEvent(new PointerEvent("pointermove", at));
}
const result = {
  title: document.title,
  scripts: [...document.scripts].filter(s => !s.type).length,
  images: document.images.length,
  resources: performance.getEntriesByType("resource").map(r => r.name),
  ground: getComputedStyle(document.body).backgroundColor,
  overflow: document.documentElement.scrollWidth - innerWidth,
  svgs: svgs.map(s => ({box: box(s), label: s.getAttribute("aria-label"), role: s.getAttribute("role")})),
  outside: svgs.flatMap(s => { const b = box(s); return [...s.querySelectorAll("text")].filter(t => { const c = box(t);
    return Math.min(c.x - b.x, c.y - b.y, b.x + b.width - c.x - c.width, b.y + b.height - c.y - c.height) < -1; })
    .map(t => t.textContent); }),
  overlaps: svgs.flatMap(s => { const all = [...s.querySelectorAll("text")].map(t => [box(t), t.textContent]);
    return all.flatMap(([b, one], i) => all.slice(i + 1).filter(([c]) =>
      b.x + b.width > c.x + 1 && c.x + c.width > b.x + 1 && b.y + b.height > c.y + 3 && c.y + c.height > b.y + 3)
      .map(([, other]) => one + " | " + other)); }),
  lines: figures.map(f => { const p = f.querySelector(".plot").getBBox();
    return [...f.querySelectorAll(".chart .line, .chart .band, .chart circle.dot")].map(e => { const b = e.getBBox();
      const circle = e.tagName === "circle";
      const [x, y, w, h] = circle ? [e.cx.baseVal.value, e.cy.baseVal.value, 0, 0] : [b.x, b.y, b.width, b.height];
      return {left: x - p.x, top: y - p.y, right: p.x + p.width - x - w, bottom: p.y + p.height - y - h}; }); }),
  readouts: figures.map(f => f.querySelector(".readout").textContent),
  headings: [...document.querySelectorAll("h1, h2, h3")].map(h => h.tagName + " " + h.textContent),
  faint: texts.filter(e => contrast(colors(getComputedStyle(e)[e.namespaceURI.endsWith("svg") ? "fill" : "color"]),
    ground(e)) < 4.5).map(e => e.textContent.slice(0, 40)),
  text: document.body.innerText,
};
const out = document.body.appendChild(document.createElement("pre"));
out.id = "measured";
out.textContent = JSON.stringify(result);
"""


def chromium(tmp_path_factory, page, *flags):
    """Run the browser on a page, in a new profile; (standard output, what it logged)."""
    profile = tmp_path_factory.mktemp("profile")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of very different runs: (folder, page) by name."""
    folder = tmp_path_factory.mktemp("runs")
    twelve = [f"source {n}" for n in range(12)]
    runs = {
        "failed": {
            "steps": 90, "planned": 200, "outcome": "failed", "message": EVIL, "spoiled": [30, 31, 90],
            "restarts": [40], "sources": [EVIL, "c"], "virtual_stages": 2, "settings": {"tokenizer": {"path": EVIL}},
        },
        "long": {"steps": 3000, "sources": twelve, "layout": (16, 8, 8), "micro_samples": 1, "per_host": 8},
        "single": {"steps": 1, "planned": 2, "phases": False},
        "flat": {"steps": 3, "layout": (2, 16, 1), "micro_samples": 1, "sources": ["a", "b"]},
        "deep": {"steps": 12, "layout": (32, 2, 1), "micro_samples": 1, "sources": ["a", "b"]},
    }  # fmt: skip
    for name, how in runs.items():
        write_run(folder / name, **how)
        (folder / f"{name}.html").write_text(make_page(read_run(folder / name)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def measure(tmp_path_factory, pages):
    """`measure(name, scheme)`: what the browser measures on a page, and what it logged."""

    @functools.cache
    def measured(name, scheme):
        page = (pages / f"{name}.html").read_text(encoding="utf-8")
        # The page's policy lets no script run but its own: the copy that is measured goes without it.
        page, dropped = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        assert dropped == 1
        copy = pages / f"{name}-{scheme}.html"
        copy.write_text(page.replace("</body></html>", f"<script>{MEASURE}</script></body></html>"), encoding="utf-8")
        scheme_flag = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
        dom, log = chromium(tmp_path_factory, copy, "--dump-dom", scheme_flag)
        found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
        assert found, log
        return json.loads(html.unescape(found[1])), log

    return measured


PAGES = pytest.mark.parametrize(
    ("name", "num_pictures"), [("failed", 13), ("long", 13), ("single", 12), ("flat", 13), ("deep", 13)]
)


@PAGES
def test_the_page_is_drawn(measure, name, num_pictures):
    result, log = measure(name, "light")
    assert "CONSOLE" not in log
    assert result["title"] == f"{name} \N{EN DASH} training report"
    assert result["resources"] == []
    assert result["headings"][0] == f"H1 {name}"
    assert len(result["headings"]) == 12
    assert len(result["svgs"]) == num_pictures
    for svg in result["svgs"]:
        assert svg["box"]["width"] > 400
        assert svg["box"]["height"] > 60
        assert svg["role"] == "img"
        assert svg["label"]
    assert result["overflow"] <= 0
    assert result["outside"] == []
    assert result["overlaps"] == []


@PAGES
def test_curves_lie_inside_their_plot_areas(measure, name, num_pictures):
    result, _ = measure(name, "light")
    assert len(result["lines"]) >= 9
    for lines in result["lines"]:
        assert lines
        for distances in lines:
            assert min(distances.values()) > -0.2


def test_the_readout_tells_the_values_in_the_middle(measure, pages):
    result, _ = measure("long", "light")
    run = read_run(pages / "long")
    points = run.metrics.curves.points(("loss",))
    at, value = re.match(r"step ([\d,]+): training ([\d.]+) \(", result["readouts"][0]).groups()
    near = [point for point in points if abs(point.x - int(at.replace(",", ""))) <= 1]
    assert 1450 < near[0].x < 1550
    assert any(float(value) == pytest.approx(point.mean, rel=1e-4) for point in near)
    assert all(readout.startswith("step ") for readout in result["readouts"])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["failed", "long"])
def test_text_can_be_read_in_light_and_in_dark(measure, name, scheme):
    result, _ = measure(name, scheme)
    assert result["faint"] == []
    red, green, blue = map(int, re.findall(r"\d+", result["ground"]))
    assert (red + green + blue > 600) == (scheme == "light")


def test_text_of_the_run_does_not_run(measure):
    """Even in the copy without the policy: it is text."""
    result, _ = measure("failed", "light")
    assert result["title"].startswith("failed")
    assert result["images"] == 0
    assert result["scripts"] == 2  # the page's and the measuring one
    assert "document.title = 'taken'" in result["text"]


def test_the_page_as_it_is_runs_its_own_script_under_its_policy(tmp_path_factory, pages):
    dom, log = chromium(tmp_path_factory, pages / "failed.html", "--dump-dom")
    assert "CONSOLE" not in log
    assert dom.count('class="readout"') == 10
    assert "<title>failed" in dom


def test_the_policy_stops_a_foreign_script(tmp_path_factory, pages):
    page = (pages / "single.html").read_text(encoding="utf-8")
    foreign = pages / "foreign.html"
    foreign.write_text(page.replace("</body>", "<script>document.title = 'taken'</script></body>"), encoding="utf-8")
    dom, log = chromium(tmp_path_factory, foreign, "--dump-dom")
    assert "<title>single" in dom
    assert "Content Security Policy" in log


def test_a_screenshot_is_not_blank(tmp_path_factory, tmp_path, pages):
    picture = tmp_path / "page.png"
    chromium(tmp_path_factory, pages / "failed.html", f"--screenshot={picture}")
    width, height, rows = png_rows(picture.read_bytes())
    assert (width, height) == (1280, 900)
    assert len(set(rows)) > 200


def png_rows(data):
    """Width, height and the filtered rows of a PNG."""
    position, pixels = 8, b""
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height = struct.unpack(">II", body[:8])
        pixels += body if kind == b"IDAT" else b""
        position += length + 12
    raw = zlib.decompress(pixels)
    stride = len(raw) // height
    return width, height, [raw[n * stride : (n + 1) * stride] for n in range(height)]
