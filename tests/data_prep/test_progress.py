"""The progress line: right numbers, one live line on a terminal, plain lines elsewhere."""

import contextlib
import fcntl
import io
import os
import re
import struct
import termios
import time
from pathlib import Path

from data_prep.progress import WINDOW_S, Progress
from data_prep.run_stats import PartStats


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def part(kept: int, **dropped: int) -> PartStats:
    return PartStats(num_parts=1, read=kept + sum(dropped.values()), kept=kept, dropped=dropped, peak_rss_bytes=300 * 2**20)


def test_line_tells_speed_time_left_success_and_the_three_main_reasons() -> None:
    clock = Clock()
    progress = Progress(10_000, file=io.StringIO(), clock=clock)
    clock.now += 10
    progress.update(part(800, dns=120, timeout=50, http_404=20, tls=10))
    clock.now += 10
    line = progress.line()
    assert line.startswith("1,000 of 10,000, 50 img/s, 3 min left, 80 % kept (dns 12 %, timeout 5.0 %, http_404 2.0 %), 300 MiB a worker"), line
    assert re.search(r"\d+\.?\d* [MG]iB here$", line), line


def test_speed_forgets_what_is_long_ago() -> None:
    clock = Clock()
    progress = Progress(10**6, file=io.StringIO(), clock=clock)
    for number in range(40):
        clock.now += 10
        progress.update(part(1000 if number < 20 else 100))
    assert progress.images_per_s == 10
    clock.now += WINDOW_S
    assert progress.images_per_s < 10, "a stall must show"


def test_work_of_an_earlier_run_counts_as_done_but_not_as_speed() -> None:
    clock = Clock()
    progress = Progress(2000, before=part(1000), file=io.StringIO(), clock=clock)
    assert "img/s" not in progress.line()
    clock.now += 10
    progress.update(part(100))
    assert progress.line().startswith("1,100 of 2,000, 10 img/s, 2 min left, 100 % kept,")
    assert progress.stats.num_parts == 2


def test_elsewhere_than_on_a_terminal_lines_are_plain_and_seldom() -> None:
    file = io.StringIO()
    with Progress(50, file=file, interval_s=30) as progress:
        for _ in range(50):
            progress.update(part(1))
        progress.note("something to know")
    lines = file.getvalue().splitlines()
    assert len(lines) == 3, "the beginning, the note, the end: not one per update"
    assert lines[0].startswith("images 0 %: 0 of 50")
    assert lines[1] == "something to know"
    assert lines[2].startswith("images 100 %: 50 of 50")
    assert "\r" not in file.getvalue()


def test_elsewhere_a_line_comes_without_an_update() -> None:
    file = io.StringIO()
    with Progress(50, file=file, interval_s=0.02):
        deadline = time.monotonic() + 20
        while file.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert file.getvalue().count("\n") >= 3


def terminal(columns: int) -> tuple[int, int]:
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    return reader, writer


def read_all(reader: int) -> str:
    """What was written to a terminal that is closed by now."""
    shown = b""
    with open(reader, "rb", buffering=0) as file, contextlib.suppress(OSError):  # EIO: nobody writes any more
        while data := file.read(65_536):
            shown += data
    return shown.decode()


def test_a_terminal_of_unknown_width_gets_plain_lines() -> None:
    reader, writer = terminal(columns=0)
    with open(writer, "w", encoding="utf-8") as file, Progress(30, file=file) as progress:
        progress.update(part(30))
    assert read_all(reader).count("\n") == 2


def test_on_a_terminal_one_line_is_rewritten_and_notes_stand_above_it() -> None:
    reader, writer = terminal(columns=200)
    with open(writer, "w", encoding="utf-8") as file, Progress(30, file=file) as progress:
        for _ in range(3):
            progress.update(part(8, dns=2))
        progress.note("something to know")
    text = read_all(reader)
    assert "100% |" in text
    assert "30 of 30" in text
    assert re.search(r"(?:^|[\r\n])something to know", text)
    assert text.replace("\r\n", "\n").count("\n") == 2, "the note and the final line"


def test_total_of_nothing_is_shown_without_a_division_by_zero(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w", encoding="utf-8") as file, Progress(0, file=file) as progress:
        assert progress.line().startswith("0 of 0")
    assert (tmp_path / "log").read_text().startswith("images 0 %")
