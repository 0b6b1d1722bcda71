"""Where a data set lies: a local folder or an object store, behind one small interface.

A write is all or nothing: a reader sees the old object, the new one, or none; never a half. Locally that is a temporary
file, fsync and rename; on an object store it is one put. `fs.open(..., "wb")` is never used: s3fs publishes what was
written so far when the body of the `with` fails.
"""

import errno
import os
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from configs.errors import UserError

TEMPORARY = ".tmp"
"""Folder for unfinished files below a local data set; no listing shows it and its contents are worthless after a crash."""

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
    def put_file(self, local: str | os.PathLike[str], path: str, *, move: bool = False) -> None:
        """Publishes a local file under `path` atomically; with `move` the local file is gone afterwards."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Sorted paths of the finished objects whose path starts with `prefix`; empty if there are none."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether a finished object of this name is there."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the object."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes the object; does nothing if it is not there."""

    @abstractmethod
    def scratch(self) -> Path:
        """A local folder for building files that `put_file(..., move=True)` publishes cheaply."""


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage at a local folder (which need not exist yet) or at an fsspec address such as `s3://bucket/prefix`."""
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" in text:
        return ObjectStorage(text)
    return LocalStorage(text)


class LocalStorage(Storage):
    """A folder. Opens no file for longer than one call, so it can be pickled, forked and shared by threads."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.url = os.fspath(root)
        self.root = Path(root).expanduser().absolute()

    def read_bytes(self, path: str) -> bytes:
        return self._path(path).read_bytes()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with open(self._path(path), "rb", buffering=0) as file:
            # A regular file's pread returns less than asked only at its end, except above 2 GiB: hence the loop.
            parts, position, end = [], offset, offset + size
            while position < end and (part := os.pread(file.fileno(), end - position, position)):
                parts.append(part)
                position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def put_bytes(self, path: str, data: bytes) -> None:
        with self._publish(path) as temporary, open(temporary, "wb") as file:
            file.write(data)

    def put_file(self, local: str | os.PathLike[str], path: str, *, move: bool = False) -> None:
        with self._publish(path) as temporary:
            if move:
                shutil.move(local, temporary)
            else:
                shutil.copyfile(local, temporary)

    def list(self, prefix: str = "") -> list[str]:
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for parent, folders, files in os.walk(folder):
            if TEMPORARY in folders:
                folders.remove(TEMPORARY)
            relative = Path(parent).relative_to(self.root)
            found += [(relative / name).as_posix() for name in files]
        return sorted(path for path in found if path.startswith(prefix))

    def exists(self, path: str) -> bool:
        return self._path(path).is_file()

    def size(self, path: str) -> int:
        return self._path(path).stat().st_size

    def delete(self, path: str) -> None:
        self._path(path).unlink(missing_ok=True)

    def scratch(self) -> Path:
        folder = self.root / TEMPORARY
        with writing(self.url):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear_scratch(self) -> None:
        """Removes what a killed run left behind. Call it only while no other run writes here."""
        shutil.rmtree(self.root / TEMPORARY, ignore_errors=True)

    def remove_empty(self, folder: str) -> None:
        """Removes a folder that holds nothing any more; leaves any other alone."""
        with suppress(OSError):
            self._path(folder.rstrip("/")).rmdir()

    def _path(self, path: str) -> Path:
        return self.root / _checked(path)

    @contextmanager
    def _publish(self, path: str) -> Iterator[Path]:
        """Yields a temporary path; flushes and renames it when the body succeeds, removes it when it fails."""
        final = self._path(path)
        temporary = self.scratch() / f"{final.name}.{os.getpid()}.{secrets.token_hex(6)}"
        try:
            with writing(f"{self.url}/{path}"):
                yield temporary
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, final)
                _sync_folder(final.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


class ObjectStorage(Storage):
    """An object store through fsspec (extra `s3` for s3://). Credentials and endpoint come from the usual AWS environment.

    The file system is opened on first use and never pickled, because its event loop survives neither pickling nor fork.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs: Any = None
        self._pid = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_fs": None, "_pid": -1}

    @property
    def fs(self) -> Any:
        """The fsspec file system of this process."""
        if self._fs is None or self._pid != os.getpid():
            scheme = self.url.partition("://")[0]
            try:
                import fsspec

                # No caches: another process publishes while we look, and instances must not be shared over a fork.
                self._fs = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
            except (ImportError, ValueError) as error:
                raise UserError(f"cannot open {scheme}:// storage", got=error, fix='pip install "jetway[s3]", or check the address') from None
            self._pid = os.getpid()
        return self._fs

    def read_bytes(self, path: str) -> bytes:
        with self._reaching():
            return self.fs.cat_file(self._path(path))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        with self._reaching():
            return self.fs.cat_file(self._path(path), start=offset, end=offset + size)

    def put_bytes(self, path: str, data: bytes) -> None:
        with writing(f"{self.url}/{path}"), self._reaching(missing="no such bucket"):
            self.fs.pipe_file(self._path(path), data)

    def put_file(self, local: str | os.PathLike[str], path: str, *, move: bool = False) -> None:
        with writing(f"{self.url}/{path}"), self._reaching(missing="no such bucket"):
            self.fs.put_file(os.fspath(local), self._path(path))
        if move:
            Path(local).unlink()

    def list(self, prefix: str = "") -> list[str]:
        folder = prefix.rpartition("/")[0]
        root = self.fs._strip_protocol(self.url)
        where = f"{root}/{folder}" if folder else root
        try:
            with self._reaching():
                found = self.fs.find(where)
        except FileNotFoundError:
            return []
        paths = (path[len(root) :].lstrip("/") for path in found)
        return sorted(path for path in paths if path.startswith(prefix))

    def exists(self, path: str) -> bool:
        with self._reaching():
            return self.fs.isfile(self._path(path))

    def size(self, path: str) -> int:
        with self._reaching():
            return int(self.fs.info(self._path(path))["size"])

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError), self._reaching():
            self.fs.rm_file(self._path(path))

    def scratch(self) -> Path:
        return Path(tempfile.gettempdir())

    @contextmanager
    def _reaching(self, missing: str = "") -> Iterator[None]:
        """Around every request: address, network and credentials are the user's to mend. s3fs lets botocore's own errors through.

        Args:
            missing: what it means that something was not found; empty: let `FileNotFoundError` through.
        """
        try:
            yield
        except Exception as error:
            refused = isinstance(error, PermissionError) or type(error).__module__.startswith(("botocore.", "aiobotocore."))
            if not refused and not (missing and isinstance(error, FileNotFoundError)):
                raise
            raise UserError(
                f"cannot use {self.url}",
                got=missing if isinstance(error, FileNotFoundError) else error,
                expected="a bucket that answers, and credentials that it accepts",
                fix="check the address, the network, and AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL",
            ) from error

    def _path(self, path: str) -> str:
        return f"{self.url}/{_checked(path)}"


def _checked(path: str) -> str:
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
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write {target}", got=error.strerror, expected="a folder that you may write to") from error
        raise


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; some file systems cannot fsync a folder, which is no reason to fail."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
