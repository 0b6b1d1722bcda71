"""The columnar sidecar of a shard: what is known of its samples, without the images.

`metadata/train-000000.parquet` has one row per sample in the order of the shard, so that duplicates, takedowns, statistics and
anyone's own queries read a few columns in place of whole tars. Columns are those of `Facts`; `sha256` is 32 bytes, `phash` uint64.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from configs.errors import UserError
from data_prep.storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One row: one kept sample."""

    key: str
    source: str
    """Where the input has it: `pairs.parquet#12`."""
    url: str
    """Address it was fetched from, empty if it was not."""
    caption: str
    width: int
    """Of the original picture as it is shown, in pixels."""
    height: int
    format: str
    """Of the original: `jpeg`, `png`, ..."""
    jpeg_quality: int
    """Estimated quality of the original JPEG, 1-100; -1 for other formats and unusual tables."""
    num_bytes: int
    """Of the original file."""
    sha256: bytes
    """Of the original file."""
    phash: int
    """64-bit perceptual hash of the stored picture."""


def metadata_path(name: str, folder: str = "metadata") -> str:
    """Path of the sidecar of a shard (or of a part) inside the data set."""
    return f"{folder}/{name}.parquet"


def schema() -> Any:
    """The `pyarrow.Schema` of every sidecar."""
    import pyarrow as pa

    types = {
        "width": pa.int32(),
        "height": pa.int32(),
        "jpeg_quality": pa.int8(),
        "num_bytes": pa.int64(),
        "sha256": pa.binary(32),
        "phash": pa.uint64(),
    }
    return pa.schema([pa.field(field.name, types.get(field.name, pa.string()), nullable=False) for field in fields(Facts)])


def to_bytes(table: Any) -> bytes:
    """A `pyarrow.Table` of `schema` as Parquet; the same bytes for the same rows and the same pyarrow."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=65_536)
    return buffer.getvalue()


def table_of(rows: Sequence[Facts]) -> Any:
    """A `pyarrow.Table` of `schema` with these rows."""
    import pyarrow as pa

    return pa.Table.from_pylist([asdict(row) for row in rows], schema=schema())


def dump(storage: Storage, name: str, table: Any, *, folder: str = "metadata") -> str:
    """Publishes a sidecar; returns the hex SHA-256 of the file."""
    data = to_bytes(table)
    storage.put_bytes(metadata_path(name, folder), data)
    return hashlib.sha256(data).hexdigest()


def load(storage: Storage, name: str, *, columns: Sequence[str] | None = None, sha256: str = "", folder: str = "metadata") -> Any:
    """The sidecar of a shard as a `pyarrow.Table`, whole or some columns of it.

    Raises:
        UserError: missing, damaged, or (with `sha256`) another one than the manifest names.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = metadata_path(name, folder)
    where, fix = f"{storage.url}/{path}", "restore it, or prepare the data set again"
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{where} is missing", fix=fix) from None
    if sha256 and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise UserError(f"{where} is damaged", got=f"sha256 {found}", expected=sha256, fix=fix)
    try:
        # Without threads: one of pyarrow's that still lets go of a Python object while the interpreter ends aborts the process.
        return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(columns=list(columns) if columns is not None else None, use_threads=False)
    except pa.ArrowInvalid as error:
        raise UserError(f"{where} is damaged", got=error, fix=fix) from None
