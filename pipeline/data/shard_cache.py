"""Open shards: local tars by descriptor; shards of an object store are fetched whole and ahead, once per node, into a bounded cache."""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from data_prep.schema import ShardIndex, ShardInfo, tar_path
from data_prep.storage import LocalStorage, Storage
from pipeline.data.dataset import check_size

logger = logging.getLogger(__name__)

NUM_FETCHES = 4
"""Shards of an object store that are fetched at a time."""
_CHUNK_BYTES = 16 << 20
_NUM_LOCKS = 64
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard that can be read at any offset."""

    info: ShardInfo
    index: ShardIndex
    descriptor: int
    cached_file: Path | None
    """The copy to delete when the shard is closed; None for a shard read in place."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only where the file ends."""
        return os.pread(self.descriptor, size, offset)


class ShardCache:
    """The most recently used shards, open, and those that come next, on their way. Called by one thread at a time: the caller holds a lock.

    Remote shards that `prefetch` names are copied by a few threads. Processes of one node share the copies: file names are content
    hashes, a copy appears whole or not at all, and only one process makes it while the others wait. Deleting a file that another
    process has open takes nothing from it.
    """

    def __init__(self, storage: Storage, *, capacity: int, folder: Path | None = None) -> None:
        """
        Args:
            capacity: shards kept open or on their way; two windows of the sample order let a batch straddle the border of two,
                and the next window arrive while the present one is used
            folder: where copies of remote shards lie; None is a folder below the system's temporary one
        """
        self._storage = storage
        self._capacity = capacity
        self._folder = folder or Path(tempfile.gettempdir()) / f"jetway-shards-{os.getuid()}"
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._coming: dict[str, Future[OpenShard]] = {}
        self._wanted: frozenset[str] = frozenset()
        self._pool: ThreadPoolExecutor | None = None
        self._stop = threading.Event()

    def get(self, info: ShardInfo) -> OpenShard:
        """The shard, opened if it is not.

        Raises:
            UserError: it is missing, of another size, its index is damaged, or there is no room for a copy.
        """
        shard = self._open.get(info.name)
        if shard is not None:
            self._open.move_to_end(info.name)
            return shard
        if (coming := self._coming.pop(info.name, None)) is not None:
            try:
                shard = coming.result()
            except (UserError, OSError) as error:
                logger.debug("%s did not arrive ahead (%s): trying again", info.name, error)
        if shard is None:
            self._make_room(for_wanted=True)
            shard = self._load(info)
        self._open[info.name] = shard
        return shard

    def prefetch(self, infos: Sequence[ShardInfo]) -> None:
        """Begins to fetch these shards of an object store, the first ones first, as far as they fit; they are kept before others.

        An error shows when the shard is used.
        """
        if isinstance(self._storage, LocalStorage):
            return
        infos = infos[: self._capacity]
        self._wanted = frozenset(info.name for info in infos)
        for info in infos:
            if info.name in self._open or info.name in self._coming:
                continue
            if not self._make_room(for_wanted=False):
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(NUM_FETCHES, thread_name_prefix="jetway-fetch")
            self._coming[info.name] = self._pool.submit(self._load, info)

    def close(self) -> None:
        """Closes all shards and deletes the copies of those it had open. Waits at most for the reads that are under way."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        for name in list(self._coming):
            self._forget(name)
        while self._open:
            self._close(self._open.popitem()[1])
        self._stop.clear()

    def _make_room(self, *, for_wanted: bool) -> bool:
        """Drops shards, the longest unused first, until there is room for one more; `for_wanted`: also such as will be needed."""
        while len(self._open) + len(self._coming) >= self._capacity:
            name = next((name for name in self._open if name not in self._wanted), None)
            late = next((name for name in self._coming if name not in self._wanted), None)
            if name is None and late is None and for_wanted:
                name, late = next(iter(self._open), None), next(reversed(self._coming), None)
            if name is not None:
                self._close(self._open.pop(name))
            elif late is not None:
                self._forget(late)
            else:
                return False
        return True

    def _forget(self, name: str) -> None:
        """Gives up a shard that is on its way: now if it is there or not begun, else as soon as it arrives."""
        future = self._coming.pop(name)
        if not future.cancel():
            future.add_done_callback(self._close_result)

    def _close_result(self, future: "Future[OpenShard]") -> None:
        if future.exception() is None:
            self._close(future.result())

    def _close(self, shard: OpenShard) -> None:
        os.close(shard.descriptor)
        if shard.cached_file is not None:
            shard.cached_file.unlink(missing_ok=True)

    def _load(self, info: ShardInfo) -> OpenShard:
        index = ShardIndex.load(self._storage, info.name, sha256=info.index_sha256)
        where = f"{self._storage.url}/{tar_path(info.name)}"
        try:
            if isinstance(self._storage, LocalStorage):
                return OpenShard(info, index, self._open_checked(self._storage.root / tar_path(info.name), info), None)
            path = self._folder / f"{hashlib.sha256(self._storage.url.encode()).hexdigest()[:8]}-{info.sha256[:24]}.tar"
            return OpenShard(info, index, self._open_copy(path, info), path)
        except FileNotFoundError:
            raise UserError(f"{where} is missing", expected="a shard that the manifest names", fix="copy the data set again") from None
        except OSError as error:
            fixes = {
                errno.ENOSPC: f"free space on {self._folder}, or point TMPDIR at a larger disk: it holds about {self._capacity} shards",
                errno.EDQUOT: f"raise the quota of {self._folder}, or point TMPDIR at another disk",
                errno.EMFILE: "lower data.shuffle_window_shards, or raise the limit of open files (ulimit -n)",
            }
            if error.errno in fixes:
                raise UserError(f"cannot open {where}: {error.strerror}", fix=fixes[error.errno]) from error
            raise

    def _open_checked(self, path: Path, info: ShardInfo) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            check_size(self._storage, info, os.fstat(descriptor).st_size)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open_copy(self, path: Path, info: ShardInfo) -> int:
        """Opens the copy, made now unless another process of this node has made it."""
        with suppress(FileNotFoundError):
            return self._open_checked(path, info)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with self._alone(info):
            with suppress(FileNotFoundError):
                return self._open_checked(path, info)  # made while this one waited
            try:
                with open(temporary, "wb") as file:
                    for offset in range(0, info.num_bytes, _CHUNK_BYTES):
                        self._check_not_closed()
                        file.write(self._storage.read_range(tar_path(info.name), offset, min(_CHUNK_BYTES, info.num_bytes - offset)))
                descriptor = self._open_checked(temporary, info)
                os.replace(temporary, path)
                return descriptor
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _alone(self, info: ShardInfo) -> Iterator[None]:
        """Of all threads and processes of this node, one at a time for this shard (and for the few that share its lock file).

        The system lets go of the lock of a process that dies. The lock files are empty and few, and stay.
        """
        with open(self._folder / f"lock-{int(info.sha256[:8], 16) % _NUM_LOCKS:02d}", "wb") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._check_not_closed()
                    time.sleep(_POLL_S)
            yield

    def _check_not_closed(self) -> None:
        if self._stop.is_set():
            raise OSError(errno.ECANCELED, "the cache is being closed")
