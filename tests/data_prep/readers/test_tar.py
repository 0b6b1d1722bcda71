"""WebDataset tars of any dialect: grouped by key, read from any slice, cut-off ones used as far as they go."""

import gzip
import io
import logging
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.config import PrepConfig
from data_prep.readers.base import RawSample
from data_prep.readers.tar import TarReader
from data_prep.storage import open_storage


def write_tar(path: Path, members: list[tuple[str, bytes]], dialect: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=dialect) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5 if dialect == tarfile.PAX_FORMAT else 1  # type: ignore[assignment]
            archive.addfile(member, io.BytesIO(content))
    return path


def usual(count: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(count):
        members += [(f"dir.x/{number:04d}.jpg", b"image %d" % number * 90), (f"dir.x/{number:04d}.txt", b"caption %d" % number)]
        members += [(f"dir.x/{number:04d}.json", b'{"label": %d, "url": "u"}' % number)]
    return members


def read_all(path: Path, size: int = 3) -> list[RawSample]:
    reader, config = TarReader(), PrepConfig(samples_per_shard=size)
    return [sample for part in reader.plan(str(path), config) for sample in reader.read(part, config)]


@pytest.mark.parametrize("dialect", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_samples_are_the_same_in_slices_of_any_size(tmp_path: Path, dialect: int, size: int) -> None:
    samples = read_all(write_tar(tmp_path / "a.tar", usual(8), dialect), size)
    assert [sample.source for sample in samples] == [f"a.tar/dir.x/{i:04d}" for i in range(8)]
    assert [sample.caption for sample in samples] == [f"caption {i}" for i in range(8)]
    assert [sample.label for sample in samples] == list(range(8))
    assert samples[5].image == b"image 5" * 90
    assert samples[5].extra == {"url": "u"}


def test_class_files_unknown_members_and_missing_images(tmp_path: Path) -> None:
    members = [("a.cls", b"7"), ("a.seg.png", b"mask"), ("a.png", b"i"), ("b.txt", b"no image"), ("__meta__.json", b"{}"), ("README", b"")]
    first, second = read_all(write_tar(tmp_path / "a.tar", members))
    assert (first.image, first.label) == (b"i", 7)
    assert second.problem is not None
    assert second.problem.reason == "missing_file"


def test_a_cut_off_tar_is_used_as_far_as_it_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", usual(8), tarfile.USTAR_FORMAT)
    path.write_bytes(path.read_bytes()[: 4096 * 4 + 700])
    with caplog.at_level(logging.WARNING):
        samples = read_all(path)
    assert "is cut off" in caplog.text
    assert [sample.problem for sample in samples[:-1]] == [None] * (len(samples) - 1)
    assert 4 <= len(samples) < 8


def test_compressed_and_foreign_files_are_refused(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", usual(2))
    (tmp_path / "gz.tar").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "text.tar").write_text("hello" * 300)
    for name in ("gz.tar", "text.tar"):
        with pytest.raises(UserError, match=f"{name} is not"):
            read_all(tmp_path / name)


def test_chosen_samples_keep_their_numbers(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", usual(8))
    part = list(TarReader().plan(str(path), PrepConfig(samples_per_shard=5)))[1]
    samples = list(TarReader().read(replace(part, rows=(0, 2)), PrepConfig()))
    assert [(sample.number, sample.caption) for sample in samples] == [(0, "caption 5"), (2, "caption 7")]


def test_tars_on_an_object_store_read_like_local_ones(tmp_path: Path, s3_url: str) -> None:
    path = write_tar(tmp_path / "a.tar", usual(8))
    open_storage(f"{s3_url}/tars").put_bytes("a.tar", path.read_bytes())
    config = PrepConfig(samples_per_shard=3)
    remote = [sample for part in TarReader().plan(f"{s3_url}/tars/a.tar", config) for sample in TarReader().read(part, config)]
    assert remote == read_all(path, 3)
