"""S3 through obstore: a quarter of the CPU time of s3fs for small objects, half for large ones, and the same environment.

s3fs knows more ways to be configured. Where one of them is in use, or obstore is missing or too old, or the process is a fork of
one that used obstore already (its threads did not come along), s3fs serves instead.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

from data_prep.stores.clients import FsspecClient

_OLDEST = (0, 12)
"""Before, obstore left the parts of a failed upload on the store."""
_ATTEMPTS = 4
_MAX_PARTS = 10_000
_UPLOADS_AT_ONCE = 4
_UNUSUAL_VARIABLES = ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT")
_UNUSUAL_SETTINGS = ("s3", "services", "use_fips_endpoint", "use_dualstack_endpoint")
"""Of the environment, and of the profile in ~/.aws/config: what botocore heeds and this module does not."""


class S3Client:
    """Requests to one bucket. See `clients.Client`."""

    _runtime_pid: ClassVar[int | None] = None
    """The process in which obstore started its threads."""

    def __init__(self, url: str, store: Any, part_bytes: int) -> None:
        """
        Args:
            url: `s3://BUCKET/PREFIX`.
            store: an `obstore.store.S3Store` of it.
            part_bytes: size of the parts of a large upload.
        """
        import obstore

        self._api: Any = obstore
        self._url = url
        self._store = store
        self._part_bytes = part_bytes

    @classmethod
    def open(cls, url: str, part_bytes: int) -> "S3Client | None":
        """The client for `s3://BUCKET/PREFIX`; None where s3fs has to serve.

        Raises:
            botocore.exceptions.BotoCoreError: the AWS configuration cannot be read (no such profile, ...).
        """
        scheme, _, rest = url.partition("://")
        if scheme != "s3" or cls._runtime_pid not in (None, os.getpid()):
            return None
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError:
            return None
        settings = _settings() if tuple(map(int, obstore.__version__.split(".")[:2])) >= _OLDEST else None
        if settings is None:
            return None
        cls._runtime_pid = os.getpid()
        bucket, _, prefix = rest.partition("/")
        return cls(url, S3Store(bucket, prefix=prefix or None, **settings), part_bytes)

    def get(self, path: str) -> bytes:
        return bytes(self._api.get(self._store, path).bytes())

    def get_range(self, path: str, offset: int, size: int) -> bytes:
        from obstore.exceptions import GenericError

        try:
            return bytes(self._api.get_range(self._store, path, start=offset, length=size))
        except GenericError:
            if offset < self.size(path):
                raise
            return b""  # S3 refuses a range that begins behind the end

    def put(self, path: str, data: bytes) -> None:
        _again(lambda: self._api.put(self._store, path, data, **self._parts(len(data))))

    def put_new(self, path: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        sent = 0

        def send() -> None:
            nonlocal sent
            sent += 1
            self._api.put(self._store, path, data, mode="create", use_multipart=False)

        try:
            _again(send)
        except AlreadyExistsError:
            # After a broken connection, what is there may well be ours.
            return sent > 1 and self.get(path) == data
        return True

    def put_file(self, local: Path, path: str) -> None:
        def send() -> None:
            with open(local, "rb") as file:
                self._api.put(self._store, path, file, **self._parts(os.fstat(file.fileno()).st_size))

        _again(send)

    def walk(self, folder: str) -> Iterator[str]:
        from obstore.exceptions import GenericError, InvalidPathError

        last = ""
        try:
            for chunk in self._api.list(self._store, folder or None):
                for item in chunk:
                    yield item["path"]
                    last = item["path"]
        except (GenericError, InvalidPathError) as error:
            if "invalid path" not in str(error):
                raise
            # One key that obstore cannot spell (`a//b`) spoils its whole listing. S3 lists in the order of the bytes.
            for path in FsspecClient(self._url, self._part_bytes).walk(folder):
                if path.encode() > last.encode():
                    yield path

    def size(self, path: str) -> int:
        return int(self._api.head(self._store, path)["size"])

    def stamp(self, path: str) -> str:
        details = self._api.head(self._store, path)
        return f"{details['size']}-{details['e_tag'] or details['last_modified']}".replace('"', "")

    def delete_many(self, paths: Sequence[str]) -> None:
        _again(lambda: self._api.delete(self._store, paths))

    def _parts(self, size: int) -> dict[str, Any]:
        """How to upload `size` bytes: in one put, or in parts (obstore aborts the upload if one fails)."""
        chunk = max(self._part_bytes, -(-size // _MAX_PARTS))
        return {"use_multipart": size > chunk, "chunk_size": chunk, "max_concurrency": _UPLOADS_AT_ONCE}


def _again(request: Callable[[], object]) -> None:
    """Makes a request that may be repeated. obstore repeats on 5xx, but not after a broken connection what HTTP calls not idempotent."""
    from obstore.exceptions import GenericError

    for attempt in range(_ATTEMPTS):
        try:
            request()
            return
        except GenericError as error:
            if attempt == _ATTEMPTS - 1 or " - HTTP error: " not in str(error):
                raise
            time.sleep(0.2 * 4**attempt)


class _Credentials:
    """Asks botocore for the current keys whenever obstore needs them: botocore knows profiles, SSO, roles and when to renew."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __call__(self) -> dict[str, Any]:
        keys = self._source.get_frozen_credentials()
        expires = datetime.now(timezone.utc) + timedelta(minutes=5)  # botocore renews in time: so ask it again and again
        return {"access_key_id": keys.access_key, "secret_access_key": keys.secret_key, "token": keys.token, "expires_at": expires}


def _settings() -> dict[str, Any] | None:
    """Arguments for S3Store from the AWS environment and configuration files, None if they hold what only s3fs understands."""
    try:
        import botocore.session
        import fsspec.config
    except ImportError:
        return None
    if fsspec.config.conf.get("s3") or any(os.environ.get(name) for name in _UNUSUAL_VARIABLES):
        return None
    session = botocore.session.get_session()
    profile = session.get_scoped_config()
    if any(name in profile for name in _UNUSUAL_SETTINGS):
        return None
    credentials = session.get_credentials()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or profile.get("endpoint_url")
    region = session.get_config_variable("region") or ("us-east-1" if endpoint else None)
    if credentials is None or region is None:
        return None  # s3fs says what is missing, or finds the bucket's region
    is_plain = bool(endpoint and endpoint.startswith("http://"))
    options: dict[str, Any] = {
        "allow_http": is_plain,
        "connect_timeout": timedelta(seconds=10),
        "read_timeout": timedelta(minutes=2),
        "timeout": timedelta(minutes=15),
    }
    authorities = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    if authorities and not is_plain:
        options["root_certificate"] = Path(authorities).read_bytes()
    settings = {"region": region, "credential_provider": _Credentials(credentials), "client_options": options}
    return {**settings, "endpoint": endpoint} if endpoint else settings
