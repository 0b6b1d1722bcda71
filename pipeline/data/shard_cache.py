"""Open shards: local tars by descriptor; shards of an object store are fetched whole, once per node, into a bounded cache."""

import errno
import hashlib
import os
import secrets
import tempfile
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from data_prep.schema import ShardIndex, ShardInfo, tar_path
from data_prep.storage import LocalStorage, Storage
from pipeline.data.dataset import check_size

_CHUNK_BYTES = 16 << 20


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
    """The most recently used shards, open. Not for several threads at once: the caller holds a lock.

    Processes of one node share the copies of remote shards: file names are content hashes, and a copy appears whole or not
    at all. Deleting a file that another process has open takes nothing from it.
    """

    def __init__(self, storage: Storage, *, capacity: int, folder: Path | None = None) -> None:
        """
        Args:
            capacity: shards kept open; two windows of the sample order let a batch straddle the border of two
            folder: where copies of remote shards lie; None is a folder below the system's temporary one
        """
        self._storage = storage
        self._capacity = capacity
        self._folder = folder or Path(tempfile.gettempdir()) / f"jetway-shards-{os.getuid()}"
        self._open: OrderedDict[str, OpenShard] = OrderedDict()

    def get(self, info: ShardInfo) -> OpenShard:
        """The shard, opened if it is not.

        Raises:
            UserError: it is missing, of another size, its index is damaged, or there is no room for a copy.
        """
        shard = self._open.get(info.name)
        if shard is None:
            while len(self._open) >= self._capacity:
                self._close(self._open.popitem(last=False)[1])
            shard = self._open[info.name] = self._load(info)
        else:
            self._open.move_to_end(info.name)
        return shard

    def close(self) -> None:
        """Closes all shards and deletes the copies of those it had open."""
        while self._open:
            self._close(self._open.popitem()[1])

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
        try:
            with open(temporary, "wb") as file:
                for offset in range(0, info.num_bytes, _CHUNK_BYTES):
                    file.write(self._storage.read_range(tar_path(info.name), offset, min(_CHUNK_BYTES, info.num_bytes - offset)))
            descriptor = self._open_checked(temporary, info)
            os.replace(temporary, path)
            return descriptor
        finally:
            temporary.unlink(missing_ok=True)
