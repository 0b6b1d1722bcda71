"""Storage: whole objects or none, on a local folder and on an S3 server."""

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.storage import LocalStorage, ObjectStorage, Storage, open_storage


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "set")
    return open_storage(f"{request.getfixturevalue('s3_url')}/{tmp_path.name}")


def test_what_is_put_is_read_whole_and_in_ranges(storage: Storage) -> None:
    storage.put_bytes("shards/a.tar", b"0123456789")
    assert storage.read_bytes("shards/a.tar") == b"0123456789"
    assert storage.read_range("shards/a.tar", 3, 4) == b"3456"
    assert storage.read_range("shards/a.tar", 8, 10) == b"89"
    assert storage.read_range("shards/a.tar", 2, 0) == b""
    assert storage.size("shards/a.tar") == 10
    assert storage.exists("shards/a.tar")
    assert not storage.exists("shards/b.tar")
    assert not storage.exists("shards")


def test_listing_is_sorted_by_prefix_and_sees_new_objects(storage: Storage) -> None:
    assert storage.list() == []
    for path in ("shards/b", "shards/a", "other/c", "top"):
        storage.put_bytes(path, b"x")
    assert storage.list() == ["other/c", "shards/a", "shards/b", "top"]
    assert storage.list("shards/") == ["shards/a", "shards/b"]
    assert storage.list("shards/b") == ["shards/b"]
    storage.delete("shards/a")
    storage.delete("shards/a")
    assert storage.list("shards/") == ["shards/b"]


def test_put_replaces(storage: Storage) -> None:
    storage.put_bytes("a", b"old, and longer")
    storage.put_bytes("a", b"new")
    assert storage.read_bytes("a") == b"new"


@pytest.mark.parametrize("move", [False, True])
def test_put_file_publishes_a_local_file(storage: Storage, move: bool) -> None:
    local = storage.scratch() / "built"
    local.write_bytes(b"content")
    storage.put_file(local, "shards/a", move=move)
    assert storage.read_bytes("shards/a") == b"content"
    assert local.exists() is not move
    local.unlink(missing_ok=True)


def test_missing_objects_raise_file_not_found(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nothing")
    with pytest.raises(FileNotFoundError):
        storage.read_range("nothing", 0, 1)


def test_storage_survives_pickling(storage: Storage) -> None:
    storage.put_bytes("a", b"x")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"x"


def test_paths_cannot_leave_the_storage(storage: Storage) -> None:
    for path in ("../a", "/etc/passwd", "a/../../b", ""):
        with pytest.raises(ValueError, match="not a relative path"):
            storage.put_bytes(path, b"x")


def test_local_unfinished_files_are_never_listed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (storage.scratch() / "half.tar").write_bytes(b"half")
    storage.put_bytes("a", b"x")
    assert storage.list() == ["a"]
    storage.clear_scratch()
    assert os.listdir(tmp_path) == ["a"]


def test_an_unknown_scheme_is_a_user_error() -> None:
    with pytest.raises(UserError, match="cannot open nowhere://"):
        ObjectStorage("nowhere://x").exists("a")


def test_a_store_that_refuses_is_a_user_error(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such bucket"):
        open_storage("s3://never-made/set").put_bytes("a", b"x")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for use in (lambda storage: storage.list(), lambda storage: storage.read_bytes("a"), lambda storage: storage.put_bytes("a", b"x")):
        with pytest.raises(UserError, match=r"cannot use .*\n  got: Unable to locate credentials"):
            use(open_storage(s3_url))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_user_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        LocalStorage(tmp_path).put_bytes("a", b"x")


def test_an_output_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        LocalStorage(tmp_path / "file").put_bytes("a", b"x")


def test_a_full_disk_leaves_the_old_object_and_says_so(tmp_path: Path) -> None:
    """The kernel's own limit on file sizes stands in for the end of the disk: write(2) fails in the middle of the file."""
    script = textwrap.dedent(
        """
        import resource, sys
        from configs.errors import UserError
        from data_prep.storage import LocalStorage
        storage = LocalStorage(sys.argv[1])
        storage.put_bytes("a", b"old")
        source = storage.root / "source"
        source.write_bytes(bytes(1 << 20))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        for put in (lambda: storage.put_bytes("a", bytes(1 << 20)), lambda: storage.put_file(source, "a")):
            try:
                put()
            except UserError as error:
                print(error)
            else:
                sys.exit(3)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("file size limit reached") == 2
    assert (tmp_path / "a").read_bytes() == b"old"
    assert list((tmp_path / ".tmp").iterdir()) == []
