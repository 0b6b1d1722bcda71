"""Requests to an object store: what a client can do, and the one that knows every store, through fsspec."""

import errno
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from configs.errors import UserError

_NEW_ATTEMPTS = 5


class Client(Protocol):
    """Requests below one address. Paths are relative to it. Raises `FileNotFoundError` and the library's own errors.

    What can heal (throttling, 5xx, broken connections) is tried again with growing pauses before it is raised.
    """

    def get(self, path: str) -> bytes:
        """The whole object."""

    def get_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` (> 0) bytes from `offset`; fewer only where the object ends."""

    def put(self, path: str, data: bytes) -> None:
        """Publishes an object atomically."""

    def put_new(self, path: str, data: bytes) -> bool:
        """Publishes an object unless there is one; False if there was."""

    def put_file(self, local: Path, path: str) -> None:
        """Publishes a local file atomically; a failed upload leaves nothing behind."""

    def walk(self, folder: str) -> Iterator[str]:
        """Paths of all objects below a folder (empty: all), in any order."""

    def size(self, path: str) -> int:
        """Bytes of the object."""

    def stamp(self, path: str) -> str:
        """See `Storage.stamp`."""

    def delete_many(self, paths: Sequence[str]) -> None:
        """Removes the objects, whether they are there or not."""


class FsspecClient:
    """Any store that fsspec knows. Its `put_new` is atomic where the store has conditional puts (S3, GCS)."""

    def __init__(self, url: str, part_bytes: int) -> None:
        """
        Raises:
            UserError: an unknown scheme, or its package is missing.
        """
        scheme = url.partition("://")[0]
        try:
            import fsspec

            # No caches: another process publishes while we look, and instances must not be shared over a fork.
            self._fs: Any = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot open {scheme}:// storage", got=error, fix='pip install -e ".[s3]", or check the address') from None
        self._root = self._fs._strip_protocol(url).rstrip("/")
        self._parts = {"chunksize": part_bytes} if scheme == "s3" else {}

    def get(self, path: str) -> bytes:
        return bytes(self._fs.cat_file(self._path(path)))

    def get_range(self, path: str, offset: int, size: int) -> bytes:
        try:
            return bytes(self._fs.cat_file(self._path(path), start=offset, end=offset + size))
        except OSError as error:
            if isinstance(error, FileNotFoundError) or offset < self.size(path):
                raise
            return b""  # S3 refuses a range that begins behind the end

    def put(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(path), data, **self._parts)

    def put_new(self, path: str, data: bytes) -> bool:
        for attempt in range(_NEW_ATTEMPTS):
            try:
                self._fs.pipe_file(self._path(path), data, mode="create", **self._parts)
                return True
            except FileExistsError:
                return False
            except OSError as error:
                # EBUSY: S3 could not decide between two writers (409). EINVAL: some stores give no reason with their 412.
                if error.errno not in (errno.EBUSY, errno.EINVAL):
                    raise
                if self._fs.exists(self._path(path)):
                    return False
                if attempt == _NEW_ATTEMPTS - 1:
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def put_file(self, local: Path, path: str) -> None:
        self._fs.put_file(str(local), self._path(path), **self._parts)

    def walk(self, folder: str) -> Iterator[str]:
        for path in self._fs.find(f"{self._root}/{folder}" if folder else self._root):
            yield path[len(self._root) + 1 :]

    def size(self, path: str) -> int:
        return int(self._details(path)["size"])

    def stamp(self, path: str) -> str:
        details = self._details(path)
        newness = next((details[name] for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if details.get(name)), "")
        return f"{details['size']}-{newness}".replace('"', "")

    def delete_many(self, paths: Sequence[str]) -> None:
        for path in paths:
            try:
                self._fs.rm_file(self._path(path))
            except FileNotFoundError:
                continue

    def abort_uploads(self) -> None:
        """Aborts every unfinished multipart upload below the address (S3 only)."""
        bucket, _, prefix = self._root.partition("/")
        for upload in self._uploads(bucket, f"{prefix}/" if prefix else ""):
            try:
                self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            except FileNotFoundError:
                continue

    def _uploads(self, bucket: str, prefix: str) -> Iterator[dict[str, str]]:
        markers: dict[str, str] = {}
        while True:
            page = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **markers)
            yield from page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _details(self, path: str) -> dict[str, Any]:
        details: dict[str, Any] = self._fs.info(self._path(path))
        if details["type"] != "file":
            raise FileNotFoundError(path)
        return details

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"
