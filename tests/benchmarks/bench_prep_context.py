"""What the sections of the benchmark share: places, sizes, and one measured run of either side."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.config import TokenizerConfig
from data_prep.tokenizer import train
from tests.benchmarks.bench_prep_measure import Usage, cpu_seconds, measure
from tests.benchmarks.bench_prep_sides import PEER_ENV, Outcome, Row, our_command, our_outcome, peer_command, peer_outcome
from tests.benchmarks.corpus import write_list
from tests.data_prep.web_server import ServerProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured run."""

    usage: Usage
    outcome: Outcome
    server_cpu_s: float
    output: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A short and a long run of the same side: differences between them are free of what a run costs once."""

    short: Run
    long: Run

    @property
    def further(self) -> int:
        """Images that the long list has more."""
        return self.long.outcome.read - self.short.outcome.read

    @property
    def images_per_s(self) -> float:
        """Steady state."""
        return self.further / (self.long.usage.wall_s - self.short.usage.wall_s)

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds of one further image, without the server."""
        return 1e3 * (self.long.usage.cpu_s - self.short.usage.cpu_s) / self.further

    @property
    def server_ms(self) -> float:
        """CPU milliseconds of the server for one image."""
        return 1e3 * (self.long.server_cpu_s - self.short.server_cpu_s) / self.further

    @property
    def once_s(self) -> float:
        """Seconds that a run takes beside its images: the long one's time less its images at the steady speed."""
        return self.long.usage.wall_s - self.long.outcome.read / self.images_per_s


@dataclass(slots=True, kw_only=True)
class Context:
    """Places and sizes of one benchmark."""

    peer: Path
    """Python of img2dataset's environment."""
    server: ServerProcess
    corpus: Path
    work: Path
    runs: int
    short: int
    long: int
    processes: int
    threads: int
    """Of each process of the peer."""
    samples_per_shard: int
    kept: dict[str, Path] = field(default_factory=dict)
    """Outputs that later sections read: `theirs` and `ours`, of the long list and the same settings."""
    _turn: int = 0

    @property
    def files(self) -> int:
        """Pictures in the corpus."""
        return sum(name.endswith(".jpg") for name in os.listdir(self.corpus / "images"))

    def new(self, name: str) -> Path:
        """A path for the output of one run, which does not exist yet."""
        self._turn += 1
        return self.work / f"{self._turn:03d}-{name}"

    def urls(self, rows: int) -> Path:
        """A URL list of that many rows over the corpus."""
        path = self.work / f"urls-{rows}.parquet"
        if not path.exists():
            write_list(path, [self.server.url("", host) for host in self.server.hosts], files=self.files, rows=rows)
        return path

    def folder(self, rows: int) -> Path:
        """A folder of that many pictures with captions: hard links to the corpus, or copies where there can be none."""
        folder, images = self.work / f"folder-{rows}", self.corpus / "images"
        if not folder.exists():
            folder.mkdir()
            for number in range(rows):
                for suffix in (".jpg", ".txt"):
                    source, link = images / f"{number % self.files:06d}{suffix}", folder / f"{number:07d}{suffix}"
                    try:
                        os.link(source, link)
                    except OSError:
                        shutil.copyfile(source, link)
        return folder

    def peer_run(self, urls: Path, row: Row, *, stop_after_s: float | None = None) -> Run:
        """img2dataset once."""
        output = self.new("theirs")
        command = peer_command(self.peer, urls, output, row, processes=self.processes, threads=self.threads, shard=self.samples_per_shard)
        return self._run(command, output, peer_outcome, stop_after_s)

    @property
    def tokenizer(self) -> Path:
        """A model for our side: to train one is a step that the peer does not have."""
        path = self.work / "tokenizer.model"
        if not path.exists():
            captions = [text.read_text() for text in sorted((self.corpus / "images").glob("*.txt"))]
            path.write_bytes(train(captions, TokenizerConfig(vocab_size=512)))
        return path

    def our_run(self, inputs: Path, overrides: Sequence[str], *, stop_after_s: float | None = None) -> Run:
        """`jetway prep` once."""
        output = self.new("ours")
        settings = (f"samples_per_shard={self.samples_per_shard}", f"tokenizer.model_file={self.tokenizer}", *overrides)
        return self._run(our_command(inputs, output, settings), output, our_outcome, stop_after_s)

    def _run(self, command: Sequence[str], output: Path, judge: Callable[[Path], Outcome], stop_after_s: float | None) -> Run:
        log = output.with_suffix(".log")
        before = cpu_seconds(self.server.process.pid)
        usage = measure(command, log=log, env=PEER_ENV, stop_after_s=stop_after_s)
        if usage.returncode and stop_after_s is None:
            raise RuntimeError(f"{' '.join(command)} returned {usage.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
        return Run(usage=usage, outcome=judge(output), server_cpu_s=cpu_seconds(self.server.process.pid) - before, output=output)
