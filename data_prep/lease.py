"""One writer per data set: a lock on a local folder, numbered lease objects with a heartbeat on an object store.

On an object store the holder is whoever created the highest `leases/NUMBER.json`, which only one run can (put-if-absent). Its heartbeat
`leases/NUMBER.ID.beat` changes as long as it lives. A run that has watched it not change for a whole period, by its own clock,
creates the next number. Clocks of two machines are never compared. A holder that was suspended and replaced notices in `check`.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from configs.errors import UserError
from data_prep.storage import LocalStorage, Storage, writing

logger = logging.getLogger(__name__)

LEASES = "leases"
EXPIRY_S = 60.0
"""How long a heartbeat must stand still before its run counts as dead."""

_BEATS_PER_EXPIRY = 6
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Lease(Protocol):
    """The right to write a data set."""

    def check(self) -> None:
        """Call it right before publishing what must not be published twice.

        Raises:
            UserError: the lease was lost.
        """


def only_writer(storage: Storage, *, expiry_s: float = EXPIRY_S) -> AbstractContextManager[Lease]:
    """Holds the only right to write `storage` while the block runs. Locally it ends with the process, however that ends.

    On an object store a run that was killed leaves its lease to expire: the next one waits, at most `expiry_s`, with one line in the log.
    (No wait where it can see that the process is gone, because it ran on the same machine.)

    Raises:
        UserError: another run holds it, or the storage cannot be written.
    """
    return _folder_lock(storage, expiry_s) if isinstance(storage, LocalStorage) else _object_lease(storage, expiry_s)


@contextmanager
def _folder_lock(storage: LocalStorage, expiry_s: float) -> Iterator[Lease]:
    with writing(storage.url):
        storage.root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(storage.root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _lock_holder(os.fstat(descriptor).st_ino)
        os.close(descriptor)
        raise _busy(storage, f"process {holder} on this machine" if holder else None) from None
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _NO_LOCKS:
            raise
        with _object_lease(storage, expiry_s) as lease:  # a network file system without locks
            yield lease
        return
    try:
        yield _FolderLock(storage, descriptor)
    finally:
        os.close(descriptor)


class _FolderLock:
    """A lock on the folder itself: held as long as the descriptor is open."""

    def __init__(self, storage: LocalStorage, descriptor: int) -> None:
        self._storage = storage
        self._descriptor = descriptor

    def check(self) -> None:
        """See `Lease.check`: what we locked must still be what bears the name."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._storage.root), os.fstat(self._descriptor)):
                return
        raise UserError(
            f"{self._storage.url} was deleted or replaced while this run wrote it", fix="run the same command again: it starts from the beginning"
        )


def _lock_holder(inode: int) -> int | None:
    """Process that holds the lock on an inode, where the system says so (Linux, same process namespace)."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode) and int(fields[4]) > 0:
                return int(fields[4])
    return None


def _busy(storage: Storage, who: str | None) -> UserError:
    return UserError(f"another run is writing {storage.url}", got=who, fix="wait for it, or choose another output")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    """Who has a lease: the content of `leases/NUMBER.json`."""

    host: str
    pid: int
    since: str
    machine: str
    """Boot and process namespace: within one, a process number means one process."""
    started: str
    """When the process started, in ticks of its machine: tells it from a later one of the same number."""
    id: str

    @classmethod
    def me(cls) -> "_Holder":
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(host=socket.gethostname(), pid=pid, since=now, machine=_machine(), started=_started(pid), id=secrets.token_hex(8))

    @property
    def text(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"

    @property
    def is_known_to_be_gone(self) -> bool:
        """Whether we can see that the process has ended."""
        return bool(self.machine) and self.machine == _machine() and _started(self.pid) != self.started


def _machine() -> str:
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    """Start time of a process; empty if there is none."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] != "Z" else ""
    return ""


@contextmanager
def _object_lease(storage: Storage, expiry_s: float) -> Iterator[Lease]:
    lease = _ObjectLease(storage, expiry_s)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


class _ObjectLease:
    """One numbered lease and the thread that keeps it alive."""

    def __init__(self, storage: Storage, expiry_s: float) -> None:
        self._storage = storage
        self._expiry_s = expiry_s
        self._me = _Holder.me()
        self._number = 0
        self._beats = 0
        self._beating = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="jetway-lease", daemon=True)

    def acquire(self) -> None:
        """Takes the lease, waiting for a dead run's to expire.

        Raises:
            UserError: another run is alive.
        """
        gone: set[str] = set()
        while True:
            holders = self._holders()
            latest = max(holders, default=0)
            if latest and holders[latest].id not in gone:
                self._outlive(latest, holders[latest])
                gone.update(holder.id for holder in holders.values())
                continue
            number = latest + 1
            if not self._storage.put_new(_lease_path(number), json.dumps(asdict(self._me)).encode()) and self._holder(number) != self._me:
                continue
            # Of runs that saw different listings, whoever finds a lease that it had not seen gives way.
            holders = self._holders()
            if max(holders, default=0) == number and all(holder == self._me or holder.id in gone for holder in holders.values()):
                break
            self._storage.delete(_lease_path(number))
            time.sleep(self._expiry_s / 50 * (1 + secrets.randbelow(100) / 100))
        self._number = number
        self._beat()
        self._delete(below=number)
        self._thread.start()

    def check(self) -> None:
        """See `Lease.check`. Beats too, so that nobody's waiting can end right after it."""
        self._beat()
        holders = self._holders()
        successor = holders[max(holders)] if holders else None
        if successor == self._me:
            return
        raise UserError(
            f"this run has lost its right to write {self._storage.url}: it did not answer for {self._expiry_s:.0f} s, and another run took over",
            got=successor.text if successor else "a lease that is gone",
            fix="let the other run finish; nothing of it was touched",
        )

    def release(self) -> None:
        """Gives the lease up. Failing to is no error: it expires."""
        self._stop.set()
        self._thread.join()
        try:
            if self._holder(self._number) == self._me:
                self._delete(below=self._number + 1)
            else:
                self._storage.delete(self._beat_path(self._number, self._me))
        except (UserError, OSError) as error:
            logger.warning("cannot release %s/%s, the next run will wait for it to expire: %s", self._storage.url, _lease_path(self._number), error)

    def _outlive(self, number: int, holder: _Holder) -> None:
        """Returns once the holder of a lease is gone or has not shown life for a whole period; raises `UserError` once it has."""
        seen: bytes | None = None
        since = time.monotonic()
        while self._holder(number) == holder and not holder.is_known_to_be_gone:
            beat = self._read(self._beat_path(number, holder))
            if seen is not None and beat != seen:
                raise _busy(self._storage, holder.text)
            if seen is None:
                logger.warning("waiting %.0f s to see whether the run on %s that writes %s lives", self._expiry_s, holder.text, self._storage.url)
            elif time.monotonic() - since > self._expiry_s:
                return
            seen = beat
            time.sleep(self._expiry_s / 30)

    def _keep_alive(self) -> None:
        while not self._stop.wait(self._expiry_s / _BEATS_PER_EXPIRY):
            try:
                self._beat()
            except (UserError, OSError) as error:
                logger.warning("cannot renew the right to write %s: %s", self._storage.url, error)

    def _beat(self) -> None:
        with self._beating:
            self._beats += 1
            self._storage.put_bytes(self._beat_path(self._number, self._me), b"%d" % self._beats)

    def _holders(self) -> dict[int, _Holder]:
        """Every lease by its number; the highest one counts."""
        names = (path[len(LEASES) + 1 : -len(".json")] for path in self._storage.list(f"{LEASES}/") if path.endswith(".json"))
        found = {int(name): self._holder(int(name)) for name in names if name.isdecimal()}
        return {number: holder for number, holder in found.items() if holder is not None}

    def _holder(self, number: int) -> _Holder | None:
        data = self._read(_lease_path(number))
        try:
            return _Holder(**json.loads(data)) if data else None
        except (ValueError, TypeError) as error:
            raise UserError(f"{self._storage.url}/{_lease_path(number)} is no lease of this program", got=error, fix="delete it") from None

    def _read(self, path: str) -> bytes:
        try:
            return self._storage.read_bytes(path)
        except FileNotFoundError:
            return b""

    def _delete(self, below: int) -> None:
        """Removes the leases of lower numbers and their heartbeats."""
        numbers = {path: path[len(LEASES) + 1 :].partition(".")[0] for path in self._storage.list(f"{LEASES}/")}
        self._storage.delete_many(path for path, number in numbers.items() if number.isdecimal() and int(number) < below)
        self._storage.remove_empty(LEASES)

    @staticmethod
    def _beat_path(number: int, holder: _Holder) -> str:
        return f"{LEASES}/{number:06d}.{holder.id}.beat"


def _lease_path(number: int) -> str:
    return f"{LEASES}/{number:06d}.json"
