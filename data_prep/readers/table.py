"""CSV, TSV, JSON lines and Parquet whose rows name image files (or, in Parquet, hold their bytes) and captions.

Relative paths are taken from the table's own folder. Text tables are planned in one pass that notes the byte at which every
slice begins, so that a task does not read the rows before its own. TSV is read without quoting, as the published
caption sets write it; CSV with it.
"""

import csv
import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import UserError
from data_prep.config import PrepConfig
from data_prep.readers.base import RawSample, Slice, parse_object, read_image_file, split_fields
from data_prep.reasons import Drop

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

Row = dict[str, Any]


class TableReader:
    """Reads tables."""

    def plan(self, path: Path, config: PrepConfig) -> Iterator[Slice]:
        size = config.samples_per_shard
        if path.suffix.lower() == ".parquet":
            file = _parquet(path)
            _check_columns(path, list(file.schema_arrow.names), config)
            total = file.metadata.num_rows
            starts = [(start, 0) for start in range(0, total, size)]
        else:
            starts, total = self._plan_text(path, config)
        for start, offset in starts:
            yield Slice(kind="table", path=str(path), start=start, count=min(size, total - start), offset=offset)

    def read(self, part: Slice, config: PrepConfig) -> Iterator[RawSample]:
        path = Path(part.path)
        for number, row in enumerate(_rows(path, part), start=part.start):
            source = f"{path.name}#{number}"
            try:
                values = parse_object(row) if isinstance(row, str) else row
                image = _image(values.get(config.columns.image), path.parent, config)
                caption, label, extra = split_fields(values, config)
                yield RawSample(source=source, image=image, caption=caption, label=label, extra=extra)
            except Drop as problem:
                yield RawSample(source=source, problem=problem)

    def _plan_text(self, path: Path, config: PrepConfig) -> tuple[list[tuple[int, int]], int]:
        """([(row, byte offset) of every slice], number of rows)."""
        starts, total = [], 0
        with open(path, "rb") as file:
            if path.suffix.lower() == ".jsonl":
                records: Iterator[tuple[Any, int, int]] = _lines(file)
                check: Callable[[Any], None] = lambda line: _check_first_object(path, line, config)  # noqa: E731
            else:
                records = _csv_records(file, path)
                _check_columns(path, next(records, ([], 0, 0))[0], config)
                check = lambda row: None  # noqa: E731
            for record, begin, _ in records:
                if total == 0:
                    check(record)
                if total % config.samples_per_shard == 0:
                    starts.append((total, begin))
                total += 1
        return starts, total


def _rows(path: Path, part: Slice) -> Iterator[Row | str]:
    """The rows of a slice; JSON lines come as text, because parsing them can fail one by one."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path, part)
        return
    with open(path, "rb") as file:
        if suffix == ".jsonl":
            file.seek(part.offset)
            for number, (line, _, _) in enumerate(_lines(file), start=1):
                yield line
                if number == part.count:
                    return
        else:
            header = next(_csv_records(file, path), ([], 0, 0))[0]
            file.seek(part.offset)
            for number, (row, _, _) in enumerate(_csv_records(file, path), start=1):
                yield dict(zip(header, row, strict=False))
                if number == part.count:
                    return


def _csv_records(file: BinaryIO, path: Path) -> Iterator[tuple[list[str], int, int]]:
    """(fields, first byte, byte after the last) of every non-empty record from the file's position on."""
    csv.field_size_limit(2**31 - 1)  # its default of 128 KiB fails whole files for one long field
    position = file.tell()

    def lines() -> Iterator[str]:
        nonlocal position
        while raw := file.readline():
            position += len(raw)
            text = raw.decode("utf-8-sig" if position == len(raw) else "utf-8", errors="replace")
            # csv gives up the whole file for one stray carriage return in a caption.
            yield text.replace("\0", "").replace("\r\n", "\n").replace("\r", " ")

    is_tsv = path.suffix.lower() == ".tsv"
    reader = csv.reader(lines(), delimiter="\t" if is_tsv else ",", quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL)
    begin = position
    for row in reader:
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


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow", fix="pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file", got=error) from None


def _parquet_rows(path: Path, part: Slice) -> Iterator[Row]:
    file = _parquet(path)
    groups: list[int] = []
    stop, begin, skipped = part.start + part.count, 0, 0
    for group in range(file.metadata.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        if begin < stop and end > part.start:
            groups.append(group)
        elif end <= part.start:
            skipped = end
        begin = end
    number = skipped
    batches = file.iter_batches(batch_size=256, row_groups=groups)
    while True:
        try:
            batch = next(batches, None)
        except ValueError as error:  # pyarrow.ArrowInvalid: a damaged column chunk
            raise OSError(f"damaged Parquet data: {error}") from None
        if batch is None:
            return
        low, high = max(0, part.start - number), min(batch.num_rows, stop - number)
        if low < high:
            yield from batch.slice(low, high - low).to_pylist()
        number += batch.num_rows


def _image(value: Any, folder: Path, config: PrepConfig) -> bytes:
    """Bytes of the image that a row names or holds (`{"bytes": ..}` is how Hugging Face stores an image column)."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        if len(value) > config.limits.max_file_bytes:
            raise Drop("file_too_large", f"{len(value)} bytes")
        return value
    if not isinstance(value, str) or not value.strip():
        raise Drop("missing_file", "the row names none")
    if "://" in value:
        raise Drop("missing_file", f"{value[:120]} is an address, not a local file")
    return read_image_file(folder / value.strip(), config.limits.max_file_bytes)


def _check_first_object(path: Path, line: str, config: PrepConfig) -> None:
    try:
        values = json.loads(line)
    except ValueError:
        return  # one bad line costs that line
    if isinstance(values, dict):
        _check_columns(path, list(values), config, wanted=("image",))


def _check_columns(path: Path, found: list[str], config: PrepConfig, wanted: tuple[str, ...] = ("image", "caption")) -> None:
    """Refuses a table without the columns we were told to read, before a million rows are dropped one by one."""
    for role in wanted:
        name = getattr(config.columns, role)
        if name in found or (role == "caption" and config.missing_caption == "empty"):
            continue
        close = difflib.get_close_matches(name, found, n=1)
        hint = f" (perhaps columns.{role}={close[0]})" if close else ""
        raise UserError(
            f"{path} has no column {name!r}", got=", ".join(found)[:300] or "an empty file", fix=f"name the {role} column: columns.{role}=NAME{hint}"
        )
