"""A folder tree of images, each with an optional `.txt` (caption) and `.json` (caption, label, anything) of the same name.

On an object store the captions are read by a few threads ahead of their use, and the images are left to the downloader.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data_prep.config import PrepConfig
from data_prep.inputs import is_remote, list_images
from data_prep.readers.base import RawSample, Slice, decode_text, parse_object, read_image_file, read_regular_file, split_fields
from data_prep.reasons import Drop
from data_prep.storage import Storage, open_storage

NUM_THREADS = 16


class FolderReader:
    """Reads folders. The plan holds the names, so that files added later do not move the others to other shards."""

    def plan(self, path: str, config: PrepConfig) -> Iterator[Slice]:
        names, size = list_images(path), config.samples_per_shard
        for start in range(0, len(names), size):
            part = tuple(names[start : start + size])
            yield Slice(kind="folder", path=path, start=start, count=len(part), names=part)

    def read(self, part: Slice, config: PrepConfig) -> Iterator[RawSample]:
        if is_remote(part.path):
            yield from _read_remote(part, config)
            return
        root = Path(part.path)
        for number in part.numbers:
            name = part.names[number]
            source = f"{root.name}/{name}"
            try:
                image = read_image_file(root / name, config.limits.max_file_bytes)
                text, values = (_local_sidecar(root / name, suffix, config) for suffix in (".txt", ".json"))
                yield _sample(source, number, text, values, config, image=image)
            except Drop as problem:
                yield RawSample(source=source, number=number, problem=problem)


def _read_remote(part: Slice, config: PrepConfig) -> Iterator[RawSample]:
    storage = open_storage(part.path)

    def read(number: int) -> RawSample:
        name = part.names[number]
        source = f"{part.path.rpartition('/')[2]}/{name}"
        try:
            text, values = (_remote_sidecar(storage, name, suffix, config) for suffix in (".txt", ".json"))
            return _sample(source, number, text, values, config, url=f"{part.path}/{name}")
        except Drop as problem:
            return RawSample(source=source, number=number, problem=problem)

    waiting: deque[Future[RawSample]] = deque()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for number in part.numbers:
            waiting.append(pool.submit(read, number))
            if len(waiting) > 4 * NUM_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _sample(
    source: str, number: int, text: bytes | None, beside: bytes | None, config: PrepConfig, *, image: bytes = b"", url: str | None = None
) -> RawSample:
    caption, label, extra = split_fields(parse_object(beside) if beside is not None else {}, config)
    if text is not None:
        caption = decode_text(text)
    return RawSample(source=source, number=number, image=image, url=url, caption=caption, label=label, extra=extra)


def _max_bytes(suffix: str, config: PrepConfig) -> int:
    return config.limits.max_caption_bytes * (1 if suffix == ".txt" else 16)


def _too_long(suffix: str, name: str, config: PrepConfig) -> Drop:
    return Drop("caption_too_long" if suffix == ".txt" else "bad_json", f"{name}: above {_max_bytes(suffix, config)} bytes")


def _local_sidecar(path: Path, suffix: str, config: PrepConfig) -> bytes | None:
    """Content of `photo.txt` beside `photo.jpg`, None if there is none."""
    beside = path.with_suffix(suffix)
    try:
        return read_regular_file(beside, _max_bytes(suffix, config))
    except FileNotFoundError:
        return None
    except Drop as problem:
        raise _too_long(suffix, beside.name, config) if problem.reason == "file_too_large" else problem from None
    except OSError as error:
        raise Drop("unreadable", str(error)) from None


def _remote_sidecar(storage: Storage, name: str, suffix: str, config: PrepConfig) -> bytes | None:
    beside = f"{name.rpartition('.')[0]}{suffix}"
    try:
        data = storage.read_range(beside, 0, _max_bytes(suffix, config) + 1)
    except FileNotFoundError:
        return None
    if len(data) > _max_bytes(suffix, config):
        raise _too_long(suffix, beside, config)
    return data
