"""Storage: whole objects or none, on a local folder and on an S3 server, by either client."""

import errno
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from data_prep.storage import LocalStorage, ObjectStorage, Storage, open_storage
from data_prep.stores.clients import FsspecClient
from data_prep.stores.s3 import S3Client
from tests.data_prep.s3_proxy import S3Proxy, own_authority, s3_proxy, times

MIB = 2**20

needs_obstore = pytest.mark.skipif(sys.version_info < (3, 11), reason="there is no obstore for this Python that is new enough")


@pytest.fixture(params=["local", "obstore", "s3fs", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "set")
    if request.param == "memory":
        return open_storage(f"memory://{tmp_path.name}")
    url = f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    return ObjectStorage(url, use_obstore=request.param == "obstore")


@pytest.fixture(params=["obstore", "s3fs"])
def faulty(request: pytest.FixtureRequest, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectStorage, S3Proxy]]:
    """A storage with parts of 5 MiB, and the proxy through which it reaches the S3 server."""
    with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield ObjectStorage(f"{s3_url}/{tmp_path.name}", part_bytes=5 * MIB, use_obstore=request.param == "obstore"), proxy


def unfinished_uploads(prefix: str) -> list[str]:
    import boto3

    return [upload["Key"] for upload in boto3.client("s3").list_multipart_uploads(Bucket="bucket", Prefix=prefix).get("Uploads", [])]


def test_what_is_put_is_read_whole_and_in_ranges(storage: Storage) -> None:
    storage.put_bytes("shards/a.tar", b"0123456789")
    assert storage.read_bytes("shards/a.tar") == b"0123456789"
    assert storage.read_range("shards/a.tar", 3, 4) == b"3456"
    assert storage.read_range("shards/a.tar", 8, 10) == b"89"
    assert storage.read_range("shards/a.tar", 50, 10) == b""
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


def test_many_are_deleted_at_once(storage: Storage) -> None:
    for number in range(5):
        storage.put_bytes(f"parts/{number}", b"x")
    storage.delete_many(f"parts/{number}" for number in (0, 2, 3, 7))
    storage.delete_many([])
    assert storage.list() == ["parts/1", "parts/4"]


def test_unusual_names_are_kept(storage: Storage) -> None:
    names = ["a b", "a+b", "50%", "50%25", "ü/é", "a#b?c&d=e", "~x"]
    for name in names:
        storage.put_bytes(name, name.encode())
    assert storage.list() == sorted(names)
    assert [storage.read_bytes(name).decode() for name in names] == names


def test_the_stamp_tells_one_version_from_the_next(storage: Storage) -> None:
    stamps = []
    for data in (b"one", b"two"):
        storage.put_bytes("a", data)
        stamps += [storage.stamp("a"), storage.stamp("a")]
    assert stamps[0] == stamps[1] != stamps[2] == stamps[3]
    assert stamps[0].startswith("3-")
    with pytest.raises(FileNotFoundError):
        storage.stamp("b")


@pytest.mark.parametrize("use_obstore", [True, False])
def test_keys_that_are_no_paths_do_not_spoil_a_listing(s3_url: str, tmp_path: Path, use_obstore: bool, caplog: pytest.LogCaptureFixture) -> None:
    import boto3

    client, keys = boto3.client("s3"), ("a.jpg", "a//b.jpg", "folder/", "c/../d.jpg", "e/./f.jpg", "tab\tg.jpg", "z.jpg")
    for key in keys:
        client.put_object(Bucket="bucket", Key=f"some/set/{tmp_path.name}/{key}", Body=key.encode())
    storage = ObjectStorage(f"{s3_url}/{tmp_path.name}", use_obstore=use_obstore)
    assert storage.list() == ["a.jpg", "z.jpg"]
    assert "4 keys below" in caplog.text


def test_only_the_first_put_new_counts(storage: Storage) -> None:
    assert storage.put_new("leases/1", b"first") is True
    assert storage.put_new("leases/1", b"second") is False
    assert storage.read_bytes("leases/1") == b"first"
    storage.delete("leases/1")
    assert storage.put_new("leases/1", b"third") is True
    assert storage.list() == ["leases/1"]


@pytest.mark.parametrize("kind", ["local", "obstore", "s3fs"])
def test_of_many_writers_at_once_one_wins(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def writer(number: int) -> Storage:
        if kind == "local":
            return LocalStorage(tmp_path / "set")
        return ObjectStorage(f"{request.getfixturevalue('s3_url')}/{tmp_path.name}", use_obstore=kind == "obstore")

    writers = [writer(number) for number in range(8)]
    with ThreadPoolExecutor(len(writers)) as pool:
        for turn in range(5):
            won = list(pool.map(lambda number, path=f"turn/{turn}": writers[number].put_new(path, b"%d" % number), range(len(writers))))
            assert won.count(True) == 1
            assert writers[0].read_bytes(f"turn/{turn}") == b"%d" % won.index(True)


@needs_obstore
def test_put_new_whose_reply_is_lost_knows_its_own_object(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage = ObjectStorage(f"{s3_url}/{tmp_path.name}")
        for data, expected in ((b"mine", True), (b"other", False)):
            proxy.hook = times(1, "lose_reply", lambda method, path, query: method == "PUT")
            assert storage.put_new("a", data) is expected
        assert storage.read_bytes("a") == b"mine"


def test_put_new_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    storage = LocalStorage(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: storage.put_new("a", b"%d" % number), range(8)))
    assert won.count(True) == 1
    assert storage.read_bytes("a") == b"%d" % won.index(True)


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


def large_file(folder: Path) -> Path:
    path = folder / "large"
    path.write_bytes(bytes(range(256)) * (12 * MIB // 256))
    return path


@pytest.mark.parametrize("how", ["file", "bytes"])
def test_a_failed_part_leaves_neither_object_nor_upload(faulty: tuple[ObjectStorage, S3Proxy], tmp_path: Path, how: str) -> None:
    storage, proxy = faulty
    local = large_file(tmp_path)

    def put() -> None:
        if how == "file":
            storage.put_file(local, "shards/a.tar")
        else:
            storage.put_bytes("shards/a.tar", local.read_bytes())

    proxy.hook = times(1000, (400, "InvalidRequest"), lambda method, path, query: query.get("partNumber") == "2")
    with pytest.raises(UserError, match="cannot use s3://"):
        put()
    assert storage.list() == []
    assert unfinished_uploads(f"some/set/{tmp_path.name}") == []
    proxy.hook = times(0, "pass", lambda *_: False)
    put()
    assert storage.read_bytes("shards/a.tar") == local.read_bytes()
    assert unfinished_uploads(f"some/set/{tmp_path.name}") == []


@pytest.mark.parametrize(
    ("faulty", "verdict"),
    [("obstore", (503, "SlowDown")), ("obstore", (500, "InternalError")), ("obstore", "reset"), ("s3fs", (503, "SlowDown")), ("s3fs", "reset")],
    indirect=["faulty"],
    ids=str,
)
def test_what_can_heal_is_tried_again(faulty: tuple[ObjectStorage, S3Proxy], tmp_path: Path, verdict: Any) -> None:
    storage, proxy = faulty
    local = large_file(tmp_path)
    uses = {
        "put": lambda: storage.put_bytes("a", b"small"),
        "put_new": lambda: storage.put_new("b", b"small"),
        "put_file": lambda: storage.put_file(local, "large"),
        "read": lambda: storage.read_bytes("large"),
        "list": storage.list,
        "delete": lambda: storage.delete("a"),
    }
    for name, use in uses.items():
        proxy.hook = times(1, verdict, lambda method, path, query: method != "HEAD" and query.get("partNumber", "2") == "2")
        proxy.seen.clear()
        use()
        assert len(proxy.seen) >= 2, f"{name} met no fault"
    assert storage.list() == ["b", "large"]
    assert storage.read_bytes("large") == local.read_bytes()


def test_what_a_killed_upload_left_is_cleared(s3_url: str, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3")
    mine, other = f"some/set/{tmp_path.name}", f"some/set/{tmp_path.name}-other"
    uploads = {
        key: client.create_multipart_upload(Bucket="bucket", Key=key)["UploadId"] for key in (f"{mine}/shards/a.tar", f"{mine}/b", f"{other}/c")
    }
    storage = open_storage(f"{s3_url}/{tmp_path.name}")
    storage.put_bytes("kept", b"x")
    storage.clear_scratch()
    assert unfinished_uploads(mine) == [f"{other}/c"]
    assert storage.list() == ["kept"]
    client.abort_multipart_upload(Bucket="bucket", Key=f"{other}/c", UploadId=uploads[f"{other}/c"])


@needs_obstore
def test_s3_goes_through_obstore_unless_only_s3fs_understands_the_settings(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def client() -> object:
        return ObjectStorage(s3_url).client

    assert isinstance(client(), S3Client)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_DEFAULT_REGION")
        assert isinstance(client(), S3Client), "an endpoint of one's own needs no region"
        patch.delenv("AWS_ENDPOINT_URL")
        assert isinstance(client(), FsspecClient), "s3fs finds out the region of a bucket"
    (tmp_path / "config").write_text("[profile mine]\nregion = eu-central-1\n[profile odd]\nregion = eu-central-1\ns3 =\n  addressing_style = path\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for profile, kind in (("mine", S3Client), ("odd", FsspecClient)):
        monkeypatch.setenv("AWS_PROFILE", profile)
        assert isinstance(client(), kind)
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(UserError, match="profile"):
        ObjectStorage(s3_url).list()


@pytest.mark.parametrize("use_obstore", [True, False])
def test_a_store_with_its_own_authority(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_obstore: bool) -> None:
    authority, tls = own_authority(tmp_path)
    with s3_proxy(os.environ["AWS_ENDPOINT_URL"], tls) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        storage = ObjectStorage(f"{s3_url}/{tmp_path.name}", use_obstore=use_obstore)
        storage.put_bytes("a", b"x")
        assert storage.read_bytes("a") == b"x"
        assert proxy.seen


def _read_in_child(storage: Storage, result: Any) -> None:
    result.put(storage.read_bytes("a"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_read(s3_url: str, tmp_path: Path) -> None:
    """The threads of obstore do not survive a fork; a request of the child would wait for them forever."""
    storage = ObjectStorage(f"{s3_url}/{tmp_path.name}")
    storage.put_bytes("a", b"x")
    context = multiprocessing.get_context("fork")
    result = context.Queue()
    child = context.Process(target=_read_in_child, args=(storage, result))
    child.start()
    try:
        assert result.get(timeout=60) == b"x"
    finally:
        child.kill()
        child.join()


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


def test_empty_folders_go_and_others_stay(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put_bytes("parts/a/b/x", b"")
    storage.put_bytes("parts/c/y", b"")
    storage.delete("parts/a/b/x")
    storage.remove_empty("parts/")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted((tmp_path / "parts").rglob("*"))] == ["parts/c", "parts/c/y"]
    storage.delete("parts/c/y")
    storage.remove_empty("parts/")
    assert not (tmp_path / "parts").exists()
