"""Shards: byte for byte what Python's tarfile would write, and readable by GNU tar and webdataset."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_prep.schema import ShardIndex
from data_prep.shard_writer import Sample, ShardWriter, ustar_header
from data_prep.storage import open_storage


def make_samples(count: int = 5) -> list[Sample]:
    samples = []
    for number in range(count):
        image = np.random.default_rng(number).bytes(400 * number + 112)  # 112: a member of a whole block when number == 1
        digest = hashlib.sha256(image).digest()
        samples.append(Sample(key=f"{number:010d}", image=image, txt=b"x" * (512 * (number % 2)), json=b'{"n": %d}' % number, sha256=digest))
    return samples


def write(folder: Path, samples: list[Sample]) -> tuple[bytes, ShardIndex]:
    storage = open_storage(folder)
    with ShardWriter(folder / "building", "png") as writer:
        for sample in samples:
            writer.add(sample)
        info = writer.publish(storage, "train-000000")
    data = storage.read_bytes("shards/train-000000.tar")
    assert info.num_bytes == len(data)
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    assert info.num_samples == len(samples)
    return data, ShardIndex.load(storage, "train-000000", sha256=info.index_sha256)


def test_bytes_equal_those_of_tarfile(tmp_path: Path) -> None:
    samples = make_samples()
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            for extension, content in (("png", sample.image), ("txt", sample.txt), ("json", sample.json)):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert write(tmp_path, samples)[0] == expected.getvalue()


def test_index_finds_every_member_and_its_checksum(tmp_path: Path) -> None:
    samples = make_samples()
    data, index = write(tmp_path, samples)
    for row, sample in enumerate(samples):
        assert index.keys[row] == sample.key.encode()
        assert index.sha256[row].tobytes() == sample.sha256
        for column, content in enumerate((sample.image, sample.txt, sample.json)):
            offset, size = index.offsets[row, column], index.sizes[row, column]
            assert data[offset : offset + size] == content
            assert index.xxh3[row, column] == xxhash.xxh3_64_intdigest(content)


def test_gnu_tar_reads_it_without_complaint(tmp_path: Path) -> None:
    write(tmp_path, make_samples())
    done = subprocess.run(["tar", "tf", str(tmp_path / "shards" / "train-000000.tar")], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.split()[:4] == ["0000000000.png", "0000000000.txt", "0000000000.json", "0000000001.png"]


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    samples = make_samples()
    write(tmp_path, samples)
    found = list(webdataset.WebDataset(str(tmp_path / "shards" / "train-000000.tar"), shardshuffle=False))
    assert [item["__key__"] for item in found] == [sample.key for sample in samples]
    assert [item["png"] for item in found] == [sample.image for sample in samples]
    assert [json.loads(item["json"])["n"] for item in found] == list(range(len(samples)))


def test_a_failure_on_the_way_publishes_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)

    def build() -> None:
        with ShardWriter(tmp_path / "building", "png") as writer:
            writer.add(make_samples()[0])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        build()
    assert storage.list() == []


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "building", "png") as writer, pytest.raises(ValueError, match="empty"):
        writer.publish(open_storage(tmp_path), "train-000000")


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        ustar_header("k" * 101, 1)
    with pytest.raises(ValueError, match="does not fit"):
        ustar_header("k", 8**11)
