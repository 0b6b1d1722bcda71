"""The data set on disk: what `data_prep` writes and `pipeline` reads.

    DATASET/
      shards/train-000000.tar       plain ustar; one sample = members KEY.<image>, KEY.txt, KEY.json side by side
      shards/train-000000.idx.npz   where each member lies, and its checksum
      metadata/train-000000.parquet what is known of each sample, by columns (`metadata.Facts`)
      manifests/000001.json         one immutable generation: which shards, how many samples, all checksums
      manifests/lineage.json        only after old generations were deleted: which one each of them continued
      tokenizer.model               SentencePiece
      tombstones/000001.json        samples of published shards that must not be used any more
      ledger/000001/failures-*.jsonl  what was dropped in generation 1, and why

A shard counts only once a manifest names it, and the manifest is written last: a reader sees a whole generation or none.
Letters: N samples of one shard.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from configs.errors import UserError
from data_prep.storage import Storage

FORMAT = "jetway-dataset/1"
"""First key of every manifest; the number grows when old readers can no longer read it."""

SPLITS = ("train", "heldout")
MEMBERS = ("image", "txt", "json")
"""Order of the second axis of every index array, and of the members in a tar."""

TOKENIZER_FILE = "tokenizer.model"
LINEAGE_FILE = "manifests/lineage.json"
"""Which generation each deleted one continued: {"2": 1, "1": null}. There only after a compaction that deleted old generations."""


def shard_name(split: str, generation: int, number: int) -> str:
    """Name of shard `number` that `generation` adds to a split: `train-000000` in the first, `train-g0002-000000` in a later one."""
    return f"{split}-{number:06d}" if generation == 1 else f"{split}-g{generation:04d}-{number:06d}"


def generation_of(shard: str) -> int:
    """The generation that wrote the shard of this name."""
    parts = shard.split("-")
    return int(parts[1][1:]) if len(parts) == 3 and parts[1][:1] == "g" and parts[1][1:].isdecimal() else 1


def tar_path(shard: str, folder: str = "shards") -> str:
    """Path of a shard's tar inside the data set."""
    return f"{folder}/{shard}.tar"


def index_path(shard: str, folder: str = "shards") -> str:
    """Path of a shard's index inside the data set."""
    return f"{folder}/{shard}.idx.npz"


def manifest_path(generation: int) -> str:
    """Path of a manifest generation inside the data set."""
    return f"manifests/{generation:06d}.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardIndex:
    """Where every member of one shard lies, so that sample i is three range reads (or one: members are contiguous)."""

    keys: np.ndarray
    """Sample keys, ASCII bytes `S*` [N]."""
    offsets: np.ndarray
    """First byte of each member's content in the tar, int64 [N, 3], in the order of `MEMBERS`."""
    sizes: np.ndarray
    """Bytes of each member's content, int64 [N, 3]."""
    xxh3: np.ndarray
    """xxh3-64 (seed 0) of each member's content, uint64 [N, 3]."""
    sha256: np.ndarray
    """SHA-256 of the original image bytes, before any re-encoding, uint8 [N, 32]."""

    def __post_init__(self) -> None:
        num = len(self.keys)
        expected = {
            "keys": (self.keys, "S", (num,)),
            "offsets": (self.offsets, "i", (num, 3)),
            "sizes": (self.sizes, "i", (num, 3)),
            "xxh3": (self.xxh3, "u", (num, 3)),
            "sha256": (self.sha256, "u", (num, 32)),
        }
        for name, (array, kind, shape) in expected.items():
            if array.dtype.kind != kind or array.shape != shape:
                raise ValueError(f"shard index array {name}: got {array.dtype} {array.shape}, expected kind {kind!r} {shape}")

    def __len__(self) -> int:
        return len(self.keys)

    def to_bytes(self) -> bytes:
        """An `.npz` whose bytes depend on nothing but the content (no clock, no platform)."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name in ("keys", "offsets", "sizes", "xxh3", "sha256"):
                member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                member.create_system = 3
                content = io.BytesIO()
                np.lib.format.write_array(content, np.ascontiguousarray(getattr(self, name)), version=(1, 0), allow_pickle=False)
                archive.writestr(member, content.getvalue())
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "ShardIndex":
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: not such a file, or arrays of other shapes.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in ("keys", "offsets", "sizes", "xxh3", "sha256")})
        except (KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a shard index: {error}") from error

    def dump(self, storage: Storage, shard: str, *, folder: str = "shards") -> str:
        """Publishes the index of `shard`; returns the hex SHA-256 of the file."""
        data = self.to_bytes()
        storage.put_bytes(index_path(shard, folder), data)
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, storage: Storage, shard: str, *, sha256: str | None = None, folder: str = "shards") -> "ShardIndex":
        """Reads the index of `shard`, and checks it against `ShardInfo.index_sha256` when that is given.

        Raises:
            UserError: the index is missing, damaged, or another one than the manifest names.
        """
        where = f"{storage.url}/{index_path(shard, folder)}"
        try:
            data = storage.read_bytes(index_path(shard, folder))
        except FileNotFoundError:
            raise UserError(f"{where} is missing", expected="the index of a shard that the manifest names", fix="run `jetway verify`") from None
        if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise UserError(f"{where} is damaged", got=f"sha256 {found}", expected=sha256, fix="run `jetway verify`, then restore or prepare again")
        try:
            return cls.from_bytes(data)
        except ValueError as error:
            raise UserError(f"{where} is damaged", got=error, fix="run `jetway verify`, then restore or prepare again") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What the manifest says of one shard."""

    name: str
    """`train-000000`; `tar_path` and `index_path` give its files."""
    num_samples: int
    num_bytes: int
    """Size of the tar."""
    sha256: str
    """Hex SHA-256 of the tar."""
    index_sha256: str
    """Hex SHA-256 of the index file."""
    metadata_sha256: str = ""
    """Hex SHA-256 of `metadata/NAME.parquet`; empty where a data set has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The shards of `train` or of `heldout`; no shard serves both."""

    num_samples: int = 0
    shards: tuple[ShardInfo, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What every image of the data set is."""

    resolution: int
    """Height and width in pixels; the shorter side where `resize_mode` is keep_ratio."""
    channels: int
    """1 (gray) or 3 (RGB)."""
    extension: str
    """`png`, `jpg` or `webp`: format of the bytes and suffix of the member."""
    resize_mode: str = "center_crop"
    """`center_crop`: squares; `keep_ratio`: pictures of any shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """The SentencePiece model that belongs to the data set."""

    file: str
    sha256: str
    num_pieces: int
    """Vocabulary size: `model.text.num_pieces` of a run on this data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of the input: read = kept + all of dropped."""

    read: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Samples dropped, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One immutable generation of a data set."""

    generation: int
    config: Mapping[str, Any]
    """The resolved configuration that made it."""
    config_hash: str
    image: ImageInfo
    splits: Mapping[str, Split]
    """`train` and `heldout`; either may be empty."""
    tokenizer: TokenizerInfo
    counts: Counts
    action: str = "prep"
    """What made this generation: `prep`, `grow`, `retry`, `rollback` or `compact`."""
    base: int | None = None
    """The generation that it continues; None for the first."""
    num_planned: int = 0
    """Samples of the input that this and earlier generations have numbered: the next new sample gets this number as its key."""
    inputs: tuple[str, ...] = ()
    """What was read, as the user named it."""
    lists: Mapping[str, str] = field(default_factory=dict)
    """Hex SHA-256 of every block list, takedown list and evaluation set that was applied, by path."""

    def to_bytes(self) -> bytes:
        """The manifest as JSON, one shard a line, same bytes for the same content."""
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: not a manifest, or one of another format version.
        """
        try:
            values = json.loads(data)
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}, this version reads {FORMAT!r}")
            splits = {
                name: Split(num_samples=split["num_samples"], shards=tuple(ShardInfo(**shard) for shard in split["shards"]))
                for name, split in values["splits"].items()
            }
            return cls(
                generation=values["generation"],
                config=values["config"],
                config_hash=values["config_hash"],
                image=ImageInfo(**values["image"]),
                splits=splits,
                tokenizer=TokenizerInfo(**values["tokenizer"]),
                counts=Counts(**values["counts"]),
                action=values.get("action", "prep"),
                base=values.get("base"),
                num_planned=values.get("num_planned", values["counts"]["read"]),
                inputs=tuple(values.get("inputs", ())),
                lists=values.get("lists", {}),
            )
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"not a data-set manifest: {type(error).__name__} {error}") from error

    def dump(self, storage: Storage) -> str:
        """Publishes this generation, unless it is there; returns its path. Of several that publish one at once, exactly one does.

        Raises:
            UserError: this generation exists with other content (generations are immutable).
        """
        path, data = manifest_path(self.generation), self.to_bytes()
        if not storage.put_new(path, data) and storage.read_bytes(path) != data:
            fix = "another run has published meanwhile: look at `jetway generations`, then run the command again, or choose another output"
            raise UserError(f"{storage.url}/{path} exists with other content", fix=fix)
        return path

    @classmethod
    def load(cls, storage: Storage, generation: int | None = None) -> "Manifest":
        """Reads one generation; None is the newest.

        Raises:
            UserError: there is no data set, it is not finished, it lacks this generation, or the manifest is damaged.
        """
        found = generations(storage)
        if not found:
            expected = "a folder with manifests/000001.json"
            if storage.list("plans/") or storage.list("shards/"):
                fix = "run the same `jetway prep` again: it finishes what is there"
                raise UserError(f"{storage.url} holds a half-written data set", expected=expected, fix=fix)
            raise UserError(f"{storage.url} holds no data set", expected=expected, fix="write one with `jetway prep --input PATH --output DIR`")
        if generation is not None and generation not in found:
            fix = "choose one of these; `jetway generations` lists them (older ones may have been deleted after a compaction)"
            raise UserError(f"{storage.url} has no generation {generation}", expected=f"one of {', '.join(map(str, found))}", fix=fix)
        path = manifest_path(found[-1] if generation is None else generation)
        try:
            return cls.from_bytes(storage.read_bytes(path))
        except ValueError as error:
            fix = "restore it or prepare the data set again"
            raise UserError(f"{storage.url}/{path} is damaged or of another version", got=error, fix=fix) from None


def base_of(storage: Storage, generation: int) -> int | None:
    """The generation that `generation` continues, also where either was deleted after a compaction; None for the first.

    Raises:
        UserError: there is and was no such generation.
    """
    deleted = read_lineage(storage)
    return deleted[generation] if generation in deleted else Manifest.load(storage, generation).base


def read_lineage(storage: Storage) -> dict[int, int | None]:
    """The deleted generations, and which one each continued.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return {int(number): base for number, base in json.loads(storage.read_bytes(LINEAGE_FILE)).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{storage.url}/{LINEAGE_FILE} is damaged", got=error, fix="restore it from where the data set was copied") from None


def write_lineage(storage: Storage, lineage: Mapping[int, int | None]) -> None:
    """Records generations that are about to be deleted, and which one each continued."""
    storage.put_bytes(LINEAGE_FILE, (json.dumps(dict(sorted(lineage.items())), indent=1) + "\n").encode())


def generations(storage: Storage) -> list[int]:
    """Numbers of the published generations, ascending."""
    names = (path.removeprefix("manifests/").removesuffix(".json") for path in storage.list("manifests/"))
    return sorted(int(name) for name in names if name.isdecimal())
