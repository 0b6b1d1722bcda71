"""`jetway prep` against img2dataset 1.47.0: the same addresses, from the same server on this machine, on the same two cores.

    python -m tests.benchmarks.bench_prep [--runs 3] [--sections same,read,...] [--work FOLDER] [--peer-processes 2] [--peer-threads 32]

Runs alternate between the sides, and between a short list and a long one. A speed is the slope between the two lists: the further
images divided by the further seconds. Whatever a side needs once (interpreter, imports, Ray or a process pool, the end of the run)
is in both lists and cancels out, for both sides alike; total times are given beside it. CPU seconds per image are a slope too, over all
processes of a side (`bench_prep_measure`); the server's are counted apart. Writes a dated report beside this file.

Needs the environments of the peer: `python -m tests.peers.environments img2dataset webdataset-0.2.111 --python python3.11`
(`make bench-prep` sees to it).
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from tests.benchmarks.bench_prep_context import Context
from tests.benchmarks.bench_prep_report import Section, report
from tests.benchmarks.bench_prep_sections import SECTIONS
from tests.benchmarks.corpus import write_corpus
from tests.data_prep.web_server import ServerProcess
from tests.peers.environments import interpreter

REPORTS = Path(__file__).parent / "reports"
HOSTS = tuple(f"127.0.0.{number}" for number in range(1, 17))
"""The server's names: a list of the web has many hosts, and our limit per host must not stand for the speed."""
DEFAULT_SECTIONS = tuple(name for name in SECTIONS if name != "peer-settings")


def main(argv: Sequence[str]) -> int:
    """Runs the sections and writes the report."""
    given = _parser().parse_args(argv)
    cores = {int(core) for core in given.cores.split(",")} if given.cores else set(sorted(os.sched_getaffinity(0))[:2])
    os.sched_setaffinity(0, cores)  # inherited by everything that is started
    start, load = time.perf_counter(), os.getloadavg()[0]
    peer = given.peer_python or interpreter("img2dataset")
    found = write_corpus(given.corpus, given.count)
    sections: list[Section] = []
    work = Path(tempfile.mkdtemp(prefix="bench-prep-", dir=given.work))
    try:
        with ServerProcess(given.corpus / "images", "--hosts", *HOSTS) as server:
            context = Context(
                peer=peer,
                server=server,
                corpus=given.corpus,
                work=work,
                runs=given.runs,
                short=given.short,
                long=given.long,
                processes=given.peer_processes,
                threads=given.peer_threads,
                samples_per_shard=min(1000, given.short // 2),  # in a short trial too, both cores have work from the start
            )
            for name in given.sections.split(","):
                sections.append(SECTIONS[name](context))
                print("\n".join([f"== {sections[-1].title}", *sections[-1].lines, ""]), flush=True)
    finally:
        if not given.keep:
            shutil.rmtree(work, ignore_errors=True)
    corpus = f"{found['count']:,} JPEGs, mean {found['mean_bytes'] / 1e3:.0f} KB and {found['mean_megapixels']:.2f} MP, "
    corpus += f"{found['progressive']:.0%} progressive (`tests/benchmarks/corpus.py`, seed {found['seed']})"
    command = shlex.join(["python", "-m", "tests.benchmarks.bench_prep", *argv])
    text = report(sections, command=command, corpus=corpus, load=load, minutes=(time.perf_counter() - start) / 60)
    path = given.report or REPORTS / f"{date.today().isoformat()}-data-prep.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(text, f"\nwritten to {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer-python", type=Path, help="interpreter beside which img2dataset lies (default: of tests.peers.environments)")
    parser.add_argument("--sections", default=",".join(DEFAULT_SECTIONS), help=f"of {', '.join(SECTIONS)} (default: all but peer-settings)")
    parser.add_argument("--runs", type=int, default=3, help="of the gated comparisons; the others run once or twice (default %(default)s)")
    parser.add_argument("--short", type=int, default=2000, help="rows of the short list (default %(default)s)")
    parser.add_argument("--long", type=int, default=6000, help="rows of the long list (default %(default)s)")
    parser.add_argument("--count", type=int, default=2000, help="pictures of the corpus (default %(default)s)")
    parser.add_argument("--corpus", type=Path, default=Path("data/bench-corpus"), help="where the corpus is, or is made (default %(default)s)")
    parser.add_argument("--work", type=Path, help="where outputs go (default: the folder for temporary files)")
    parser.add_argument("--keep", action="store_true", help="leave the outputs there")
    parser.add_argument("--cores", help="comma-separated; default: the first two of this process")
    parser.add_argument("--peer-processes", type=int, default=2)
    parser.add_argument("--peer-threads", type=int, default=32)
    parser.add_argument("--report", type=Path, help="where to write the report (default: a dated file in tests/benchmarks/reports)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
