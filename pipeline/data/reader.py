"""Reads samples by (shard, member): one read per sample, every byte checked against the index, images decoded to uint8."""

import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import xxhash
from PIL import Image

from configs.errors import UserError
from data_prep.schema import MEMBERS
from pipeline.data.dataset import Dataset, DatasetSplit
from pipeline.data.shard_cache import OpenShard, ShardCache

_IMAGE, _TXT, _JSON = (MEMBERS.index(name) for name in ("image", "txt", "json"))


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as it stands in the data set."""

    shard: str
    key: str
    image: npt.NDArray[np.uint8] | None
    """[H, W, channels]; None when it was not asked for."""
    text: str
    """The caption, or the label in decimal."""


class SampleReader:
    """Random access to the samples of one split. Safe to share between threads, one of which reads at a time."""

    def __init__(
        self, dataset: Dataset, split: DatasetSplit, *, labels: bool = False, num_open_shards: int = 32, cache_folder: Path | None = None
    ) -> None:
        """
        Args:
            labels: the text of a sample is the integer `label` of its JSON, and not its caption
            num_open_shards: shards kept open (and cached, if remote)
            cache_folder: where copies of remote shards lie; None is below the system's temporary folder
        """
        self.dataset = dataset
        self.split = split
        self.labels = labels
        image = dataset.manifest.image
        self.image_shape = (image.resolution, image.resolution, image.channels)
        self._extension = image.extension
        self._crop = image.resize_mode == "keep_ratio"
        self._cache = ShardCache(dataset.storage, capacity=num_open_shards, folder=cache_folder)
        self._lock = threading.Lock()

    def read(self, shard: int, member: int, *, with_image: bool = True) -> Sample:
        """The sample `member` of the split's shard number `shard`.

        Raises:
            UserError: a damaged or missing shard, a member that does not match its checksum, an image of another shape, no label.
        """
        with self._lock:
            opened = self._cache.get(self.split.shards[shard])
            wanted = ([_IMAGE] if with_image else []) + [_JSON if self.labels else _TXT]
            members = self._read_members(opened, member, wanted)
        key = opened.index.keys[member].decode()
        where = f"{self.dataset.storage.url}, shard {opened.info.name}, sample {key}"
        text = _label(members[-1], where) if self.labels else members[-1].decode("utf-8", errors="replace")
        image = decode_image(members[0], self._extension, self.image_shape, where, crop=self._crop) if with_image else None
        return Sample(opened.info.name, key, image, text)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Says which shards of the split are read now and next, so that remote ones are fetched while others are used."""
        with self._lock:
            self._cache.prefetch([self.split.shards[shard] for shard in dict.fromkeys(shards)])

    def key(self, shard: int, member: int) -> str:
        """The sample's key, from the index alone."""
        with self._lock:
            return self._cache.get(self.split.shards[shard]).index.keys[member].decode()

    def close(self) -> None:
        """Closes the shards and deletes the copies of remote ones."""
        with self._lock:
            self._cache.close()

    def _read_members(self, opened: OpenShard, member: int, wanted: list[int]) -> list[bytes]:
        """The contents of the wanted members, by a single read, checked."""
        index = opened.index
        offsets, sizes = index.offsets[member].tolist(), index.sizes[member].tolist()
        start = min(offsets[kind] for kind in wanted)
        stop = max(offsets[kind] + sizes[kind] for kind in wanted)
        span = opened.read(start, stop - start)
        contents = []
        for kind in wanted:
            content = span[offsets[kind] - start : offsets[kind] - start + sizes[kind]]
            if xxhash.xxh3_64_intdigest(content) != int(index.xxh3[member, kind]):
                raise UserError(
                    f"{self.dataset.storage.url}, shard {opened.info.name}, sample {index.keys[member].decode()}: its {MEMBERS[kind]} is damaged",
                    got=f"{len(content)} bytes with xxh3 {xxhash.xxh3_64_intdigest(content):016x}",
                    expected=f"{sizes[kind]} bytes with xxh3 {int(index.xxh3[member, kind]):016x}",
                    fix="`jetway verify` lists all damage; restore the shard, or leave this sample out with "
                    f"`jetway takedown {self.dataset.storage.url} --key {index.keys[member].decode()}` and resume",
                )
            contents.append(content)
        return contents


def decode_image(data: bytes, extension: str, shape: tuple[int, int, int], where: str, *, crop: bool = False) -> npt.NDArray[np.uint8]:
    """Pixels of a PNG, JPEG or WebP file, uint8 [H, W, channels].

    Args:
        crop: the shorter side of the file is that of `shape`, a square, which is cut out of the middle (`resize_mode` keep_ratio)

    Raises:
        UserError: it does not decode, or has another shape.
    """
    channels = shape[2]
    try:
        if extension in ("jpg", "jpeg"):
            pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY" if channels == 1 else "RGB")
        else:
            with Image.open(io.BytesIO(data)) as image:
                mode = "L" if channels == 1 else "RGB"
                # WebP has no gray mode: prep stores gray there as three equal channels.
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except (ValueError, OSError, SyntaxError) as error:
        raise UserError(f"{where}: the image does not decode", got=error, fix="prepare the data set again with `jetway prep`") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    found = pixels.shape
    if crop and min(found[:2]) == shape[0]:
        top, left = (found[0] - shape[0]) // 2, (found[1] - shape[1]) // 2
        pixels = pixels[top : top + shape[0], left : left + shape[1]]
    if pixels.shape != shape:
        raise UserError(
            f"{where}: the image is not what the manifest says",
            got=f"{found} (height, width, channels)",
            expected=f"{shape}, or more on the longer side" if crop else shape,
            fix="prepare the data set again with `jetway prep`",
        )
    return pixels


def _label(data: bytes, where: str) -> str:
    try:
        label = json.loads(data)["label"]
        if type(label) is not int:
            raise TypeError(f"label={label!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where} has no integer `label` in its JSON",
            got=error,
            expected='{"label": 7, ...}',
            fix='set data.text="caption", or give labels in the input of `jetway prep`',
        ) from None
    return str(label)
