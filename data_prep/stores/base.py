"""What every storage can do, and which of its failures are the user's to mend."""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError

_FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file size limit reached"}


class Storage(ABC):
    """A tree of immutable objects named by relative, `/`-separated paths.

    Every read of a missing object raises `FileNotFoundError`. Writes raise `UserError` when the disk is full or not writable.
    """

    url: str
    """What the user gave; for messages."""

    @abstractmethod
    def read_bytes(self, path: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only where the object ends."""

    @abstractmethod
    def put_bytes(self, path: str, data: bytes) -> None:
        """Publishes `data` under `path` atomically, replacing what was there."""

    @abstractmethod
    def put_new(self, path: str, data: bytes) -> bool:
        """Publishes `data` under `path` atomically unless an object is there: of many writers at once exactly one does.

        Returns:
            Whether it was published. False may also mean that it was, but that the store's reply got lost and the repeated
            request found our own object: where that matters, put something unique into `data` and read it back.
        """

    @abstractmethod
    def put_file(self, local: str | os.PathLike[str], path: str, *, move: bool = False) -> None:
        """Publishes a local file under `path` atomically; with `move` the local file is gone afterwards."""

    @abstractmethod
    def walk(self, prefix: str = "") -> Iterator[str]:
        """Paths of the finished objects whose path starts with `prefix`, in any order, as they are found."""

    def list(self, prefix: str = "") -> list[str]:
        """Sorted paths of the finished objects whose path starts with `prefix`; empty if there are none."""
        return sorted(self.walk(prefix))

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether a finished object of this name is there."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the object."""

    @abstractmethod
    def stamp(self, path: str) -> str:
        """Another text whenever the object was written anew: of its size and time, or its entity tag."""

    @abstractmethod
    def delete_many(self, paths: Iterable[str]) -> None:
        """Removes the objects; does nothing about those that are not there."""

    def delete(self, path: str) -> None:
        """Removes the object; does nothing if it is not there."""
        self.delete_many([path])

    @abstractmethod
    def scratch(self) -> Path:
        """A local folder for building files that `put_file(..., move=True)` publishes cheaply."""

    @abstractmethod
    def clear_scratch(self) -> None:
        """Removes what a killed run left unfinished here. Call it only while no other run writes here."""

    def remove_empty(self, folder: str) -> None:  # noqa: B027 - most stores have no folders, and so nothing to do
        """Removes a folder that holds nothing any more; leaves any other alone."""


def checked(path: str) -> str:
    """The path, if it is one inside a storage.

    Raises:
        ValueError: empty, absolute, or leading out of the storage.
    """
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is not a relative path inside the storage")
    return path


@contextmanager
def writing(target: str) -> Iterator[None]:
    """Around code that writes files: turns the write errors that a user can mend into `UserError`; lets the others through."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"cannot write {target}: {_FULL[error.errno]}",
                fix="free space or choose another output, then run the same command again: finished shards are kept",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            raise UserError(f"cannot write {target}", got=error.strerror, expected="a folder that you may write to") from error
        raise
