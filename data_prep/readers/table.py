"""CSV, TSV, JSON lines (each also .gz) and Parquet whose rows name images and captions.

A row names its image by address (`columns.url`, a URL list) or by path (`columns.image`), or, in Parquet, holds its bytes. Relative paths are taken
from the table's own folder; an address may be a file there too, and nowhere else on this machine. Text tables are planned in one pass that notes the
byte at which every slice begins, so that a task does not read the rows before its own; in a compressed table it has to decompress them (some 200 MB a
second), so large lists are better left plain or made Parquet, which is read by row groups. TSV is read without quoting, as the published caption sets
write it; CSV with it.
"""

import csv
import difflib
import gzip
import json
import logging
import os
import posixpath
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import numpy as np

from configs.errors import UserError
from data_prep.config import PrepConfig
from data_prep.inputs import input_size, is_remote, open_input
from data_prep.readers.base import RawSample, Slice, parse_object, read_image_file, split_fields
from data_prep.reasons import Drop

logger = logging.getLogger(__name__)

LARGE_GZIP_BYTES = 2**30
LARGE_GROUP_ROWS = 2_000_000
_GROUP_READ_BYTES = 2**22
"""Of one column of a row group at a time, so that memory does not grow with the row group."""
_BATCH_ROWS = 256
"""Rows decoded at a time: few, because they may hold images."""

Row = dict[str, Any]


class TableReader:
    """Reads tables."""

    def plan(self, path: str, config: PrepConfig) -> Iterator[Slice]:
        size = config.samples_per_shard
        if _suffix(path) == ".parquet":
            with _parquet(path) as file:
                _image_column(path, list(file.schema_arrow.names), config)
                total = file.metadata.num_rows
                _warn_of_large_groups(path, file.metadata)
            for start in range(0, total, size):
                yield Slice(kind="table", path=path, start=start, count=min(size, total - start))
            return
        number, begin = 0, 0
        for number, offset in enumerate(_starts(path, config), start=1):
            if number % size == 1 or size == 1:
                begin = offset
            if number % size == 0:
                yield Slice(kind="table", path=path, start=number - size, count=size, offset=begin)
        if number % size:
            yield Slice(kind="table", path=path, start=number - number % size, count=number % size, offset=begin)

    def read(self, part: Slice, config: PrepConfig) -> Iterator[RawSample]:
        name = part.path.rpartition("/")[2]
        for number, row in _rows(part):
            source = f"{name}#{part.start + number}"
            try:
                values = parse_object(row) if isinstance(row, str) else row
                yield _sample(values, source, number, part.path, config)
            except Drop as problem:
                yield RawSample(source=source, number=number, problem=problem)


def _suffix(path: str) -> str:
    """`.csv`, `.tsv`, `.jsonl` or `.parquet`."""
    return posixpath.splitext(path.lower().removesuffix(".gz"))[1]


@contextmanager
def _open_text(path: str) -> Iterator[BinaryIO]:
    """A text table, decompressed."""
    with open_input(path) as file:
        if not path.lower().endswith(".gz"):
            yield file
            return
        with gzip.GzipFile(fileobj=file) as plain:
            try:
                yield cast(BinaryIO, plain)
            except (EOFError, zlib.error) as error:
                raise OSError(f"{path} is damaged or cut off: {error}") from None


def _starts(path: str, config: PrepConfig) -> Iterator[int]:
    """The byte at which every row begins, in the decompressed file."""
    if path.lower().endswith(".gz") and input_size(path) > LARGE_GZIP_BYTES:
        logger.warning("%s is large and compressed: every task has to decompress what stands before its rows. Parquet would be faster", path)
    check: Callable[[Any], None] = lambda row: None  # noqa: E731
    try:
        with _open_text(path) as file:
            if _suffix(path) == ".jsonl":
                records: Iterator[tuple[Any, int, int]] = _lines(file)
                check = lambda line: _check_first_object(path, line, config)  # noqa: E731
            else:
                records = _csv_records(file, path)
                _image_column(path, next(records, ([], 0, 0))[0], config)
            for number, (record, begin, _) in enumerate(records):
                if number == 0:
                    check(record)
                yield begin
    except OSError as error:
        raise UserError(f"{path} cannot be read", got=error, fix="mend or replace it") from None


def _rows(part: Slice) -> Iterator[tuple[int, Row | str]]:
    """(offset, row) of the rows that a slice wants; JSON lines come as text, because parsing them can fail one by one."""
    if _suffix(part.path) == ".parquet":
        yield from _parquet_rows(part)
        return
    wanted, last = frozenset(part.numbers), part.numbers[-1]
    with _open_text(part.path) as file:
        if _suffix(part.path) == ".jsonl":
            file.seek(part.offset)
            rows: Iterator[Row | str] = (line for line, _, _ in _lines(file))
        else:
            header = next(_csv_records(file, part.path), ([], 0, 0))[0]
            file.seek(part.offset)
            rows = (dict(zip(header, row, strict=False)) for row, _, _ in _csv_records(file, part.path))
        for number, row in enumerate(rows):
            if number in wanted:
                yield number, row
            if number == last:
                return


def _csv_records(file: BinaryIO, path: str) -> Iterator[tuple[list[str], int, int]]:
    """(fields, first byte, byte after the last) of every non-empty record from the file's position on."""
    if _suffix(path) == ".tsv":
        for line, begin, end in _lines(file):
            # As in CSV below: a stray carriage return is a space.
            yield line.replace("\0", "").rstrip("\r\n").replace("\r", " ").split("\t"), begin, end
        return
    csv.field_size_limit(2**31 - 1)  # its default of 128 KiB fails whole files for one long field
    position = file.tell()

    def lines() -> Iterator[str]:
        nonlocal position
        while raw := file.readline():
            position += len(raw)
            text = raw.decode("utf-8-sig" if position == len(raw) else "utf-8", errors="replace")
            # csv gives up the whole file for one stray carriage return in a caption.
            yield text.replace("\0", "").replace("\r\n", "\n").replace("\r", " ")

    begin = position
    for row in csv.reader(lines()):
        if row:
            yield row, begin, position
        begin = position


def _lines(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(text, first byte, byte after the last) of every non-blank line."""
    position = file.tell()
    while raw := file.readline():
        begin, position = position, position + len(raw)
        if raw.strip():
            yield raw.decode("utf-8-sig" if begin == 0 else "utf-8", errors="replace"), begin, position


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow", fix="pip install pyarrow") from None
    with open_input(path) as file:
        try:
            opened = pyarrow.parquet.ParquetFile(file, buffer_size=_GROUP_READ_BYTES, pre_buffer=False)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is not a Parquet file", got=error) from None
        yield opened


def _warn_of_large_groups(path: str, metadata: Any) -> None:
    largest = max((metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)), default=0)
    if largest > LARGE_GROUP_ROWS:
        logger.warning("%s has a row group of %d rows: every task decodes what stands before its own. 100,000 would be faster", path, largest)


def _parquet_rows(part: Slice) -> Iterator[tuple[int, Row]]:
    wanted = np.asarray(part.numbers)
    with _parquet(part.path) as file:
        groups: list[int] = []
        begin, number = 0, 0
        for group in range(file.metadata.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if begin <= part.start + wanted[-1] and end > part.start + wanted[0]:
                groups.append(group)
            elif end <= part.start + wanted[0]:
                number = end
            begin = end
        batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, use_threads=False)  # a task has one CPU
        number -= part.start
        while number <= wanted[-1]:
            try:
                batch = next(batches, None)
            except ValueError as error:  # pyarrow.ArrowInvalid: a damaged column chunk
                raise OSError(f"damaged Parquet data: {error}") from None
            if batch is None:
                return
            here = wanted[(wanted >= number) & (wanted < number + batch.num_rows)]
            if len(here):
                yield from zip(here.tolist(), _plain_rows(batch.take(here - number)), strict=True)
            number += batch.num_rows


def _plain_rows(batch: Any) -> list[Row]:
    """The rows of a record batch as Python values."""
    try:
        rows: list[Row] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError):  # text that is not UTF-8, a date that Python cannot hold: such a value must not cost the others
        columns = [[_plain_value(value) for value in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _plain_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:  # as in text tables
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace") if hasattr(scalar, "as_buffer") else None
    except (ValueError, OverflowError):
        return None


def _sample(values: Row, source: str, number: int, path: str, config: PrepConfig) -> RawSample:
    """The sample of one row, its image fetched only where it lies on this machine."""
    columns = config.columns
    if columns.image in values or columns.url not in values:
        caption, label, extra = split_fields(values, config)
        image, url = _named_image(values.get(columns.image), path, config)
    else:
        caption, label, extra = split_fields(values, config, taken=columns.url)
        image, url = _addressed_image(values[columns.url], path, config)
    return RawSample(source=source, number=number, image=image, url=url or None, caption=caption, label=label, extra=extra)


def _addressed_image(value: Any, path: str, config: PrepConfig) -> tuple[bytes, str]:
    """(b"", address), or (bytes, "") of a file below the folder of a table on this machine (`columns.image` may name files anywhere)."""
    if not isinstance(value, str) or not value.strip():
        raise Drop("bad_url", repr(value)[:200])
    is_file = not is_remote(value) or value.strip().startswith("file://")
    if is_file and (is_remote(path) or not _is_beside(value.strip().removeprefix("file://"), path)):
        raise Drop("bad_url", f"a file outside the folder of the list: {value[:200]}")
    try:
        return _named_image(value, path, config)
    except Drop as problem:
        if problem.reason == "missing_file":
            raise Drop("bad_url", f"neither an address nor a file here: {value[:200]}") from None
        raise


def _is_beside(name: str, path: str) -> bool:
    """Whether a file lies below the folder of a table. Lists of addresses come from strangers: theirs must not name any file of this machine."""
    name, folder = unquote(name), os.path.abspath(os.path.dirname(path))
    return ".." not in name.split("/") and os.path.abspath(os.path.join(folder, name)).startswith(f"{folder.rstrip('/')}/")


def _named_image(value: Any, path: str, config: PrepConfig) -> tuple[bytes, str]:
    """(bytes, "") or (b"", address) of the image that a row names or holds (`{"bytes": ..}` is how Hugging Face stores an image column)."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        if len(value) > config.limits.max_file_bytes:
            raise Drop("file_too_large", f"{len(value)} bytes")
        return value, ""
    if not isinstance(value, str) or not value.strip():
        raise Drop("missing_file", "the row names none")
    name = value.strip()
    is_file = name.startswith("file://")
    if is_remote(name) and not is_file:
        return b"", name
    if is_remote(path):
        if is_file or name.startswith("/") or ".." in name.split("/"):
            raise Drop("missing_file", f"{name[:120]} is outside the folder of a remote table")
        return b"", f"{path.rpartition('/')[0]}/{name}"
    return read_image_file(Path(path).parent / (unquote(name[len("file://") :]) if is_file else name), config.limits.max_file_bytes), ""


def _check_first_object(path: str, line: str, config: PrepConfig) -> None:
    try:
        values = json.loads(line)
    except ValueError:
        return  # one bad line costs that line
    if isinstance(values, dict):
        _image_column(path, list(values), config, needs_caption=False)


def _image_column(path: str, found: list[str], config: PrepConfig, *, needs_caption: bool = True) -> None:
    """Refuses a table without the columns we were told to read, before a million rows are dropped one by one."""
    if not found:
        raise UserError(f"{path} names no columns", got="nothing", expected="a table with the names of its columns, and rows", fix="check the file")
    columns = config.columns
    wanted = [] if columns.url in found else ["image"]
    if needs_caption and config.missing_caption != "empty":
        wanted.append("caption")
    for role in wanted:
        name = getattr(columns, role)
        if name in found:
            continue
        close = difflib.get_close_matches(name, found, n=1)
        hint = f" (perhaps columns.{role}={close[0]})" if close else ""
        also = f" nor {columns.url!r}" if role == "image" else ""
        fix = f"name the {role} column: columns.{role}=NAME{hint}" + (", or columns.url=NAME for addresses" if role == "image" else "")
        raise UserError(f"{path} has no column {name!r}{also}", got=", ".join(found)[:300], fix=fix)
