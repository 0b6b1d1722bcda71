"""WebDataset tars: members with the same path up to the first dot of the file name are one sample."""

import logging
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from configs.errors import UserError
from data_prep.config import PrepConfig
from data_prep.images.formats import EXTENSIONS
from data_prep.inputs import open_input
from data_prep.readers.base import RawSample, Slice, as_integer, decode_text, parse_object, split_fields
from data_prep.reasons import Drop

logger = logging.getLogger(__name__)

Group = tuple[str, list[tuple[str, tarfile.TarInfo]]]
"""(key, [(extension, member)])."""


class TarReader:
    """Reads uncompressed tars of any dialect. The plan notes the byte where every slice begins."""

    def plan(self, path: str, config: PrepConfig) -> Iterator[Slice]:
        size, total, offset = config.samples_per_shard, 0, 0
        try:
            with open_input(path) as file:
                archive = _open(file, path)
                for _, members in _groups(archive):
                    if total and total % size == 0:
                        yield Slice(kind="tar", path=path, start=total - size, count=size, offset=offset)
                    if total % size == 0:
                        offset = members[0][1].offset
                    total += 1
                # tarfile takes a header that is cut off for the end; the real end is a block of zeros.
                file.seek(archive.offset)
                if file.read(512) != bytes(512):
                    raise tarfile.ReadError("it has no end mark")
        except tarfile.TarError as error:
            if total == 0:
                raise UserError(f"{path} is not a whole tar", got=error, fix="replace it or remove it from the input") from None
            logger.warning("%s is cut off (%s): only its first %d samples are used", path, error, total)
        if total:
            start = (total - 1) // size * size
            yield Slice(kind="tar", path=path, start=start, count=total - start, offset=offset)

    def read(self, part: Slice, config: PrepConfig) -> Iterator[RawSample]:
        wanted, last = frozenset(part.rows), part.numbers[-1]
        with open_input(part.path) as file:
            file.seek(part.offset)
            archive = _open(file, part.path)
            for number, (key, members) in enumerate(_groups(archive)):
                source = f"{part.path.rpartition('/')[2]}/{key}"
                try:
                    if not wanted or number in wanted:
                        yield replace(_sample(archive, members, source, config), number=number)
                except Drop as problem:
                    yield RawSample(source=source, number=number, problem=problem)
                except (tarfile.TarError, OSError) as error:
                    yield RawSample(source=source, number=number, problem=Drop("truncated", f"in the tar: {error}"))
                if number == last:
                    return


def _open(file: BinaryIO, path: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise UserError(f"{path} is not an uncompressed tar", got=error, fix="decompress .tar.gz, or remove the file from the input") from None


def _groups(archive: tarfile.TarFile) -> Iterator[Group]:
    current: Group | None = None
    while True:
        try:
            member = archive.next()
        except tarfile.TarError:
            if current is not None:
                yield current
            raise
        if member is None:
            break
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header for lookups that we do not make
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not member.isfile() or not dot or not stem or name.startswith("__"):
            continue
        key = f"{folder}{slash}{stem}".removeprefix("./")
        if current is None or key != current[0]:
            if current is not None:
                yield current
            current = (key, [])
        current[1].append((extension.lower(), member))
    if current is not None:
        yield current


def _sample(archive: tarfile.TarFile, members: list[tuple[str, tarfile.TarInfo]], source: str, config: PrepConfig) -> RawSample:
    parts = dict(reversed(members))
    image = next((member for extension, member in members if extension in EXTENSIONS), None)
    if image is None:
        raise Drop("missing_file", f"only {', '.join(parts)}")
    if image.size > config.limits.max_file_bytes:
        raise Drop("file_too_large", f"{image.size} bytes")
    caption: str | None = None
    label: int | None = None
    extra: dict[str, Any] = {}
    if "json" in parts:
        caption, label, extra = split_fields(parse_object(_content(archive, parts["json"])), config)
    if "txt" in parts:
        if parts["txt"].size > config.limits.max_caption_bytes:
            raise Drop("caption_too_long", f"{parts['txt'].size} bytes")
        caption = decode_text(_content(archive, parts["txt"]))
    if "cls" in parts and label is None:
        label = as_integer(_content(archive, parts["cls"]).decode("ascii", errors="replace").strip())
    return RawSample(source=source, image=_content(archive, image), caption=caption, label=label, extra=extra)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise Drop("truncated", f"{member.name}: {len(data)} of {member.size} bytes in the tar")
    return data
