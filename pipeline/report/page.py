"""The look of the report: one style sheet for light and dark, and the script that reads values off the charts."""

STYLE = """
:root { --bg: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #667078; --line: #e3e5e8; --c0: #2563c9; --c1: #d9622b; --c2: #17885f; --c3: #8250c4;
  --good: #17885f; --bad: #c0392b; --shadow: 0 1px 2px rgb(20 30 40 / 6%); }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --card: #1c2024; --ink: #e6e9ec; --soft: #98a2ab; --line: #2e343a; --c0: #6ea8ff;
  --c1: #f2935c; --c2: #4cc596; --c3: #b58cf2; --good: #4cc596; --bad: #f0776a; --shadow: none; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1220px; margin: 0 auto; padding: 36px 24px 80px; }
h1 { font-size: 27px; font-weight: 650; letter-spacing: -.01em; margin: 0; }
h2 { font-size: 18px; font-weight: 620; margin: 44px 0 14px; }
p.sub { color: var(--soft); margin: 4px 0 24px; }
small { color: var(--soft); font-weight: 400; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; }
.tile, .chart, .card { background: var(--card); border: 1px solid var(--line); border-radius: 9px; box-shadow: var(--shadow); }
.tile { padding: 13px 16px; }
.tile b { display: block; font-size: 23px; font-weight: 620; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px; }
.chart { margin: 0; padding: 13px 15px 6px; }
.chart figcaption { display: flex; align-items: baseline; gap: 8px; font-size: 14px; }
.chart output { margin-left: auto; color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.chart svg { display: block; width: 100%; height: auto; }
.legend { display: flex; gap: 10px; font-size: 12px; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 10px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: 3px; background: currentcolor; }
.key.c0::before { background: var(--c0); } .key.c1::before { background: var(--c1); } .key.c2::before { background: var(--c2); }
.key.c3::before { background: var(--c3); }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; opacity: .6; }
.tick { fill: var(--soft); font-size: 11px; }
.mark { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 3 4; } .cursor { stroke: var(--soft); stroke-width: 1; opacity: .7; }
polyline { fill: none; stroke-linejoin: round; } .line { stroke-width: 1.9; } .raw { stroke-width: 1; opacity: .28; }
polyline.c0 { stroke: var(--c0); } polyline.c1 { stroke: var(--c1); } polyline.c2 { stroke: var(--c2); } polyline.c3 { stroke: var(--c3); }
.dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); } .dot.c3 { fill: var(--c3); }
.strip { display: flex; gap: 14px; overflow-x: auto; padding-bottom: 8px; }
.strip figure { margin: 0; flex: none; padding: 12px; }
.strip img { display: block; max-height: 300px; max-width: 640px; border-radius: 4px; }
.strip figcaption { color: var(--soft); font-size: 13px; margin-top: 7px; }
.card { padding: 6px 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 550; color: var(--soft); font-size: 13px; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
td.n { font-variant-numeric: tabular-nums; } td img { display: block; width: 48px; image-rendering: pixelated; border-radius: 3px; }
.good { color: var(--good); } .bad { color: var(--bad); }
details { margin-top: 12px; } summary { cursor: pointer; padding: 6px 0; }
pre, code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 0 0 10px; overflow-x: auto; }
ol.prompts { margin: 6px 0 10px; padding-left: 26px; columns: 2; font-size: 14px; }
"""

SCRIPT = """
for (const figure of document.querySelectorAll(".chart")) {
  const { x, y, lines } = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), output = figure.querySelector("output");
  const rest = output.textContent;
  const short = v => Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4));
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const step = x[0] + (at - x[2]) / (x[3] - x[2]) * (x[1] - x[0]);
    const near = lines.map(l => l.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    const px = x[2] + (near[0][0] - x[0]) / ((x[1] - x[0]) || 1) * (x[3] - x[2]);
    cursor.setAttribute("x1", px); cursor.setAttribute("x2", px);
    output.textContent = "step " + near[0][0] + ": " + near.map(p => short(p[1])).join(" / ");
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); output.textContent = rest; });
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document that asks nothing of the network; `title` is escaped already."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )
