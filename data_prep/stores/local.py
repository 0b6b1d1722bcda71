"""A data set in a folder: every write is a temporary file, fsync and rename."""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.stores.base import Storage, checked, writing

TEMPORARY = ".tmp"
"""Folder for unfinished files below a local data set; no listing shows it and its contents are worthless after a crash."""

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


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

    def put_new(self, path: str, data: bytes) -> bool:
        final = self._path(path)
        with writing(f"{self.url}/{path}"), self._temporary(final.name) as temporary:
            with open(temporary, "wb") as file:
                file.write(data)
            _sync_file(temporary)
            final.parent.mkdir(parents=True, exist_ok=True)
            is_new = self._link(temporary, final)
            if is_new:
                _sync_folder(final.parent)
            return is_new

    def put_file(self, local: str | os.PathLike[str], path: str, *, move: bool = False) -> None:
        with self._publish(path) as temporary:
            if move:
                shutil.move(local, temporary)
            else:
                shutil.copyfile(local, temporary)

    def walk(self, prefix: str = "") -> Iterator[str]:
        for parent, folders, files in os.walk(self.root / prefix.rpartition("/")[0]):
            if TEMPORARY in folders:
                folders.remove(TEMPORARY)
            relative = Path(parent).relative_to(self.root)
            for name in files:
                path = (relative / name).as_posix()
                if path.startswith(prefix):
                    yield path

    def exists(self, path: str) -> bool:
        return self._path(path).is_file()

    def size(self, path: str) -> int:
        return self._path(path).stat().st_size

    def stamp(self, path: str) -> str:
        status = self._path(path).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    def delete_many(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._path(path).unlink(missing_ok=True)

    def scratch(self) -> Path:
        folder = self.root / TEMPORARY
        with writing(self.url):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear_scratch(self) -> None:
        shutil.rmtree(self.root / TEMPORARY, ignore_errors=True)

    def remove_empty(self, folder: str) -> None:
        """Removes a folder and those below it, as far as they hold nothing any more; leaves any others alone."""
        for parent, _, _ in os.walk(self._path(folder.rstrip("/")), topdown=False):
            with suppress(OSError):
                os.rmdir(parent)

    def _path(self, path: str) -> Path:
        return self.root / checked(path)

    @contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        """A path of its own in the scratch folder; whatever is there afterwards is removed."""
        temporary = self.scratch() / f"{name}.{os.getpid()}.{secrets.token_hex(6)}"
        try:
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _publish(self, path: str) -> Iterator[Path]:
        """Yields a temporary path; flushes and renames it when the body succeeds, removes it when it fails."""
        final = self._path(path)
        with self._temporary(final.name) as temporary, writing(f"{self.url}/{path}"):
            yield temporary
            _sync_file(temporary)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, final)
            _sync_folder(final.parent)

    def _link(self, temporary: Path, final: Path) -> bool:
        """Gives the file its final name unless that is taken: link(2) is atomic and, unlike rename(2), never replaces."""
        try:
            os.link(temporary, final)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system without hard links: writers of this machine take turns.
            with open(self.scratch() / "put_new.lock", "wb") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                if final.exists():
                    return False
                os.rename(temporary, final)
        return True


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; some file systems cannot fsync a folder, which is no reason to fail."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
