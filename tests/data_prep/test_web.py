"""From a URL list to a data set: what the network does never shows in the bytes, and what the servers ask for is done."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import UserError
from data_prep import run_stats
from data_prep.config import DownloadConfig, FilterConfig, LimitConfig, PrepConfig, RayConfig, ScoreConfig
from data_prep.prepare import prepare
from data_prep.schema import Manifest, generations
from data_prep.storage import open_storage
from tests.data_prep.conftest import encoded, files_below, small_config, smooth_pixels
from tests.data_prep.web_server import Fault, WebServer

pytestmark = pytest.mark.usefixtures("ray_cluster")

DOWNLOAD = DownloadConfig(contact="crawl@example.org", allowed_networks=("127.0.0.0/8",), timeout_s=5, backoff_s=0.01)
NUM_PAGES = 40


@pytest.fixture(scope="module")
def pages() -> dict[str, bytes]:
    return {f"/p{i:03d}.png": encoded(smooth_pixels(20, 24, seed=i)) for i in range(NUM_PAGES)}


def url_list(path: Path, urls: list[str], **columns: list[Any]) -> Path:
    pq.write_table(pa.table({"url": urls, "caption": [f"picture {i}" for i in range(len(urls))], **columns}), path, row_group_size=16)
    return path


def failures_in(folder: Path) -> dict[str, str]:
    """Last part of the address -> reason."""
    files = files_below(folder)
    rows = [json.loads(line) for path, data in files.items() if path.startswith("ledger/") for line in data.splitlines()]
    return {row["url"].rpartition("/")[2]: row["reason"] for row in rows}


def test_arrival_order_and_number_of_tasks_do_not_show_in_the_bytes(pages: dict[str, bytes], tmp_path: Path) -> None:
    results = []
    port = 0
    for name, seed, window in (("a", 1, 1), ("b", 2, 4)):
        with WebServer(pages, delay_s=(0.0, 0.15), seed=seed, port=port) as server:
            port = server.port  # the addresses are part of the samples
            server.fault("/p007.png", Fault(kind="status", status=500, times=seed))
            server.fault("/p011.png", Fault(kind="status", status=404))
            table = tmp_path / "urls.parquet"
            if not table.exists():
                url_list(table, [server.url(path) for path in pages], license=["mine"] * NUM_PAGES)
            config = small_config(table, tmp_path / name, download=DOWNLOAD, ray=RayConfig(num_cpus=2, max_in_flight=window))
            manifest, _ = prepare(config)
            assert (manifest.counts.kept, manifest.counts.dropped) == (NUM_PAGES - 1, {"http_404": 1})
            results.append(files_below(tmp_path / name))
    assert results[0] == results[1]
    (values,) = (row for row in _json_members(tmp_path / "a") if row["key"] == "0000000003")
    assert values["extra"] == {"license": "mine"}
    assert values["url"].endswith("/p003.png")
    assert values["source"] == "urls.parquet#3"


def test_servers_are_treated_as_they_ask(pages: dict[str, bytes], tmp_path: Path) -> None:
    with WebServer(pages, robots="User-agent: *\nDisallow: /p00\n", delay_s=(0.02, 0.05)) as server:
        server.fault("/p010.png", Fault(kind="headers", headers=(("X-Robots-Tag", "noai"),)))
        server.fault("/p011.png", Fault(kind="headers", headers=(("TDM-Reservation", "1"),)))
        server.fault("/p012.png", Fault(kind="headers", headers=(("X-Robots-Tag", "otherbot: noai"),)))
        table = url_list(tmp_path / "urls.parquet", [server.url(path) for path in pages])
        manifest, _ = prepare(small_config(table, tmp_path / "set", download=replace(DOWNLOAD, per_host=4)))
        asked = [entry.path for entry in server.log]
        assert not [path for path in asked if path.startswith("/p00")], "no request to what robots.txt disallows"
        assert all("crawl@example.org" in entry.user_agent for entry in server.log)
        assert max(server.peak.values()) <= 4, "two tasks share out four requests to one host"
    assert manifest.counts.dropped == {"opt_out": 2, "robots": 10}
    assert manifest.counts.kept == NUM_PAGES - 12
    found = failures_in(tmp_path / "set")
    assert (found["p010.png"], found["p011.png"], found["p003.png"]) == ("opt_out", "opt_out", "robots")


def test_what_columns_and_lists_rule_out_is_never_asked_for(pages: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text("http://127.0.0.1/other.png\n")
    with WebServer(pages) as server:
        (tmp_path / "blocked.txt").write_text(server.url("/p001.png") + "\n")
        table = url_list(tmp_path / "urls.parquet", [server.url(path) for path in pages], clip=[i / NUM_PAGES for i in range(NUM_PAGES)])
        filters = FilterConfig(scores=(ScoreConfig(name="clip", min=0.5),), blocked_urls=str(tmp_path / "blocked.txt"))
        manifest, _ = prepare(small_config(table, tmp_path / "set", download=DOWNLOAD, filters=filters))
        asked = {entry.path for entry in server.log} - {"/robots.txt"}
    assert asked == {f"/p{i:03d}.png" for i in range(NUM_PAGES // 2, NUM_PAGES)}
    assert manifest.counts.dropped == {"blocked_url": 1, "score": 19}
    assert list(manifest.lists) == [str(tmp_path / "blocked.txt")]


def test_pictures_that_the_header_rules_out_are_not_fetched_whole(tmp_path: Path) -> None:
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, (900, 1100, 3)).astype("uint8")
    big = {f"/b{i}.png": encoded(noise) for i in range(4)}
    with WebServer(big) as server:
        table = url_list(tmp_path / "urls.parquet", [server.url(path) for path in big] + [server.url("/b0.png")])
        config = small_config(table, tmp_path / "set", download=DOWNLOAD, limits=LimitConfig(max_pixels=100_000))
        with pytest.raises(UserError, match="5 x too_many_pixels"):
            prepare(config)
    stats = run_stats.load_part(open_storage(tmp_path / "set"), 1, 0)
    assert stats is not None
    assert stats.bytes_fetched < 0.2 * sum(map(len, big.values()))


def test_a_crawl_without_a_contact_is_refused(pages: dict[str, bytes], tmp_path: Path) -> None:
    table = url_list(tmp_path / "urls.parquet", ["http://127.0.0.1:9/a.png"])
    with pytest.raises(UserError, match=r"download\.contact"):
        prepare(small_config(table, tmp_path / "set"))
    assert not generations(open_storage(tmp_path / "set"))


def test_private_addresses_are_refused_unless_allowed(pages: dict[str, bytes], tmp_path: Path) -> None:
    with WebServer(pages) as server:
        table = url_list(tmp_path / "urls.parquet", [server.url("/p000.png")])
        with pytest.raises(UserError, match=r"1 x private_address(?s:.*)download\.allowed_networks"):
            prepare(small_config(table, tmp_path / "set", download=replace(DOWNLOAD, allowed_networks=())))
        assert not server.log


def test_lists_and_results_may_lie_in_an_object_store(pages: dict[str, bytes], tmp_path: Path, s3_url: str) -> None:
    with WebServer(pages) as server:
        table = url_list(tmp_path / "urls.parquet", [server.url(path) for path in pages])
        inputs = open_storage(f"{s3_url}/lists")
        inputs.put_bytes("urls.parquet", table.read_bytes())
        local, _ = prepare(small_config(table, tmp_path / "set", download=DOWNLOAD))
        config = small_config(Path("unused"), Path("unused"), download=DOWNLOAD)
        remote, _ = prepare(replace(config, inputs=(f"{s3_url}/lists/urls.parquet",), output=f"{s3_url}/web-set"))
    assert remote.splits == local.splits
    assert Manifest.load(open_storage(f"{s3_url}/web-set")) == remote


def test_images_may_lie_in_an_object_store(make_folder: Callable[..., Path], tmp_path: Path, s3_url: str) -> None:
    folder, store = make_folder(12), open_storage(f"{s3_url}/photos")
    for path in sorted(folder.iterdir()):
        store.put_bytes(f"raw/{path.name}", path.read_bytes())
    names = [path.name for path in sorted(folder.glob("*.png"))]
    addresses = url_list(tmp_path / "urls.parquet", [f"{s3_url}/photos/raw/{name}" for name in [*names, "absent.png"]])
    config = small_config(addresses, tmp_path / "by-url")
    manifest, _ = prepare(config)
    assert (manifest.counts.kept, manifest.counts.dropped) == (12, {"missing_file": 1})
    listed, _ = prepare(replace(config, inputs=(f"{s3_url}/photos/raw",), output=str(tmp_path / "by-folder")))
    assert (listed.counts.kept, listed.counts.dropped) == (12, {})
    hashes = [sorted(shard.num_samples for split in found.splits.values() for shard in split.shards) for found in (manifest, listed)]
    assert hashes[0] == hashes[1]


class Gate:
    """A scorer that waits until a file is there: it keeps a run going for as long as a test needs it."""

    def score(self, images: Sequence[Any], captions: Sequence[str]) -> dict[str, list[float]]:
        gate, deadline = Path(os.environ["TEST_GATE"]), time.monotonic() + 100
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return {"one": [1.0] * len(images)}


DRIVER = """
import sys
from dataclasses import replace
from pathlib import Path
from configs.errors import UserError
from data_prep.config import FilterConfig
from data_prep.prepare import prepare
from tests.data_prep.conftest import small_config
config = small_config(Path(sys.argv[1]), Path("unused"), filters=FilterConfig(scorer="tests.data_prep.test_web:Gate"))
try:
    print("made", prepare(replace(config, output=sys.argv[2]))[0].generation)
except UserError as error:
    print("refused", error.what)
"""


@pytest.mark.parametrize("where", ["folder", "object store"])
def test_of_two_drivers_on_one_output_one_wins(make_folder: Callable[..., Path], tmp_path: Path, s3_url: str, where: str) -> None:
    output = f"{s3_url}/contested" if where == "object store" else str(tmp_path / "set")
    command = [sys.executable, "-c", DRIVER, str(make_folder(12)), output]
    environment = {**os.environ, "TEST_GATE": str(tmp_path / "gate")}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not open_storage(output).list("plans/") and time.monotonic() < deadline:
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    (tmp_path / "gate").touch()
    assert first.communicate(timeout=100)[0].strip() == "made 1"
    assert second.stdout.startswith("refused another run is writing")
    assert Manifest.load(open_storage(output)).counts.kept == 12


def _json_members(folder: Path) -> list[dict[str, Any]]:
    import tarfile

    found = []
    for path in sorted((folder / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            for name in archive.getnames():
                if name.endswith(".json"):
                    found.append(json.loads(archive.extractfile(name).read()))  # type: ignore[union-attr]
    return found


def test_the_configuration_refuses_nonsense() -> None:
    for bad in ({"per_host": 0}, {"timeout_s": 0.0}, {"allowed_networks": ("10.0.0.300/8",)}):
        with pytest.raises(ValueError, match="download"):
            DownloadConfig(**bad)  # type: ignore[arg-type]
    assert PrepConfig().download.respect_robots
    with pytest.raises(ValueError, match="must leave a quarter of ray.memory_per_task_bytes"):
        PrepConfig(ray=RayConfig(memory_per_task_bytes=2**29))


def test_a_list_of_what_is_not_wanted_holds_behind_a_redirect(pages: dict[str, bytes], tmp_path: Path) -> None:
    with WebServer(pages) as server:
        server.fault("/p003.png", Fault(kind="redirect", location="/p009.png"))
        (tmp_path / "blocked.txt").write_text(server.url("/p009.png"))
        table = url_list(tmp_path / "urls.parquet", [server.url(path) for path in list(pages)[:8]])
        config = small_config(table, tmp_path / "set", download=DOWNLOAD, filters=FilterConfig(blocked_urls=str(tmp_path / "blocked.txt")))
        manifest, _ = prepare(config)
    assert manifest.counts.dropped == {"blocked_url": 1}
    assert failures_in(tmp_path / "set") == {"p003.png": "blocked_url"}
