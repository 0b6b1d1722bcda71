"""What a run of `jetway prep` will cost, before it runs: `jetway prep --plan`.

A few hundred rows, spread evenly over the whole input, go through the real work in this process, and what they took is
scaled to all rows. Nothing is written to the output. Duplicates cannot be seen in so small a sample.
"""

import argparse
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from configs.errors import UserError
from data_prep.config import PrepConfig
from data_prep.diagnosis import findings
from data_prep.heavy_hitters import ranked
from data_prep.metadata import Facts
from data_prep.plan import Task, make_plan
from data_prep.readers.base import Slice
from data_prep.run_stats import PartStats, quantile
from data_prep.tokenizer import check_given_model, load, train
from data_prep.units import bytes_text, count_text, duration_text, share_text

Measure = Callable[[Task], tuple[PartStats, list[Facts], int]]
"""Does the work of a task without writing to the output: (statistics, kept samples, bytes that they would take in a shard)."""

FILES_PER_TASK = 6
"""Tar, index, metadata, ledger, statistics and record of a part; the first three and the record of a shard are `FILES_PER_SHARD`."""
FILES_PER_SHARD = 4
FILES_PER_RUN = 6
BYTES_BESIDE_SAMPLE = 250
"""Of index and metadata, per sample."""
MAX_PIECES = 8000
"""Pieces of the tokenizer that is trained on the sampled captions."""
WORDS_PER_PIECE = 20
"""A corpus with fewer words than this per piece usually supports fewer pieces."""
MIN_FINDING = 10
"""Samples that a finding about the sample needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceOptions:
    """What a price is asked for."""

    num_rows: int = 200
    """Rows to measure."""
    bandwidth_mbit: float = 1000.0
    """Of the link to the web, in Mbit/s."""
    cores: tuple[int, ...] = ()
    """Further numbers of cores to give the time for, beside this machine's."""
    patch_size: int = 16
    """Pixels per side of one image token of the model to be trained."""

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.bandwidth_mbit <= 0 or self.patch_size < 1 or any(cores < 1 for cores in self.cores):
            raise ValueError("rows, bandwidth, cores and patch size must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class WallTime:
    """How long the run takes on some cores, and what holds it up."""

    cores: int
    seconds: float
    bound: str
    """`cpu`, `link` (the bandwidth) or `host` (requests to one host at a time)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """The expected cost of a run; bytes, seconds and counts of the whole input, scaled from the sample."""

    num_rows: int
    num_measured: int
    num_measured_kept: int
    num_kept: int
    num_kept_range: tuple[int, int]
    """95 % confidence interval of `num_kept`."""
    dropped: dict[str, int]
    """Reasons among the rows measured."""
    bytes_fetched: int
    """Over the network; 0 for local inputs."""
    download_s: float
    """`bytes_fetched` at the given bandwidth."""
    bytes_in: int
    """Original files of the samples kept."""
    bytes_out: int
    bytes_temporary: int
    """Further space on the output until the run ends (parts/)."""
    core_s: float
    wall_times: tuple[WallTime, ...]
    num_tasks: int
    num_shards: dict[str, int]
    """By split."""
    num_put_requests: int
    num_objects: int
    """Files that stay."""
    tokens_per_caption: float
    """With the end of sequence; 0 where nothing was kept."""
    text_tokens: int
    """Of the train split, per epoch."""
    image_tokens: int
    options: PriceOptions
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def text(self) -> str:
        """A table for people."""
        low, high = self.num_kept_range
        lost = ", ".join(f"{reason} {share_text(number, self.num_measured)}" for reason, number in ranked(self.dropped.items(), 6))
        shards = " and ".join(f"{number:,} of {split}" for split, number in self.num_shards.items())
        options = self.options
        lines = [
            ("rows", f"{self.num_rows:,} in {self.num_tasks:,} tasks; {self.num_measured:,} of them measured, evenly spread"),
            ("kept", f"about {self.num_kept:,} ({share_text(self.num_kept, self.num_rows)}; {low:,} to {high:,} with 95 % confidence)"),
            *([("dropped", lost)] if lost else []),
        ]
        if self.bytes_fetched:
            time = duration_text(self.download_s)
            lines.append(("download", f"{bytes_text(self.bytes_fetched)}: {time} at {options.bandwidth_mbit:g} Mbit/s (--plan-bandwidth)"))
        else:
            lines.append(("input", bytes_text(self.bytes_in)))
        work = f"{self.core_s / 3600:,.1f} core-hours" if self.core_s >= 3600 else f"{self.core_s:.1f} core-seconds"
        lines.append(("compute", f"{work}, {1000 * self.core_s / self.num_rows:.1f} ms a row"))
        reason = {"cpu": "bound by the CPU", "link": "bound by the link", "host": "bound by download.per_host of the largest host"}
        lines += [("", f"{duration_text(wall.seconds)} on {wall.cores:,} cores, {reason[wall.bound]}") for wall in self.wall_times]
        extra = f"{bytes_text(self.bytes_temporary)} more until the run ends"
        lines += [
            ("output", f"{bytes_text(self.bytes_out)} in shards ({shards}), {extra}"),
            ("objects", f"{self.num_objects:,} files stay, {self.num_put_requests:,} PUT requests in all"),
        ]
        if self.tokens_per_caption:
            image = f"{count_text(self.image_tokens)} of images ({options.patch_size} x {options.patch_size} pixels each)"
            lines.append(("tokens", f"{count_text(self.text_tokens)} of text ({self.tokens_per_caption:.1f} a caption) and {image} per epoch"))
        lines += [("look out" if number == 0 else "", warning) for number, warning in enumerate(self.warnings)]
        return "\n".join(f"{name:<10}{text}" for name, text in lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--plan` and the options of a price to a command line; `options_of` reads them."""
    default = PriceOptions()
    text = "measure a sample of the input and print what preparing all of it will cost, whatever the output holds already; write nothing"
    parser.add_argument("--plan", action="store_true", help=text)
    parser.add_argument("--plan-sample", type=int, default=default.num_rows, metavar="ROWS", help="rows that --plan measures (default %(default)s)")
    parser.add_argument("--plan-bandwidth", type=float, default=default.bandwidth_mbit, metavar="MBIT", help="Mbit/s (default %(default)g)")
    parser.add_argument("--plan-cores", type=int, action="append", default=[], metavar="N", help="give the time on N cores too; may be repeated")
    parser.add_argument("--plan-patch", type=int, default=default.patch_size, metavar="PIXELS", help="side of an image token (default %(default)s)")


def options_of(arguments: argparse.Namespace) -> PriceOptions:
    """The options that `add_options` added.

    Raises:
        UserError: a number that is not positive.
    """
    try:
        return PriceOptions(
            num_rows=arguments.plan_sample,
            bandwidth_mbit=arguments.plan_bandwidth,
            cores=tuple(arguments.plan_cores),
            patch_size=arguments.plan_patch,
        )
    except ValueError as error:
        raise UserError("the options of --plan do not make sense", got=error) from None


def price(config: PrepConfig, measure: Measure, options: PriceOptions | None = None) -> Price:
    """Measures a sample of the input and scales it up.

    Raises:
        UserError: the input cannot be used as a whole, or `tokenizer.model_file` not at all.
    """
    options = options or PriceOptions()
    check_given_model(config.tokenizer)
    total, num_tasks, task = sampled_task(config, options.num_rows)
    measure(_first_row(task))  # libraries load and connections open once: that must not be scaled up
    stats, facts, num_bytes = measure(task)
    scale = total / max(1, stats.read)
    low, high = wilson(stats.kept, stats.read) if stats.read < total else (stats.kept / max(1, stats.read),) * 2
    num_kept = round(stats.kept * scale)
    num_heldout = round(num_kept * config.heldout_permille / 1000)
    num_shards = {
        "train": -(-(num_kept - num_heldout) // config.samples_per_shard),
        **({"heldout": -(-num_heldout // config.samples_per_shard)} if num_heldout else {}),
    }
    bytes_out = round(num_bytes * scale) + BYTES_BESIDE_SAMPLE * num_kept
    tokens_per_caption, tokenizer_warnings = _tokens(config, [one.caption for one in facts], num_kept)
    found = Price(
        num_rows=total,
        num_measured=stats.read,
        num_measured_kept=stats.kept,
        num_kept=num_kept,
        num_kept_range=(math.floor(low * total), math.ceil(high * total)),
        dropped=dict(stats.dropped),
        bytes_fetched=round(stats.bytes_fetched * scale),
        download_s=8e-6 * stats.bytes_fetched * scale / options.bandwidth_mbit,
        bytes_in=round(stats.bytes_in * scale),
        bytes_out=bytes_out,
        bytes_temporary=bytes_out,
        core_s=stats.cpu_s * scale,
        wall_times=tuple(_wall_time(stats, scale, cores, config, options) for cores in sorted({_usable_cpus(), *options.cores})),
        num_tasks=num_tasks,
        num_shards=num_shards,
        num_put_requests=FILES_PER_TASK * num_tasks + FILES_PER_SHARD * sum(num_shards.values()) + FILES_PER_RUN,
        num_objects=(FILES_PER_SHARD - 1) * sum(num_shards.values()) + 2 * num_tasks + FILES_PER_RUN,
        tokens_per_caption=tokens_per_caption,
        text_tokens=round(tokens_per_caption * (num_kept - num_heldout)),
        image_tokens=(num_kept - num_heldout) * math.ceil(config.image.resolution / options.patch_size) ** 2,
        options=options,
    )
    return replace(found, warnings=(*_warnings(found, config), *tokenizer_warnings, *_sample_findings(stats, config)))


def sampled_task(config: PrepConfig, num_rows: int) -> tuple[int, int, Task]:
    """(rows of the input, tasks of its plan, a task of `num_rows` rows spread evenly over it, or of all if there are fewer).

    One row at a random place in each of `num_rows` equal stretches, the same every time: rows at equal distances could all be of one kind
    where a list alternates.
    """
    plan = make_plan(config)
    total = plan.num_samples
    num_rows = min(num_rows, total)
    chance = random.Random(0)
    bounds = [number * total // num_rows for number in range(num_rows + 1)]
    targets = iter([low + int(chance.random() * (high - low)) for low, high in zip(bounds, bounds[1:], strict=False)])
    chosen: list[Slice] = []
    begin, target = 0, next(targets, total)
    for part in (part for task in plan.tasks for part in task.slices):
        rows: list[int] = []
        while target < begin + part.count:
            rows.append(target - begin)
            target = next(targets, total)
        begin += part.count
        if rows:
            chosen.append(replace(part, rows=tuple(rows)))
    return total, len(plan.tasks), Task.of(chosen)


def _first_row(task: Task) -> Task:
    return Task.of(replace(part, rows=part.rows[:1]) for part in task.slices[:1])


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, 95 % for z = 1.96; unlike the normal one it stays in 0..1 and is no point at 0 or 1."""
    if not trials:
        return 0.0, 1.0
    share, square = successes / trials, z * z / trials
    middle, half = share + square / 2, z * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def _wall_time(stats: PartStats, scale: float, cores: int, config: PrepConfig, options: PriceOptions) -> WallTime:
    host, share = _largest_host(stats)
    seconds = {
        "cpu": stats.cpu_s * scale / cores,
        "link": 8e-6 * stats.bytes_fetched * scale / options.bandwidth_mbit,
        "host": 0.0,
    }
    if host:
        usual = quantile("download_s", stats.histograms["download_s"], 0.5)
        seconds["host"] = share * stats.read * scale * usual / config.download.per_host
    bound = max(seconds, key=lambda name: seconds[name])
    return WallTime(cores=cores, seconds=seconds[bound], bound=bound)


def _largest_host(stats: PartStats) -> tuple[str, float]:
    """(host, its share of the rows measured) where one stands out; ("", 0) otherwise."""
    top = ranked(stats.hosts.items(), 1)
    if not top or top[0][1] < max(3, 0.02 * stats.read):
        return "", 0.0
    return top[0][0], top[0][1] / stats.read


def _tokens(config: PrepConfig, captions: Sequence[str], num_kept: int) -> tuple[float, list[str]]:
    """(tokens per caption with the end of sequence, warnings), by the given tokenizer or one trained on these very captions."""
    if not captions:
        return 0.0, []
    warnings = []
    tokenizer = config.tokenizer
    if tokenizer.model_file is not None:
        model = Path(tokenizer.model_file).read_bytes()
    else:
        try:
            model = train(captions, replace(tokenizer, vocab_size=min(tokenizer.vocab_size, MAX_PIECES)))
        except UserError as error:
            return 0.0, [str(error).replace("\n ", ";")]
        words = num_kept * sum(len(caption.split()) for caption in captions) / len(captions)
        if words < WORDS_PER_PIECE * tokenizer.vocab_size:
            few = f"about {words:,.0f} words of captions will hardly support tokenizer.vocab_size={tokenizer.vocab_size:,}"
            warnings.append(f"{few}: the tokenizer will have fewer pieces")
    processor = load(model, tokenizer.model_file or "the tokenizer")
    return sum(len(ids) + 1 for ids in processor.EncodeAsIds(list(captions))) / len(captions), warnings


def _warnings(found: Price, config: PrepConfig) -> list[str]:
    warnings = []
    if not found.num_measured_kept:
        warnings.append(f"not one of the {found.num_measured:,} rows measured can be kept")
    elif found.num_kept_range[1] > 1.5 * found.num_kept_range[0] + 1:
        warnings.append(f"{found.num_measured:,} rows say little: measure more of them (--plan-sample) for a closer estimate")
    expected = found.num_kept * config.heldout_permille / 1000
    if config.heldout_permille and expected < 100:
        what = "may be empty" if expected < 5 else f"will have only about {expected:.0f} samples"
        warnings.append(f"the held-out split {what}: raise heldout_permille ({config.heldout_permille} now)")
    first = found.wall_times[0]
    if first.bound == "link" and found.core_s:
        warnings.append(f"more than {max(1, round(found.core_s / found.download_s)):,} cores would wait for the link")
    elif first.bound == "host":
        warnings.append(f"one host holds the run up: download.per_host ({config.download.per_host} now) limits it, with its owner's consent raise it")
    needed = found.bytes_out + found.bytes_temporary
    if "://" not in config.output and needed > (free := _free_bytes(Path(config.output))):
        warnings.append(f"the output needs {bytes_text(needed)}, but {bytes_text(free)} are free at {config.output}")
    if config.dedup.is_on:
        warnings.append("duplicates show only in the whole: the number kept will be lower by their share")
    return warnings


def _sample_findings(stats: PartStats, config: PrepConfig) -> list[str]:
    return [f"in the sample, {one.text}" for one in findings(stats, config, min_samples=MIN_FINDING) if one.code not in ("retry", "low-success")]


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
