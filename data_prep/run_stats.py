"""What a run of `jetway prep` measured: counts, sizes, times, and why samples failed.

A task collects (`PartCollector`), the driver adds up (`merge`), and both are stored as `stats/000001/part-000003.json` and
`stats/000001.json`. The size is bounded whatever the input: histograms have fixed bins, names are the most frequent ones.
Timings live only here: shards, metadata and manifests are the same bytes in every run.
"""

import json
import math
import resource
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Protocol

from configs.errors import UserError
from data_prep.failure_text import host_of, normalise
from data_prep.heavy_hitters import HeavyHitters, ranked
from data_prep.metadata import Facts
from data_prep.reasons import stage_of
from data_prep.storage import Storage

FORMAT = "jetway-stats/1"
NUM_HOSTS = 256
"""Hosts kept; people are shown at most 100 of them."""
NUM_PER_REASON = 40
"""Hosts and details kept for each reason."""
NUM_REASONS = 40
"""Reasons that keep hosts and details: a hostile server can answer with any status."""
_NUM_THREADS = 16

EDGES: Mapping[str, tuple[float, ...]] = {
    "shorter_side": (0, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096),
    "aspect_ratio": (0, 1 / 3, 1 / 2, 9 / 16, 2 / 3, 3 / 4, 0.95, 1.05, 4 / 3, 3 / 2, 16 / 9, 2, 3),
    "caption_chars": (0, 1, 10, 20, 40, 60, 80, 120, 160, 240, 320, 640, 1280),
    "caption_words": (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 75, 100, 200),
    "jpeg_quality": (1, 30, 40, 50, 60, 70, 75, 80, 85, 90, 93, 95, 98),
    "image_bytes": tuple(1024 * size for size in (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)),
    "download_s": (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120),
    "failure_s": (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120),
    "attempts": (1, 2, 3, 4, 5, 6),
}
"""Histogram -> lower edges of its bins; the last bin is open. Aspect ratio is width / height. `download_s` is the time of
fetches that brought a file, `failure_s` of those that failed on the network."""


class AnswerLike(Protocol):
    """What the statistics want of a downloader's answer."""

    @property
    def status(self) -> int:
        """HTTP status, 0 if none came."""

    @property
    def seconds(self) -> float:
        """From the first attempt to the end, pauses included."""

    @property
    def num_attempts(self) -> int:
        """0 where the network was not asked."""

    @property
    def num_bytes(self) -> int:
        """Bytes received."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStats:
    """Statistics of one task, or of several merged."""

    num_parts: int = 0
    read: int = 0
    kept: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Samples by reason, the most frequent first."""
    started_at: float = 0.0
    """Unix time at which the first of the tasks began; 0: none did."""
    ended_at: float = 0.0
    """Unix time at which the last one ended."""
    wall_s: float = 0.0
    """Summed over the tasks."""
    cpu_s: float = 0.0
    """Of the workers while they ran these tasks."""
    peak_rss_bytes: int = 0
    """Largest resident memory that any of the workers has had."""
    num_fetched: int = 0
    """Samples for which the network was asked."""
    num_attempts: int = 0
    bytes_fetched: int = 0
    """Received over the network, also for samples that were dropped."""
    bytes_in: int = 0
    """Original files of the samples kept."""
    bytes_out: int = 0
    """Stored pictures of the samples kept."""
    statuses: Mapping[str, int] = field(default_factory=dict)
    """Answers by HTTP status."""
    formats: Mapping[str, int] = field(default_factory=dict)
    """Of the samples kept."""
    histograms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Counts in the bins of `EDGES`; sizes and captions of the samples kept, times and attempts of all fetches."""
    hosts: Mapping[str, int] = field(default_factory=dict)
    """Samples kept by host."""
    hosts_missed: int = 0
    """How much too small a number in `hosts` may be (see `heavy_hitters`)."""
    failed_hosts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Reason -> host -> samples."""
    failed_details: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Reason -> cause in a few words -> samples."""

    @property
    def num_dropped(self) -> int:
        """Samples not kept."""
        return self.read - self.kept

    @property
    def elapsed_s(self) -> float:
        """From the first task's begin to the last one's end, interruptions included."""
        return max(0.0, self.ended_at - self.started_at)

    def to_bytes(self) -> bytes:
        """As JSON."""
        return (json.dumps({"format": FORMAT, "edges": EDGES, **asdict(self)}, ensure_ascii=False) + "\n").encode("utf-8", "replace")

    @classmethod
    def from_bytes(cls, data: bytes) -> "PartStats":
        """Reads what `to_bytes` wrote; histograms of other bins than today's are left out.

        Raises:
            ValueError: no such file, or of another format version.
        """
        try:
            values = json.loads(data)
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}, this version reads {FORMAT!r}")
            known = {item.name for item in fields(cls)}
            histograms = {name: tuple(counts) for name, counts in values["histograms"].items() if values["edges"][name] == list(EDGES.get(name, ()))}
            return cls(**{name: value for name, value in values.items() if name in known} | {"histograms": histograms})
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"not run statistics: {type(error).__name__} {error}") from error


class PartCollector:
    """Collects the statistics of one task, sample by sample; its clocks start when it is made."""

    def __init__(self) -> None:
        self._started_at, self._wall, self._cpu = time.time(), time.perf_counter(), time.process_time()
        self._kept = self._num_fetched = self._num_attempts = self._bytes_fetched = self._bytes_in = self._bytes_out = 0
        self._dropped: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._formats: Counter[str] = Counter()
        self._histograms = {name: [0] * len(edges) for name, edges in EDGES.items()}
        self._hosts = HeavyHitters(NUM_HOSTS)
        self._failed_hosts: dict[str, HeavyHitters] = {}
        self._failed_details: dict[str, HeavyHitters] = {}

    def kept(self, facts: Facts, *, num_bytes_out: int, answer: AnswerLike | None = None) -> None:
        """One sample goes into the part; `num_bytes_out` is the size of its stored picture."""
        self._kept += 1
        self._bytes_in += facts.num_bytes
        self._bytes_out += num_bytes_out
        self._formats[facts.format] += 1
        self._count("shorter_side", min(facts.width, facts.height))
        self._count("aspect_ratio", facts.width / max(1, facts.height))
        self._count("caption_chars", len(facts.caption))
        self._count("caption_words", len(facts.caption.split()))
        self._count("image_bytes", facts.num_bytes)
        if facts.jpeg_quality > 0:
            self._count("jpeg_quality", facts.jpeg_quality)
        if host := host_of(facts.url):
            self._hosts.add(host)
        if answer is not None:
            self._fetched(answer, "download_s")

    def dropped(self, reason: str, detail: str = "", url: str | None = None, answer: AnswerLike | None = None) -> None:
        """One sample does not."""
        self._dropped[reason] += 1
        host, cause = host_of(url), normalise(detail)
        for text, table in ((host, self._failed_hosts), (cause, self._failed_details)):
            if text and (reason in table or len(table) < NUM_REASONS):
                table.setdefault(reason, HeavyHitters(NUM_PER_REASON)).add(text)
        if answer is not None:
            self._fetched(answer, "failure_s" if stage_of(reason) == "network" else "download_s")

    def finish(self) -> PartStats:
        """The statistics up to now."""
        return PartStats(
            num_parts=1,
            read=self._kept + sum(self._dropped.values()),
            kept=self._kept,
            dropped=dict(ranked(self._dropped.items())),
            started_at=self._started_at,
            ended_at=time.time(),
            wall_s=time.perf_counter() - self._wall,
            cpu_s=time.process_time() - self._cpu,
            peak_rss_bytes=peak_rss_bytes(),
            num_fetched=self._num_fetched,
            num_attempts=self._num_attempts,
            bytes_fetched=self._bytes_fetched,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            statuses=dict(ranked(self._statuses.items())),
            formats=dict(ranked(self._formats.items())),
            histograms={name: tuple(counts) for name, counts in self._histograms.items()},
            hosts=self._hosts.top(),
            hosts_missed=self._hosts.missed,
            failed_hosts=_tops(self._failed_hosts),
            failed_details=_tops(self._failed_details),
        )

    def _count(self, name: str, value: float) -> None:
        self._histograms[name][max(0, bisect_right(EDGES[name], value) - 1)] += 1

    def _fetched(self, answer: AnswerLike, times: str) -> None:
        if not answer.num_attempts:
            return  # nothing was asked: a bad address, robots.txt, an open circuit
        self._num_fetched += 1
        self._num_attempts += answer.num_attempts
        self._bytes_fetched += answer.num_bytes
        if answer.status:
            self._statuses[str(answer.status)] += 1
        self._count(times, answer.seconds)
        self._count("attempts", answer.num_attempts)


def merge(*stats: PartStats) -> PartStats:
    """The statistics of several tasks (or of none) as one."""

    def total(name: str) -> Any:
        return sum(getattr(one, name) for one in stats)

    def table(name: str) -> dict[str, int]:
        added: Counter[str] = Counter()
        for one in stats:
            added.update(getattr(one, name))
        return dict(ranked(added.items()))

    histograms = {name: [0] * len(edges) for name, edges in EDGES.items()}
    hosts = HeavyHitters(NUM_HOSTS)
    for one in stats:
        hosts.merge(one.hosts, one.hosts_missed)
        for name, counts in one.histograms.items():
            histograms[name] = [a + b for a, b in zip(histograms[name], counts, strict=True)]
    dropped = table("dropped")
    return PartStats(
        num_parts=total("num_parts"),
        read=total("read"),
        kept=total("kept"),
        dropped=dropped,
        started_at=min((one.started_at for one in stats if one.started_at), default=0.0),
        ended_at=max((one.ended_at for one in stats), default=0.0),
        wall_s=total("wall_s"),
        cpu_s=total("cpu_s"),
        peak_rss_bytes=max((one.peak_rss_bytes for one in stats), default=0),
        num_fetched=total("num_fetched"),
        num_attempts=total("num_attempts"),
        bytes_fetched=total("bytes_fetched"),
        bytes_in=total("bytes_in"),
        bytes_out=total("bytes_out"),
        statuses=table("statuses"),
        formats=table("formats"),
        histograms={name: tuple(counts) for name, counts in histograms.items()},
        hosts=hosts.top(),
        hosts_missed=hosts.missed,
        failed_hosts=_merge_failed([one.failed_hosts for one in stats], dropped),
        failed_details=_merge_failed([one.failed_details for one in stats], dropped),
    )


def total_of(stats: Iterable[PartStats]) -> PartStats:
    """`merge` of any number of statistics in bounded memory."""
    total, pending = PartStats(), []
    for one in stats:
        pending.append(one)
        if len(pending) == 64:
            total, pending = merge(total, *pending), []
    return merge(total, *pending)


def part_path(generation: int, number: int) -> str:
    """Where the statistics of task `number` lie in the data set."""
    return f"stats/{generation:06d}/part-{number:06d}.json"


def whole_path(generation: int) -> str:
    """Where the statistics of a whole generation lie in the data set."""
    return f"stats/{generation:06d}.json"


def dump_part(storage: Storage, generation: int, number: int, stats: PartStats) -> str:
    """Publishes the statistics of one task; returns the path."""
    path = part_path(generation, number)
    storage.put_bytes(path, stats.to_bytes())
    return path


def dump_whole(storage: Storage, generation: int, stats: PartStats) -> str:
    """Publishes the statistics of a generation; returns the path."""
    path = whole_path(generation)
    storage.put_bytes(path, stats.to_bytes())
    return path


def load_part(storage: Storage, generation: int, number: int) -> PartStats | None:
    """The statistics of one task; None if there are none.

    Raises:
        UserError: the file is damaged.
    """
    return _load(storage, part_path(generation, number))


def load_parts(storage: Storage, generation: int, numbers: Iterable[int] | None = None) -> Iterator[PartStats]:
    """The statistics of tasks of a generation, in the order of the plan.

    Args:
        numbers: of the tasks; None: all.

    Raises:
        UserError: a file is damaged.
    """
    if numbers is None:
        paths = storage.list(f"stats/{generation:06d}/part-")
    else:
        paths = [part_path(generation, number) for number in sorted(numbers)]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for begin in range(0, len(paths), 1000):  # not all at once: there may be a million, of some kilobytes each
            yield from (stats for stats in threads.map(partial(_load, storage), paths[begin : begin + 1000]) if stats is not None)


def load_whole(storage: Storage, generation: int) -> PartStats | None:
    """The statistics of a generation; None if there are none (data sets of earlier versions).

    Raises:
        UserError: the file is damaged.
    """
    return _load(storage, whole_path(generation))


def quantile(name: str, counts: Sequence[int], share: float) -> float:
    """The value below which `share` (0..1) of a histogram lies, linear within a bin; NaN if it is empty.

    The last, open bin counts as its lower edge.
    """
    edges, below, wanted = EDGES[name], 0, share * sum(counts)
    if not any(counts):
        return math.nan
    for edge, following, count in zip(edges, [*edges[1:], edges[-1]], counts, strict=True):
        if count and below + count >= wanted:
            return edge + (following - edge) * (wanted - below) / count
        below += count
    return float(edges[-1])


def peak_rss_bytes() -> int:
    """Largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _tops(tables: Mapping[str, HeavyHitters]) -> dict[str, dict[str, int]]:
    return {reason: table.top() for reason, table in tables.items()}


def _merge_failed(tables: Sequence[Mapping[str, Mapping[str, int]]], dropped: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Hosts or details by reason, for the most frequent reasons."""
    merged: dict[str, HeavyHitters] = {}
    for reason in list(dropped)[:NUM_REASONS]:
        for counts in (table[reason] for table in tables if reason in table):
            merged.setdefault(reason, HeavyHitters(NUM_PER_REASON)).merge(counts)
    return _tops(merged)


def _load(storage: Storage, path: str) -> PartStats | None:
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        return PartStats.from_bytes(data)
    except ValueError as error:
        raise UserError(f"{storage.url}/{path} is damaged or of another version", got=error, fix="delete it: it is not part of the data") from None
