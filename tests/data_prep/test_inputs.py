"""What a path or an address stands for, here and on an object store."""

import os
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_prep import inputs
from data_prep.inputs import RemoteFile, file_kind, input_fingerprint, input_size, list_inputs, open_input
from data_prep.storage import open_storage
from tests.data_prep.s3_proxy import s3_proxy


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


def test_a_remote_file_reads_and_seeks_like_a_local_one(tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "FIRST_READ", 3000)
    monkeypatch.setattr(inputs, "LARGEST_READ", 40_000)
    data = np.random.default_rng(0).bytes(700_001)
    open_storage(f"{s3_url}/files").put_bytes("a.bin", data)
    (tmp_path / "a.bin").write_bytes(data)
    steps = np.random.default_rng(1)
    with open_input(f"{s3_url}/files/a.bin") as remote, open_input(str(tmp_path / "a.bin")) as local:
        for step in range(300):
            if step % 7 == 0:
                offset, whence = int(steps.integers(0, 700_010)), 0
            else:
                offset, whence = int(steps.integers(0, 5000)), 1  # mostly onwards, as readers go
            size = int(steps.integers(0, 20_000))
            assert remote.seek(offset, whence) == local.seek(offset, whence)
            assert remote.read(size) == local.read(size)
        assert remote.seek(-7, 2) == len(data) - 7
        assert remote.read() == data[-7:]
        assert remote.read(1) == b""


def test_a_remote_file_read_in_order_is_fetched_once_in_ever_larger_pieces(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(30 * 2**20)
    open_storage(f"{s3_url}/files").put_bytes("long.bin", data)
    with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with open_input(f"{s3_url}/files/long.bin") as file:
            while file.read(100_000):
                pass
        assert proxy.num_bytes == len(data)
        assert sum(method == "GET" for method, _, _ in proxy.seen) <= 7


def test_a_remote_file_that_could_not_be_opened_can_be_closed() -> None:
    """As Python 3.13 does, and complains where it fails."""

    class Gone:
        def size(self, path: str) -> int:
            raise FileNotFoundError(path)

    file = RemoteFile.__new__(RemoteFile)
    with pytest.raises(FileNotFoundError):
        file.__init__(Gone(), "a.csv")  # type: ignore[misc, arg-type]
    file.close()
    assert file.closed


def test_size_and_fingerprint_here_and_on_an_object_store(tmp_path: Path, s3_url: str) -> None:
    for place in (str(tmp_path), f"{s3_url}/sizes"):
        fingerprints = []
        for data in (b"one", b"two"):
            open_storage(place).put_bytes("a.csv", data)
            assert input_size(f"{place}/a.csv") == 3
            fingerprints += [input_fingerprint(f"{place}/a.csv"), input_fingerprint(f"{place}/a.csv")]
        assert fingerprints[0] == fingerprints[1] != fingerprints[2] == fingerprints[3]
        for ask in (input_size, input_fingerprint, open_input):
            with pytest.raises(FileNotFoundError):
                ask(f"{place}/b.csv")
