"""Writes one WebDataset shard: plain ustar, and its index.

The 512-byte headers are made here, because the file then depends on nothing but the samples (no clock, user or umask) and
because a PAX header for every member costs 7 % of space and half of the reading speed. The bytes equal those of
`tarfile` with `format=USTAR_FORMAT` (POSIX.1-1988 ustar).
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.schema import ShardIndex, ShardInfo, tar_path
from data_prep.storage import Storage

BLOCK = 512
RECORD = 10_240
"""A tar ends with two zero blocks and fills its last record."""

MAX_MEMBER_BYTES = 8**11 - 1
"""Largest size that ustar's eleven octal digits hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample as it stands in a shard."""

    key: str
    """Unique over the whole data set; ASCII, no dot, no slash."""
    image: bytes
    txt: bytes
    json: bytes
    sha256: bytes
    """SHA-256 of the original image bytes (32 bytes)."""


def ustar_header(name: str, size: int) -> bytes:
    """The header block of a regular file: mode 0644, owner 0, mtime 0.

    Raises:
        ValueError: the name is longer than 100 bytes or not ASCII, or the file too large for ustar.
    """
    encoded = name.encode("ascii")
    if len(encoded) > 100 or size > MAX_MEMBER_BYTES:
        raise ValueError(f"{name!r} of {size} bytes does not fit a ustar header")
    header = bytearray(BLOCK)
    header[: len(encoded)] = encoded
    # Mode, user, group, size, time. One literal each: a NUL directly before digits would read as an octal escape.
    header[100:148] = b"%b\0%b\0%b\0%011o\0%b\0" % (b"0000644", b"0000000", b"0000000", size, b"0" * 11)
    header[148:157] = b"        0"
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def stored_bytes(*sizes: int) -> int:
    """Bytes that members of these sizes take in a tar: a header each, and content padded to whole blocks."""
    return sum(BLOCK + size + -size % BLOCK for size in sizes)


class ShardWriter:
    """Builds one shard in a local file, then publishes tar and index.

    Use as a context manager: an exception removes the local file, and nothing is published.
    """

    def __init__(self, path: Path, extension: str) -> None:
        self._path = path
        self._extension = extension
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._digest = hashlib.sha256()
        self._position = 0
        self._keys: list[bytes] = []
        self._offsets: list[list[int]] = []
        self._sizes: list[list[int]] = []
        self._xxh3: list[list[int]] = []
        self._sha256: list[bytes] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # closing flushes, which fails again on a full disk; the first error is the one to show
            self._file.close()
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._keys)

    def content_hashes(self) -> np.ndarray:
        """SHA-256 of the original images so far, uint8 [N, 32]."""
        return np.frombuffer(b"".join(self._sha256), dtype=np.uint8).reshape(-1, 32)

    def add(self, sample: Sample) -> None:
        """Appends the three members of one sample."""
        offsets, sizes, checksums = [], [], []
        for extension, content in ((self._extension, sample.image), ("txt", sample.txt), ("json", sample.json)):
            self._write(ustar_header(f"{sample.key}.{extension}", len(content)))
            offsets.append(self._position)
            sizes.append(len(content))
            checksums.append(xxhash.xxh3_64_intdigest(content))
            self._write(content + bytes(-len(content) % BLOCK))
        self._keys.append(sample.key.encode("ascii"))
        self._offsets.append(offsets)
        self._sizes.append(sizes)
        self._xxh3.append(checksums)
        self._sha256.append(sample.sha256)

    def publish(self, storage: Storage, shard: str, *, folder: str = "shards") -> ShardInfo:
        """Ends the tar and publishes it and its index in `folder`; call it once, with at least one sample.

        Raises:
            UserError: the storage is full or not writable.
        """
        if not self._keys:
            raise ValueError(f"{shard} would be empty: readers stumble over empty shards")
        self._end()
        index = ShardIndex(
            keys=np.array(self._keys),
            offsets=np.array(self._offsets, dtype=np.int64),
            sizes=np.array(self._sizes, dtype=np.int64),
            xxh3=np.array(self._xxh3, dtype=np.uint64),
            sha256=self.content_hashes(),
        )
        storage.put_file(self._path, tar_path(shard, folder), move=True)
        index_sha256 = index.dump(storage, shard, folder=folder)
        return ShardInfo(name=shard, num_samples=len(index), num_bytes=self._position, sha256=self._digest.hexdigest(), index_sha256=index_sha256)

    def publish_tar(self, storage: Storage, path: str) -> None:
        """Ends the tar and publishes it alone, without an index."""
        self._end()
        storage.put_file(self._path, path, move=True)

    def _end(self) -> None:
        end = self._position + 2 * BLOCK
        self._write(bytes(2 * BLOCK + -end % RECORD))
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)
