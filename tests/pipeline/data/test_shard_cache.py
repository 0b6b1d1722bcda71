"""Shards of an object store are copied whole, once per node, atomically, and bounded in number. Against a real S3 server on loopback."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import wait

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


@pytest.fixture
def reads(remote, monkeypatch) -> list[str]:
    """Grows with the path of every range read of the object store."""
    kind = type(open_storage(remote))
    original, found = kind.read_range, []

    def counted(self, path, offset, size):
        found.append(path)
        return original(self, path, offset, size)

    monkeypatch.setattr(kind, "read_range", counted)
    return found


def test_shards_that_are_wanted_arrive_together_and_are_fetched_once(remote, monkeypatch, tmp_path):
    dataset = open_dataset(remote)
    shards, kind = dataset.split("train").shards, type(dataset.storage)
    meeting, original = threading.Barrier(3, timeout=60), kind.read_range
    paths = []

    def met(self, path, offset, size):
        paths.append(path)
        meeting.wait()  # breaks unless three shards are on their way at once
        return original(self, path, offset, size)

    monkeypatch.setattr(kind, "read_range", met)
    cache = ShardCache(dataset.storage, capacity=3, folder=tmp_path)
    cache.prefetch(shards)
    cache.prefetch(shards)
    for shard in shards:
        assert cache.get(shard).info == shard
    assert sorted(paths) == [tar_path(shard.name) for shard in shards]
    cache.close()
    assert _copies(tmp_path) == []


def test_no_more_shards_are_open_or_on_their_way_than_allowed(remote, tmp_path, reads):
    split = open_dataset(remote).split("train")
    cache = ShardCache(open_storage(remote), capacity=2, folder=tmp_path)
    for start in (0, 1, 2, 0, 2):
        wanted = [split.shards[(start + step) % 3] for step in range(3)]
        cache.prefetch(wanted)
        assert len(cache._open) + len(cache._coming) <= 2
        cache.get(wanted[0])
        cache.get(wanted[1])
        assert len(_copies(tmp_path)) <= 2
    before = len(reads)
    cache.prefetch([split.shards[0], split.shards[2]])
    cache.get(split.shards[1])  # neither wanted nor there: one of the others has to go
    assert len(cache._open) + len(cache._coming) <= 2
    assert len(reads) > before
    cache.close()
    assert _copies(tmp_path) == []


def test_wanted_shards_are_kept_before_those_used_later(remote, tmp_path, reads):
    split = open_dataset(remote).split("train")
    cache = ShardCache(open_storage(remote), capacity=2, folder=tmp_path)
    first, second, third = split.shards
    cache.get(first)
    cache.get(second)
    cache.prefetch([first, third])
    cache.get(third)
    cache.get(first)
    assert [path for path in reads if path == tar_path(first.name)] == [tar_path(first.name)]
    cache.close()


def test_a_shard_that_did_not_arrive_is_tried_again_when_it_is_used(remote, tmp_path, monkeypatch):
    dataset = open_dataset(remote)
    shards, kind = dataset.split("train").shards, type(dataset.storage)
    original, failures = kind.read_range, [OSError("the network is away")]

    def shaky(self, path, offset, size):
        if failures:
            raise failures.pop()
        return original(self, path, offset, size)

    monkeypatch.setattr(kind, "read_range", shaky)
    cache = ShardCache(dataset.storage, capacity=2, folder=tmp_path)
    cache.prefetch(shards[:1])
    wait(cache._coming.values(), timeout=60)
    assert not failures
    assert len(cache.get(shards[0]).read(0, 512)) == 512
    dataset.storage.delete(tar_path(shards[1].name))
    cache.prefetch(shards[:2])
    with pytest.raises(UserError, match="train-000001.tar is missing"):
        cache.get(shards[1])
    cache.close()


def test_closing_does_not_wait_for_what_has_not_begun_and_leaves_nothing(remote, tmp_path, monkeypatch):
    dataset = open_dataset(remote)
    shards, kind = dataset.split("train").shards, type(dataset.storage)
    original, held, begun = kind.read_range, threading.Event(), threading.Event()

    def slow(self, path, offset, size):
        begun.set()
        held.wait(60)
        return original(self, path, offset, size)

    monkeypatch.setattr(kind, "read_range", slow)
    cache = ShardCache(dataset.storage, capacity=3, folder=tmp_path)
    cache.prefetch(shards)
    assert begun.wait(60)
    closing = threading.Thread(target=cache.close)
    closing.start()
    held.set()
    closing.join(60)
    assert not closing.is_alive()
    assert _copies(tmp_path) == []
    assert not any(thread.name.startswith("jetway-fetch") for thread in threading.enumerate())


def test_a_shard_is_fetched_once_per_node_also_when_all_want_it_at_once(remote, tmp_path, reads):
    split = open_dataset(remote).split("train")
    caches = [ShardCache(open_storage(remote), capacity=3, folder=tmp_path) for _ in range(4)]
    for cache in caches:
        cache.prefetch(split.shards)
    for cache in caches:
        for shard in split.shards:
            cache.get(shard)
    assert sorted(reads) == [tar_path(shard.name) for shard in split.shards]
    for cache in caches:
        cache.close()


def test_a_shard_that_another_process_fetches_is_waited_for(remote, tmp_path, reads):
    """The lock of a process that dies is let go of, and the next one fetches."""
    split = open_dataset(remote).split("train")
    lock = tmp_path / f"lock-{int(split.shards[0].sha256[:8], 16) % 64:02d}"
    program = f"import fcntl, sys\nfile = open({str(lock)!r}, 'wb')\nfcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    cache = ShardCache(open_storage(remote), capacity=3, folder=tmp_path)
    cache.prefetch(split.shards[:1])
    done, _ = wait(cache._coming.values(), timeout=0.3)
    assert not done
    assert not reads
    other.kill()
    other.wait()
    assert len(cache.get(split.shards[0]).read(0, 512)) == 512
    cache.close()


def test_a_run_has_the_next_window_fetched_while_it_uses_this_one(remote, make_config, tmp_path, monkeypatch, reads):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = make_config(remote, shuffle_window_shards=1, global_batch_size=1, num_prefetch=0)
    with TrainLoader(config, open_dataset(remote), cache_bytes=0) as loader:
        next(loader)
        coming = loader._source.reader._cache._coming
        (ahead,) = coming
        wait(list(coming.values()), timeout=60)
        used = next(name.shard for name in loader.which_samples(0))
        assert sorted(reads) == sorted([tar_path(used), tar_path(ahead)])
        step = next(step for step in range(21) if loader.which_samples(step)[0].shard != used)
        assert loader.which_samples(step)[0].shard == ahead
        loader.seek(step)
        next(loader)
        assert reads.count(tar_path(ahead)) == 1


def test_a_split_that_is_kept_in_memory_is_not_fetched_again(remote, make_config, tmp_path, monkeypatch, reads):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = make_config(remote, shuffle_window_shards=1, global_batch_size=21, num_prefetch=0)
    with TrainLoader(config, open_dataset(remote)) as loader:
        for _ in range(2):
            next(loader)
        wait(list(loader._source.reader._cache._coming.values()), timeout=60)
        before = len(reads)
        for _ in range(3):
            next(loader)
        assert len(reads) == before
