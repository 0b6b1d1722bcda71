"""Images made on the spot, one Ray for the whole session, and a prepared data set to inspect."""

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.config import ImageConfig, PrepConfig, RayConfig, TokenizerConfig
from data_prep.part import write_part
from data_prep.plan import make_plan
from data_prep.prepare import prepare
from data_prep.schema import ShardInfo
from data_prep.shard import PartCounts, plan_shards, publish_failures, write_shard
from data_prep.task_samples import Job


def smooth_pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture without sharp edges, uint8 [height, width, 3], so that two ways of resizing it agree closely."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture: Image.Image | np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    """Bytes of an image file."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def ray_cluster(s3_url: str) -> Iterator[None]:
    """A local Ray that all tests share: starting one takes seconds. Its workers inherit the address of the S3 server."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes `count` small pictures with captions to a new folder below `tmp_path`."""

    def make(count: int, name: str = "raw", first: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for number in range(first, first + count):
            (folder / f"p{number:03d}.png").write_bytes(encoded(smooth_pixels(20, 24, seed=number)))
            (folder / f"p{number:03d}.txt").write_text(f"a soft picture\n  number {number} ")
            (folder / f"p{number:03d}.json").write_text(f'{{"label": {number % 3}, "license": "mine"}}')
        return folder

    return make


def small_config(source: Path, output: Path, **changes: Any) -> PrepConfig:
    """16-pixel PNGs, 8 samples a shard, a fifth held out, a tiny tokenizer."""
    settings: dict[str, Any] = {
        "inputs": (str(source),),
        "output": str(output),
        "image": ImageConfig(resolution=16, format="png"),
        "samples_per_shard": 8,
        "heldout_permille": 200,
        "tokenizer": TokenizerConfig(vocab_size=300, num_threads=1),
        "ray": RayConfig(num_cpus=2),
    }
    return PrepConfig(**{**settings, **changes})


def make_shards(config: PrepConfig) -> list[ShardInfo]:
    """Parts, ledger and shards of a configuration, one after the other in this process."""
    job = Job(generation=1)
    records = [write_part(config, job, task)[0] for task in make_plan(config).tasks]
    for record in records:
        publish_failures(config, job, record, False)
    parts = [PartCounts(name=record.name, num_train=record.kept - record.num_heldout, num_heldout=record.num_heldout) for record in records]
    return [write_shard(config, job, shard) for shard in plan_shards(parts, config, 1, has_verdicts=False)]


@pytest.fixture
def data_set(make_folder: Callable[..., Path], tmp_path: Path, ray_cluster: None) -> Path:
    """A prepared data set of 30 samples."""
    prepare(small_config(make_folder(30), tmp_path / "set"))
    return tmp_path / "set"


def files_below(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file but the run statistics, whose timings differ from run to run."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {path: data for path, data in files.items() if not path.startswith("stats/")}


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """An S3 server of this process, with one bucket."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import boto3

    server = server_module.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket/some/set"
    server.stop()
