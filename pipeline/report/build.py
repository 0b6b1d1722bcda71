"""One self-contained report.html of a run, from the files in its folder; whatever is missing is left out."""

import base64
import html
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from pipeline.report.chart import Chart, Line, Point, render_chart
from pipeline.report.page import page
from pipeline.tracker import CAPTIONS, CONFIG, EVAL, METRICS, PROVENANCE, SAMPLES, read_json, read_records

REPORT = "report.html"
SUMMARY = "summary.json"
MAX_GRIDS = 12
"""Sample grids shown: the first, the last, and evenly spread ones between."""
MAX_CAPTIONS = 40

CHARTS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    ("Training loss", "bits per subpixel + weighted text", (("loss", "train", METRICS),)),
    (
        "Image",
        "bits per subpixel",
        (("image_bits", "train, at its noise", METRICS), ("image_bits_clean", "train, no noise", METRICS), ("image_bits", "held out", EVAL)),
    ),
    ("Text", "nats per token", (("text_nats", "train", METRICS), ("text_nats", "held out", EVAL))),
    ("Log-determinant of the flow", "nats per subpixel", (("logdet_per_dim", "log-determinant", METRICS),)),
    (
        "Likelihood of latents",
        "nats per channel",
        (("soft_nats_per_dim", "in the mixture", METRICS), ("rest_nats_per_dim", "factored out", METRICS)),
    ),
    ("Effective mixture components", "exp of entropy", (("effective_components", "components", METRICS),)),
    ("Saturated coupling scales", "share", (("scale_saturation", "share", METRICS),)),
    ("Gradient norm", "before clipping", (("grad_norm", "norm", METRICS),)),
    ("Learning rate", "", (("learning_rate", "learning rate", METRICS),)),
    ("Noise on the pixels", "grey levels", (("sigma", "sigma", METRICS),)),
    ("Throughput", "images per second", (("images_per_second", "images/s", METRICS),)),
    ("Model FLOPs utilisation", "share of peak", (("mfu", "MFU", METRICS),)),
    ("Step time", "seconds", (("step_seconds", "whole step", METRICS), ("data_seconds", "waiting for data", METRICS))),
    ("Peak memory", "GB per process", (("memory_gb", "GB", METRICS),)),
)
"""Title, unit, and lines (key, label, file) of every chart, in the order shown."""

WIDE_RANGE = ("Training loss", "Image", "Text", "Gradient norm")
"""Charts drawn on a logarithmic scale where their values need one."""

TILES = (
    ("generated_digit_accuracy", "generated digits read right", "{:.1%}"),
    ("caption_accuracy", "captions right", "{:.1%}"),
    ("bits_per_subpixel", "held-out bits per subpixel", "{:.3f}"),
    ("loss", "training loss", "{:.4g}"),
    ("image_bits", "image bits at training noise", "{:.3f}"),
    ("text_nats", "text nats per token", "{:.3f}"),
    ("images_per_second", "images per second", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("wall_seconds", "wall time", "{:,.0f} s"),
)
"""Figures at the top, from summary.json and the last record."""


def build_report(run_dir: Path | str) -> Path:
    """Writes RUN/report.html and returns its path.

    Raises:
        UserError: there is no run in this folder, or the report cannot be written.
    """
    run = Path(run_dir)
    if not any((run / name).is_file() for name in (METRICS, CONFIG, PROVENANCE, EVAL)):
        raise UserError("no run in this folder", got=run, expected=f"{METRICS} or {CONFIG}", fix="give the run's output_dir")
    records = {name: read_records(run / name) for name in (METRICS, EVAL, CAPTIONS)}
    origin = read_json(run / PROVENANCE)
    sessions = [session for session in origin.get("sessions", []) if isinstance(session, dict)]
    marks = [int(session["step"]) for session in sessions[1:] if isinstance(session.get("step"), int)]
    name = str(origin.get("name") or run.resolve().name)
    sections = (
        _header(name, records[METRICS], sessions, read_json(run / SUMMARY)),
        _section("Curves", _curves(records, marks)),
        _section("Images drawn from text", _grids(run / SAMPLES)),
        _section("Captions written for held-out images", _captions(records[CAPTIONS])),
        _section("Evaluations", _evaluations(records[EVAL])),
        _section("Where it came from", _sessions(sessions)),
        _section("Configuration", _configuration(run / CONFIG)),
    )
    path = run / REPORT
    temporary = path.with_name(f".{REPORT}.tmp")
    try:
        temporary.write_text(page(html.escape(f"{name} - Jetway report"), "\n".join(filter(None, sections))), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError("the report cannot be written", got=error) from None
    return path


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>" if content else ""


def _header(name: str, metrics: Sequence[Mapping[str, Any]], sessions: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    last = metrics[-1] if metrics else {}
    facts = [f"step {last['step']:,}"] if last else ["nothing logged yet"]
    if last.get("samples"):
        facts.append(f"{last['samples']:,} images seen")
    if len(sessions) > 1:
        facts.append(f"{len(sessions) - 1} resume{'s' if len(sessions) > 2 else ''}")
    git = sessions[-1].get("git") if sessions else None
    if isinstance(git, dict) and git.get("revision"):
        facts.append(f"revision {html.escape(str(git['revision'])[:10])}{' with local changes' if git.get('dirty') else ''}")
    figures = {**last, **summary}
    tiles = "".join(
        f'<div class="tile"><b>{form.format(figures[key])}</b><span>{label}</span></div>'
        for key, label, form in TILES
        if isinstance(figures.get(key), int | float)
    )
    return f'<h1>{html.escape(name)}</h1><p class="sub">{" &middot; ".join(facts)}</p><div class="tiles">{tiles}</div>'


def _curves(records: Mapping[str, Sequence[Mapping[str, Any]]], marks: Sequence[int]) -> str:
    figures = []
    for title, unit, sources in CHARTS:
        lines = [Line(label, _points(records[file], key), dots=file == EVAL) for key, label, file in sources]
        figures.append(render_chart(Chart(title, unit, lines, marks, may_be_log=title in WIDE_RANGE)))
    content = "\n".join(filter(None, figures))
    note = '<p class="sub">Dashed lines mark where the run was resumed from a checkpoint.</p>' if marks and content else ""
    return f'{note}<div class="charts">{content}</div>' if content else ""


def _points(records: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    return [(r["step"], float(r[key])) for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]


def _grids(folder: Path) -> str:
    paths = sorted(folder.glob("step_*.png"))
    if len(paths) > MAX_GRIDS:
        paths = [paths[round(index * (len(paths) - 1) / (MAX_GRIDS - 1))] for index in range(MAX_GRIDS)]
    figures: list[str] = []
    prompts: list[Any] = []
    for path in reversed(paths):
        image = base64.b64encode(path.read_bytes()).decode()
        step = int(path.stem.removeprefix("step_"))
        prompts = prompts or read_json(path.with_suffix(".json")).get("prompts", [])
        picture = f'<img alt="samples at step {step}" src="data:image/png;base64,{image}">'
        figures.append(f'<figure class="card">{picture}<figcaption>step {step:,}</figcaption></figure>')
    if not figures:
        return ""
    items = "".join(f"<li>{html.escape(str(prompt))}</li>" for prompt in prompts)
    listing = f'<details><summary>Prompts, row by row</summary><ol class="prompts">{items}</ol></details>' if items else ""
    return f'<div class="strip">{"".join(figures)}</div>{listing}'


def _captions(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return ""
    last = max(record["step"] for record in records)
    shown = [record for record in records if record["step"] == last]
    rows = []
    for record in shown[:MAX_CAPTIONS]:
        image = record.get("image")
        picture = (
            f'<img alt="" src="data:image/png;base64,{html.escape(image)}">' if isinstance(image, str) else html.escape(str(record.get("key", "")))
        )
        correct = record.get("correct")
        verdict = "" if correct is None else '<span class="good">right</span>' if correct else '<span class="bad">wrong</span>'
        rows.append([picture, html.escape(str(record.get("caption", ""))), html.escape(str(record.get("reference", ""))), verdict])
    note = f"step {last:,}" + (f", {MAX_CAPTIONS} of {len(shown)}" if len(shown) > MAX_CAPTIONS else "")
    headers = ["image", f"written by the model <small>({note})</small>", "the data set's own", ""]
    return _table(headers, rows)


def _evaluations(records: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for record in records for key, value in record.items() if isinstance(value, int | float | str)))
    if not keys:
        return ""
    return _table([html.escape(key.replace("_", " ")) for key in keys], [[_cell(record.get(key)) for key in keys] for record in records])


def _sessions(sessions: Sequence[Mapping[str, Any]]) -> str:
    if not sessions:
        return ""
    rows = []
    known: dict[str, Callable[[Any], str]] = {
        "time": lambda value: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(value)),
        "git": lambda value: "not a checkout" if not value.get("revision") else value["revision"][:10] + (" + changes" if value.get("dirty") else ""),
        "command": lambda value: " ".join(map(str, value)),
        "versions": lambda value: ", ".join(f"{name} {version}" for name, version in value.items()),
        "config_hash": lambda value: value[:12],
    }
    keys = list(dict.fromkeys(key for session in sessions for key in session))
    for session in sessions:
        row = []
        for key in keys:
            value = session.get(key)
            try:
                row.append(html.escape(known[key](value)) if key in known and value is not None else _cell(value))
            except (AttributeError, KeyError, TypeError, ValueError):
                row.append(_cell(value))
        rows.append(row)
    # One start: facts below each other; several: one row each.
    if len(rows) == 1:
        return _table(["", ""], [[html.escape(key.replace("_", " ")), cell] for key, cell in zip(keys, rows[0], strict=True)])
    return _table([html.escape(key.replace("_", " ")) for key in keys], rows)


def _configuration(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return ""
    return f'<div class="card"><details><summary>Every field, defaults included</summary><pre>{html.escape(text)}</pre></details></div>'


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return html.escape(", ".join(f"{key} {item}" for key, item in value.items()))
    return html.escape(str(value))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Headers and cells are HTML already."""
    head = "".join(f"<th>{header}</th>" for header in headers) if any(headers) else ""
    body = "".join("<tr>" + "".join(f'<td class="n">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f'<div class="card"><table>{f"<thead><tr>{head}</tr></thead>" if head else ""}<tbody>{body}</tbody></table></div>'
