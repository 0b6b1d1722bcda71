"""One writer per data set: a second one is refused, a dead one is outlived, a replaced one stops before it publishes."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.lease import only_writer
from data_prep.storage import LocalStorage, Storage, open_storage

HOLD = textwrap.dedent(
    """
    import sys
    from configs.errors import UserError
    from data_prep.lease import only_writer
    from data_prep.storage import open_storage
    with only_writer(open_storage(sys.argv[1]), expiry_s=float(sys.argv[2])) as lease:
        print("held", flush=True)
        sys.stdin.readline()
        try:
            lease.check()
        except UserError as error:
            print(error.what, flush=True)
        else:
            print("still held", flush=True)
    """
)

Hold = Callable[[str, float], "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that holds the lease until it is told to go on; ends all of them afterwards."""
    started = []

    def start(url: str, expiry_s: float) -> "subprocess.Popen[str]":
        process = subprocess.Popen([sys.executable, "-c", HOLD, url, str(expiry_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ask(process: "subprocess.Popen[str]") -> str:
    """What the process says of its lease."""
    said, _ = process.communicate("go on\n", timeout=60)
    return said


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "set") if request.param == "local" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"


def take(storage: Storage, expiry_s: float = 3.0) -> bool:
    try:
        with only_writer(storage, expiry_s=expiry_s) as lease:
            lease.check()
            return True
    except UserError:
        return False


def test_the_lease_leaves_nothing_behind(url: str) -> None:
    storage = open_storage(url)
    for _ in range(2):
        with only_writer(storage) as lease:
            lease.check()
        assert storage.list() == []


def test_a_second_run_is_told_who_writes(url: str, hold: Hold) -> None:
    holder = hold(url, 3.0)
    with pytest.raises(UserError, match=rf"another run is writing[\s\S]*process {holder.pid}"), only_writer(open_storage(url), expiry_s=3.0):
        pass
    assert ask(holder) == "still held\n"
    assert take(open_storage(url))


def test_a_killed_run_on_this_machine_is_replaced_at_once(url: str, hold: Hold) -> None:
    holder = hold(url, 1000.0)
    holder.kill()
    holder.wait()
    assert take(open_storage(url), expiry_s=1000.0)
    assert open_storage(url).list() == []


def test_a_run_that_was_suspended_and_replaced_stops(s3_url: str, tmp_path: Path, hold: Hold) -> None:
    url = f"{s3_url}/{tmp_path.name}"
    first = hold(url, 1.0)
    first.send_signal(signal.SIGSTOP)
    second = hold(url, 1.0)
    first.send_signal(signal.SIGCONT)
    assert "has lost its right to write" in ask(first)
    assert ask(second) == "still held\n"
    assert open_storage(url).list() == []


def test_a_silent_run_elsewhere_is_outlived_and_said_once(s3_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = open_storage(f"{s3_url}/{tmp_path.name}")
    other = {"host": "far", "pid": os.getpid(), "since": "2020-01-01T00:00:00+00:00", "machine": "another", "started": "1", "id": "ab"}
    storage.put_bytes("leases/000041.json", json.dumps(other).encode())
    storage.put_bytes("leases/000041.ab.beat", b"7")
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), only_writer(storage, expiry_s=1.0) as lease:
        lease.check()
        assert [path for path in storage.list() if path.endswith(".json")] == ["leases/000042.json"]
    assert time.monotonic() - began > 1.0, "it must be watched for the whole period"
    assert [record.getMessage() for record in caplog.records if record.name == "data_prep.lease"] == [
        f"waiting 1 s to see whether the run on host far, process {os.getpid()}, since 2020-01-01T00:00:00+00:00 that writes {storage.url} lives"
    ]
    assert storage.list() == []


def test_the_heartbeat_keeps_the_lease(s3_url: str, tmp_path: Path) -> None:
    storage = open_storage(f"{s3_url}/{tmp_path.name}")
    with only_writer(storage, expiry_s=1.0) as lease:
        for _ in range(2):
            assert not take(open_storage(storage.url), expiry_s=1.0)
        lease.check()


def test_of_many_runs_at_once_one_writes(s3_url: str, tmp_path: Path) -> None:
    """All see the same dead lease, wait for it, and go for the next number together."""
    url = f"{s3_url}/{tmp_path.name}"
    other = {"host": "far", "pid": 1, "since": "2020-01-01T00:00:00+00:00", "machine": "another", "started": "1", "id": "ab"}
    open_storage(url).put_bytes("leases/000001.json", json.dumps(other).encode())
    refused = threading.Semaphore(0)

    def run(number: int) -> bool:
        try:
            with only_writer(open_storage(url), expiry_s=1.5) as lease:
                for _ in range(3):
                    assert refused.acquire(timeout=60)
                lease.check()
                return True
        except UserError as error:
            refused.release()
            return "another run is writing" not in str(error)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(run, range(4))) == [False, False, False, True]


def test_a_lease_object_that_vanished_is_a_lost_lease(s3_url: str, tmp_path: Path) -> None:
    storage = open_storage(f"{s3_url}/{tmp_path.name}")
    with only_writer(storage) as lease:
        storage.delete_many(storage.list("leases/"))
        with pytest.raises(UserError, match="lost its right"):
            lease.check()


def test_a_folder_that_was_replaced_is_a_lost_lease(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "set")
    with only_writer(storage) as lease:
        lease.check()
        shutil.rmtree(storage.root)
        for _ in range(2):
            with pytest.raises(UserError, match="deleted or replaced"):
                lease.check()
            storage.root.mkdir(exist_ok=True)


def test_a_file_system_without_locks_gets_lease_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    storage = LocalStorage(tmp_path / "set")
    with only_writer(storage, expiry_s=1.0) as lease:
        assert any(path.startswith("leases/000001") for path in storage.list())
        assert not take(LocalStorage(tmp_path / "set"), expiry_s=1.0)
        lease.check()
    assert os.listdir(storage.root) in ([], [".tmp"])
