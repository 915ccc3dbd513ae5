"""Style sheet and script of the report's page; of it, what a drawing of a schedule needs by itself."""

import re

LIGHT = """  --paper: #fbfaf6; --sheet: #ffffff; --ink: #1d2329; --soft: #565f69; --rule: #d9d5ca; --hair: #ece8de;
  --good: #14694b; --bad: #a8291b; --wait: #7a5a00; --link: #1b5e9b;
  --c0: #1b5e9b; --c1: #bf4f06; --c2: #11795a; --c3: #923482; --c4: #806400; --c5: #58626e;
  --forward: #abcbea; --backward: #f2c79c;"""

SCHEDULE = """
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .title, svg .number { fill: var(--ink); }
.idle { fill: var(--hair); }
.forward { fill: var(--forward); stroke: var(--c0); } .backward { fill: var(--backward); stroke: var(--c1); }
.forward, .backward { stroke-width: .7; } path.o1 { fill-opacity: .68; } path.o2 { fill-opacity: .36; }
svg .inside { font-size: 11px; fill: var(--ink); }
"""

_PAGE = """
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --sheet: #1a1e22; --ink: #e6e4de; --soft: #a3abb3; --rule: #3a4148; --hair: #2a3036;
  --good: #6ccfa6; --bad: #ff9a8a; --wait: #e4c15c; --link: #7db8ee;
  --c0: #6fb1ea; --c1: #f0944d; --c2: #4fc79f; --c3: #dc90d0; --c4: #d6b94a; --c5: #a9b3be;
  --forward: #2a5780; --backward: #87501f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); counter-reset: section figure;
  font: 15px/1.5 "Segoe UI", "Helvetica Neue", "Noto Sans", "DejaVu Sans", Arial, sans-serif; }
main, header, footer { max-width: 1064px; margin: 0 auto; padding: 0 24px; }
h1, h2 { font-family: Charter, "Iowan Old Style", Georgia, "Noto Serif", "DejaVu Serif", serif; font-weight: 600; }
h1 { font-size: 34px; line-height: 1.15; margin: 2px 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 44px 0 12px; padding-top: 10px; border-top: 2px solid var(--ink); }
h2::before { counter-increment: section; content: counter(section) "\\2002"; color: var(--soft); }
h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 0 0 10px; max-width: 80ch; overflow-wrap: anywhere; }
a { color: var(--link); }
.kicker { margin: 34px 0 0; font-size: 12px; letter-spacing: .09em; text-transform: uppercase; color: var(--soft); }
.outcome { font-size: 16px; max-width: none; }
.outcome strong { border: 1.5px solid currentColor; border-radius: 3px; padding: 1px 8px; margin-right: 6px; }
.finished { color: var(--good); } .failed { color: var(--bad); } .running, .stopped, .unknown { color: var(--wait); }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); margin: 18px 0; border: 1px solid var(--rule);
  border-width: 1px 0 0 1px; background: var(--sheet); }
.facts div { border: 1px solid var(--rule); border-width: 0 1px 1px 0; padding: 8px 12px 9px; }
.facts dt { font-size: 12px; color: var(--soft); }
.facts dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.facts small { font-size: 13px; color: var(--soft); display: block; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 0 0 8px; font-size: 14px; }
nav a { white-space: nowrap; text-decoration: none; } nav a:hover { text-decoration: underline; }
.notices { border-left: 4px solid var(--wait); background: var(--sheet); margin: 18px 0; padding: 10px 16px 10px 32px; }
.row { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 28px; }
figure { margin: 0 0 12px; position: relative; break-inside: avoid; }
figcaption { font-size: 14px; margin-bottom: 4px; color: var(--soft); }
figcaption b { color: var(--ink); }
figcaption::before { counter-increment: figure; content: "Fig. " counter(figure) "\\2002"; }
.legend { list-style: none; margin: 0 0 2px; padding: 0; font-size: 13px; display: flex; flex-wrap: wrap;
  gap: 2px 18px; }
.legend li { overflow-wrap: anywhere; } .legend svg { vertical-align: -1px; margin-right: 6px; }
.readout { font-size: 13px; min-height: 20px; margin: 0; max-width: none; color: var(--soft);
  font-variant-numeric: tabular-nums; }
svg.chart { display: block; width: 100%; height: auto; background: var(--sheet); border: 1px solid var(--rule); }
svg.chart:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.plot { fill: none; } .grid { stroke: var(--hair); } .axis { stroke: var(--soft); }
.mark { stroke: var(--soft); stroke-dasharray: 2 3; opacity: .7; } .cursor { stroke: var(--ink); stroke-width: 1; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
.d1 { stroke-dasharray: 7 3; } .d2 { stroke-dasharray: 2 2.5; }
.band { fill: var(--c); opacity: .2; }
.dot { fill: var(--sheet); stroke: var(--c); stroke-width: 1.8; }
.part { fill: var(--c); } .part.o1 { opacity: .62; } .part.o2 { opacity: .36; }
.trough { fill: var(--hair); } svg.share { vertical-align: middle; }
.cell { fill: var(--c); fill-opacity: .15; stroke: var(--c); } .sheet { fill: var(--sheet); stroke: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 0 0 16px; background: var(--sheet); }
th, td { text-align: left; vertical-align: top; padding: 5px 10px; border: 1px solid var(--rule);
  border-width: 1px 0; overflow-wrap: anywhere; }
th { font-weight: 600; } thead th { font-size: 13px; color: var(--soft); }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } tbody th { width: 180px; }
.event-failure, .event-out_of_memory, .event-stall { color: var(--bad); white-space: nowrap; }
.event-skip, .event-stop, .event-straggler { color: var(--wait); white-space: nowrap; }
code, pre { font: 13px/1.45 "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: var(--sheet); border: 1px solid var(--rule); padding: 12px 16px;
  margin: 8px 0; } pre.columns { white-space: pre; overflow-x: auto; }
time { white-space: nowrap; }
summary { cursor: pointer; color: var(--link); }
footer { margin-top: 44px; padding-bottom: 40px; font-size: 13px; color: var(--soft); }
@media (max-width: 720px) { .row { grid-template-columns: 1fr; } .facts { grid-template-columns: repeat(2, 1fr); } }
@media print {
  :root { color-scheme: light; --paper: #fff; --sheet: #fff; --ink: #000; --soft: #444; --rule: #bbb; --hair: #e4e4e4;
    --good: #14694b; --bad: #a8291b; --wait: #7a5a00; --link: #1b5e9b;
    --c0: #1b5e9b; --c1: #bf4f06; --c2: #11795a; --c3: #923482; --c4: #806400; --c5: #58626e;
    --forward: #abcbea; --backward: #f2c79c; }
  * { print-color-adjust: exact; } nav, .readout { display: none; } h2, h2 + p { break-after: avoid; }
  details::details-content { content-visibility: visible; }
}
"""

STYLE = f":root {{ color-scheme: light dark;\n{LIGHT} }}\n{SCHEDULE}{_PAGE}"


def schedule_style() -> str:
    """The rules of `schedule_svg` for a file of its own: light, and with the colours written in.

    Viewers other than browsers know no variables.
    """
    colors = dict(re.findall(r"--(\w+): (#\w+)", LIGHT))
    return "text { font-family: sans-serif; }" + re.sub(r"var\(--(\w+)\)", lambda found: colors[found[1]], SCHEDULE)


SCRIPT = """
"use strict";
const NS = "http://www.w3.org/2000/svg";
const show = v => v !== 0 && (Math.abs(v) >= 1e6 || Math.abs(v) < 1e-3) ? v.toExponential(3)
  : v.toLocaleString("en", {maximumSignificantDigits: 5});
for (const data of document.querySelectorAll("figure > script[type='application/json']")) {
  const {left, right, low, high, series} = JSON.parse(data.textContent);
  const figure = data.parentElement, svg = figure.querySelector("svg.chart");
  const readout = figure.appendChild(document.createElement("p"));
  readout.className = "readout";
  readout.setAttribute("aria-live", "polite");
  const cursor = document.createElementNS(NS, "line");
  const plot = svg.querySelector(".plot");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", plot.getAttribute("y"));
  cursor.setAttribute("y2", +plot.getAttribute("y") + +plot.getAttribute("height"));
  const xs = series.reduce((most, s) => s.x.length > most.length ? s.x : most, []);
  const nearest = (list, x) => list.reduce((best, v, i) => Math.abs(v - x) < Math.abs(list[best] - x) ? i : best, 0);
  let at = -1;
  const move = index => {
    at = Math.min(xs.length - 1, Math.max(0, index));
    const px = left + (xs[at] - low) / (high - low) * (right - left);
    cursor.setAttribute("x1", px);
    cursor.setAttribute("x2", px);
    svg.appendChild(cursor);
    const parts = series.map(s => {
      const i = nearest(s.x, xs[at]);
      const where = s.x[i] === xs[at] ? "" : ` at ${show(s.x[i])}`;
      const range = s.low[i] < s.high[i] ? ` (${show(s.low[i])} to ${show(s.high[i])})` : "";
      return `${s.name}${where} ${show(s.y[i])}${range}`;
    });
    readout.textContent = `step ${Math.round(xs[at]).toLocaleString("en")}: ${parts.join(" \\u00b7 ")}`;
  };
  svg.tabIndex = 0;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const px = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    move(nearest(xs, low + (px - left) / (right - left) * (high - low)));
  });
  svg.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1, PageUp: -50, PageDown: 50}[event.key];
    if (by) { event.preventDefault(); move(at + by); }
  });
}
"""
