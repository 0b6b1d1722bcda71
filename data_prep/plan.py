"""The plan: which samples exist, in which order, and which task prepares which. Made once and stored on the output.

Sample number i of the plan has the key `i` (ten digits) whatever becomes of the others, so keys are unique and a rerun
gives the same ones.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from configs.errors import UserError
from data_prep.config import PrepConfig, identity, identity_hash
from data_prep.inputs import list_inputs
from data_prep.readers.base import Reader, Slice
from data_prep.readers.folder import FolderReader
from data_prep.readers.table import TableReader
from data_prep.readers.tar import TarReader
from data_prep.storage import Storage

PLAN_FILE = "plan.json"
READERS: dict[str, Reader] = {"folder": FolderReader(), "table": TableReader(), "tar": TarReader()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The samples that one Ray task prepares: about one shard's worth."""

    number: int
    first_sample: int
    """Number of its first sample in the whole plan."""
    slices: tuple[Slice, ...]

    @property
    def num_samples(self) -> int:
        """Samples that the task reads, good and bad."""
        return sum(part.count for part in self.slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All tasks of one data set."""

    config: dict[str, Any]
    """`identity` of the configuration."""
    config_hash: str
    tasks: tuple[Task, ...]

    @property
    def num_samples(self) -> int:
        """Samples of the input, good and bad."""
        return sum(task.num_samples for task in self.tasks)

    @property
    def digest(self) -> str:
        """Hash of the listing: differs when the input gained or lost samples."""
        return hashlib.sha256(json.dumps([asdict(task) for task in self.tasks]).encode()).hexdigest()

    def dump(self, storage: Storage) -> None:
        """Stores the plan on the output."""
        storage.put_bytes(PLAN_FILE, (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape"))

    @classmethod
    def load(cls, storage: Storage) -> "Plan | None":
        """The plan that an earlier run stored on the output, if any."""
        try:
            values = json.loads(storage.read_bytes(PLAN_FILE).decode("utf-8", "surrogateescape"))
            tasks = tuple(
                Task(
                    number=task["number"],
                    first_sample=task["first_sample"],
                    slices=tuple(Slice(**{**part, "names": tuple(part["names"]), "rows": tuple(part["rows"])}) for part in task["slices"]),
                )
                for task in values["tasks"]
            )
            return cls(config=values["config"], config_hash=values["config_hash"], tasks=tasks)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{storage.url}/{PLAN_FILE} is damaged", got=error, fix="choose another output, or delete this one") from None


def make_plan(config: PrepConfig) -> Plan:
    """Lists the inputs and groups their samples into tasks.

    Raises:
        UserError: an input is missing, of no known kind, or holds no sample.
    """
    tasks: list[Task] = []
    pending: list[Slice] = []
    first = waiting = 0
    for part in (part for path in config.inputs for part in _slices(path, config)):
        if pending and waiting + part.count > config.samples_per_shard:
            tasks.append(Task(number=len(tasks), first_sample=first, slices=tuple(pending)))
            pending, first, waiting = [], first + waiting, 0
        pending.append(part)
        waiting += part.count
    if pending:
        tasks.append(Task(number=len(tasks), first_sample=first, slices=tuple(pending)))
    if not tasks:
        raise UserError(
            f"the input holds no samples: {', '.join(config.inputs)}",
            expected="image files (.jpg, .png, .webp, ...), a table with rows, or tars",
            fix="check the path",
        )
    return Plan(config=identity(config), config_hash=identity_hash(config), tasks=tuple(tasks))


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


def _slices(text: str, config: PrepConfig) -> Iterator[Slice]:
    for kind, path in list_inputs(text):
        yield from READERS[kind].plan(path, config)
