"""Run statistics: complete counts, mergeable, bounded, and read back as they were written."""

import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep import run_stats
from data_prep.metadata import Facts
from data_prep.reasons import REASONS, STAGES, stage_of
from data_prep.run_stats import EDGES, PartCollector, PartStats, merge, quantile, total_of
from data_prep.storage import open_storage


@dataclass(frozen=True)
class Fetched:
    """The part of a downloader's answer that statistics read."""

    status: int = 200
    seconds: float = 0.3
    num_attempts: int = 1
    num_bytes: int = 1000


def facts(number: int = 0, **changes: object) -> Facts:
    values = {
        "key": f"{number:010d}",
        "source": f"list.parquet#{number}",
        "url": f"https://img{number % 7}.Example.org/{number}.jpg",
        "caption": "a red bus on a street",
        "width": 640,
        "height": 480,
        "format": "jpeg",
        "jpeg_quality": 90,
        "num_bytes": 90_000,
        "sha256": bytes(32),
        "phash": 0,
    }
    return Facts(**{**values, **changes})  # type: ignore[arg-type]


def collected(kept: int = 5, dropped: int = 3, reason: str = "dns", detail: str = "SERVFAIL from 127.0.0.53") -> PartStats:
    collector = PartCollector()
    for number in range(kept):
        collector.kept(facts(number), num_bytes_out=30_000, answer=Fetched())
    for number in range(dropped):
        answer = Fetched(status=0, seconds=4.0, num_attempts=3, num_bytes=0)
        collector.dropped(reason, detail, f"http://dead{number}.example.com/x.jpg", answer)
    return collector.finish()


def test_every_sample_is_counted_once() -> None:
    stats = collected(kept=5, dropped=3)
    assert (stats.read, stats.kept, dict(stats.dropped), stats.num_dropped) == (8, 5, {"dns": 3}, 3)
    assert (stats.num_fetched, stats.num_attempts) == (8, 5 + 9)
    assert (stats.bytes_fetched, stats.bytes_in, stats.bytes_out) == (5000, 450_000, 150_000)
    assert dict(stats.statuses) == {"200": 5}
    assert dict(stats.formats) == {"jpeg": 5}
    assert stats.peak_rss_bytes > 10 * 2**20
    assert stats.elapsed_s >= 0
    assert stats.started_at > 1.6e9


def test_histograms_take_each_value_into_its_bin() -> None:
    stats = collected(kept=5, dropped=3)
    sides = dict(zip(EDGES["shorter_side"], stats.histograms["shorter_side"], strict=True))
    assert sides == {edge: 5 if edge == 384 else 0 for edge in EDGES["shorter_side"]}
    ratios = dict(zip(EDGES["aspect_ratio"], stats.histograms["aspect_ratio"], strict=True))
    assert ratios[4 / 3] == 5
    words = dict(zip(EDGES["caption_words"], stats.histograms["caption_words"], strict=True))
    assert words[5] == 5
    assert sum(stats.histograms["download_s"]) == 5
    assert sum(stats.histograms["failure_s"]) == 3, "the time of a failure must not look like that of a download"
    assert dict(zip(EDGES["attempts"], stats.histograms["attempts"], strict=True))[3] == 3


def test_a_fetched_but_unusable_image_counts_as_a_good_download() -> None:
    collector = PartCollector()
    collector.dropped("not_an_image", "text/html", "http://a.org/x", Fetched())
    stats = collector.finish()
    assert (sum(stats.histograms["download_s"]), sum(stats.histograms["failure_s"])) == (1, 0)


def test_what_was_never_asked_for_is_no_fetch() -> None:
    collector = PartCollector()
    collector.dropped("circuit_open", "timeout connecting", "http://a.org/x", Fetched(status=0, seconds=0, num_attempts=0, num_bytes=0))
    stats = collector.finish()
    assert (stats.read, stats.num_fetched, sum(stats.histograms["failure_s"]), sum(stats.histograms["attempts"])) == (1, 0, 0, 0)


def test_local_samples_have_neither_hosts_nor_downloads() -> None:
    collector = PartCollector()
    collector.kept(facts(url="", jpeg_quality=-1, format="png"), num_bytes_out=1)
    collector.dropped("corrupt", "broken data stream")
    stats = collector.finish()
    assert (stats.num_fetched, dict(stats.hosts), dict(stats.failed_hosts)) == (0, {}, {})
    assert sum(stats.histograms["jpeg_quality"]) == 0
    assert stats.failed_details == {"corrupt": {"broken data stream": 1}}


def test_hosts_and_causes_are_grouped_by_reason() -> None:
    stats = merge(collected(), collected(reason="tls", detail="Cannot connect to host a.b.org:443 ssl: certificate verify failed"))
    assert stats.failed_details == {"dns": {"SERVFAIL": 3}, "tls": {"certificate verify failed": 3}}
    assert stats.failed_hosts["dns"] == {f"dead{number}.example.com": 1 for number in range(3)}
    assert stats.hosts == {f"img{number}.example.org": 2 for number in range(5)}


def test_merging_equals_collecting_together_and_has_a_neutral_element() -> None:
    parts = [collected(kept=k, dropped=d, reason=r) for k, d, r in ((5, 3, "dns"), (2, 0, "dns"), (0, 4, "http_404"))]
    whole = merge(*parts)
    assert (whole.num_parts, whole.read, whole.kept) == (3, 14, 7)
    assert list(whole.dropped.items()) == [("http_404", 4), ("dns", 3)], "the most frequent comes first"
    assert merge(whole, PartStats()) == whole == merge(PartStats(), *parts)
    assert merge() == PartStats(histograms={name: (0,) * len(edges) for name, edges in EDGES.items()})
    assert total_of(iter(parts * 50)).read == 14 * 50
    assert whole.peak_rss_bytes == max(part.peak_rss_bytes for part in parts)


def test_size_is_bounded_whatever_the_input() -> None:
    collector = PartCollector()
    chance = random.Random(0)
    for number in range(20_000):
        url = f"http://{chance.randrange(10**9)}.org/a.jpg"
        if number % 2:
            collector.kept(facts(number, url=url), num_bytes_out=1)
        else:
            collector.dropped(f"http_{number % 900:03d}", chance.choice("abcdefgh") * chance.randrange(1, 60), url)
    stats = collector.finish()
    assert len(stats.to_bytes()) < 250_000
    assert len(stats.hosts) <= run_stats.NUM_HOSTS
    assert max(map(len, stats.failed_hosts.values())) <= run_stats.NUM_PER_REASON
    assert len(merge(*[stats] * 5).to_bytes()) < 250_000
    assert sum(stats.dropped.values()) == 10_000, "the reasons themselves are counted in full"


def test_a_frequent_host_survives_many_rare_ones() -> None:
    chance, truth, parts = random.Random(1), Counter[str](), []
    for _ in range(12):
        collector = PartCollector()
        for number in range(1500):
            host = "cdn.org" if number % 10 == 0 else "img.net" if number % 20 == 1 else f"h{chance.randrange(10**6)}.com"
            truth[host] += 1
            collector.kept(facts(number, url=f"https://{host}/x"), num_bytes_out=1)
        parts.append(collector.finish())
    whole = merge(*parts)
    assert list(whole.hosts)[:2] == ["cdn.org", "img.net"]
    for host in ("cdn.org", "img.net"):
        assert truth[host] - whole.hosts_missed <= whole.hosts[host] <= truth[host]
    assert whole.hosts_missed <= truth.total() / run_stats.NUM_HOSTS


def test_files_return_what_was_written(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    parts = [collected(kept=number + 1) for number in range(3)]
    for number, part in enumerate(parts):
        assert run_stats.dump_part(storage, 1, number, part) == f"stats/000001/part-{number:06d}.json"
    assert run_stats.dump_whole(storage, 1, merge(*parts)) == "stats/000001.json"
    assert list(run_stats.load_parts(storage, 1)) == parts
    assert list(run_stats.load_parts(storage, 1, [1])) == parts[1:2]
    assert run_stats.load_part(storage, 1, 2) == parts[2]
    assert run_stats.load_whole(storage, 1) == merge(*parts)
    assert run_stats.load_whole(storage, 2) is None
    assert list(run_stats.load_parts(storage, 2)) == []


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"format": "jetway-stats/9"}', b"[1]", b"\xff"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    storage = open_storage(tmp_path)
    storage.put_bytes("stats/000001.json", damage)
    with pytest.raises(UserError, match=r"stats/000001\.json is damaged"):
        run_stats.load_whole(storage, 1)


def test_histograms_of_other_bins_are_left_out_rather_than_misread() -> None:
    stats = collected()
    changed = stats.to_bytes().replace(b'"attempts": [1, 2, 3', b'"attempts": [1, 2, 4', 1)
    assert changed != stats.to_bytes()
    loaded = PartStats.from_bytes(changed)
    assert "attempts" not in loaded.histograms
    assert loaded.histograms["caption_words"] == stats.histograms["caption_words"]
    assert merge(loaded, stats).kept == 10


def test_quantile_lies_in_the_right_bin() -> None:
    counts = [0] * len(EDGES["download_s"])
    counts[4], counts[8] = 90, 10  # 0.2-0.5 s and 5-10 s
    assert 0.2 <= quantile("download_s", counts, 0.5) <= 0.5
    assert 5 <= quantile("download_s", counts, 0.95) <= 10
    assert quantile("download_s", [0] * 13 + [3], 0.5) == 120, "of the open bin, its edge"
    assert math.isnan(quantile("download_s", [0] * 14, 0.5))


def test_every_reason_has_one_stage() -> None:
    listed = [reason for reasons in STAGES.values() for reason in reasons]
    assert sorted(listed) == sorted(REASONS)
    assert stage_of("http_503") == "network"
    assert stage_of("of_a_later_version") == "other"


def test_statistics_survive_json() -> None:
    stats = collected()
    assert PartStats.from_bytes(stats.to_bytes()) == stats
