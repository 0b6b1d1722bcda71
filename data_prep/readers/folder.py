"""A folder tree of images, each with an optional `.txt` (caption) and `.json` (caption, label, anything) of the same name."""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.config import PrepConfig
from data_prep.images.formats import EXTENSIONS
from data_prep.readers.base import RawSample, Slice, decode_text, parse_object, read_image_file, split_fields
from data_prep.reasons import Drop


def list_images(root: Path) -> list[str]:
    """Relative `/`-separated paths of the image files below `root`, sorted; hidden files and folders are skipped."""
    found = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(root)
        found += [(relative / name).as_posix() for name in files if not name.startswith(".") and _extension(name) in EXTENSIONS]
    return sorted(found)


class FolderReader:
    """Reads folders. The plan holds the names, so that files added later do not move the others to other shards."""

    def plan(self, path: Path, config: PrepConfig) -> Iterator[Slice]:
        names, size = list_images(path), config.samples_per_shard
        for start in range(0, len(names), size):
            part = tuple(names[start : start + size])
            yield Slice(kind="folder", path=str(path), start=start, count=len(part), names=part)

    def read(self, part: Slice, config: PrepConfig) -> Iterator[RawSample]:
        root = Path(part.path)
        for name in part.names:
            source = f"{root.name}/{name}"
            try:
                yield _read(root / name, source, config)
            except Drop as problem:
                yield RawSample(source=source, problem=problem)


def _read(path: Path, source: str, config: PrepConfig) -> RawSample:
    image = read_image_file(path, config.limits.max_file_bytes)
    beside_json = _sidecar(path, ".json", 16 * config.limits.max_caption_bytes)
    values = parse_object(beside_json) if beside_json is not None else {}
    caption, label, extra = split_fields(values, config)
    text = _sidecar(path, ".txt", config.limits.max_caption_bytes)
    if text is not None:
        caption = decode_text(text)
    return RawSample(source=source, image=image, caption=caption, label=label, extra=extra)


def _sidecar(path: Path, suffix: str, max_bytes: int) -> bytes | None:
    """Content of `photo.txt` beside `photo.jpg`, None if there is none."""
    beside = path.with_suffix(suffix)
    try:
        if beside.stat().st_size > max_bytes:
            raise Drop("caption_too_long" if suffix == ".txt" else "bad_json", f"{beside.name}: above {max_bytes} bytes")
        return beside.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Drop("unreadable", str(error)) from None


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""
