"""The frame of the page: one style sheet for light, dark and paper; no script, and a policy that forbids any network access."""

STYLE = """
:root { --bg: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #5f6972; --line: #e3e5e8; --c0: #2563c9; --lost: #d9622b;
  --good: #17885f; --shadow: 0 1px 2px rgb(20 30 40 / 6%); color-scheme: light dark; }
@media screen and (prefers-color-scheme: dark) { :root { --bg: #14171a; --card: #1c2024; --ink: #e6e9ec; --soft: #9aa4ad; --line: #2e343a;
  --c0: #6ea8ff;
  --lost: #f2935c; --good: #4cc596; --shadow: none; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1220px; margin: 0 auto; padding: 36px 24px 80px; }
h1 { font-size: 28px; font-weight: 650; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; font-weight: 620; margin: 42px 0 14px; }
h2 small { margin-left: 8px; }
p.sub { color: var(--soft); margin: 4px 0 24px; overflow-wrap: anywhere; }
p.note { color: var(--soft); font-size: 13px; margin: 10px 2px 0; }
small { color: var(--soft); font-weight: 400; font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 250px), 1fr)); gap: 12px; }
.tile, .figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 9px; box-shadow: var(--shadow); break-inside: avoid; }
.tile { padding: 13px 16px; }
.tile b { display: block; font-size: 23px; font-weight: 620; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 14px; }
.figure { margin: 0; padding: 13px 15px 10px; min-width: 0; }
.figure figcaption { display: flex; align-items: baseline; gap: 8px; font-size: 14px; margin-bottom: 6px; }
.figure figcaption small:last-child { margin-left: auto; text-align: right; font-variant-numeric: tabular-nums; }
.figure svg.histogram { display: block; width: 100%; height: auto; }
.bar { fill: var(--c0); } .tick { fill: var(--soft); font-size: 11px; } .value { fill: var(--soft); font-size: 10px; }
.base { stroke: var(--line); stroke-width: 1; }
.rows { display: grid; grid-template-columns: fit-content(46%) 1fr auto; gap: 4px 12px; align-items: center; font-size: 13.5px; }
.rows > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.rows > span.n { color: var(--soft); font-variant-numeric: tabular-nums; text-align: right; }
.rows svg { display: block; width: 100%; height: 9px; }
.flow { overflow-x: auto; padding: 16px 18px; } .flow > div { min-width: 760px; }
.flow svg { display: block; width: 100%; height: auto; }
.stream { fill: var(--c0); opacity: .85; } .leak { fill: var(--lost); opacity: .75; }
.ends { display: flex; justify-content: space-between; font-size: 14px; margin-bottom: 8px; }
.ends b { font-size: 17px; font-variant-numeric: tabular-nums; }
.stages { display: grid; gap: 0 14px; margin-top: 6px; font-size: 13px; }
.stages b { display: block; font-size: 14px; }
.stages i { display: block; font-style: normal; color: var(--lost); font-variant-numeric: tabular-nums; }
.stages span { display: block; color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 12px 10px; }
.sheet figure { margin: 0; min-width: 0; break-inside: avoid; }
.sheet img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px; background: var(--line); }
.sheet img.small { image-rendering: pixelated; }
.sheet figcaption { color: var(--soft); font-size: 12px; line-height: 1.35; margin-top: 5px; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 3; overflow: hidden; overflow-wrap: anywhere; }
.card { padding: 6px 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 550; color: var(--soft); font-size: 13px; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } tr.here td { font-weight: 600; }
td.n, th.n { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
td:first-child { min-width: 120px; } td small { display: block; }
code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
details { margin-top: 14px; } summary { cursor: pointer; padding: 6px 0; color: var(--soft); }
.set { color: var(--good); font-weight: 600; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@page { margin: 14mm; }
@media print { body { background: #fff; font-size: 12px; } main { max-width: none; padding: 0; } h2 { break-after: avoid; margin-top: 26px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .sheet { grid-template-columns: repeat(8, 1fr); }
  .tile, .figure, .card { box-shadow: none; }
  .figures { grid-template-columns: repeat(2, 1fr); } .tiles { grid-template-columns: repeat(4, 1fr); }
  .flow { overflow: visible; } .stages, .stages b { font-size: 11px; } .stages span { font-size: 10px; } .flow > div { min-width: 0; } }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Whatever a caption smuggles in, the browser loads and runs nothing."""


def page(title: str, body: str) -> str:
    """A whole HTML document; `title` is escaped already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )
