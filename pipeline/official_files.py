"""Files of the official code (big_vision): `.npz` archives and folders of TensorStore arrays, read without JAX; `.npz` written.

A folder holds one zarr (version 2) array per parameter, `/` in names written as `~`: `params~decoder~final_norm~scale/.zarray`.
"""

import contextlib
import gzip
import itertools
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.loader import build_config, to_dict
from model.config import JetFormerConfig
from model.convert.big_vision import config_from_official

CONFIG_KEY = "jetway_config"
"""Our configuration as JSON, in archives that we write; readers of big_vision look at `params/` only."""
REFERENCE_CONFIG_KEY = "config_json"
"""Configuration in the reference's terms, in parity fixtures."""
PREFIXES = ("params/", "opt/target/")
"""Where parameters stand in a checkpoint with optimiser state, newer and older; parameters alone have no prefix."""


@dataclass(frozen=True, slots=True)
class OfficialCheckpoint:
    """Parameters under their official names, and the configuration where one was stored with them."""

    arrays: dict[str, np.ndarray]
    config: JetFormerConfig | None


def read_official(path: Path) -> OfficialCheckpoint:
    """Reads an archive, a folder, or the name that big_vision's `-LAST` pointer stands beside.

    Raises:
        UserError: nothing there, unreadable, or no parameters in it.
    """
    last = path.with_name(f"{path.name}-LAST")
    if not path.exists() and last.is_file():
        path = path.with_name(f"{path.name}-{last.read_text(encoding='utf-8').strip()}")
    if not path.exists():
        raise UserError("no such file or folder", got=path, expected="an .npz archive or a folder written by big_vision")
    try:
        found = _read_folder(path) if path.is_dir() else _read_archive(path)
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}", got=f"{type(error).__name__}: {error}", expected="a checkpoint of big_vision") from None
    arrays = _parameters(found)
    if not arrays:
        raise UserError(f"no parameters in {path}", got=f"{len(found)} arrays", expected="names such as params/decoder/final_norm/scale")
    return OfficialCheckpoint({name: _to_float32(name, value) for name, value in arrays.items()}, _stored_config(found, path))


def write_official(path: Path, arrays: Mapping[str, np.ndarray], config: JetFormerConfig) -> None:
    """Writes parameters as `params/NAME`, with the configuration, to an .npz archive, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    members = {f"params/{name}": value for name, value in arrays.items()}
    members[CONFIG_KEY] = np.array(json.dumps(to_dict(config), sort_keys=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **members)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}", got=error, fix="free space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _parameters(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in PREFIXES:
        below = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        if below:
            return below
    return {name: value for name, value in found.items() if name not in (CONFIG_KEY, REFERENCE_CONFIG_KEY)}


def _stored_config(found: Mapping[str, np.ndarray], path: Path) -> JetFormerConfig | None:
    if CONFIG_KEY in found:
        return build_config(JetFormerConfig, json.loads(str(found[CONFIG_KEY])), source=f"the configuration in {path}")
    if REFERENCE_CONFIG_KEY in found:
        return config_from_official(json.loads(str(found[REFERENCE_CONFIG_KEY])))
    return None


def _to_float32(name: str, value: np.ndarray) -> np.ndarray:
    """numpy stores JAX's bfloat16 as two untyped bytes."""
    if value.dtype.kind == "V" and value.dtype.itemsize == 2:
        return (value.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if value.dtype.kind != "f":
        raise UserError(f"{name} holds no numbers that a model is made of", got=value.dtype, expected="float32 or bfloat16")
    return value.astype(np.float32, copy=False)


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("one array, not an archive of named ones")
    with loaded:
        return {name: loaded[name] for name in loaded.files}


def _read_folder(path: Path) -> dict[str, np.ndarray]:
    """Parameters only: optimiser state is twice their size and of no use here."""
    folders = sorted(entry for entry in path.iterdir() if (entry / ".zarray").is_file())
    named = {entry.name.replace("~", "/"): entry for entry in folders}
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in named)), "")
    return {name: _read_zarr(entry) for name, entry in named.items() if name.startswith(prefix)}


def _read_zarr(folder: Path) -> np.ndarray:
    """One zarr array of version 2 (zarr-specs, "Storage specification version 2"), uncompressed or by gzip or zlib, as JAX writes it."""
    meta: dict[str, Any] = json.loads((folder / ".zarray").read_text(encoding="utf-8"))
    compressor = (meta.get("compressor") or {}).get("id")
    if meta.get("zarr_format") != 2 or meta.get("order", "C") != "C" or meta.get("filters") or compressor not in (None, "gzip", "zlib"):
        raise ValueError(f"{folder.name}: zarr_format {meta.get('zarr_format')}, compressor {compressor}, order {meta.get('order')} is not supported")
    dtype = np.dtype("V2") if meta["dtype"] == "bfloat16" else np.dtype(meta["dtype"])
    shape, chunks = tuple(meta["shape"]), tuple(meta["chunks"])
    result = np.zeros(shape, dtype)
    if meta.get("fill_value"):
        result[...] = meta["fill_value"]
    for index in itertools.product(*(range(math.ceil(size / chunk)) for size, chunk in zip(shape, chunks, strict=True))):
        file = folder / (meta.get("dimension_separator", ".").join(map(str, index)) or "0")
        if not file.is_file():
            continue  # a chunk of fill values is not stored
        data = file.read_bytes()
        data = data if compressor is None else gzip.decompress(data) if compressor == "gzip" else zlib.decompress(data)
        block = np.frombuffer(data, dtype).reshape(chunks)
        target = tuple(slice(i * chunk, min((i + 1) * chunk, size)) for i, chunk, size in zip(index, chunks, shape, strict=True))
        result[target] = block[tuple(slice(0, part.stop - part.start) for part in target)]
    return result
