"""The second chance: failed addresses are tried again into new full shards, published ones stay as they are."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep import retry as retry_module
from data_prep.config import DownloadConfig, PrepConfig
from data_prep.part import write_part
from data_prep.plan import plan_path
from data_prep.prepare import prepare
from data_prep.retry import parse_reasons, retry
from data_prep.schema import Manifest, ShardIndex
from data_prep.shard import publish_failures
from data_prep.storage import open_storage
from data_prep.task_samples import Job
from tests.data_prep.conftest import encoded, files_below, small_config, smooth_pixels
from tests.data_prep.web_server import Fault, WebServer

pytestmark = pytest.mark.usefixtures("ray_cluster")

DOWNLOAD = DownloadConfig(contact="test@example.org", allowed_networks=("127.0.0.0/8",), retries=0, timeout_s=5, host_failures=1000)


@pytest.fixture
def server() -> Iterator[WebServer]:
    """Forty pictures, of which about a third fail until the server is healed."""
    pages = {f"/p{i:03d}.png": encoded(smooth_pixels(20, 24, seed=i)) for i in range(40)}
    with WebServer(pages, fail_share=0.3, fail_with=Fault(kind="status", status=503), seed=3) as running:
        yield running


@pytest.fixture
def config(server: WebServer, tmp_path: Path) -> PrepConfig:
    table = tmp_path / "urls.jsonl"
    rows = [{"url": server.url(f"/p{i:03d}.png"), "caption": f"picture {i}", "license": "mine"} for i in range(40)]
    rows.insert(5, {"url": server.url("/nothing.png"), "caption": "there is no such page"})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return small_config(table, tmp_path / "set", download=DOWNLOAD)


def members_of(manifest: Manifest, folder: Path) -> dict[bytes, bytes]:
    """Key -> content hash of every sample."""
    storage = open_storage(folder)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    indexes = [ShardIndex.load(storage, shard.name, sha256=shard.index_sha256) for shard in shards]
    return {key: row.tobytes() for index in indexes for key, row in zip(index.keys.tolist(), index.sha256, strict=True)}


def test_what_heals_is_added_and_finished_shards_are_not_touched(config: PrepConfig, server: WebServer, tmp_path: Path) -> None:
    first, _ = prepare(config)
    failed = first.counts.dropped["http_503"]
    assert 5 < failed < 20
    before = files_below(tmp_path / "set")
    server.heal()
    second, worked = retry(config.output, ("5xx",))
    assert worked
    assert (second.action, second.base, second.counts.read) == ("retry", 1, 41)
    assert (second.counts.kept, second.counts.dropped) == (40, {"http_404": 1})
    after = files_below(tmp_path / "set")
    assert {path: after[path] for path in before} == before
    new = [shard for shard in second.splits["train"].shards if shard not in first.splits["train"].shards]
    assert all(shard.num_samples == config.samples_per_shard for shard in new[:-1])
    # Every sample has the key and the content that it would have had if nothing had ever failed.
    whole, _ = prepare(replace(config, output=str(tmp_path / "whole")))
    assert members_of(second, tmp_path / "set") == members_of(whole, tmp_path / "whole")


def test_only_failures_of_the_named_reasons_are_asked_for_again(config: PrepConfig, server: WebServer) -> None:
    prepare(config)
    server.heal()
    server.log.clear()
    retry(config.output, ("http_404",))
    assert [entry.path for entry in server.log if entry.path != "/robots.txt"] == ["/nothing.png"]


def test_a_third_chance_sees_what_the_second_left(config: PrepConfig, server: WebServer) -> None:
    first, _ = prepare(config)
    second, _ = retry(config.output, ("5xx", "http_404"))  # nothing has healed
    assert (second.counts.kept, second.counts.dropped) == (first.counts.kept, first.counts.dropped)
    server.heal()
    third, _ = retry(config.output, ("5xx",))
    assert (third.generation, third.counts.kept, third.counts.dropped) == (3, 40, {"http_404": 1})
    fourth, worked = retry(config.output, ("5xx",))
    assert (fourth, worked) == (third, False)


def test_growth_after_a_second_chance_continues_the_numbering(config: PrepConfig, server: WebServer, tmp_path: Path) -> None:
    prepare(config)
    server.heal()
    retry(config.output, ("5xx",))
    table = tmp_path / "urls.jsonl"
    with open(table, "a") as file:
        file.write(json.dumps({"url": server.url("/p000.png"), "caption": "again"}) + "\n")
    manifest, _ = prepare(config)
    assert (manifest.generation, manifest.counts.read, manifest.num_planned) == (3, 42, 42)
    assert b"0000000041" in members_of(manifest, tmp_path / "set")


def test_settings_of_speed_may_change_and_others_may_not(config: PrepConfig, server: WebServer) -> None:
    prepare(config)
    server.heal()
    with pytest.raises(UserError, match=r"image\.resolution: 16 -> 32"):
        retry(config.output, ("5xx",), ["image.resolution=32"])
    assert retry(config.output, ("5xx",), ["download.timeout_s=9", "ray.num_cpus=1"])[1]


def test_an_interrupted_pass_is_finished_by_the_same_command_only(config: PrepConfig, server: WebServer, tmp_path: Path) -> None:
    prepare(config)
    server.heal()
    storage = open_storage(config.output)
    plan, _ = retry_module.retry_plan(storage, Manifest.load(storage), ("5xx",))
    plan.dump(storage)
    with pytest.raises(UserError, match="unfinished generation 2"):
        retry(config.output, ("http_404",))
    assert retry(config.output, ("5xx",))[0].counts.kept == 40


@pytest.mark.parametrize(("text", "found"), [("dns, timeout", ("dns", "timeout")), ("5xx,http_429", ("5xx", "http_429"))])
def test_reasons_are_a_list(text: str, found: tuple[str, ...]) -> None:
    assert parse_reasons(text) == found


@pytest.mark.parametrize("text", ["dsn", "", "6xx", "http_9"])
def test_a_word_that_is_no_reason_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="unknown reason"):
        parse_reasons(text)


def test_the_verb_says_what_it_would_do(
    config: PrepConfig, server: WebServer, capsys: pytest.CaptureFixture[str], make_folder: Callable[..., Path]
) -> None:
    first, _ = prepare(config)
    assert retry_module.main([config.output, "--reason", "5xx", "--dry-run"]) == 0
    assert f"would try {first.counts.dropped['http_503']} samples again" in capsys.readouterr().out
    assert retry_module.main([config.output, "--reason", "tls"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_what_failed_before_a_table_grew_gets_its_second_chance(server: WebServer, tmp_path: Path) -> None:
    """The new rows lie in a slice that begins where the slice of the old ones begins."""
    table = tmp_path / "urls.jsonl"

    def write(count: int) -> None:
        table.write_text("".join(json.dumps({"url": server.url(f"/p{i:03d}.png"), "caption": f"picture {i}"}) + "\n" for i in range(count)))

    write(20)
    config = small_config(table, tmp_path / "set", download=DOWNLOAD, samples_per_shard=32)
    first, _ = prepare(config)
    write(30)
    grown, _ = prepare(config)
    assert 0 < first.counts.dropped["http_503"] < grown.counts.dropped["http_503"]
    server.heal()
    manifest, _ = retry(config.output, ("5xx",))
    assert (manifest.counts.read, manifest.counts.kept, manifest.counts.dropped) == (30, 30, {})
    assert sorted(members_of(manifest, tmp_path / "set")) == [b"%010d" % i for i in range(30)]


def test_a_pass_that_was_given_up_leaves_nothing_to_the_next(config: PrepConfig, server: WebServer) -> None:
    prepare(config)
    server.heal()
    storage = open_storage(config.output)
    given_up, _ = retry_module.retry_plan(storage, Manifest.load(storage), ("http_404",))
    given_up.dump(storage)
    job = Job(generation=2)
    record, _ = write_part(config, job, given_up.tasks[0])
    publish_failures(config, job, record, False)
    storage.delete(plan_path(2))
    manifest, _ = retry(config.output, ("5xx",))
    assert (manifest.counts.kept, manifest.counts.dropped) == (40, {"http_404": 1})
    assert not storage.list("ledger/000002/"), "nothing failed in this pass"


def test_a_pass_continues_what_was_published_while_it_waited_for_its_turn(
    config: PrepConfig, server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config)
    server.heal()
    check = retry_module.check_settings

    def check_while_another_publishes(settings: PrepConfig) -> dict[str, str]:
        monkeypatch.setattr(retry_module, "check_settings", check)
        retry(config.output, ("5xx",))
        return check(settings)

    monkeypatch.setattr(retry_module, "check_settings", check_while_another_publishes)
    manifest, _ = retry(config.output, ("4xx",))
    assert (manifest.generation, manifest.base, manifest.counts.kept) == (3, 2, 40)
