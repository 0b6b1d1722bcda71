"""What `jetway prep` is to do, as data. Imports nothing heavy."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from configs.loader import config_hash, to_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What every image becomes: shorter side to `resolution`, centre crop to a square."""

    resolution: int = 256
    """Height and width of the result in pixels."""
    channels: int = 3
    """3: sRGB; 1: gray (ITU-R 601 luma)."""
    format: Literal["png", "jpg", "webp"] = "jpg"
    """How the result is stored. An image that already has this size, mode and format keeps its bytes."""
    quality: int = 95
    """1-100, for jpg (always 4:4:4) and webp (100 is lossless there)."""
    matte: tuple[int, int, int] = (255, 255, 255)
    """sRGB colour shown through transparent pixels."""
    animated: Literal["drop", "first_frame"] = "drop"
    """Images of several frames or pages: drop them (reason `animated`), or take the first."""

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"image.resolution={self.resolution} must be at least 1")
        if self.channels not in (1, 3):
            raise ValueError(f"image.channels={self.channels} must be 1 or 3")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"image.quality={self.quality} must be in 1..100")
        if not all(0 <= level <= 255 for level in self.matte):
            raise ValueError(f"image.matte={self.matte} must hold levels in 0..255")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitConfig:
    """What is dropped before it is decoded. All checked against the file size and the image header."""

    max_file_bytes: int = 64 * 2**20
    max_pixels: int = 100_000_000
    """Width x height of the header; a 100-megapixel RGB image decodes to 300 MB."""
    max_aspect_ratio: float = 8.0
    """Longer side over shorter side."""
    min_side: int = 8
    """Shorter side in pixels."""
    max_caption_bytes: int = 64 * 2**10

    def __post_init__(self) -> None:
        for name in ("max_file_bytes", "max_pixels", "min_side", "max_caption_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name}={getattr(self, name)} must be at least 1")
        if self.max_aspect_ratio < 1:
            raise ValueError(f"limits.max_aspect_ratio={self.max_aspect_ratio} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnConfig:
    """Names of the columns of a table, and of the keys of a `.json` beside an image."""

    image: str = "image"
    """Path of the image, relative to the table's folder (or the image's bytes, in Parquet). Tables only."""
    caption: str = "caption"
    label: str = "label"
    """Optional integer class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """The SentencePiece unigram model of the data set, trained on captions of its train split."""

    vocab_size: int = 32_000
    """Pieces wanted, with the 256 bytes and the 3 control pieces; fewer if the captions do not hold as many."""
    sample_size: int = 1_000_000
    """Captions to train on at most, chosen by content hash."""
    num_threads: int = 4
    """Pinned, because the scores depend on it and with them the bytes of the model."""
    lower_case: bool = False
    """Fold case inside the tokenizer: prompts of any case then read the same."""
    model_file: str | None = None
    """Use this SentencePiece model instead of training one."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sample_size", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"tokenizer.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """Where the work runs. Changes nothing about the result."""

    address: str | None = None
    """Address of a running cluster (`auto`, `ray://HOST:10001`); None starts Ray on this machine."""
    num_cpus: int | None = None
    """CPUs of the local Ray; None: all that this process may use."""
    max_in_flight: int | None = None
    """Tasks submitted at once; None: twice the CPUs of the cluster."""

    def __post_init__(self) -> None:
        for name in ("num_cpus", "max_in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"ray.{name}={value} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepConfig:
    """One run of `jetway prep`: raw images and captions in, a data set out."""

    inputs: tuple[str, ...] = ()
    """Folders of images, tables (.csv .tsv .jsonl .parquet) and WebDataset tars (.tar); a folder of tars counts as its tars."""
    output: str = ""
    """Folder or s3:// prefix of the data set."""
    image: ImageConfig = field(default_factory=ImageConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    missing_caption: Literal["drop", "empty"] = "drop"
    """A sample without caption: drop it (reason `missing_caption`), or keep it with an empty one (class-conditional sets)."""
    samples_per_shard: int = 1000
    """Every shard of a split holds exactly this many samples, except its last."""
    heldout_permille: int = 10
    """Samples per thousand that go to the held-out split, chosen by the hash of the original image bytes."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.samples_per_shard <= 1_000_000:
            raise ValueError(f"samples_per_shard={self.samples_per_shard} must be in 1..1000000")
        if not 0 <= self.heldout_permille <= 500:
            raise ValueError(f"heldout_permille={self.heldout_permille} must be in 0..500")


def identity(config: PrepConfig) -> dict[str, Any]:
    """The part of the configuration that decides the bytes of the data set: all but where it is made and put."""
    values = to_dict(config)
    del values["ray"], values["output"]
    return values


def identity_hash(config: PrepConfig) -> str:
    """Hex SHA-256 of `identity`, the `config_hash` of the manifest."""
    return config_hash(replace(config, ray=RayConfig(), output=""))
