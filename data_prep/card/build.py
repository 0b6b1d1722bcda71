"""The page of a data-set card, section by section; what a data set does not tell is left out."""

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from configs.errors import UserError
from data_prep.card.contents import captions, care, columns, pictures, seconds_label, sources
from data_prep.card.figures import Stage, count_or_full, escape, flow, histogram, ranked_bars, table, tiles
from data_prep.card.gather import CardFacts
from data_prep.card.style import page
from data_prep.config import PrepConfig, identity
from data_prep.heavy_hitters import ranked
from data_prep.reasons import STAGES, explain, stage_of
from data_prep.run_stats import EDGES, quantile
from data_prep.samples import StoredSample
from data_prep.units import bytes_text, count_text, duration_text, share_text

THUMBNAIL = 192
"""Shorter side of the pictures of the contact sheet, in pixels."""
STAGE_NAMES = {
    "input": "input and text",
    "lists": "block lists",
    "network": "network",
    "image": "image",
    "filters": "filters",
    "duplicates": "duplicates",
    "other": "other",
}


def build_card(facts: CardFacts) -> bytes:
    """The whole HTML file."""
    sections = (_header, _sheet, _flow, pictures, captions, sources, columns, care, _effort, _history, _settings)
    body = "\n".join(text for section in sections if (text := section(facts)))
    footer = f"<footer>Made by <code>jetway card {escape(facts.url)}</code>. Check the data: <code>jetway verify {escape(facts.url)}</code></footer>"
    return page(f"{escape(facts.name)} · data set card", f"{body}\n{footer}").encode("utf-8", "replace")


def thumbnail(data: bytes) -> tuple[str, bool]:
    """(a data: address of the picture as a small JPEG, whether it is so small that it is shown with visible pixels)."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    is_small = min(picture.size) <= 64
    if min(picture.size) > THUMBNAIL:
        scale = THUMBNAIL / min(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95 if is_small else 82, subsampling=0 if is_small else 2)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), is_small


def _header(facts: CardFacts) -> str:
    manifest, survey = facts.manifest, facts.survey
    train, heldout = (manifest.splits[split] for split in ("train", "heldout"))
    shards = [*train.shards, *heldout.shards]
    image, counts = manifest.image, manifest.counts
    shape = f"{image.resolution} × {image.resolution}" if image.resize_mode == "center_crop" else f"{image.resolution}, any shape"
    rows = [
        (count_or_full(train.num_samples), "training samples"),
        (count_or_full(heldout.num_samples), "held-out samples, by content hash"),
        (f"{len(shards):,}", f"shards, {bytes_text(sum(shard.num_bytes for shard in shards))}"),
        (shape, f"pixels, {'RGB' if image.channels == 3 else 'gray'} {image.extension}"),
        (share_text(counts.kept, counts.read), f"of {count_or_full(counts.read)} samples read are kept"),
        (count_or_full(manifest.tokenizer.num_pieces), "pieces of the tokenizer"),
    ]
    if survey.num_tokenized:
        mean = survey.num_tokens / survey.num_tokenized
        rows.append((f"{mean:.1f}", f"tokens a caption, {count_text(mean * train.num_samples)} per epoch"))
    if manifest.inputs:
        rows.append((f"{len(manifest.inputs):,}", "input" if len(manifest.inputs) == 1 else "inputs"))
    made = f", {facts.made_at}" if facts.made_at else ""
    sub = f"{escape(facts.url)} · generation {manifest.generation} ({escape(manifest.action)}{made})"
    sub += f" · configuration <code>{escape(manifest.config_hash[:12])}</code>"
    return f'<h1>{escape(facts.name)}</h1>\n<p class="sub">{sub}</p>\n{tiles(rows)}'


def _sheet(facts: CardFacts) -> str:
    if not facts.sheet:
        return ""
    cells = "".join(_cell(sample) for sample in facts.sheet)
    return f'<h2>Samples <small>{len(facts.sheet)} spread evenly over the training split</small></h2>\n<div class="sheet">{cells}</div>'


def _cell(sample: StoredSample) -> str:
    try:
        address, is_small = thumbnail(sample.image)
    except (OSError, ValueError) as error:
        raise UserError(f"sample {sample.key} of {sample.shard} does not decode", got=error, fix="run `jetway verify`") from None
    style, caption = ' class="small"' if is_small else "", escape(sample.caption)
    return f'<figure><img{style} src="{address}" alt="{caption}" title="{caption}" loading="lazy"><figcaption>{caption}</figcaption></figure>'


def _flow(facts: CardFacts) -> str:
    counts = facts.manifest.counts
    stages = []
    for stage in (*STAGES, "other"):
        reasons = ranked((reason, number) for reason, number in counts.dropped.items() if stage_of(reason) == stage)
        stages.append(Stage(name=STAGE_NAMES[stage], lost=sum(number for _, number in reasons), causes=reasons[:4]))
    text = f"<h2>From input to data set</h2>\n{flow(counts.read, counts.kept, stages)}"
    if not counts.dropped:
        return text
    stats = facts.stats
    rows = []
    for reason, number in ranked(counts.dropped.items()):
        details = ranked(stats.failed_details.get(reason, {}).items(), 3) if stats else []
        hosts = ranked(stats.failed_hosts.get(reason, {}).items(), 3) if stats else []
        rows.append(
            [
                f"<code>{escape(reason)}</code><small>{escape(explain(reason))}</small>",
                f"{number:,}",
                share_text(number, counts.read),
                escape(", ".join(f"{name} ({share_text(part, number)})" for name, part in details)),
                escape(", ".join(f"{name} ({share_text(part, number)})" for name, part in hosts)),
            ]
        )
    head = ["reason", "samples", "of all", "most frequent causes", "hosts"]
    width = 5 if any(row[3] or row[4] for row in rows) else 3
    breakdown = table(head[:width], [row[:width] for row in rows], numeric=(1, 2))
    return f"{text}\n<details{' open' if len(rows) <= 12 else ''}><summary>every reason ({len(rows)})</summary>{breakdown}</details>"


def _effort(facts: CardFacts) -> str:
    stats = facts.stats
    if stats is None or not stats.num_parts:
        return ""
    rows = [
        (f"{stats.cpu_s / 3600:,.1f} h" if stats.cpu_s >= 3600 else duration_text(stats.cpu_s), "of CPU time"),
        (f"{stats.read / stats.elapsed_s:,.0f}/s" if stats.elapsed_s else "–", f"samples, in {duration_text(stats.elapsed_s)}"),
        (bytes_text(stats.peak_rss_bytes), "most memory of a worker"),
        (f"{stats.num_parts:,}", "tasks"),
    ]
    figures = ""
    if stats.num_fetched:
        rows += [
            (bytes_text(stats.bytes_fetched), "received from the network"),
            (f"{stats.num_attempts / stats.num_fetched:.2f}", "attempts per address"),
        ]
        middle = quantile("download_s", stats.histograms.get("download_s", (0,) * len(EDGES["download_s"])), 0.5)
        answers = ranked(stats.statuses.items(), 8)
        figures = (
            histogram("Time of a good download", EDGES["download_s"], stats.histograms.get("download_s", ()), seconds_label, f"median {middle:.2g} s")
            + histogram("Time until a failure", EDGES["failure_s"], stats.histograms.get("failure_s", ()), seconds_label)
            + ranked_bars("Answers by HTTP status", answers, sum(stats.statuses.values()))
        )
    return f'<h2>Effort</h2>\n{tiles(rows)}<div class="figures" style="margin-top: 14px">{figures}</div>'


def _history(facts: CardFacts) -> str:
    rows, here = [], None
    for number, one in enumerate(facts.history):
        if one.generation == facts.manifest.generation:
            here = number
        shards = [shard for split in one.splits.values() for shard in split.shards]
        rows.append(
            [
                f"{one.generation}",
                escape(one.action) + (f" on {one.base}" if one.base is not None else ""),
                f"{one.splits['train'].num_samples:,}",
                f"{one.splits['heldout'].num_samples:,}",
                f"{one.counts.read:,}",
                f"{len(shards):,}",
                bytes_text(sum(shard.num_bytes for shard in shards)),
            ]
        )
    head = ["generation", "made by", "train", "held out", "read", "shards", "size"]
    return f"<h2>Generations</h2>\n{table(head, rows, numeric=(2, 3, 4, 5, 6), here=here)}"


def _settings(facts: CardFacts) -> str:
    """All settings that decide the bytes of the data set; those that are not the defaults stand out."""
    usual, rows = dict(_flat(identity(PrepConfig()))), []
    for name, value in _flat(facts.manifest.config):
        is_set = name in usual and json.dumps(usual[name]) != json.dumps(value)
        text = escape(json.dumps(value, ensure_ascii=False))
        rows.append([f"<code>{escape(name)}</code>", f'<code class="set">{text}</code>' if is_set else f"<code>{text}</code>"])
    changed = sum('class="set"' in row[1] for row in rows)
    summary = f"{len(rows)} settings, {changed} of them not the default (green)"
    return f"<h2>Settings</h2>\n<details><summary>{summary}</summary>{table(['setting', 'value'], rows)}</details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return flat
