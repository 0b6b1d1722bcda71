"""The plan of a generation: which samples exist, in which order, and which task prepares which. Made once and stored on the output.

Sample number i of a data set has the key `i` (ten digits) whatever becomes of the others, so keys are unique and a rerun gives the same
ones. A grown input continues the numbering: `grow_plan` lists only what the generations before have not numbered.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from configs.errors import UserError
from configs.loader import to_dict
from data_prep.config import PrepConfig, identity, identity_hash
from data_prep.inputs import list_inputs, open_input
from data_prep.ledger import LedgerFile
from data_prep.readers.base import Reader, Slice
from data_prep.readers.folder import FolderReader
from data_prep.readers.table import TableReader
from data_prep.readers.tar import TarReader
from data_prep.schema import base_of
from data_prep.storage import Storage

PLANS = "plans"
HEAD_BYTES = 2**16
READERS: dict[str, Reader] = {"folder": FolderReader(), "table": TableReader(), "tar": TarReader()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive samples of one input, and the numbers that they have in the data set."""

    first_sample: int
    """Number of the sample at `part.start`."""
    part: Slice
    history: tuple[LedgerFile, ...] = ()
    """Second-chance passes: where the failures of these samples are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The samples that one Ray task prepares: about one shard's worth."""

    number: int
    spans: tuple[Span, ...]
    num_samples: int
    """Samples that the task reads, good and bad."""
    reasons: tuple[str, ...] = ()
    """Second-chance passes: only the samples of the spans that fail for one of these. Empty: all samples."""

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The slices of the spans."""
        return tuple(span.part for span in self.spans)

    @classmethod
    def of(cls, slices: Iterable[Slice]) -> "Task":
        """A task of these slices on its own, numbered from 0."""
        spans, number = [], 0
        for part in slices:
            spans.append(Span(first_sample=number, part=part))
            number += part.count
        return cls(number=0, spans=tuple(spans), num_samples=sum(len(span.part.numbers) for span in spans))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One input as it was when it was planned."""

    kind: str
    path: str
    num_samples: int
    head_bytes: int = 0
    head: str = ""
    """Hex SHA-256 of its first `head_bytes` (tables and tars): an input that is replaced has not grown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All tasks of one generation."""

    generation: int
    action: str
    """`prep`, `grow` or `retry`."""
    base: int | None
    """The generation that this one continues."""
    config: dict[str, Any]
    """`identity` of the configuration."""
    config_hash: str
    settings: dict[str, Any]
    """The configuration but for `output` and `ray`: what a second-chance pass starts from."""
    inputs: tuple[str, ...]
    """As the user named them."""
    sources: tuple[Source, ...]
    """Every input of this generation and of those before it."""
    lists: dict[str, str]
    """Hex SHA-256 of every block list and evaluation set, by path."""
    first_sample: int
    """Number of the first sample that this generation adds."""
    tasks: tuple[Task, ...]

    @property
    def num_samples(self) -> int:
        """Samples that this generation reads, good and bad."""
        return sum(task.num_samples for task in self.tasks)

    @property
    def num_planned(self) -> int:
        """Samples numbered so far, those of the base included."""
        return self.first_sample + (0 if self.action == "retry" else self.num_samples)

    def to_bytes(self) -> bytes:
        """As JSON; names of files keep bytes that are no UTF-8."""
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")

    def dump(self, storage: Storage) -> None:
        """Stores the plan on the output.

        Raises:
            UserError: another run has just stored one for this generation.
        """
        data = self.to_bytes()
        if not storage.put_new(plan_path(self.generation), data) and storage.read_bytes(plan_path(self.generation)) != data:
            raise UserError(f"another run has begun generation {self.generation} of {storage.url}", fix="wait for it, then run again")

    @classmethod
    def load(cls, storage: Storage, generation: int) -> "Plan | None":
        """The plan that an earlier run stored on the output, if any."""
        path = plan_path(generation)
        try:
            values = json.loads(storage.read_bytes(path).decode("utf-8", "surrogateescape"))
            return cls(
                **{
                    **values,
                    "inputs": tuple(values["inputs"]),
                    "sources": tuple(Source(**source) for source in values["sources"]),
                    "tasks": tuple(_task(task) for task in values["tasks"]),
                }
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{storage.url}/{path} is damaged", got=error, fix="choose another output, or delete this one") from None


def settings(config: PrepConfig) -> dict[str, Any]:
    """What a plan stores of a configuration beside its identity."""
    return {name: value for name, value in to_dict(config).items() if name not in ("output", "ray")}


def plan_path(generation: int) -> str:
    """Path of the plan of a generation inside the data set."""
    return f"{PLANS}/{generation:06d}.json"


def planned(storage: Storage) -> list[int]:
    """Numbers of the generations that have a plan, ascending."""
    names = (path.removeprefix(f"{PLANS}/").removesuffix(".json") for path in storage.list(f"{PLANS}/"))
    return sorted(int(name) for name in names if name.isdecimal())


def make_plan(config: PrepConfig, *, lists: dict[str, str] | None = None) -> Plan:
    """Lists the inputs and groups their samples into tasks: the plan of a first generation.

    Raises:
        UserError: an input is missing, of no known kind, or holds no sample.
    """
    sources, slices = _list(config, {}, {})
    plan = _plan(config, slices, sources, generation=1, action="prep", base=None, first_sample=0, lists=lists or {})
    if not plan.tasks:
        raise UserError(
            f"the input holds no samples: {', '.join(config.inputs)}",
            expected="image files (.jpg, .png, .webp, ...), a table with rows, or tars",
            fix="check the path",
        )
    return plan


def grow_plan(config: PrepConfig, storage: Storage, *, generation: int, base: int, first_sample: int, lists: dict[str, str]) -> Plan:
    """Lists what the inputs hold beyond what generation `base` and those before it have numbered. It may have no task.

    Raises:
        UserError: an input was replaced, or has fewer samples than before.
    """
    sources: dict[tuple[str, str], Source] = {}
    names: dict[str, set[str]] = {}
    for plan in reversed(plans_of(storage, base)):
        sources.update(((source.kind, source.path), source) for source in plan.sources)
        for part in (span.part for task in plan.tasks for span in task.spans if not task.reasons):
            if part.kind == "folder":
                names.setdefault(part.path, set()).update(part.names)
    found, slices = _list(config, sources, names)
    merged = {**sources, **{(source.kind, source.path): source for source in found}}
    return _plan(config, slices, merged.values(), generation=generation, action="grow", base=base, first_sample=first_sample, lists=lists)


def plans_of(storage: Storage, generation: int | None) -> list[Plan]:
    """The plans that made a generation, newest first: its own, that of its base, and so on."""
    found: list[Plan] = []
    while generation is not None:
        plan = Plan.load(storage, generation)
        if plan is not None:  # a rollback and a compaction have none
            found.append(plan)
        generation = base_of(storage, generation)
    return found


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every setting that two configurations do not share."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name}: {before!r} -> {after!r}")
    return found


def group(spans: Iterable[Span], size: int, counts: Iterable[int] | None = None, reasons: Sequence[str] = ()) -> tuple[Task, ...]:
    """Tasks of about `size` samples: as many spans in a row as fit. `counts` are their samples, if not all of a span count."""
    tasks: list[Task] = []
    pending: list[Span] = []
    waiting = 0

    def close() -> None:
        tasks.append(Task(number=len(tasks), spans=tuple(pending), num_samples=waiting, reasons=tuple(reasons)))

    spans = list(spans)
    for span, count in zip(spans, counts or [span.part.count for span in spans], strict=True):
        if pending and waiting + count > size:
            close()
            pending, waiting = [], 0
        pending.append(span)
        waiting += count
    if pending:
        close()
    return tuple(tasks)


def _plan(config: PrepConfig, slices: Sequence[Slice], sources: Iterable[Source], *, first_sample: int, **rest: Any) -> Plan:
    spans, number = [], first_sample
    for part in slices:
        # A slice that lists rows begins before them; its first sample keeps the place that the numbering gives it.
        skipped = part.rows[0] if part.rows else 0
        spans.append(Span(first_sample=number - skipped, part=part))
        number += part.count - skipped
    counts = [span.part.count - (span.part.rows[0] if span.part.rows else 0) for span in spans]
    return Plan(
        config=identity(config),
        config_hash=identity_hash(config),
        settings=settings(config),
        inputs=config.inputs,
        sources=tuple(sources),
        first_sample=first_sample,
        tasks=group(spans, config.samples_per_shard, counts),
        **rest,
    )


def _list(config: PrepConfig, before: dict[tuple[str, str], Source], names: dict[str, set[str]]) -> tuple[list[Source], list[Slice]]:
    """(every input of the configuration, slices of the samples that are not among those of `before` and `names`)."""
    sources: list[Source] = []
    slices: list[Slice] = []
    for kind, path in (found for text in config.inputs for found in list_inputs(text)):
        old = before.get((kind, path))
        head = b"" if kind == "folder" else _head(path, HEAD_BYTES)
        if old is not None and hashlib.sha256(head[: old.head_bytes]).hexdigest() != old.head:
            fix = "put the new samples into a file of their own, and restore this one"
            raise UserError(f"{path} has been replaced since it was prepared", expected="the same file, perhaps with more at its end", fix=fix)
        total = 0
        for part in READERS[kind].plan(path, config):
            total += part.count
            slices += _new_part(part, old.num_samples if old else 0, names.get(path, set()))
        if old is not None and kind != "folder" and total < old.num_samples:
            raise UserError(f"{path} has fewer samples than when it was prepared", got=total, expected=f"at least {old.num_samples}")
        sources.append(Source(kind=kind, path=path, num_samples=total, head_bytes=len(head), head=hashlib.sha256(head).hexdigest()))
    return sources, slices


def _head(path: str, size: int) -> bytes:
    with open_input(path) as file:
        return file.read(size)


def _new_part(part: Slice, num_old: int, old_names: set[str]) -> Iterator[Slice]:
    """What of a slice is new, if anything."""
    if part.kind == "folder":
        fresh = tuple(name for name in part.names if name not in old_names)
        if fresh:
            yield replace(part, names=fresh, count=len(fresh))
    elif part.start >= num_old:
        yield part
    elif part.start + part.count > num_old:
        yield replace(part, rows=tuple(range(num_old - part.start, part.count)))


def _task(values: dict[str, Any]) -> Task:
    spans = tuple(
        Span(
            first_sample=span["first_sample"],
            part=Slice(**{**span["part"], "names": tuple(span["part"]["names"]), "rows": tuple(span["part"]["rows"])}),
            history=tuple(LedgerFile(path=file["path"], retried=tuple(file["retried"])) for file in span["history"]),
        )
        for span in values["spans"]
    )
    return Task(number=values["number"], spans=spans, num_samples=values["num_samples"], reasons=tuple(values["reasons"]))
