"""Shards of an object store are copied whole, once per node, atomically, and bounded in number. Against a real S3 server on loopback."""

import shutil
from collections.abc import Iterator

import pytest

from configs.errors import UserError
from data_prep.schema import tar_path
from data_prep.storage import open_storage
from pipeline.data.dataset import open_dataset
from pipeline.data.loader import TrainLoader
from pipeline.data.reader import SampleReader
from pipeline.data.shard_cache import ShardCache

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """s3://bucket on a server of this process."""
    import boto3

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="training")
        yield "s3://training"
    server.stop()


@pytest.fixture
def remote(bucket, intact, request) -> str:
    """The intact data set, copied to the object store."""
    url = f"{bucket}/{request.node.name.replace('[', '-').replace(']', '')}"
    storage = open_storage(url)
    for path in intact.path.rglob("*"):
        if path.is_file():
            storage.put_file(path, path.relative_to(intact.path).as_posix())
    return url


def _copies(folder) -> list[str]:
    """Copies, whole or half; lock files do not count."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("lock-"))


def test_samples_of_an_object_store_are_the_same(remote, intact, tmp_path):
    dataset = open_dataset(remote)
    split = dataset.split("train")
    reader = SampleReader(dataset, split, num_open_shards=2, cache_folder=tmp_path)
    for shard, member in ((0, 6), (1, 0), (2, 8), (0, 1)):
        place = (intact.shards["train"][shard], member)
        sample = reader.read(shard, member)
        assert (sample.key, sample.text) == (intact.keys[place], intact.captions[place])
        assert sample.image.tobytes() == intact.images[place].tobytes()
        assert len(_copies(tmp_path)) <= 2
    reader.close()
    assert _copies(tmp_path) == []


def test_processes_of_a_node_share_a_copy_and_survive_its_removal(remote, tmp_path):
    dataset = open_dataset(remote)
    split = dataset.split("train")
    first, second = (ShardCache(dataset.storage, capacity=2, folder=tmp_path) for _ in range(2))
    mine = first.get(split.shards[0])
    before = mine.cached_file.stat()
    theirs = second.get(split.shards[0])
    assert theirs.cached_file.stat() == before
    first.close()
    assert len(theirs.read(0, 512)) == 512
    second.close()


def test_a_shard_that_is_cut_short_on_the_way_leaves_no_copy(remote, tmp_path):
    dataset = open_dataset(remote)
    split = dataset.split("train")
    dataset.storage.put_bytes(tar_path("train-000001"), b"half")
    reader = SampleReader(dataset, split, cache_folder=tmp_path)
    with pytest.raises(UserError, match="train-000001.tar is half-written"):
        reader.read(1, 0)
    assert _copies(tmp_path) == []


def test_a_missing_remote_shard_is_named(remote, tmp_path):
    dataset = open_dataset(remote)
    split = dataset.split("train")
    dataset.storage.delete(tar_path("train-000001"))
    with pytest.raises(UserError, match="train-000001.tar is missing"):
        SampleReader(dataset, split, cache_folder=tmp_path).read(1, 0)
    with pytest.raises(UserError, match="1 of 3 shards"):
        dataset.split("train")


def test_a_run_trains_from_an_object_store(remote, intact, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    local, far = make_config(intact.path), make_config(remote)
    with TrainLoader(local, open_dataset(str(intact.path))) as near, TrainLoader(far, open_dataset(remote)) as distant:
        for _ in range(3):
            assert (next(near).image == next(distant).image).all()
    assert not any(path.suffix == ".tar" for path in tmp_path.rglob("*"))
    shutil.rmtree(tmp_path, ignore_errors=True)
