"""Where inputs lie: this machine or an object store, listed and opened in the same way.

A remote file is read by ranges, so that a task that begins at row 1,000,000 of a 20 GB table does not read what stands before it.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

from configs.errors import UserError
from data_prep.images.formats import EXTENSIONS
from data_prep.storage import Storage, open_storage

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Suffixes of tables; the text ones may be followed by `.gz`."""

READ_AHEAD = 2**20
"""Bytes of one range request at least: a round trip costs about as much as these."""


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


def open_input(path: str) -> BinaryIO:
    """A file opened for reading: seekable, buffered.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if not is_remote(path):
        return open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(RangeFile(*input_storage(path)), buffer_size=READ_AHEAD))


class RangeFile(io.RawIOBase):
    """A remote object as a raw file; every read is one range request."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        self._size = storage.size(path)
        self._position = 0

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

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed asks for its own Buffer
        size = min(len(buffer), self._size - self._position)
        if size <= 0:
            return 0
        data = self._storage.read_range(self._path, self._position, size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def file_kind(name: str) -> str | None:
    """Which reader a file name asks for: `table`, `tar`, or None."""
    lower = name.lower()
    if lower.endswith(TABLES) or lower.removesuffix(".gz").endswith(TABLES[:3]):
        return "table"
    return "tar" if lower.endswith(".tar") else None


def _list_local(path: Path) -> Sequence[tuple[str, str]]:
    if not path.exists():
        expected = "a folder of images, a table, a tar, or an s3:// address of one"
        raise UserError(f"{path} does not exist", expected=expected, fix="check --input or `inputs`")
    if path.is_file():
        return [(_known_kind(str(path)), str(path))]
    if list_images(str(path)):
        return [("folder", str(path))]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return [(kind, str(file)) for file in files if (kind := file_kind(file.name)) is not None]


def _list_remote(path: str) -> Sequence[tuple[str, str]]:
    storage, name = input_storage(path)
    if name and file_kind(name) is not None and storage.exists(name):
        return [(_known_kind(path), path)]
    names = [found for found in open_storage(path).list() if not any(part.startswith(".") for part in found.split("/"))]
    if not names:
        if storage.exists(name):
            _known_kind(path)
        raise UserError(f"{path} does not exist", expected="an object, or a prefix with objects below it", fix="check --input or `inputs`")
    if any(_is_image(found) for found in names):
        return [("folder", path)]
    return [(kind, f"{path}/{found}") for found in names if (kind := file_kind(found)) is not None]


def _known_kind(path: str) -> str:
    kind = file_kind(path)
    if kind is None:
        fix = "decompress .tar.gz: a compressed tar can only be read from its beginning" if path.lower().endswith((".tar.gz", ".tgz")) else ""
        raise UserError(f"{path} is no known kind of input", expected=f"a folder, or a file ending in {', '.join(TABLES)}, .gz or .tar", fix=fix)
    return kind


def _is_image(name: str) -> bool:
    parts = name.split("/")
    return not any(part.startswith(".") for part in parts) and name.rpartition(".")[2].lower() in EXTENSIONS and "." in parts[-1]
