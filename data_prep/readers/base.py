"""What every reader gives: slices of an input at planning time, raw samples of a slice at work time."""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.config import PrepConfig
from data_prep.reasons import Drop

MAX_DEPTH = 100
"""Of lists and objects in the extra columns: Python's own limits depend on its version and on how deep the stack is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Consecutive samples of one input: small enough to store in the plan, precise enough to start reading anywhere."""

    kind: str
    """Which reader: `folder`, `table` or `tar`."""
    path: str
    start: int
    """Number of the first sample within the input."""
    count: int
    offset: int = 0
    """Byte where the first sample begins (text tables, tars)."""
    names: tuple[str, ...] = ()
    """The images, relative to `path` (folders): the listing at planning time is what counts."""
    rows: tuple[int, ...] = ()
    """If not empty: only these samples of the slice, as ascending offsets from `start`. The others are passed over, their images unread."""

    @property
    def numbers(self) -> Sequence[int]:
        """Offsets from `start` of the samples to be read."""
        return self.rows or range(self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSample:
    """One sample as found. `problem` is set where not even the bytes could be had; the other fields are then empty."""

    source: str
    """Where it came from, for people: `photos/a/b.jpg`, `pairs.csv#12`, `x.tar/000123`."""
    number: int = 0
    """Offset from the start of its slice."""
    image: bytes = b""
    url: str | None = None
    """Address of the image, where the input only names one: whoever asked for the sample fetches it."""
    caption: str | None = None
    label: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that the input says of this sample."""
    problem: Drop | None = None


class Reader(Protocol):
    """A kind of input. `plan` and `read` see the samples in the same, deterministic order."""

    def plan(self, path: str, config: PrepConfig) -> Iterator[Slice]:
        """Cuts one input into slices of at most `config.samples_per_shard` samples.

        Raises:
            UserError: the input as a whole cannot be used (no such column, compressed, ...).
        """

    def read(self, part: Slice, config: PrepConfig) -> Iterator[RawSample]:
        """The samples of one slice; a bad one is yielded with its `problem`."""


def read_image_file(path: Path, max_bytes: int) -> bytes:
    """Bytes of an image file.

    Raises:
        Drop: missing_file, file_too_large or unreadable.
    """
    try:
        return read_regular_file(path, max_bytes)
    except (FileNotFoundError, NotADirectoryError):
        raise Drop("missing_file", str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Drop("unreadable", str(error)) from None


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Bytes of a file that is neither a device nor a pipe: `/dev/zero` has no end, and a pipe may never begin.

    Raises:
        OSError: it is not there, or cannot be read.
        Drop: file_too_large or unreadable.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Drop("unreadable", "not a regular file")
        if status.st_size > max_bytes:
            raise Drop("file_too_large", f"{status.st_size} bytes")
        return file.read(max_bytes)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # without waiting for the other end of a pipe; nothing changes for files


def decode_text(data: bytes) -> str:
    """A caption file's text.

    Raises:
        Drop: bad_caption.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Drop("bad_caption", str(error)) from None


def parse_object(data: bytes | str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Drop: bad_json.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Drop("bad_json", str(error)) from None
    if not isinstance(values, dict):
        raise Drop("bad_json", f"{type(values).__name__} instead of an object")
    return values


def split_fields(values: Mapping[str, Any], config: PrepConfig, taken: str = "") -> tuple[str | None, int | None, dict[str, Any]]:
    """(caption, label, everything else but the column `taken`) of a table row or a JSON object. A label that is no integer stays with the rest."""
    rest = {str(key): plain_json(value) for key, value in values.items() if key not in (config.columns.image, taken)}
    caption = rest.pop(config.columns.caption, None)
    if caption is not None and not isinstance(caption, str):
        caption = str(caption) if isinstance(caption, (int, float)) else None
    label = rest.get(config.columns.label)
    number = as_integer(label)
    if number is not None:
        del rest[config.columns.label]
    return caption, number, rest


def as_integer(value: Any) -> int | None:
    """7, 7.0, "7" -> 7; anything else -> None."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
        return int(value) if number.is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None


def plain_json(value: Any, depth: int = 0) -> Any:
    """The value in JSON's types: NaN becomes null, dates and other foreign types their text, bytes are left out.

    Raises:
        Drop: bad_json, where it is nested so deeply that it could not be written again.
    """
    if depth > MAX_DEPTH:
        raise Drop("bad_json", f"nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bytes, bytearray)):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, depth + 1) for item in value]
    return str(value)
