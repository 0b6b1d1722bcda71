"""What a section of a benchmark is given, and what it leaves: tables, text, plots and aims, saved whenever one is added."""

import json
import re
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.benchmarks.bench_device import Device
from tests.benchmarks.bench_prep_report import Bar, table

MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+@~-]+/)+")
"""An absolute folder in an error message."""


@dataclass(slots=True)
class Section:
    """One part of the report, growing; a section that is cut off keeps what it saved."""

    title: str
    path: Path | None = None
    """Where it is saved."""
    blocks: dict[str, list[str]] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
    """Name -> SVG."""
    error: str | None = None
    seconds: float = 0.0
    is_done: bool = False

    def text(self, key: str, *lines: str) -> None:
        """A paragraph; the same key replaces it."""
        self.blocks[key] = list(lines)
        self.save()

    def table(self, key: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; the same key replaces it, as rows are added."""
        self.text(key, *table(head, rows))

    def item(self, key: str, line: str) -> None:
        """One more item of a list."""
        self.text(key, *self.blocks.get(key, []), f"- {line}")

    def bar(self, what: str, *, aim: float, found: float, at_least: bool, unit: str) -> None:
        """An aim and what was found."""
        self.bars.append(Bar(what=what, aim=aim, found=found, at_least=at_least, unit=unit))
        self.save()

    def plot(self, name: str, svg: str) -> None:
        """A picture, written beside the report and shown in this place."""
        self.plots[name] = svg
        self.text(f"plot {name}", f"![{name}](REPORT-{name}.svg)")

    def fail(self, error: BaseException) -> None:
        """Records what went wrong."""
        self.error = describe_error(error)
        self.save()

    def save(self) -> None:
        """To its file, whole."""
        if self.path is not None:
            values = asdict(self) | {"path": None}
            self.path.write_text(json.dumps(values), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Section":
        """What `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["bars"] = [Bar(**bar) for bar in values["bars"]]
        return Section(**values)

    def lines(self) -> list[str]:
        """As Markdown, without the title."""
        lines = []
        for block in self.blocks.values():
            lines += [*block, ""]
        if self.error:
            lines += [f"**Failed**: {self.error}", ""]
        return lines[:-1] if lines else ["(nothing measured)"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every section is given."""

    device: Device
    small: bool
    """Shapes of a CPU: every line runs, no figure means anything for a GPU."""
    budget: float = 1.0
    """Scales the seconds spent on repeating."""
    deadline: float = float("inf")
    """On the clock of `time.monotonic`: nothing long is begun after it."""

    def repeat_seconds(self, seconds: float) -> float:
        """How long to repeat something."""
        return seconds * self.budget * (0.1 if self.small else 1.0)

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()


def describe_error(error: BaseException) -> str:
    """Type, message and the last frames of our own code, without the paths of this machine."""
    frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)][-4:]
    message = " ".join(str(error).split())[:600]
    return scrub(f"{type(error).__name__}: {message} ({' > '.join(frames)})")


def breaks_device(error: BaseException | str) -> bool:
    """Whether this process can do nothing more on its GPU after an error: those of CUDA stay, as torch and as Triton report them."""
    return any(sign in str(error) for sign in ("CUDA error", "Triton Error [CUDA]"))


def scrub(text: str) -> str:
    """Without the folders of this machine."""
    return MACHINE_PATH.sub("", text)
