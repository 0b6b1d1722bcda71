"""Files that are whole or absent: safetensors written with their digest in one pass, fsync, atomic replacement."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint.format import DTYPE_NAMES, DTYPES

CHUNK_BYTES = 16 << 20
"""Bytes hashed and written at a time."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file; `load` is called when its turn to be written has come, so one tensor at a time is in memory."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> tuple[int, str]:
    """Writes and fsyncs a safetensors file (the format of huggingface/safetensors, README "Format").

    Written here rather than by the library because the digest must be that of the bytes meant, taken while they are written, and
    because a full disk must show as the OSError it is.

    Returns:
        (bytes, hex sha256).

    Raises:
        OSError: as `open` and `write` raise it, for example ENOSPC.
        ValueError: a dtype that DTYPES does not list.
    """
    # Widest type first: every tensor is then aligned to its item size, as readers that map the file expect.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for entry in ordered:
        if entry.dtype not in DTYPE_NAMES:
            raise ValueError(f"{entry.key} is of type {entry.dtype}: a checkpoint stores {', '.join(DTYPES)}")
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in _chunks(text, ordered):
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _chunks(header: bytes, entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for entry in entries:
        tensor = entry.load().detach()
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise ValueError(f"{entry.key}: announced {entry.dtype} {entry.shape}, found {tensor.dtype} {tuple(tensor.shape)}")
        if not tensor.numel():
            continue
        flat = tensor.to("cpu").contiguous()
        flat = torch.as_strided(flat, (flat.numel(),), (1,), flat.storage_offset())  # one element may have any stride, which view refuses
        data = flat.view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def hash_file(path: Path) -> str:
    """Hex sha256 of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Writes and fsyncs a file (not atomically: for folders that are published whole); returns its hex sha256."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Replaces a small file atomically and durably."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_text(temporary, text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Makes the creations and renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
