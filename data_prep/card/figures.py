"""Figures as HTML with inline SVG: histograms, ranked bars, and the flow from what was read to what was kept."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.units import count_text, share_text

WIDTH, HEIGHT, BASE = 360, 150, 126
"""Of a histogram's drawing; the bars stand on BASE."""
MIN_BINS = 6
"""A histogram shows at least as many."""
FLOW_WIDTH, STREAM, DROP, LEAK_RADIUS = 1000, 120, 40, 12
"""Of the flow's drawing: its width, the height of the stream at the beginning, how far the leaks fall below it, and their inner radius."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the flow and what it lost."""

    name: str
    lost: int
    causes: Sequence[tuple[str, int]]
    """(reason, samples), the most frequent first."""


def escape(text: object) -> str:
    """Text for HTML, also inside quotes, without the control characters that HTML forbids."""
    cleaned = "".join(letter if letter >= " " or letter in "\t\n" else "\ufffd" for letter in str(text))
    return html.escape(cleaned.replace("\x7f", "\ufffd"), quote=True)


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], label: Callable[[float], str], note: str = "") -> str:
    """A <figure> with one bar per bin, lower edges below; empty bins at both ends are left out, and a figure without counts is ""."""
    filled = [number for number, count in enumerate(counts) if count]
    if not filled:
        return ""
    first, last = filled[0], filled[-1]
    while last - first + 1 < min(MIN_BINS, len(counts)):  # a bar alone would say nothing about where it stands
        first, last = max(0, first - 1), min(len(counts) - 1, last + 1)
    shown, total, most = range(first, last + 1), sum(counts), max(counts)
    step = WIDTH / len(shown)
    # Labels stand at the edges between the bars; of many, every second or third.
    every = -(-(len(shown) + 1) * 36 // WIDTH)
    parts = [f'<line class="base" x1="0" x2="{WIDTH}" y1="{BASE}" y2="{BASE}"/>']
    for place, number in enumerate(shown):
        x, height = place * step, max(1.0 if counts[number] else 0.0, (BASE - 18) * counts[number] / most)
        upper = f"to {label(edges[number + 1])}" if number + 1 < len(edges) else "and more"
        tip = f"{label(edges[number])} {upper}: {counts[number]:,} ({share_text(counts[number], total)})"
        parts.append(f'<rect class="bar" x="{x + 1.5:.1f}" y="{BASE - height:.1f}" width="{step - 3:.1f}" height="{height:.1f}" rx="1.5">')
        parts.append(f"<title>{escape(tip)}</title></rect>")
        if counts[number] >= 0.005 * total and step > 20:
            share = f"{100 * counts[number] / total:.0f} %" if counts[number] >= 0.015 * total else "1 %"
            parts.append(f'<text class="value" x="{x + step / 2:.1f}" y="{BASE - height - 4:.1f}" text-anchor="middle">{share}</text>')
        if place % every == 0:
            anchor = "start" if place == 0 else "middle"
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{escape(label(edges[number]))}</text>')
    if last + 1 < len(edges) and (len(shown) - 1) % every == 0:
        parts.append(f'<text class="tick" x="{WIDTH}" y="{HEIGHT - 8}" text-anchor="end">{escape(label(edges[last + 1]))}</text>')
    summary = f"{title}: {note}" if note else title
    return (
        f'<figure class="figure"><figcaption><b>{escape(title)}</b> <small>{escape(note)}</small></figcaption>'
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">{"".join(parts)}</svg></figure>'
    )


def ranked_bars(title: str, rows: Sequence[tuple[str, int]], total: int, note: str = "") -> str:
    """A <figure> with one horizontal bar per row; "" without rows."""
    if not rows:
        return ""
    most = max(number for _, number in rows)
    cells = "".join(
        f'<span title="{escape(name)}">{escape(name)}</span><svg viewBox="0 0 100 9" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bar" width="{max(0.6, 100 * number / most):.2f}" height="9"/></svg>'
        f'<span class="n">{share_text(number, total)}</span>'
        for name, number in rows
    )
    caption = f"<figcaption><b>{escape(title)}</b> <small>{escape(note)}</small></figcaption>"
    return f'<figure class="figure">{caption}<div class="rows">{cells}</div></figure>'


def flow(read: int, kept: int, stages: Sequence[Stage]) -> str:
    """The stream of samples from read to kept, thinner after every stage that lost some; stages without loss are left out."""
    stages = [stage for stage in stages if stage.lost]
    ends = f'<div class="ends"><span><b>{read:,}</b> samples read</span><span><b>{kept:,}</b> kept, {share_text(kept, read)}</span></div>'
    if not stages or not read:
        box = f'<svg viewBox="0 0 {FLOW_WIDTH} 30" role="img" aria-label="nothing lost"><path class="stream" d="M0 0H{FLOW_WIDTH}V30H0Z"/></svg>'
        return f'<div class="card flow"><div>{ends}{box}</div></div>'
    step, left = FLOW_WIDTH / len(stages), read
    leaks, lower_edge = [], []
    for number, stage in enumerate(stages):
        x, begin, after = number * step, STREAM * left / read, STREAM * (left - stage.lost) / read
        leaks.append(_leak(x, after, min(max(1.2, begin - after), 0.8 * step), f"{stage.name}: {stage.lost:,} lost"))
        lower_edge.append(f"L{x + step:.1f} {after:.1f}L{x:.1f} {after:.1f}")
        left -= stage.lost
    path = f"M0 0H{FLOW_WIDTH}" + "".join(reversed(lower_edge)) + "Z"
    columns = "".join(
        f"<div><b>{escape(stage.name)}</b><i>−{stage.lost:,} ({share_text(stage.lost, read)})</i>"
        + "".join(f"<span>{escape(reason)} {share_text(number, read)}</span>" for reason, number in stage.causes)
        + "</div>"
        for stage in stages
    )
    label = f"{read} samples read, " + ", ".join(f"{stage.lost} lost to {stage.name}" for stage in stages) + f", {kept} kept"
    return (
        f'<div class="card flow"><div>{ends}<svg viewBox="0 0 {FLOW_WIDTH} {STREAM + DROP}" role="img" aria-label="{escape(label)}">'
        f'<path class="stream" d="{path}"/>{"".join(leaks)}</svg>'
        f'<div class="stages" style="grid-template-columns: repeat({len(stages)}, minmax(0, 1fr))">{columns}</div></div></div>'
    )


def _leak(x: float, top: float, thickness: float, tip: str) -> str:
    """A band that runs along below the stream from (x, top), turns in two concentric quarters, and falls to the foot of the drawing."""
    bend, inner, outer = x + 4, LEAK_RADIUS, LEAK_RADIUS + thickness
    return (
        f'<path class="leak" d="M{x:.1f} {top:.1f}H{bend:.1f}a{outer:.1f} {outer:.1f} 0 0 1 {outer:.1f} {outer:.1f}V{STREAM + DROP}'
        f'h{-thickness:.1f}V{top + outer:.1f}a{inner:.1f} {inner:.1f} 0 0 0 {-inner:.1f} {-inner:.1f}H{x:.1f}Z"><title>{escape(tip)}</title></path>'
    )


def tiles(rows: Sequence[tuple[str, str]]) -> str:
    """(number, what it counts) as large tiles."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in rows)
        + "</div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = (), here: int | None = None) -> str:
    """A table in a card; cells are HTML already. `numeric` columns are set right, row `here` is bold."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if number in numeric else ''}>{cell}</{tag}>" for number, cell in enumerate(row))

    body = "".join(f"<tr{' class=here' if number == here else ''}>{cells('td', row)}</tr>" for number, row in enumerate(rows))
    return f'<div class="card"><table><thead><tr>{cells("th", [escape(name) for name in head])}</tr></thead><tbody>{body}</tbody></table></div>'


def count_or_full(number: int) -> str:
    """Small numbers in full, large ones short."""
    return f"{number:,}" if number < 1_000_000 else count_text(number)
