"""What a path or an address stands for, here and on an object store."""

from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.inputs import file_kind, list_inputs, open_input
from data_prep.storage import open_storage


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.csv", "table"),
        ("a.TSV.gz", "table"),
        ("a.jsonl.gz", "table"),
        ("a.parquet", "table"),
        ("a.tar", "tar"),
        ("a.tar.gz", None),
        ("a.parquet.gz", None),
    ],
)
def test_the_name_tells_the_reader(name: str, kind: str | None) -> None:
    assert file_kind(name) == kind


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="decompress"):
        list_inputs(str(tmp_path / "a.tar.gz"))


def test_an_object_store_is_listed_like_a_folder(s3_url: str) -> None:
    store = open_storage(f"{s3_url}/inputs")
    for name in ("lists/b.parquet", "lists/a.csv.gz", "lists/_SUCCESS", "lists/.hidden.csv", "photos/x/1.jpg", "photos/0.png", "photos/0.txt"):
        store.put_bytes(name, b"content")
    root = f"{s3_url}/inputs"
    assert list_inputs(f"{root}/lists") == [("table", f"{root}/lists/a.csv.gz"), ("table", f"{root}/lists/b.parquet")]
    assert list_inputs(f"{root}/lists/") == list_inputs(f"{root}/lists")
    assert list_inputs(f"{root}/lists/b.parquet") == [("table", f"{root}/lists/b.parquet")]
    assert list_inputs(f"{root}/photos") == [("folder", f"{root}/photos")]
    for missing in ("nothing", "lists/c.csv"):
        with pytest.raises(UserError, match="does not exist"):
            list_inputs(f"{root}/{missing}")
    with pytest.raises(UserError, match="no known kind"):
        list_inputs(f"{root}/lists/_SUCCESS")


def test_a_remote_file_reads_and_seeks_like_a_local_one(tmp_path: Path, s3_url: str) -> None:
    data = bytes(range(256)) * 20_000
    open_storage(f"{s3_url}/files").put_bytes("a.bin", data)
    (tmp_path / "a.bin").write_bytes(data)
    for path in (f"{s3_url}/files/a.bin", str(tmp_path / "a.bin")):
        with open_input(path) as file:
            assert file.read(10) == data[:10]
            assert file.seek(-7, 2) == len(data) - 7
            assert file.read() == data[-7:]
            file.seek(3_000_001)
            assert file.read(300) == data[3_000_001:3_000_301]
