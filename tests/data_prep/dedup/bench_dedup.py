"""Speed and memory of the duplicate search on synthetic samples: `python -m tests.data_prep.dedup.bench_dedup [SAMPLES]`.

A tenth of the samples are copies of others: a third of those of the bytes, a third of the picture (up to 4 bits flipped), a third of the
caption (one word exchanged). Every task runs in a process of its own, so that its CPU time and its peak memory are its own.
"""

import hashlib
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep import metadata
from data_prep.dedup.run import find_duplicates
from data_prep.storage import LocalStorage
from tests.data_prep.dedup.planted import flipped, settings, telling_hashes

PART = 10_000


def write_samples(folder: Path, num: int) -> list[str]:
    """Sidecars of `num` samples, `PART` in each; returns their names."""
    generator = np.random.default_rng(0)
    kind = np.where(generator.random(num) < 0.1, generator.integers(1, 4, num), 0)
    model = generator.integers(0, np.maximum(1, np.arange(num)))
    hashes = telling_hashes(num, generator)
    near = np.flatnonzero(kind == 2)
    hashes[near] = flipped(hashes[model[near]], 4, generator)
    words = np.array(["".join(letters) for letters in generator.choice(list("etaoinshrdlucmfwyp"), (30_000, 6))])
    popularity = 1 / (np.arange(len(words)) + 10)
    texts = generator.choice(words, (num, 10), p=popularity / popularity.sum())
    near = np.flatnonzero(kind == 3)
    texts[near] = texts[model[near]]
    texts[near, generator.integers(0, 10, len(near))] = generator.choice(words, len(near))
    same = np.flatnonzero(kind == 1)
    content = np.arange(num)
    content[same], hashes[same], texts[same] = model[same], hashes[model[same]], texts[model[same]]
    storage, names = LocalStorage(folder), []
    for begin in range(0, num, PART):
        rows = range(begin, min(num, begin + PART))
        columns = {
            "key": [f"{row:010d}" for row in rows],
            "source": [""] * len(rows),
            "url": [""] * len(rows),
            "caption": [" ".join(texts[row]) for row in rows],
            "width": [256] * len(rows),
            "height": [256] * len(rows),
            "format": ["jpeg"] * len(rows),
            "jpeg_quality": [90] * len(rows),
            "num_bytes": [1000] * len(rows),
            "sha256": [hashlib.sha256(content[row].tobytes()).digest() for row in rows],
            "phash": hashes[rows.start : rows.stop],
        }
        names.append(f"000001/part-{len(names):06d}.bench")
        metadata.dump(storage, names[-1], pa.table(columns, schema=metadata.schema()), folder="parts")
    return names


def measured(function: Callable[..., Any], argument: tuple[Any, ...]) -> tuple[Any, float, float]:
    """(result, CPU seconds, growth of the peak memory in MiB) of one task."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far; a child inherits its parent's
    before, begin = peak_mebibytes(), time.process_time()
    result = function(*argument)
    return result, time.process_time() - begin, peak_mebibytes() - before


def peak_mebibytes() -> float:
    """Most memory that this process has held."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


class Meter:
    """Runs tasks one by one in fresh processes and adds up what they cost, by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.mebibytes: dict[str, float] = defaultdict(float)
        self.tasks: dict[str, int] = defaultdict(int)

    def __call__(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        for argument in arguments:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result, seconds, mebibytes = pool.apply(measured, (function, argument))
            step = argument[1] if argument[1] != "search" else f"search {type(argument[4][3]).__name__} {getattr(argument[4][3], 'kind', '')}"
            self.seconds[step] += seconds
            self.mebibytes[step] = max(self.mebibytes[step], mebibytes)
            self.tasks[step] += 1
            yield result


def main() -> None:
    """Prints a table."""
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    settings_of: dict[str, dict[str, Any]] = {
        "exact": {"exact": True},
        "image, 4 bits": {"image_distance": 4},
        "image, 6 bits": {"image_distance": 6},
        "caption, 0.8": {"caption_similarity": 0.8},
        "all": {"exact": True, "image_distance": 6, "caption_similarity": 0.8},
    }
    with tempfile.TemporaryDirectory() as folder:
        names = write_samples(Path(folder), num)
        for title, dedup in settings_of.items():
            meter, begin = Meter(), time.perf_counter()
            found = find_duplicates(settings(Path(folder), PART, **dedup), names, run=meter)
            total = sum(meter.seconds.values())
            dropped = sum(sum(counts.values()) for counts in found.counts.values())
            print(f"\n{title}: {num / total:,.0f} samples/s of one core, {dropped:,} dropped, {time.perf_counter() - begin:.1f} s")
            print(f"  on disk: {sum(path.stat().st_size for path in (Path(folder) / 'parts/dedup').rglob('*') if path.is_file()) / num:.0f} B/sample")
            for step, seconds in meter.seconds.items():
                print(f"  {step:28} {meter.tasks[step]:4} tasks {seconds:7.1f} CPU s {meter.mebibytes[step]:7.0f} MiB above an idle worker")


if __name__ == "__main__":
    main()
