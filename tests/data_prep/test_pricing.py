"""The price of a run: an even sample, measured, scaled to the whole; nothing is written."""

import argparse
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from configs.errors import UserError
from data_prep.config import DedupConfig, ImageConfig, PrepConfig, TokenizerConfig
from data_prep.metadata import Facts
from data_prep.plan import READERS, Task, make_plan
from data_prep.pricing import MIN_FINDING, PriceOptions, add_options, options_of, price, sampled_task, wilson
from data_prep.run_stats import PartCollector, PartStats
from data_prep.tokenizer import train

BYTES_PER_SAMPLE = 4096


@dataclass(frozen=True)
class Fetched:
    status: int = 200
    seconds: float = 2.0
    num_attempts: int = 1
    num_bytes: int = 50_000


def measure_with(config: PrepConfig, answer: Fetched | None = None, host: str = "a.org") -> Callable[[Task], tuple[PartStats, list[Facts], int]]:
    """The work of a task in short: reads, decodes, counts."""

    def measure(task: Task) -> tuple[PartStats, list[Facts], int]:
        collector, kept = PartCollector(), []
        for raw in (raw for part in task.slices for raw in READERS[part.kind].read(part, config)):
            try:
                with Image.open(io.BytesIO(raw.image)) as picture:
                    picture.load()
            except UnidentifiedImageError:
                collector.dropped("not_an_image", "text", answer=answer)
                continue
            url = f"http://{host}/{raw.source}" if answer else ""
            facts = Facts(
                key=str(len(kept)),
                source=raw.source,
                url=url,
                caption=raw.caption or "",
                width=picture.width,
                height=picture.height,
                format=str(picture.format).lower(),
                jpeg_quality=-1,
                num_bytes=len(raw.image),
                sha256=hashlib.sha256(raw.image).digest(),
                phash=0,
            )
            collector.kept(facts, num_bytes_out=BYTES_PER_SAMPLE, answer=answer)
            kept.append(facts)
        return collector.finish(), kept, BYTES_PER_SAMPLE * len(kept)

    return measure


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """120 rows naming 16-pixel pictures; every fourth is no picture."""
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (16, 16), "red").save(good)
    bad.write_text("no picture")
    rows = "".join(f"{'bad' if i % 4 == 3 else 'good'}.png,picture number {i} of a small red square\n" for i in range(120))
    (tmp_path / "pairs.csv").write_text("image,caption\n" + rows)
    return tmp_path / "pairs.csv"


def config_of(table: Path, **changes: object) -> PrepConfig:
    settings: dict[str, object] = {
        "inputs": (str(table),),
        "output": str(table.parent / "out"),
        "image": ImageConfig(resolution=32),
        "samples_per_shard": 16,
        "heldout_permille": 200,
        "tokenizer": TokenizerConfig(vocab_size=400, num_threads=1),
    }
    return PrepConfig(**{**settings, **changes})  # type: ignore[arg-type]


def test_a_sample_is_scaled_to_all_rows_and_nothing_is_written(table: Path) -> None:
    config = config_of(table)
    found = price(config, measure_with(config), PriceOptions(num_rows=60, cores=(64,), patch_size=16))
    assert (found.num_rows, found.num_measured, found.num_tasks) == (120, 60, 8)
    low, high = found.num_kept_range
    assert low <= 90 <= high, "the truth, although every second row would be good"
    assert low < found.num_kept < high
    assert found.bytes_in == pytest.approx(found.num_kept * (table.parent / "good.png").stat().st_size, rel=1e-3)
    assert found.bytes_out == pytest.approx(found.num_kept * (BYTES_PER_SAMPLE + 250), rel=1e-3)
    heldout = round(found.num_kept * 0.2)
    assert found.num_shards == {"train": -(-(found.num_kept - heldout) // 16), "heldout": -(-heldout // 16)}
    assert found.image_tokens == (found.num_kept - heldout) * 4
    assert 5 < found.tokens_per_caption < 20
    assert found.core_s > 0
    assert [wall.cores for wall in found.wall_times][-1] == 64
    assert found.wall_times[-1].seconds == pytest.approx(found.core_s / 64)
    assert (found.bytes_fetched, found.download_s) == (0, 0)
    assert not Path(config.output).exists()


def test_all_rows_measured_leave_no_doubt(table: Path) -> None:
    config = config_of(table)
    found = price(config, measure_with(config), PriceOptions(num_rows=500))
    assert (found.num_measured, found.num_kept, found.num_kept_range) == (120, 90, (90, 90))
    assert found.dropped == {"not_an_image": 30}


@pytest.mark.parametrize("samples_per_shard", [1, 7, 120, 1000])
@pytest.mark.parametrize("num_rows", [1, 10, 39, 119, 120])
def test_the_sample_is_spread_evenly_whatever_the_tasks(table: Path, samples_per_shard: int, num_rows: int) -> None:
    config = config_of(table, samples_per_shard=samples_per_shard)
    total, num_tasks, task = sampled_task(config, num_rows)
    assert (total, num_tasks) == (120, len(make_plan(config).tasks))
    sources = [raw.source for part in task.slices for raw in READERS[part.kind].read(part, config)]
    rows = [int(source.split("#")[1]) for source in sources]
    assert len(set(rows)) == len(rows) == num_rows
    by_third = Counter(row // 40 for row in rows)
    assert num_rows < 10 or max(by_third.values()) - min(by_third[i] for i in range(3)) <= 3
    assert sampled_task(config, num_rows) == (total, num_tasks, task), "the same sample every time"


@pytest.mark.parametrize("period", [2, 4, 10, 12, 25])
def test_a_list_that_alternates_does_not_deceive(tmp_path: Path, period: int) -> None:
    rows = 20_000
    (tmp_path / "list.jsonl").write_text("".join(f'{{"image": "{i}.png", "caption": "a"}}\n' for i in range(rows)))
    _, _, task = sampled_task(config_of(tmp_path / "list.jsonl", samples_per_shard=1000), 200)
    phases = Counter((part.start + row) % period for part in task.slices for row in part.rows)
    assert max(phases.values()) < 200 / period + 5 * math.sqrt(200 / period)


def test_folders_are_sampled_over_their_whole_length(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = config_of(make_folder(30), output=str(tmp_path / "out"), samples_per_shard=1000)
    _, _, task = sampled_task(config, 3)
    numbers = [int(part.names[row][1:4]) for part in task.slices for row in part.rows]
    assert [number // 10 for number in numbers] == [0, 1, 2]


def test_a_slow_link_is_named_as_the_bound(table: Path) -> None:
    config = config_of(table)
    found = price(config, measure_with(config, Fetched()), PriceOptions(num_rows=40, bandwidth_mbit=0.1))
    assert found.bytes_fetched == 120 * 50_000
    assert found.download_s == pytest.approx(120 * 50_000 * 8 / 1e5)
    assert {wall.bound for wall in found.wall_times} == {"link"}
    assert any("cores would wait for the link" in warning for warning in found.warnings)


def test_politeness_to_one_large_host_is_named_as_the_bound(table: Path) -> None:
    config = config_of(table)
    found = price(config, measure_with(config, Fetched()), PriceOptions(num_rows=40, bandwidth_mbit=1e6))
    assert {wall.bound for wall in found.wall_times} == {"host"}
    seconds = found.wall_times[0].seconds
    assert found.num_kept * 1 / 8 <= seconds <= found.num_kept * 5 / 8, "fetches of 1 to 5 s (the bin), 8 at a time"
    assert any("download.per_host" in warning for warning in found.warnings)


def test_warnings_say_what_will_disappoint(table: Path) -> None:
    config = config_of(table, tokenizer=TokenizerConfig(vocab_size=32_000), dedup=DedupConfig(exact=True), heldout_permille=10)
    warnings = price(config, measure_with(config), PriceOptions(num_rows=60)).warnings
    assert any("held-out split may be empty" in text for text in warnings)
    assert any("hardly support tokenizer.vocab_size=32,000" in text for text in warnings)
    assert any("duplicates show only in the whole" in text for text in warnings)
    assert any("no images of a known format" in text for text in warnings), "15 of 60 are no pictures"
    assert MIN_FINDING <= 15
    silent = replace(config, tokenizer=TokenizerConfig(vocab_size=20), dedup=DedupConfig())
    assert any("larger tokenizer.vocab_size" in text for text in price(silent, measure_with(silent), PriceOptions(num_rows=60)).warnings)


def test_an_input_without_a_usable_row_is_said_to_be_so(table: Path) -> None:
    (table.parent / "good.png").write_text("neither")
    config = config_of(table)
    found = price(config, measure_with(config), PriceOptions(num_rows=20))
    assert found.num_kept == 0
    assert found.num_kept_range[1] >= 1, "twenty rows cannot exclude a few good ones"
    assert "not one of the 20 rows measured can be kept" in found.warnings
    assert "look out" in found.text()


def test_a_given_tokenizer_counts_the_tokens(table: Path, tmp_path: Path) -> None:
    model = tmp_path / "own.model"
    model.write_bytes(train(["abc"] * 5, TokenizerConfig(vocab_size=265, num_threads=1)))
    config = config_of(table, tokenizer=TokenizerConfig(model_file=str(model)))
    assert price(config, measure_with(config), PriceOptions(num_rows=40)).tokens_per_caption > 25, "nearly one token a letter"
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        price(config_of(table, tokenizer=TokenizerConfig(model_file="missing.model")), measure_with(config))


def test_text_and_json_hold_the_same_numbers(table: Path) -> None:
    config = config_of(table)
    found = price(config, measure_with(config, Fetched()), PriceOptions(num_rows=40, cores=(64,)))
    values = json.loads(found.to_json())
    assert values["num_rows"] == 120
    text = found.text()
    for part in ("120 in 8 tasks; 40 of them measured", "95 % confidence", "on 64 cores", "per epoch", f"{found.num_put_requests:,} PUT requests"):
        assert part in text, text


def test_options_come_from_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    arguments = parser.parse_args(["--plan", "--plan-sample=50", "--plan-bandwidth=200", "--plan-cores=8", "--plan-cores=96", "--plan-patch=32"])
    assert options_of(arguments) == PriceOptions(num_rows=50, bandwidth_mbit=200, cores=(8, 96), patch_size=32)
    with pytest.raises(UserError, match="do not make sense"):
        options_of(parser.parse_args(["--plan-sample", "0"]))


def test_wilson_interval_covers_the_truth_as_often_as_promised() -> None:
    """Exact coverage by the binomial distribution, for shares from rare to common."""
    for truth in (0.02, 0.3, 0.5, 0.9):
        trials = 200
        chance = [math.comb(trials, k) * truth**k * (1 - truth) ** (trials - k) for k in range(trials + 1)]
        covered = sum(p for k, p in enumerate(chance) if wilson(k, trials)[0] <= truth <= wilson(k, trials)[1])
        assert 0.93 < covered < 0.98
    assert wilson(0, 0) == (0, 1)
