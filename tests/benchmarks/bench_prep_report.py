"""The report of the data-preparation benchmark: sections with their tables, and whether the bars are met."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("ray", "aiohttp", "simplejpeg", "opencv-python-headless", "pillow", "pyarrow", "numpy", "webdataset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One aim and what was found."""

    what: str
    aim: float
    found: float
    at_least: bool
    """Whether the aim is a lower bound."""
    unit: str = "x"

    @property
    def is_met(self) -> bool:
        """Judged on the unrounded number."""
        return self.found >= self.aim if self.at_least else self.found <= self.aim

    def row(self) -> list[str]:
        """Cells of a table."""
        sign, verdict = ("at least", "at most")[not self.at_least], "met" if self.is_met else "**not met**"
        return [self.what, f"{sign} {self.aim:g}{self.unit}", f"{self.found:.2f}{self.unit}", verdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the report."""

    title: str
    lines: Sequence[str]
    bars: Sequence[Bar] = field(default=())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def values(numbers: Sequence[float], digits: int = 1) -> str:
    """Median, and all values in the order of the runs."""
    return f"{statistics.median(numbers):.{digits}f} ({', '.join(f'{number:.{digits}f}' for number in numbers)})"


def megabytes(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.0f} MiB"


def machine() -> str:
    """Processor, cores, memory, system and versions."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    what = f"{names[0] if names else platform.machine()}, cores {cores} of {os.cpu_count()}, {memory / 2**30:.0f} GiB"
    return f"{what}; Python {platform.python_version()}; {libraries}"


def report(sections: Sequence[Section], *, command: str, corpus: str, load: float, minutes: float) -> str:
    """The whole report as Markdown."""
    bars = [bar.row() for section in sections for bar in section.bars]
    quiet = f"Load average before the first run: {load:.2f}" + ("" if load < 0.5 else " (**not a quiet machine: do not quote these numbers**)")
    lines = [f"# Data preparation against img2dataset, {date.today().isoformat()}", "", f"`{command}`, {minutes:.1f} minutes", "", machine(), ""]
    lines += [f"Corpus: {corpus}. {quiet}.", ""]
    if bars:
        lines += ["## Bars", "", *table(["what", "aim", "found", ""], bars), ""]
    for section in sections:
        lines += [f"## {section.title}", "", *section.lines, ""]
    return "\n".join(lines).rstrip() + "\n"
