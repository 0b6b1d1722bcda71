"""Runs the sections of a benchmark in child processes, prints each as it ends, and rewrites the report after each.

A child runs sections in turn; if it dies, crashes its CUDA context or is too slow, the section counts as failed and a new child takes the
rest. So a fault in one kernel costs that section alone, and a run that is cut off keeps what it measured.
"""

import argparse
import contextlib
import importlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tests.benchmarks.bench_prep_report import table
from tests.benchmarks.bench_section import Context, Section, breaks_device, scrub

REPORTS = Path(__file__).parent / "reports"
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Entry:
    """A section: where it is, and how long it may take."""

    function: str
    """`module:function`, called with (context, section); imported in the child."""
    title: str
    seconds: float
    """Expected on an H100, start of its process included."""
    own_process: bool = False
    """Start with a fresh process, and leave none behind."""


MACHINE = "tests.benchmarks.bench_kernels"
SECTIONS = {
    "peaks": Entry(f"{MACHINE}:peaks", "What the device does at best", 12),
    "gmm": Entry(f"{MACHINE}:gmm", "Image head: loss and gradients", 25),
    "gmm-memory": Entry(f"{MACHINE}:gmm_memory", "Image head: memory and time against N", 32),
    "cross-entropy": Entry(f"{MACHINE}:cross_entropy", "Text head: loss and gradients", 8),
    "elementwise": Entry("tests.benchmarks.bench_kernels_elementwise:elementwise", "Bandwidth-bound kernels", 50),
    "ablation": Entry("tests.benchmarks.bench_step:ablation", "350m: what each part contributes to a step", 120, own_process=True),
    "step-350m": Entry("tests.benchmarks.bench_step:step_350m", "350m: a training step", 50, own_process=True),
    "step-1p3b": Entry("tests.benchmarks.bench_step:step_1p3b", "1p3b: a training step", 80, own_process=True),
    "sampling": Entry("tests.benchmarks.bench_sampling:sampling", "Sampling with guidance", 70, own_process=True),
}
"""In the order in which they run: what matters most first."""
HOW = (
    "Times are medians of single calls, with the last-level cache overwritten between them; spread: slowest less fastest over the median.",
    "What is compared ran turn by turn, after its results were compared with the reference's at the same shape.",
)
LEAST = 0.3
"""A section is not begun with less than this share of its expected seconds left."""
PATIENCE = 2.0
"""A child is ended after this many times the expected seconds of its section."""
STARTUP = 30.0
"""Seconds more for the first section of a child: the first import of torch reads gigabytes from the disk."""
GAVE_UP = 3
"""Status of a child whose device an error may have broken: the section is recorded, those after it want another process."""


def main(argv: Sequence[str], *, default: Sequence[str], name: str, doc: str | None) -> int:
    """Command line of a benchmark.

    Args:
        default: its sections.
        name: of its report.
    """
    given = _parser(default, doc).parse_args(argv)
    if given.child is not None:
        return run_child(given)
    names = given.sections.split(",")
    unknown = [one for one in names if one not in SECTIONS]
    if unknown:
        raise SystemExit(f"no section {', '.join(unknown)}: choose of {', '.join(SECTIONS)}")
    import torch

    if not given.small and not torch.cuda.is_available():
        print("no CUDA device is visible: nothing was measured. `--small` runs every section at small shapes on this CPU.", file=sys.stderr)
        return 2
    given.seconds = given.seconds or (3600.0 if given.small else 450.0)
    place = "cpu-small" if given.small else "gpu"
    part = "" if names == list(default) else "-" + "-".join(names)  # some sections do not replace a report of all
    path = given.report or REPORTS / f"{date.today().isoformat()}-{name}-{place}{part}.md"
    path.parent.mkdir(exist_ok=True)
    command = shlex.join(["python", "-m", f"tests.benchmarks.bench_{name}", *argv])
    return Runner(names, given, path, command).run()


class Runner:
    """The parent's side."""

    def __init__(self, names: Sequence[str], given: argparse.Namespace, path: Path, command: str) -> None:
        self.names, self.given, self.path, self.command = list(names), given, path, command
        self.start, self.load = time.monotonic(), os.getloadavg()[0]
        self.sections: dict[str, Section] = {}
        self.machine = ""

    def run(self) -> int:
        """All sections; 1 if one of them failed."""
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            pending = list(self.names)
            while pending:
                group = [pending.pop(0)]
                if self._seconds_left() < LEAST * SECTIONS[group[0]].seconds:
                    self._finish(group[0], Section(SECTIONS[group[0]].title, error="not begun: the time ran out"))
                    continue
                while pending and not SECTIONS[group[0]].own_process and not SECTIONS[pending[0]].own_process:
                    group.append(pending.pop(0))
                pending = self._run_group(group, Path(folder)) + pending
        print(f"\nwritten to {os.path.relpath(self.path)}")
        failed = [name for name, section in self.sections.items() if section.error]
        if failed:
            print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0

    def _run_group(self, group: list[str], folder: Path) -> list[str]:
        """Runs sections in one child; returns those that it did not come to."""
        command = [sys.executable, "-m", "tests.benchmarks.bench_runner", "--child", str(folder), "--sections", ",".join(group)]
        command += ["--budget", str(self.given.budget), "--seconds", str(self._seconds_left())] + (["--small"] if self.given.small else [])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}
        if self.given.small:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        child = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
        left = list(group)
        began = time.monotonic()
        reason = ""
        while left:
            ended = child.poll() is not None
            section = self._read(folder, left[0])
            if section is not None and section.is_done:
                self._finish(left.pop(0), section)
                began = time.monotonic()
                continue
            if ended and child.returncode == GAVE_UP and len(left) < len(group):
                return left
            if ended:
                reason = f"its process ended with status {child.returncode}"
                break
            allowed = PATIENCE * SECTIONS[left[0]].seconds * (5 if self.given.small else 1) + (STARTUP if len(left) == len(group) else 0.0)
            if time.monotonic() - began > allowed or self._seconds_left() < -PATIENCE * 10:
                reason = f"was ended after {time.monotonic() - began:.0f} s"
                break
            time.sleep(0.1)
        if left:
            _end(child)
            section = self._read(folder, left[0]) or Section(SECTIONS[left[0]].title)
            section.error, section.seconds = section.error or reason, time.monotonic() - began
            self._finish(left.pop(0), section)
        else:
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                _end(child)
        return left

    def _seconds_left(self) -> float:
        return self.given.seconds - (time.monotonic() - self.start)

    def _read(self, folder: Path, name: str) -> Section | None:
        with contextlib.suppress(OSError, ValueError):
            self.machine = self.machine or (folder / "machine").read_text(encoding="utf-8")
            return Section.load(folder / f"{name}.json")
        return None

    def _finish(self, name: str, section: Section) -> None:
        """Prints a section and rewrites the report."""
        self.sections[name] = section
        print("\n".join([f"\n== {section.title} ({section.seconds:.0f} s)", *section.lines()]), flush=True)
        for plot, svg in section.plots.items():
            self.path.with_name(f"{self.path.stem}-{plot}.svg").write_text(svg, encoding="utf-8")
        self.path.write_text(self.report(), encoding="utf-8")

    def report(self) -> str:
        """The whole report as Markdown."""
        minutes = (time.monotonic() - self.start) / 60
        lines = [f"# Kernels, training step and sampling, {date.today().isoformat()}", "", f"`{self.command}`, {minutes:.1f} minutes", ""]
        quiet = "" if self.load < 0.5 else " (**not a quiet machine: do not quote its times**)"
        lines += [f"{self.machine}; load average before the first run {self.load:.2f}{quiet if self.given.small else ''}.", "", *HOW, ""]
        if self.given.small:
            lines += [
                "**Small shapes on a CPU, the models miniatures**: what is said of the heads' memory holds, no time says anything about a GPU.",
                "",
            ]
        bars = [bar.row() for section in self.sections.values() for bar in section.bars]
        if bars:
            lines += ["## Aims", "", *table(["what", "aim", "found", ""], bars), ""]
        for section in self.sections.values():
            lines += [f"## {section.title}", "", *(line.replace("](REPORT-", f"]({self.path.stem}-") for line in section.lines()), ""]
        return scrub("\n".join(lines).rstrip() + "\n")


def run_child(given: argparse.Namespace) -> int:
    """The child's side: sections in turn, each saved as it grows; leaves after an error that may have broken the device."""
    from tests.benchmarks.bench_device import open_device

    device = open_device(small=given.small)
    (given.child / "machine").write_text(device.describe(), encoding="utf-8")
    deadline = time.monotonic() + given.seconds
    for name in given.sections.split(","):
        entry, start = SECTIONS[name], time.monotonic()
        section = Section(entry.title, given.child / f"{name}.json")
        own = start + entry.seconds * (PATIENCE if given.small else 1.0)
        context = Context(device=device, small=given.small, budget=given.budget, deadline=min(deadline, own))
        try:
            module, _, function = entry.function.partition(":")
            getattr(importlib.import_module(module), function)(context, section)
        except Exception as error:
            section.fail(error)
        section.seconds, section.is_done = time.monotonic() - start, True
        section.save()
        if section.error and breaks_device(section.error):
            return GAVE_UP
        device.release()
    return 0


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _parser(default: Sequence[str], doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--small", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--sections", default=",".join(default), help=f"of {', '.join(SECTIONS)} (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=1.0, help="scales the time spent on repeating (default %(default)s)")
    parser.add_argument("--seconds", type=float, help="begin nothing long after this (default 450, and 3600 with --small)")
    parser.add_argument("--report", type=Path, help="where to write the report (default: a dated file in tests/benchmarks/reports)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default=(), name="runner", doc=__doc__))
