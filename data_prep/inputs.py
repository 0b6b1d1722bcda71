"""Where inputs lie: this machine or an object store, listed and opened in the same way.

A remote file is read by ranges, so that a task that begins at row 1,000,000 of a 20 GB table does not read what stands before it,
and ahead of its use, so that a planning pass through all of it does not wait for every one.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from configs.errors import UserError
from data_prep.images.formats import EXTENSIONS
from data_prep.storage import Storage, open_storage

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Suffixes of tables; the text ones may be followed by `.gz`."""

FIRST_READ, LARGEST_READ = 2**20, 2**23
"""Bytes of one range request: the first one of a file or after a jump, and what they grow to while reading goes on in order.

A round trip costs about as much as the first; and a task that reads 1000 rows needs no more.
"""

CHECK_PATH = "check --input, `inputs` or dedup.evaluation, whichever names it"


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return "://" in path


def list_inputs(text: str) -> Sequence[tuple[str, str]]:
    """(reader, path) of what the user named: one input, or the tables and tars of a folder without images.

    Raises:
        UserError: nothing is there, or it is no known kind of input.
    """
    path = text.removeprefix("file://")
    if ":/" in path and not is_remote(path):
        raise UserError(f"{path} is neither a path nor an address", expected="a local path or s3://BUCKET/PATH")
    return _list_remote(path.rstrip("/")) if is_remote(path) else _list_local(Path(path))


def list_images(path: str) -> list[str]:
    """Relative `/`-separated paths of the image files below a folder, sorted; hidden files and folders are skipped."""
    if is_remote(path):
        return [name for name in open_storage(path).list() if _is_image(name)]
    found = []
    for parent, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(path)
        found += [(relative / name).as_posix() for name in files if _is_image(name)]
    return sorted(found)


def input_storage(path: str) -> tuple[Storage, str]:
    """(storage of the folder, name in it) of a remote file."""
    folder, _, name = path.rpartition("/")
    return open_storage(folder), name


def input_size(path: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(path):
        return os.stat(path).st_size
    storage, name = input_storage(path)
    return storage.size(name)


def input_fingerprint(path: str) -> str:
    """Another text whenever the file was written anew: its size, with its time of change or its entity tag.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(path):
        status = os.stat(path)
        return f"{status.st_size}-{status.st_mtime_ns}"
    storage, name = input_storage(path)
    return storage.stamp(name)


def open_input(path: str) -> BinaryIO:
    """A file opened for reading: seekable, buffered. A remote one is read ahead in the background while reading goes on in order.

    Raises:
        OSError: it is not there or cannot be read.
        UserError: the object store refuses.
    """
    if not is_remote(path):
        return open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(RemoteFile(*input_storage(path)), buffer_size=2**16))


class RemoteFile(io.RawIOBase):
    """A remote object as a raw file, of which it holds one window, and fetches the next while that is read."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jetway-read-ahead")  # first: Python closes a half-made file, too
        self._storage, self._path = storage, path
        self._size = storage.size(path)
        self._position = 0
        self._start, self._window = 0, b""
        self._next: Future[bytes] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        if not self._start <= self._position < self._start + len(self._window):
            self._move(len(buffer))
        begin = self._position - self._start
        data = memoryview(self._window)[begin : begin + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._window, self._next = b"", None
        super().close()

    def _move(self, wanted: int) -> None:
        """Puts the window at the position: the next one, or after a jump a small one."""
        end = self._start + len(self._window)
        if self._window and end <= self._position < end + len(self._window):
            size = min(2 * len(self._window), LARGEST_READ)
            data = self._next.result() if self._next is not None else b""
            if self._position >= end + len(data):
                end, data = self._position, self._fetch(self._position, max(size, wanted))
            self._start, self._window = end, data
            following = end + len(data)
            self._next = self._pool.submit(self._fetch, following, min(2 * len(data), LARGEST_READ)) if following < self._size else None
        else:
            self._start, self._window, self._next = self._position, self._fetch(self._position, max(wanted, FIRST_READ)), None

    def _fetch(self, begin: int, size: int) -> bytes:
        data = self._storage.read_range(self._path, begin, min(size, self._size - begin))
        if not data:
            raise OSError(f"{self._storage.url}/{self._path} has become shorter while it was read")
        return data


def file_kind(name: str) -> str | None:
    """Which reader a file name asks for: `table`, `tar`, or None."""
    lower = name.lower()
    if lower.endswith(TABLES) or lower.removesuffix(".gz").endswith(TABLES[:3]):
        return "table"
    return "tar" if lower.endswith(".tar") else None


def _list_local(path: Path) -> Sequence[tuple[str, str]]:
    if not path.exists():
        expected = "a folder of images, a table, a tar, or an s3:// address of one"
        raise UserError(f"{path} does not exist", expected=expected, fix=CHECK_PATH)
    if path.is_file():
        return [(_known_kind(str(path)), str(path))]
    if list_images(str(path)):
        return [("folder", str(path))]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return [(kind, str(file)) for file in files if (kind := file_kind(file.name)) is not None]


def _list_remote(path: str) -> Sequence[tuple[str, str]]:
    storage, name = input_storage(path)
    if file_kind(name) is not None and storage.exists(name):
        return [(_known_kind(path), path)]
    names = []
    for found in open_storage(path).walk():
        if _is_image(found):
            return [("folder", path)]  # the reader will list it whole
        names.append(found)
    if not names:
        if "/" in path.partition("://")[2] and storage.exists(name):
            _known_kind(path)
        raise UserError(f"{path} does not exist", expected="an object, or a prefix with objects below it", fix=CHECK_PATH)
    return [(kind, f"{path}/{found}") for found in sorted(names) if (kind := file_kind(found)) is not None and not _is_hidden(found)]


def _known_kind(path: str) -> str:
    kind = file_kind(path)
    if kind is None:
        fix = "decompress .tar.gz: a compressed tar can only be read from its beginning" if path.lower().endswith((".tar.gz", ".tgz")) else ""
        raise UserError(f"{path} is no known kind of input", expected=f"a folder, or a file ending in {', '.join(TABLES)}, .gz or .tar", fix=fix)
    return kind


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and "." in name.rpartition("/")[2] and name.rpartition(".")[2].lower() in EXTENSIONS


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
