"""Everything that a data-set card shows, read from the data set: manifests, sidecars, some samples, statistics, tokenizer."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configs.errors import UserError
from data_prep import metadata, tombstones
from data_prep.failure_text import host_of
from data_prep.heavy_hitters import HeavyHitters
from data_prep.run_stats import EDGES, NUM_HOSTS, PartStats, load_whole, merge
from data_prep.samples import StoredSample, stored_samples
from data_prep.schema import SPLITS, Manifest, ShardInfo, base_of, generations
from data_prep.storage import Storage
from data_prep.tokenizer import load_tokenizer

MAX_ROWS = 500_000
"""Rows of sidecars read; a larger data set is judged by shards spread evenly over it."""
MAX_MEMBERS = 600
"""Samples whose JSON is read for licences, languages and other columns; `MAX_MEMBERS_ALONE` where there are no sidecars."""
MAX_MEMBERS_ALONE = 2000
MAX_TOKENIZED = 20_000
MAX_GENERATIONS = 50

COLUMNS = ("url", "caption", "width", "height", "format", "jpeg_quality", "num_bytes")
TOKEN_EDGES = (0, 1, 5, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257)
TITLE_COLUMNS = {"license": ("license", "licence"), "language": ("language", "lang")}
"""What is looked for among the extra columns, and under which names, in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What an extra column of the input holds, over the samples looked at."""

    num_filled: int
    values: Counter[str]
    """Texts (or numbers as text) by number, at most 1,000 of them."""
    numbers: tuple[float, float, float] | None
    """Least, median, most, where all are numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Distributions over samples of all splits, read from sidecars (or from JSON members)."""

    num_rows: int = 0
    num_shards: int = 0
    from_sidecars: bool = True
    histograms: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Counts in the bins of `run_stats.EDGES`, and `tokens` in those of `TOKEN_EDGES`."""
    medians: dict[str, float] = field(default_factory=dict)
    """Of what is known; names as in `histograms`."""
    formats: Counter[str] = field(default_factory=Counter)
    hosts: dict[str, int] = field(default_factory=dict)
    num_with_url: int = 0
    num_enlarged: int = 0
    """Samples whose original is smaller than what is stored."""
    num_tokenized: int = 0
    num_tokens: int = 0
    """Of those captions, with the end of sequence."""
    num_words: int = 0
    """Of those captions."""
    num_empty: int = 0
    """Captions without text, of all rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """All that the page is built from."""

    name: str
    url: str
    manifest: Manifest
    history: tuple[Manifest, ...]
    """The newest `MAX_GENERATIONS` generations, oldest first."""
    made_at: str
    """Day of the newest run's end, from the statistics; empty if unknown."""
    stats: PartStats | None
    """Of the runs that made this generation, merged; None where they left none."""
    survey: Survey
    num_members: int
    """Samples that `columns` and `labels` are from."""
    columns: dict[str, Column]
    labels: Counter[str]
    num_taken_down: int
    """Samples of this generation's shards that must not be used any more."""
    num_takedowns: int
    sheet: tuple[StoredSample, ...]


def gather(storage: Storage, generation: int | None, num_samples: int) -> CardFacts:
    """Reads what a card of `num_samples` pictures needs.

    Raises:
        UserError: no such data set or generation, or a damaged file.
    """
    manifest = Manifest.load(storage, generation)
    takedowns = tombstones.load_files(storage)
    gone = tombstones.merge(takedowns)
    hidden = {(shard, key) for file in takedowns for shard, hits in file.shards.items() for key in hits.keys}
    shards = [shard for split in SPLITS for shard in manifest.splits[split].shards]
    has_sidecars = bool(shards) and all(shard.metadata_sha256 for shard in shards)
    members = list(_spread(storage, manifest, SPLITS, MAX_MEMBERS if has_sidecars else MAX_MEMBERS_ALONE, hidden))
    processor = load_tokenizer(storage, manifest)
    if has_sidecars:
        chosen = _evenly(shards, max(1, MAX_ROWS * len(shards) // max(1, sum(shard.num_samples for shard in shards))))
        tables = (_table(storage, shard, gone) for shard in chosen)
        survey = _survey(tables, manifest.image.resolution, processor, len(chosen))
    else:
        survey = _survey(iter([_member_table(members)]), manifest.image.resolution, processor, 0)
    runs = _runs(storage, manifest)
    return CardFacts(
        name=storage.url.rstrip("/").rsplit("/", 1)[-1] or storage.url,
        url=storage.url,
        manifest=manifest,
        history=tuple(Manifest.load(storage, number) for number in generations(storage)[-MAX_GENERATIONS:]),
        made_at=time.strftime("%Y-%m-%d", time.gmtime(runs.ended_at)) if runs else "",
        stats=runs,
        survey=survey,
        num_members=len(members),
        columns=_columns(members),
        labels=Counter(str(sample.values["label"]) for sample in members if "label" in sample.values),
        num_taken_down=gone.count(shard.name for shard in shards),
        num_takedowns=len(takedowns),
        sheet=_sheet(storage, manifest, num_samples, hidden),
    )


def find_column(columns: dict[str, Column], role: str) -> Column | None:
    """The extra column that plays a role of `TITLE_COLUMNS`, whatever its case."""
    return next((column for name, column in columns.items() if name.lower() in TITLE_COLUMNS[role]), None)


def _spread(storage: Storage, manifest: Manifest, splits: Sequence[str], number: int, hidden: set[tuple[str, str]]) -> Iterator[StoredSample]:
    """At least `number` (if there are so many) and about at most twice as many samples, spread evenly over these splits, without those taken down."""
    total = sum(manifest.splits[split].num_samples for split in splits)
    for split in splits:
        for sample in stored_samples(storage, manifest, split, every=max(1, total // number)):
            if (sample.shard, sample.key) not in hidden:
                yield sample


def _sheet(storage: Storage, manifest: Manifest, number: int, hidden: set[tuple[str, str]]) -> tuple[StoredSample, ...]:
    """`number` training samples, evenly spread."""
    if not number:
        return ()
    found = list(_spread(storage, manifest, ("train",), number, hidden))
    return tuple(found) if len(found) <= number else tuple(found[place * len(found) // number] for place in range(number))


def _runs(storage: Storage, manifest: Manifest) -> PartStats | None:
    """Statistics of all runs that this generation rests on; None where one of them left none."""
    found = []
    generation: int | None = manifest.generation
    while generation is not None:
        stats = load_whole(storage, generation)
        if stats is not None:
            found.append(stats)
        base = base_of(storage, generation)  # a compaction may have deleted its manifest; the statistics stay
        generation = base if base is not None and base < generation else None
    return merge(*found) if found else None


def _table(storage: Storage, shard: ShardInfo, gone: tombstones.Tombstones) -> dict[str, list[Any]]:
    """The columns of a sidecar without the samples taken down."""
    table = metadata.load(storage, shard.name, columns=COLUMNS, sha256=shard.metadata_sha256)
    if table.num_rows != shard.num_samples:
        where = f"{storage.url}/{metadata.metadata_path(shard.name)}"
        raise UserError(f"{where} does not fit its shard", got=f"{table.num_rows} rows", expected=f"{shard.num_samples}", fix="run `jetway verify`")
    return dict(table.take(gone.kept(shard.name, shard.num_samples)).to_pydict())


def _member_table(members: Sequence[StoredSample]) -> dict[str, list[Any]]:
    """The same columns as a sidecar's, as far as the JSON members know them."""
    values = [sample.values for sample in members]
    return {
        "url": [_text(one.get("url") or one.get("extra", {}).get("url")) for one in values],
        "caption": [sample.caption for sample in members],
        "width": [one["width"] for one in values],
        "height": [one["height"] for one in values],
        "format": [one["format"] for one in values],
        "jpeg_quality": [-1] * len(values),
        "num_bytes": [-1] * len(values),
    }


def _survey(tables: Iterable[dict[str, list[Any]]], resolution: int, processor: Any, num_shards: int) -> Survey:
    histograms = {name: np.zeros(len(edges), dtype=np.int64) for name, edges in {**EDGES, "tokens": TOKEN_EDGES}.items()}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in histograms}
    formats: Counter[str] = Counter()
    hosts = HeavyHitters(NUM_HOSTS)
    num_rows = num_with_url = num_enlarged = num_empty = num_tokens = num_words = num_tokenized = 0
    for table in tables:
        width, height = np.array(table["width"], dtype=np.int64), np.array(table["height"], dtype=np.int64)
        words = np.array([len(caption.split()) for caption in table["caption"]], dtype=np.int64)
        for name, values in (
            ("shorter_side", np.minimum(width, height)),
            ("aspect_ratio", width / np.maximum(height, 1)),
            ("caption_words", words),
            ("caption_chars", np.array([len(caption) for caption in table["caption"]], dtype=np.int64)),
            ("jpeg_quality", _known(table["jpeg_quality"])),
            ("image_bytes", _known(table["num_bytes"])),
        ):
            histograms[name] += _binned(values, EDGES[name])
            seen[name].append(values)
        formats.update(table["format"])
        for url in table["url"]:
            if host := host_of(url):
                num_with_url += 1
                hosts.add(host)
        num_rows += len(words)
        num_enlarged += int((np.minimum(width, height) < resolution).sum())
        num_empty += int((words == 0).sum())
        share = max(1, len(words) * max(1, num_shards) // MAX_TOKENIZED)
        captions = table["caption"][::share]
        tokens = np.array([len(ids) + 1 for ids in processor.EncodeAsIds(captions)], dtype=np.int64)
        histograms["tokens"] += _binned(tokens, TOKEN_EDGES)
        seen["tokens"].append(tokens)
        num_tokens, num_tokenized, num_words = num_tokens + int(tokens.sum()), num_tokenized + len(tokens), num_words + int(words[::share].sum())
    return Survey(
        num_rows=num_rows,
        num_shards=num_shards,
        from_sidecars=num_shards > 0,
        histograms={name: tuple(int(count) for count in counts) for name, counts in histograms.items()},
        medians={name: float(np.median(values)) for name, arrays in seen.items() if len(values := np.concatenate([*arrays, np.empty(0)]))},
        formats=formats,
        hosts=hosts.top(),
        num_with_url=num_with_url,
        num_enlarged=num_enlarged,
        num_tokenized=num_tokenized,
        num_tokens=num_tokens,
        num_words=num_words,
        num_empty=num_empty,
    )


def _columns(members: Sequence[StoredSample]) -> dict[str, Column]:
    """The extra columns, most filled first."""
    filled: dict[str, list[Any]] = {}
    for sample in members:
        extra = sample.values.get("extra")
        for name, value in extra.items() if isinstance(extra, dict) else ():
            if value is not None and value != "":
                filled.setdefault(name, []).append(value)
    columns = {name: _column(values) for name, values in filled.items()}
    return dict(sorted(columns.items(), key=lambda item: (-item[1].num_filled, item[0])))


def _column(values: list[Any]) -> Column:
    numbers = [_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    extent = (min(known), float(np.median(known)), max(known)) if len(known) == len(values) else None
    return Column(num_filled=len(values), values=Counter(dict(Counter(_text(value) for value in values).most_common(1000))), numbers=extent)


def _number(value: Any) -> float | None:
    """A number, also one that a text table brought as text."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _known(values: list[int]) -> np.ndarray:
    array = np.array(values, dtype=np.int64)
    return array[array > 0]


def _binned(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Counts in bins of these lower edges, int64 [len(edges)]; the last bin is open."""
    bins = np.maximum(np.searchsorted(np.array(edges), values, side="right") - 1, 0)
    return np.bincount(bins, minlength=len(edges)).astype(np.int64)


def _evenly(shards: Sequence[ShardInfo], number: int) -> list[ShardInfo]:
    """At most `number` shards, evenly spread."""
    if len(shards) <= number:
        return list(shards)
    return [shards[index * len(shards) // number] for index in range(number)]
