"""A data set on an object store: s3:// through obstore where that can serve, any other through fsspec."""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import UserError
from data_prep.stores.base import Storage, checked, writing
from data_prep.stores.clients import Client, FsspecClient
from data_prep.stores.s3 import S3Client

logger = logging.getLogger(__name__)

PART_BYTES = 16 * 2**20
"""Files above this are uploaded in parts of this size: what a broken connection costs, and what S3 is happy with."""


class ObjectStorage(Storage):
    """An object store (extra `s3` for s3://). Credentials and endpoint come from the usual AWS environment.

    The client is opened on first use and never pickled, because its threads survive neither pickling nor fork.
    """

    def __init__(self, url: str, *, part_bytes: int = PART_BYTES, use_obstore: bool = True) -> None:
        """
        Args:
            url: `SCHEME://BUCKET/PREFIX`.
            part_bytes: size of the parts of a large upload; S3 takes 5 MiB and more.
            use_obstore: False: fsspec for s3:// too.
        """
        self.url = url.rstrip("/")
        self._part_bytes = part_bytes
        self._use_obstore = use_obstore
        self._client: Client | None = None
        self._pid = -1

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_client": None, "_pid": -1}

    def read_bytes(self, path: str) -> bytes:
        with self._reaching():
            return self.client.get(checked(path))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        with self._reaching():
            return self.client.get_range(checked(path), offset, size)

    def put_bytes(self, path: str, data: bytes) -> None:
        with self._reaching(missing="no such bucket"):
            self.client.put(checked(path), data)

    def put_new(self, path: str, data: bytes) -> bool:
        with self._reaching(missing="no such bucket"):
            return self.client.put_new(checked(path), data)

    def put_file(self, local: str | os.PathLike[str], path: str, *, move: bool = False) -> None:
        with open(local, "rb"):  # a missing file is our mistake, not the bucket's
            pass
        with self._reaching(missing="no such bucket"):
            self.client.put_file(Path(local), checked(path))
        if move:
            Path(local).unlink()

    def walk(self, prefix: str = "") -> Iterator[str]:
        """See `Storage.walk`. Keys that are no paths (`a//b`, `a/../b`, control characters) are passed over, with a warning."""
        folder, odd = prefix.rpartition("/")[0], 0
        with suppress(FileNotFoundError), self._reaching():
            for path in self.client.walk(folder):
                if not path or path.endswith("/") or not path.startswith(prefix):
                    continue
                if min(path) < " " or any(part in ("", ".", "..") for part in path.split("/")):
                    odd += 1
                else:
                    yield path
        if odd:
            logger.warning("%d keys below %s are passed over: they are no paths", odd, self.url)

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        with self._reaching():
            return self.client.size(checked(path))

    def stamp(self, path: str) -> str:
        with self._reaching():
            return self.client.stamp(checked(path))

    def delete_many(self, paths: Iterable[str]) -> None:
        if names := [checked(path) for path in paths]:
            with self._reaching():
                self.client.delete_many(names)

    def scratch(self) -> Path:
        return Path(tempfile.gettempdir())

    def clear_scratch(self) -> None:
        """Aborts the uploads that a killed run began below this address and never finished: S3 bills for them forever."""
        if self.url.startswith("s3://"):
            with self._reaching():
                self._fsspec_client().abort_uploads()

    @property
    def client(self) -> Client:
        """The client of this process."""
        if self._client is None or self._pid != os.getpid():
            fast = S3Client.open(self.url, self._part_bytes) if self._use_obstore else None
            self._client = fast or self._fsspec_client()
            self._pid = os.getpid()
        return self._client

    def _fsspec_client(self) -> FsspecClient:
        return FsspecClient(self.url, self._part_bytes)

    @contextmanager
    def _reaching(self, missing: str = "") -> Iterator[None]:
        """Around every request: address, network and credentials are the user's to mend.

        Args:
            missing: what it means that something was not found; empty: let `FileNotFoundError` through.
        """
        try:
            with writing(self.url):
                yield
        except (UserError, ValueError):
            raise
        except Exception as error:
            # s3fs lets botocore's own errors through; the errors of obstore are all of its own.
            foreign = isinstance(error, OSError) or type(error).__module__.startswith(("botocore.", "aiobotocore.", "obstore."))
            is_missing = isinstance(error, FileNotFoundError)
            if not foreign or (is_missing and not missing):
                raise
            raise UserError(
                f"cannot use {self.url}",
                got=missing if is_missing else str(error).partition("\n\nDebug source:")[0],
                expected="a bucket that answers, and credentials that it accepts",
                fix="check the address, the network, and AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
            ) from error
