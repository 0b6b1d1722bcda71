"""Kills a preparation in the middle and looks at what lies under the names of finished shards: img2dataset, then ours.

    python -m tests.peers.kill_contrast CORPUS [--rows 3000]       # CORPUS as tests.benchmarks.corpus writes it

Both read the same addresses from a server of this machine, in twelve shards, and get SIGKILL, with all processes that they started, when
about a third of the output is on disk. A tar counts as broken if `tar tf` does not read it to its end. (A second run of img2dataset
would write the broken ones anew; until then, whoever lists the folder takes them for shards.)
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.bench_prep_measure import descendants
from tests.benchmarks.bench_prep_sides import PEER_ENV, ROWS, our_command, peer_command
from tests.benchmarks.corpus import write_list
from tests.data_prep.web_server import ServerProcess
from tests.peers.environments import interpreter

NUM_SHARDS = 12
BYTES_PER_ROW = 15_000
"""About a third of what a picture takes in the output."""
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Aftermath:
    """What a kill left behind."""

    side: str
    written_bytes: int
    """Of all files in the output, when it was killed."""
    finished: tuple[str, ...]
    """Names of tars that read to their end."""
    broken: tuple[str, ...]
    """Names of tars that do not."""

    def line(self) -> str:
        """One sentence."""
        found = f"{len(self.finished)} whole and {len(self.broken)} broken tars under final names"
        return f"{self.side}: killed after {self.written_bytes / 2**20:.1f} MiB; {found}{': ' + ', '.join(self.broken) if self.broken else ''}"


def kill_midway(side: str, command: Sequence[str], output: Path, enough: int) -> Aftermath:
    """Runs a command, kills its whole tree once it has written `enough` bytes, and judges every tar of the output under its final name.

    Raises:
        RuntimeError: it ended, or wrote nothing for two minutes, before it could be killed.
    """
    log = output.with_suffix(".log")
    deadline = time.monotonic() + PATIENCE_S
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **PEER_ENV})
        try:
            while _bytes_below(output) < enough:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{side} could not be killed in the middle: see {log}")
                time.sleep(0.02)
        finally:
            for pid in [process.pid, *descendants(process.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    tars = sorted(path for path in output.rglob("*.tar") if not any(part.startswith(".") for part in path.relative_to(output).parts))
    broken = [path for path in tars if subprocess.run(["tar", "tf", path], capture_output=True, check=False).returncode]
    return Aftermath(
        side=side,
        written_bytes=_bytes_below(output),
        finished=tuple(path.name for path in tars if path not in broken),
        broken=tuple(path.name for path in broken),
    )


def contrast(corpus: Path, rows: int, folder: Path) -> list[Aftermath]:
    """Kills both sides once."""
    images, urls, shard, enough = corpus / "images", folder / "urls.parquet", rows // NUM_SHARDS, rows * BYTES_PER_ROW
    files = len(list(images.glob("*.jpg")))
    with ServerProcess(images) as server:
        write_list(urls, [server.url("")], files=files, rows=rows)
        theirs = peer_command(interpreter("img2dataset"), urls, folder / "theirs", ROWS["same"], shard=shard)
        ours = our_command(urls, folder / "ours", (*ROWS["same"].ours, f"samples_per_shard={shard}", "ray.num_cpus=2"))
        return [
            kill_midway("img2dataset", theirs, folder / "theirs", enough),
            kill_midway("jetway", ours, folder / "ours", enough),
        ]


def main(argv: Sequence[str]) -> int:
    """Prints one line for each side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--rows", type=int, default=3000)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for aftermath in contrast(arguments.corpus, arguments.rows, Path(folder)):
            print(aftermath.line())
    return 0


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # renamed meanwhile
                total += os.path.getsize(Path(parent) / name)
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
