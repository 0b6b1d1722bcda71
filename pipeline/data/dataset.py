"""Opens a data set for a run, and refuses one that is missing, half-written, or made for another model."""

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import UserError
from data_prep.schema import Manifest, ShardInfo, tar_path
from data_prep.storage import LocalStorage, Storage, open_storage
from data_prep.tombstones import Rows, Tombstones
from data_prep.tombstones import load as load_tombstones
from model.config import ImageConfig, TextConfig
from pipeline.data.hashing import Int64Array

NUM_SHARDS_SIZED_AT_START = 4096
"""Sizes of up to this many local shards are compared with the manifest at start; any shard's size is compared when it is opened."""


RESIZE_MODES = ("center_crop", "keep_ratio")
"""Squares; pictures of any shape, whose centred square is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSplit:
    """One split of one generation: its shards exist, and hold at least one sample."""

    name: str
    shards: tuple[ShardInfo, ...]
    excluded: tuple[Rows, ...] = ()
    """Samples of each shard that were taken down; empty where there are none at all."""

    @property
    def counts(self) -> Int64Array:
        """Samples of each shard, int64 [number of shards]."""
        return np.array([shard.num_samples for shard in self.shards], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """Samples of all shards, with those that were taken down."""
        return int(self.counts.sum())

    @property
    def num_excluded(self) -> int:
        """Samples that were taken down."""
        return sum(len(rows) for rows in self.excluded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One immutable generation of a data set, without the samples that were taken down from it."""

    storage: Storage
    manifest: Manifest
    tombstones: Tombstones = Tombstones()

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the manifest: the same for every copy of this generation, another for any other data."""
        return hashlib.sha256(self.manifest.to_bytes()).hexdigest()

    def split(self, name: str) -> DatasetSplit:
        """The split `name`, after a look at every shard's file.

        Raises:
            UserError: no such split, no sample in it (or none left), or a shard that is missing or of another size than the manifest says.
        """
        splits = self.manifest.splits
        if name not in splits:
            raise UserError(
                f"{self.storage.url} has no split {name!r}", expected=f"one of {', '.join(splits)}", fix="set data.split or data.eval_split"
            )
        shards = tuple(splits[name].shards)
        split = DatasetSplit(name=name, shards=shards, excluded=self._excluded(shards))
        if split.num_samples == 0:
            others = ", ".join(f"{other}: {found.num_samples}" for other, found in splits.items())
            raise UserError(
                f"split {name!r} of {self.storage.url} is empty",
                got=f"samples by split: {others}",
                fix="prepare more images, or another share for the held-out split, with `jetway prep`",
            )
        if split.num_excluded == split.num_samples:
            raise UserError(
                f"every sample of split {name!r} of {self.storage.url} was taken down",
                got=f"{split.num_samples} samples, all of them named by tombstones/ (takedown {self.tombstones.number})",
                fix="choose another data.generation or split, or prepare more images with `jetway prep`",
            )
        self._check_files(split)
        return split

    def _excluded(self, shards: tuple[ShardInfo, ...]) -> tuple[Rows, ...]:
        for shard in shards:
            rows = self.tombstones.rows(shard.name)
            if len(rows) and not 0 <= rows[0] <= rows[-1] < shard.num_samples:
                raise UserError(
                    f"the takedowns of {self.storage.url} do not fit its shards",
                    got=f"sample {rows[-1]} of {shard.name}",
                    expected=f"at most {shard.num_samples - 1}",
                    fix="restore tombstones/ and the shards from the same copy of the data set; `jetway verify` names what does not fit",
                )
        return tuple(self.tombstones.rows(shard.name) for shard in shards) if self.tombstones.count(shard.name for shard in shards) else ()

    def check_model(self, image: ImageConfig, text: TextConfig, *, captions: bool) -> None:
        """Compares what the data set holds with what the model expects.

        Args:
            captions: the text slots hold captions (and not labels), so that the tokenizer counts too

        Raises:
            UserError: another resolution, channels or vocabulary.
        """
        for key, found, expected in (
            ("resolution", self.manifest.image.resolution, image.resolution),
            ("channels", self.manifest.image.channels, image.channels),
        ):
            if found != expected:
                raise UserError(
                    f"the images of {self.storage.url} do not fit the model: another {key}",
                    got=f"{found} in the data set",
                    expected=f"model.image.{key}={expected}",
                    fix=f"set model.image.{key}={found}, or prepare the data set again with `jetway prep` and image.{key}={expected}",
                )
        if (mode := self.manifest.image.resize_mode) not in RESIZE_MODES:
            raise UserError(
                f"the images of {self.storage.url} have a shape that this version does not know",
                got=f"resize_mode {mode!r}",
                expected=f"one of {', '.join(RESIZE_MODES)}",
                fix="train with the version of jetway that prepared the data set, or a later one",
            )
        pieces = self.manifest.tokenizer.num_pieces
        if captions and pieces != text.num_pieces:
            raise UserError(
                f"the tokenizer of {self.storage.url} is not the model's",
                got=f"{pieces} pieces in the data set",
                expected=f"model.text.num_pieces={text.num_pieces}",
                fix=f"set model.text.num_pieces={pieces} for a new model; a trained one needs the data set's tokenizer to be its own",
            )

    def read_tokenizer(self) -> bytes:
        """The SentencePiece model file.

        Raises:
            UserError: it is missing, or not the one that the manifest names.
        """
        info = self.manifest.tokenizer
        where = f"{self.storage.url}/{info.file}"
        fix = "restore the file, or prepare the data set again with `jetway prep`"
        try:
            data = self.storage.read_bytes(info.file)
        except FileNotFoundError:
            raise UserError(f"{where} is missing", expected="the tokenizer that the manifest names", fix=fix) from None
        if (found := hashlib.sha256(data).hexdigest()) != info.sha256:
            raise UserError(f"{where} is the tokenizer of another data set, or damaged", got=f"sha256 {found}", expected=info.sha256, fix=fix)
        return data

    def check_tokenizer(self, path: Path, *, otherwise: str) -> None:
        """Compares with the copy that a model's weights came with, if there is one at `path`: equal sizes are not equal pieces.

        Args:
            otherwise: what else the user could do, for the message.

        Raises:
            UserError: another tokenizer.
        """
        if path.exists() and path.read_bytes() != self.read_tokenizer():
            raise UserError(
                "the data set's tokenizer is not the one that the weights came with",
                got=f"{self.storage.url}: {self.manifest.tokenizer.file}",
                expected=f"the same pieces as {path}",
                fix=f"prepare the data set with tokenizer.model_file={path}, or {otherwise}",
            )

    def _check_files(self, split: DatasetSplit) -> None:
        # A shard whose samples were all taken down is never read: it may be gone.
        shards = [shard for shard in split.shards if len(self.tombstones.rows(shard.name)) < shard.num_samples]
        listed = set(self.storage.list("shards/"))
        missing = [shard.name for shard in shards if tar_path(shard.name) not in listed]
        if missing:
            raise UserError(
                f"{self.storage.url} is half-written: {len(missing)} of {len(shards)} shards of split {split.name!r} are missing",
                got=f"no {', '.join(tar_path(name) for name in missing[:3])}{' ...' if len(missing) > 3 else ''}",
                expected=f"what manifest generation {self.manifest.generation} names",
                fix="copy the data set again, or run the same `jetway prep` again",
            )
        if isinstance(self.storage, LocalStorage):
            for shard in itertools.islice(shards, NUM_SHARDS_SIZED_AT_START):
                check_size(self.storage, shard, self.storage.size(tar_path(shard.name)))


def open_dataset(path: str, generation: int | None = None, takedown: int | None = None) -> Dataset:
    """The data set at a folder or s3:// prefix.

    Args:
        generation: manifest generation, None for the newest. A resumed run gives the one that its checkpoint recorded.
        takedown: number of the newest takedown to honour, None for all. Only for ranks that must agree with another.

    Raises:
        UserError: nothing there, not finished, no such generation, or a takedown that is lost or damaged.
    """
    storage = open_storage(path)
    if isinstance(storage, LocalStorage) and not storage.root.is_dir():
        raise UserError(
            f"data set {path} does not exist",
            got=f"data.path={path}",
            expected="a folder written by `jetway prep`",
            fix=f"run `jetway prep --input IMAGES --output {path}`, or set data.path",
        )
    return Dataset(storage=storage, manifest=Manifest.load(storage, generation), tombstones=load_tombstones(storage, takedown))


def check_size(storage: Storage, shard: ShardInfo, found: int) -> None:
    """Raises:
    UserError: the shard has another size than the manifest says.
    """
    if found != shard.num_bytes:
        raise UserError(
            f"{storage.url}/{tar_path(shard.name)} is {'half-written' if found < shard.num_bytes else 'not the shard that the manifest names'}",
            got=f"{found} bytes",
            expected=f"{shard.num_bytes} bytes",
            fix="copy the data set again, or run the same `jetway prep` again",
        )
