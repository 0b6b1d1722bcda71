"""The samples of one task on their way from the input to a part: judged, fetched, prepared, scored.

For every row: judge its text and the lists, fetch it if the input only names an address, judge its header, decode, filter, hash, encode.
Fetching goes on in the background while this thread decodes.
"""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2

from configs.errors import UserError
from data_prep import ledger
from data_prep.config import PrepConfig
from data_prep.download.downloader import Downloader
from data_prep.download.request import Answer, Request
from data_prep.filters.row import RowFilter
from data_prep.images.header import judge_header
from data_prep.images.prepare import PreparedImage, prepare_image
from data_prep.isolation import Isolated
from data_prep.ledger import Failure
from data_prep.metadata import Facts
from data_prep.plan import READERS, Span, Task
from data_prep.readers.base import RawSample, plain_json
from data_prep.reasons import Drop, matches
from data_prep.run_stats import PartCollector, PartStats
from data_prep.scoring import ScoreQueue
from data_prep.spool import Prepared, Spool
from data_prep.storage import Storage

DOWNLOAD_SHARE = 4
"""Of a task's memory a quarter may hold bodies that wait for their decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all tasks of one run share beside the configuration."""

    generation: int
    num_workers: int = 1
    """Tasks that run at once: they share out `download.per_host`."""
    takedowns: tuple[str, ...] = ()
    """Rules of earlier `jetway takedown` calls, in the format of `filters.takedown`."""
    scorers: tuple[Any, ...] = ()
    """Ray actors of `filters.scorer`."""
    is_isolated: bool = False
    """Decode in a child process, where a picture that kills the decoder costs only itself."""


class TaskSamples:
    """What a task makes of its rows.

    Attributes:
        kept: the prepared samples.
        dropped: images that were dropped, if `keep_dropped` asks for them.
        failures: every dropped sample, in the order in which they failed.
        retried: second-chance passes: what the samples had failed with before, by reason.
    """

    def __init__(self, config: PrepConfig, job: Job, task: Task, scratch: Path, stack: ExitStack) -> None:
        cv2.setNumThreads(1)  # one task per CPU: OpenCV's own threads would fight over them
        self._config, self._job, self._task = config, job, task
        self._filter = RowFilter.from_config(config.filters, more_takedowns=job.takedowns)
        self.kept = stack.enter_context(Spool(scratch))
        self.dropped = stack.enter_context(Spool(scratch))
        self._scores = ScoreQueue(job.scorers) if job.scorers else None
        self._prepare: Callable[[bytes], PreparedImage] = partial(_prepare, config=config)
        if job.is_isolated:
            self._prepare = stack.enter_context(Isolated(self._prepare))
        self._collector = PartCollector()
        self._unscored: dict[int, tuple[Facts, int, Answer | None, Mapping[str, Any]]] = {}
        self.failures: list[Failure] = []
        self.retried: Counter[str] = Counter()

    def run(self, storage: Storage) -> None:
        """Takes every row of the task to the spool or to the failures."""
        waiting: dict[int, RawSample] = {}
        for number, raw in self._rows(storage):
            try:
                caption = self._judge(raw)
                if raw.url is not None and not raw.image:
                    waiting[number] = replace(raw, caption=caption)
                    continue
                self._take(number, replace(raw, caption=caption), raw.image)
            except Drop as problem:
                self._drop(number, raw, problem, data=raw.image)
        if waiting:
            self._fetch(waiting)
        if self._scores is not None:
            self._score(self._scores)

    def _rows(self, storage: Storage) -> Iterator[tuple[int, RawSample]]:
        """(number, sample), exactly as many as planned: an input that has shrunk since must not shift the keys of the others."""
        for span in self._task.spans:
            part = span.part
            if self._task.reasons:
                rows = self._second_chances(span, storage)
                if not rows:
                    continue
                part = replace(part, rows=rows)
            left = dict.fromkeys(part.rows or range(part.count))
            problem = Drop("missing_file", "the input has shrunk since the plan was made")
            try:
                for raw in READERS[part.kind].read(part, self._config):
                    if raw.number in left:
                        del left[raw.number]
                        yield span.first_sample + raw.number, raw
            except (OSError, tarfile.TarError) as error:
                problem = Drop("missing_file" if isinstance(error, FileNotFoundError) else "unreadable", str(error))
            for offset in left:
                source = f"{part.path.rpartition('/')[2]}#{part.start + offset}"
                yield span.first_sample + offset, RawSample(source=source, number=offset, problem=problem)

    def _second_chances(self, span: Span, storage: Storage) -> tuple[int, ...]:
        """Offsets of the samples of a span that fail for one of the reasons to be tried again."""
        numbers = range(span.first_sample, span.first_sample + span.part.count)
        wanted = frozenset(self._task.reasons)
        found = {number: failure for number, failure in ledger.failing(storage, span.history, numbers).items() if matches(failure.reason, wanted)}
        own = set(span.part.rows or range(span.part.count))  # numbers below a slice's first row are those of other samples
        chosen = {number - span.first_sample: failure for number, failure in found.items() if number - span.first_sample in own}
        self.retried.update(failure.reason for failure in chosen.values())
        return tuple(sorted(chosen))

    def _judge(self, raw: RawSample) -> str:
        """The clean caption of a row that may be kept as far as its text, address and columns tell."""
        if raw.problem is not None:
            raise raw.problem
        caption = clean_caption(raw.caption or "")
        if not caption and self._config.missing_caption == "drop":
            raise Drop("missing_caption")
        if len(caption.encode()) > self._config.limits.max_caption_bytes:
            raise Drop("caption_too_long", f"{len(caption.encode())} bytes")
        self._filter.check_row(raw.url, caption, raw.extra)
        return caption

    def _fetch(self, waiting: dict[int, RawSample]) -> None:
        config = self._config
        has_web = any((raw.url or "").startswith(("http://", "https://")) for raw in waiting.values())
        if not config.download.contact and has_web:
            raise UserError(
                "download.contact is not set",
                expected="a mail address or a page about this crawl, which goes into the user agent",
                fix="add download.contact=you@example.org",
            )
        requests = (Request(number=number, url=raw.url or "") for number, raw in sorted(waiting.items()))
        downloader = Downloader(
            config.download,
            max_file_bytes=config.limits.max_file_bytes,
            memory_bytes=config.ray.memory_per_task_bytes // DOWNLOAD_SHARE,
            share=self._job.num_workers,
            judge=lambda prefix, total: judge_header(prefix, total, config.image, config.limits, config.filters),
            needs_stores=not has_web,  # in a list from the web, one odd address must not end the job
        )
        with downloader:
            for answer in downloader.fetch(requests):
                raw = waiting.pop(answer.number)
                try:
                    if answer.drop is not None:
                        raise answer.drop
                    self._filter.check_url(answer.final_url)  # what is not wanted may hide behind a redirect
                    self._take(answer.number, raw, answer.data, answer)
                except Drop as problem:
                    self._drop(answer.number, raw, problem, data=answer.data, answer=answer)

    def _take(self, number: int, raw: RawSample, data: bytes, answer: Answer | None = None) -> None:
        """Prepares one image and spools the sample."""
        if len(data) > self._config.limits.max_file_bytes:
            raise Drop("file_too_large", f"{len(data)} bytes")
        digest = hashlib.sha256(data).digest()
        self._filter.check_content(digest, None)
        image = self._prepare(data)
        self._filter.check_content(digest, image.phash)
        facts = Facts(
            key=f"{number:010d}",
            source=_utf8(raw.source),
            url=_utf8(raw.url or ""),
            caption=raw.caption or "",
            width=image.width,
            height=image.height,
            format=image.format,
            jpeg_quality=image.jpeg_quality,
            num_bytes=len(data),
            sha256=digest,
            phash=image.phash,
        )
        self.kept.add(Prepared(number=number, image=image.data, values=sample_values(facts, raw), facts=facts))
        if self._scores is None:
            self._collector.kept(facts, num_bytes_out=len(image.data), answer=answer)
            return
        self._unscored[number] = (facts, len(image.data), replace(answer, data=b"") if answer is not None else None, raw.extra)

    def _score(self, queue: ScoreQueue) -> None:
        """Has everything scored that was kept: in the order of the numbers, because a model's figures depend on what shares their batch."""
        for sample in self.kept:
            self._settle(queue.put(sample.number, sample.image, sample.facts.caption))
        self._settle(queue.finish())

    def _settle(self, scored: Iterator[tuple[int, dict[str, float]]]) -> None:
        """Notes scores in their samples, and drops those outside the bounds."""
        for number, scores in scored:
            facts, num_bytes, answer, columns = self._unscored.pop(number)
            try:
                self._filter.check_scores({**columns, **scores})
                self.kept.note(number, "scores", plain_json(scores))
                self._collector.kept(facts, num_bytes_out=num_bytes, answer=answer)
            except Drop as problem:
                self.kept.remove(number)
                self._fail(number, facts.source, facts.url, problem, answer)

    def _drop(self, number: int, raw: RawSample, problem: Drop, *, data: bytes, answer: Answer | None = None) -> None:
        self._fail(number, raw.source, raw.url or "", problem, answer)
        if data and self._config.keep_dropped and problem.reason != "takedown":
            failure = self.failures[-1]
            digest = hashlib.sha256(data).digest()
            facts = _facts_of_dropped(failure, clean_caption(raw.caption or ""), digest)
            values = {**asdict(failure), "sha256": digest.hex(), "extra": raw.extra}
            self.dropped.add(Prepared(number=number, image=data, values=values, facts=facts))

    def _fail(self, number: int, source: str, url: str, problem: Drop, answer: Answer | None = None) -> None:
        self.failures.append(Failure(number=number, source=source, url=url, reason=problem.reason, detail=problem.detail))
        self._collector.dropped(problem.reason, problem.detail, url=url or None, answer=answer)

    def stats(self) -> PartStats:
        """Statistics so far; call it once, at the end."""
        return self._collector.finish()


def clean_caption(text: str) -> str:
    """The caption with runs of white space made one space, and what UTF-8 cannot hold replaced."""
    return " ".join(_utf8(text).split())


def _utf8(text: str) -> str:
    """The text with what UTF-8 cannot hold replaced: the bytes of some file names, halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def sample_values(facts: Facts, raw: RawSample) -> dict[str, Any]:
    """The JSON member of a sample."""
    values: dict[str, Any] = {"key": facts.key, "caption": facts.caption, "source": facts.source}
    if facts.url:
        values["url"] = facts.url
    values |= {"width": facts.width, "height": facts.height, "format": facts.format, "jpeg_quality": facts.jpeg_quality}
    values |= {"sha256": facts.sha256.hex(), "phash": f"{facts.phash:016x}"}
    if raw.label is not None:
        values["label"] = raw.label
    if raw.extra:
        values["extra"] = dict(raw.extra)
    return values


def _facts_of_dropped(failure: Failure, caption: str, sha256: bytes) -> Facts:
    return Facts(
        key=f"{failure.number:010d}",
        source=_utf8(failure.source),
        url=_utf8(failure.url),
        caption=caption,
        width=0,
        height=0,
        format="",
        jpeg_quality=-1,
        num_bytes=0,
        sha256=sha256,
        phash=0,
    )


def _prepare(data: bytes, config: PrepConfig) -> PreparedImage:
    """A function of the module, because it may have to travel to a child process."""
    return prepare_image(data, config.image, config.limits, config.filters, config.limits.max_decode_bytes)
