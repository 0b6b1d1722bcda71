"""The sections of a card about what the samples are: pictures, captions, sources, other columns, and the care taken with them."""

from collections.abc import Callable, Mapping
from typing import Any

from data_prep.card.figures import escape, histogram, ranked_bars, table
from data_prep.card.gather import TOKEN_EDGES, CardFacts, Column, Survey, find_column
from data_prep.heavy_hitters import ranked
from data_prep.reasons import stage_of
from data_prep.run_stats import EDGES
from data_prep.units import bytes_text, share_text

RATIOS = {
    1 / 3: "1:3",
    1 / 2: "1:2",
    9 / 16: "9:16",
    2 / 3: "2:3",
    3 / 4: "3:4",
    0.95: "0.95",
    1.05: "1.05",
    4 / 3: "4:3",
    3 / 2: "3:2",
    16 / 9: "16:9",
}


def pictures(facts: CardFacts) -> str:
    """Sizes, shapes, formats and labels."""
    survey, resolution = facts.survey, facts.manifest.image.resolution
    shown = survey.histograms
    middle = _median(survey, "shorter_side", "{:.0f} px".format)
    enlarged = f"{middle}; {share_text(survey.num_enlarged, survey.num_rows)} below {resolution}" if middle else ""
    figures = [
        histogram("Shorter side", EDGES["shorter_side"], shown["shorter_side"], "{:g}".format, enlarged),
        histogram(
            "Aspect ratio",
            EDGES["aspect_ratio"],
            shown["aspect_ratio"],
            lambda edge: RATIOS.get(edge, f"{edge:g}:1" if edge else "0"),
            "width : height",
        ),
        histogram("File size", EDGES["image_bytes"], shown["image_bytes"], _short_bytes, _median(survey, "image_bytes", bytes_text)),
        histogram(
            "JPEG quality",
            EDGES["jpeg_quality"],
            shown["jpeg_quality"],
            "{:g}".format,
            _median(survey, "jpeg_quality", "{:.0f}".format),
        ),
        ranked_bars("Format", ranked(survey.formats.items(), 8), survey.num_rows),
    ]
    if facts.labels:
        rows, number = ranked(facts.labels.items(), 12), sum(facts.labels.values())
        figures.append(ranked_bars("Labels", rows, number, f"{len(facts.labels):,} of them in {number:,} samples looked at"))
    return f'<h2>Original pictures <small>{_scope(facts)}</small></h2>\n<div class="figures">{"".join(figures)}</div>'


def captions(facts: CardFacts) -> str:
    """Lengths, language and tokenizer."""
    survey = facts.survey
    words = _median(survey, "caption_words", "{:.0f} words".format)
    empty = f"; {share_text(survey.num_empty, survey.num_rows)} are empty" if survey.num_empty else ""
    figures = [
        histogram("Words of a caption", EDGES["caption_words"], survey.histograms["caption_words"], "{:g}".format, words + empty if words else ""),
        histogram(
            "Tokens of a caption",
            TOKEN_EDGES,
            survey.histograms["tokens"],
            "{:g}".format,
            _median(survey, "tokens", "{:.0f}".format),
        ),
    ]
    language = find_column(facts.columns, "language")
    if language is not None:
        note = f"{share_text(language.num_filled, facts.num_members)} of the samples say"
        figures.append(ranked_bars("Language", ranked(language.values.items(), 10), language.num_filled, note))
    if not any(figures):
        return ""
    facts_line = f"{facts.manifest.tokenizer.num_pieces:,} SentencePiece pieces"
    if survey.num_words:
        facts_line += f"; {survey.num_tokens / survey.num_tokenized:.2f} tokens a caption with its end"
        facts_line += f", {survey.num_tokens / survey.num_words:.2f} tokens a word (fertility)"
    facts_line += f", over {survey.num_tokenized:,} captions. Model <code>{facts.manifest.tokenizer.sha256[:12]}</code>"
    return f'<h2>Captions</h2>\n<div class="figures">{"".join(figures)}</div>\n<p class="note">{facts_line}</p>'


def sources(facts: CardFacts) -> str:
    """Hosts, licences and inputs."""
    survey = facts.survey
    figures: list[str] = []
    if survey.hosts:
        rows = ranked(survey.hosts.items(), 12)
        note = f"these hold {share_text(sum(number for _, number in rows), survey.num_with_url)}"
        figures.append(ranked_bars("Hosts of the pictures", rows, survey.num_with_url, note))
    license_ = find_column(facts.columns, "license")
    if license_ is not None:
        note = f"{share_text(license_.num_filled, facts.num_members)} of {facts.num_members:,} samples looked at name one"
        figures.append(ranked_bars("Licences", ranked(license_.values.items(), 10), license_.num_filled, note))
    inputs = facts.manifest.inputs
    listed = ""
    if inputs:
        rows_ = "".join(f"<div><code>{escape(name)}</code></div>" for name in inputs[:20])
        more = f'<div class="sub">and {len(inputs) - 20:,} more</div>' if len(inputs) > 20 else ""
        listed = f'<figure class="figure"><figcaption><b>Inputs</b></figcaption>{rows_}{more}</figure>'
    if license_ is None:
        listed += (
            '<figure class="figure"><figcaption><b>Licences</b></figcaption><small>The inputs carry no column named license or licence: '
            "nothing is known of the rights in these pictures and texts.</small></figure>"
        )
    return f'<h2>Sources</h2>\n<div class="figures">{"".join(figures)}{listed}</div>'


def columns(facts: CardFacts) -> str:
    """What else the input said of its samples."""
    if not facts.columns:
        return ""
    rows = [
        [f"<code>{escape(name)}</code>", share_text(column.num_filled, facts.num_members), _contents(column)]
        for name, column in facts.columns.items()
    ]
    note = f"from the JSON of {facts.num_members:,} samples, spread evenly"
    return f"<h2>Columns carried along <small>{note}</small></h2>\n{table(['column', 'filled', 'holds'], rows[:40], numeric=(1,))}"


def _contents(column: Column) -> str:
    if column.numbers is not None and len(column.values) > 8:
        low, middle, high = column.numbers
        return f"{low:.4g} to {high:.4g}, median {middle:.4g}"
    texts = [
        f"{escape(text[:60] + ('…' if len(text) > 60 else ''))} ({share_text(number, column.num_filled)})"
        for text, number in ranked(column.values.items(), 4)
    ]
    if len(column.values) == column.num_filled > 8:
        return f"all different, such as {escape(next(iter(column.values))[:80])}"
    return ", ".join(texts) + (f" and {len(column.values) - 4:,} more" if len(column.values) > 4 else "")


def care(facts: CardFacts) -> str:
    """Duplicates, evaluation sets, opting out, taking down: what was done, also where it found nothing."""
    manifest = facts.manifest
    dropped, config = manifest.counts.dropped, manifest.config
    dedup, download, filters = (config.get(name) or {} for name in ("dedup", "download", "filters"))

    def found(*reasons: str) -> str:
        return f"{sum(dropped.get(reason, 0) for reason in reasons):,}"

    def asked(setting: str) -> str:
        if not facts.survey.num_with_url and not any(stage_of(reason) == "network" for reason in dropped):
            return "nothing was downloaded"
        return "respected" if download.get(setting, False) else "not asked"

    takedowns = f"{facts.num_takedowns:,} takedown{'' if facts.num_takedowns == 1 else 's'}"
    since = f"in {takedowns}; no training run uses these samples any more" if facts.num_takedowns else "nothing"
    distance, similarity = dedup.get("image_distance"), dedup.get("caption_similarity")
    evaluation = dedup.get("evaluation") or ()
    rows = [
        ["Exact copies of a picture", "dropped" if dedup.get("exact") else "kept", found("duplicate")],
        ["Near copies of a picture", f"dropped up to {distance} of 64 bits apart" if distance is not None else "kept", found("near_duplicate_image")],
        [
            "Near copies of a caption",
            f"dropped from similarity {similarity} on" if similarity is not None else "kept",
            found("near_duplicate_caption"),
        ],
        [
            "Samples of evaluation sets",
            "dropped: " + ", ".join(f"<code>{escape(path)}</code>" for path in evaluation) if evaluation else "not compared with any",
            found("eval_image", "eval_caption"),
        ],
        ["Owners who opt out (HTTP headers)", asked("respect_opt_out"), found("opt_out")],
        ["robots.txt", asked("respect_robots"), found("robots")],
        ["Takedown list of the preparation", _listed(filters.get("takedown"), manifest.lists), found("takedown")],
        ["Block lists", _block_lists(filters, manifest.lists), found("blocked_url", "blocked_domain", "blocked_text")],
        ["Taken down since", since, f"{facts.num_taken_down:,}"],
    ]
    return f"<h2>Care taken</h2>\n{table(['what', 'how', 'samples'], rows, numeric=(2,))}"


def _listed(path: Any, lists: Mapping[str, str]) -> str:
    if not path:
        return "none"
    return f"<code>{escape(path)}</code> <code>{escape(lists.get(path, '')[:12])}</code>"


def _block_lists(filters: Mapping[str, Any], lists: Mapping[str, str]) -> str:
    named = [filters.get(name) for name in ("blocked_urls", "blocked_domains", "blocked_text")]
    return ", ".join(_listed(path, lists) for path in named if path) or "none"


def _scope(facts: CardFacts) -> str:
    survey, total = facts.survey, sum(split.num_samples for split in facts.manifest.splits.values())
    if survey.num_rows + facts.num_taken_down >= total:
        return "all samples"
    where = f"{survey.num_shards:,} shards" if survey.from_sidecars else "the data set"
    return f"{survey.num_rows:,} of {total:,} samples, from {where}, evenly spread"


def _median(survey: Survey, name: str, form: Callable[[float], str]) -> str:
    """`median 640 px`; empty where nothing is known."""
    return f"median {form(survey.medians[name])}" if name in survey.medians else ""


def _short_bytes(number: float) -> str:
    return f"{number / 2**20:g}M" if number >= 2**20 else f"{number / 1024:g}K"


def seconds_label(number: float) -> str:
    """A short time for the foot of a bar."""
    return f"{number:g}s" if number >= 1 or not number else f"{1000 * number:g}ms"
