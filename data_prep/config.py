"""What `jetway prep` is to do, as data. Imports nothing heavy."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any, Literal

from configs.loader import to_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What every image becomes: shorter side to `resolution`, and a centre crop to a square unless `resize_mode` keeps the ratio."""

    resolution: int = 256
    """Shorter side of the result in pixels; with `center_crop` the longer side too."""
    resize_mode: Literal["center_crop", "keep_ratio"] = "center_crop"
    """center_crop: a square; keep_ratio: the whole picture (training cuts the centred square out of it)."""
    channels: int = 3
    """3: sRGB; 1: gray (ITU-R 601 luma)."""
    format: Literal["png", "jpg", "webp"] = "jpg"
    """How the result is stored. An image that already has this size, mode and format keeps its bytes."""
    quality: int = 95
    """1-100, for jpg and webp (100 is lossless there)."""
    subsampling: Literal[444, 420] = 444
    """Chroma of jpg. 4:4:4, because halved colour resolution is a pattern that a pixel-exact likelihood model would have to learn."""
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
    max_decode_bytes: int = 512 * 2**20
    """Memory that decoding one picture may take, by an estimate from its header: 3-8 bytes a pixel for JPEG and PNG, 20 for WebP and AVIF."""
    max_aspect_ratio: float = 8.0
    """Longer side over shorter side."""
    min_side: int = 8
    """Shorter side in pixels."""
    max_caption_bytes: int = 64 * 2**10

    def __post_init__(self) -> None:
        for name in ("max_file_bytes", "max_pixels", "max_decode_bytes", "min_side", "max_caption_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name}={getattr(self, name)} must be at least 1")
        if self.max_aspect_ratio < 1:
            raise ValueError(f"limits.max_aspect_ratio={self.max_aspect_ratio} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnConfig:
    """Names of the columns of a table, and of the keys of a `.json` beside an image. All other columns go into the sample's JSON."""

    image: str = "image"
    """Path of the image, relative to the table's folder (or the image's bytes, in Parquet). Tables only."""
    url: str = "url"
    """Address of the image (http, https or s3). A table that has this column and no `image` column is a URL list."""
    caption: str = "caption"
    label: str = "label"
    """Optional integer class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadConfig:
    """How images are fetched from URL lists. Only the three `respect_*`, `max_redirects` settings decide what is kept."""

    contact: str = ""
    """Mail address or page about this crawl, for the user agent. Needed for http inputs: whoever runs a server may want to ask."""
    respect_robots: bool = True
    """Obey robots.txt (RFC 9309), cached per host."""
    respect_opt_out: bool = True
    """Drop what says noai, noimageai, noindex or noimageindex in X-Robots-Tag, or TDM-Reservation: 1."""
    respect_tokens: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """The X-Robots-Tag values that count as opting out."""
    max_redirects: int = 5
    allowed_networks: tuple[str, ...] = ()
    """CIDR networks (`10.2.0.0/16`) that may be fetched from although they are private; every other such address is refused."""
    concurrency: int = 32
    """Requests in flight per task at the start; it adapts between 1 and `max_concurrency`."""
    max_concurrency: int = 256
    per_host: int = 8
    """Requests in flight to one host, over the whole job: the tasks that run at once share them out, at least one each."""
    connect_timeout_s: float = 10.0
    timeout_s: float = 30.0
    """Total deadline of one attempt, from the first byte sent to the last received."""
    retries: int = 2
    """Further attempts after a timeout, a broken connection, 429 or 5xx; never after what cannot heal."""
    backoff_s: float = 0.5
    """First pause before another attempt; doubles each time, with jitter. Retry-After wins where it is given."""
    max_retry_after_s: float = 60.0
    """A longer Retry-After ends the attempts of this run; `jetway retry` is for later."""
    header_bytes: int = 32 * 2**10
    """Bytes after which the header is judged and the rest fetched only if the sample may be kept."""
    host_failures: int = 20
    """Failures in a row after which a host is left alone for the rest of a task (reason `circuit_open`)."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_concurrency", "per_host", "header_bytes", "host_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"download.{name}={getattr(self, name)} must be at least 1")
        for name in ("connect_timeout_s", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"download.{name}={getattr(self, name)} must be above 0")
        for name in ("max_redirects", "retries", "backoff_s", "max_retry_after_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"download.{name}={getattr(self, name)} must not be negative")
        if self.contact and "@" not in self.contact and "://" not in self.contact:
            raise ValueError(f"download.contact={self.contact!r} must be a mail address or the address of a page")
        for network in self.allowed_networks:
            try:
                ip_network(network)
            except ValueError as error:
                raise ValueError(f"download.allowed_networks: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """Bounds on one score."""

    name: str
    """A column of the input (judged before anything is fetched), or a score that `filters.scorer` gives."""
    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ValueError(f"filters.scores: {self.name!r} has neither min nor max")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """What is dropped although it is sound. Everything is off by default."""

    min_caption_chars: int = 0
    min_caption_words: int = 0
    max_caption_words: int | None = None
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes to keep, empty: all (extra `language`)."""
    min_language_probability: float = 0.0
    min_jpeg_quality: int = 0
    """Of the source, estimated from its quantisation tables, 1-100; other formats pass."""
    min_contrast: float = 0.0
    """Standard deviation of the luma of the result, in grey levels; blank pictures have less than about 4."""
    max_border: float = 1.0
    """Largest share of the height or the width that a constant border may take."""
    min_detail: float = 0.0
    """Energy in the upper half of the frequencies over that of the two octaves below, in permille; enlarged pictures have less than 32."""
    blocked_urls: str | None = None
    """Text file, one address a line."""
    blocked_domains: str | None = None
    """Text file, one domain a line; subdomains included."""
    blocked_text: str | None = None
    """Text file, one regular expression a line, searched in the caption without regard to case."""
    takedown: str | None = None
    """Text file of `url ADDRESS`, `domain NAME`, `sha256 HEX` and `phash HEX` lines. (`jetway takedown` adds to a finished data set.)"""
    scores: tuple[ScoreConfig, ...] = ()
    scorer: str | None = None
    """`module:Class` of your own; runs on Ray actors and gives further scores (see data_prep/README.md)."""
    scorer_actors: int = 1
    scorer_gpus: float = 0.0
    """GPUs of each actor."""

    def __post_init__(self) -> None:
        for name in ("min_caption_chars", "min_caption_words", "min_jpeg_quality", "min_contrast", "min_detail", "scorer_gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"filters.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.max_border <= 1:
            raise ValueError(f"filters.max_border={self.max_border} must be in 0..1")
        if self.scorer is not None and self.scorer.count(":") != 1:
            raise ValueError(f"filters.scorer={self.scorer!r} must be module:Class")
        if self.scorer_actors < 1:
            raise ValueError(f"filters.scorer_actors={self.scorer_actors} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupConfig:
    """Which samples count as the same. Of two, the one with the lower number stays."""

    exact: bool = False
    """Drop images whose original bytes are those of an earlier sample."""
    image_distance: int | None = None
    """Drop images whose 64-bit perceptual hash is at most this many bits from an earlier one's (0-7; 4 is cautious, 6 thorough).

    Equal bytes count too. Pictures without detail are not compared by hash (see data_prep/dedup/README.md).
    """
    caption_similarity: float | None = None
    """Drop samples whose caption's estimated Jaccard similarity to an earlier one is at least this (0.5-1)."""
    evaluation: tuple[str, ...] = ()
    """Evaluation sets, in any form that `inputs` takes except lists of addresses, or data sets made by jetway: samples near one of theirs go."""
    evaluation_image_distance: int = 6
    evaluation_caption_similarity: float | None = None
    """None: evaluation captions are not compared (short captions coincide by chance)."""

    def __post_init__(self) -> None:
        for name in ("image_distance", "evaluation_image_distance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 7:
                raise ValueError(f"dedup.{name}={value} must be in 0..7")
        for name in ("caption_similarity", "evaluation_caption_similarity"):
            value = getattr(self, name)
            if value is not None and not 0.5 <= value <= 1:
                raise ValueError(f"dedup.{name}={value} must be in 0.5..1")

    @property
    def is_on(self) -> bool:
        """Whether there is anything to compare."""
        return self.exact or self.image_distance is not None or self.caption_similarity is not None or bool(self.evaluation)


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
    """`auto` or HOST:PORT of a running cluster that this machine belongs to; None starts Ray on this machine."""
    num_cpus: int | None = None
    """CPUs of the local Ray; None: all that this process may use."""
    max_in_flight: int | None = None
    """Tasks submitted at once; None: twice the CPUs of the cluster."""
    memory_per_task_bytes: int = 1 * 2**30
    """What one task may use above an idle worker. What `limits.max_decode_bytes` leaves of it bounds the bytes being downloaded."""
    straggler_factor: float = 3.0
    """A task that takes this many times the median of the finished ones gets a second copy elsewhere; the first to finish counts.

    After ten times that it is stopped and started again, once.
    """
    straggler_min_s: float = 60.0
    """No second copy before this many seconds."""

    def __post_init__(self) -> None:
        for name in ("num_cpus", "max_in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"ray.{name}={value} must be at least 1")
        if self.memory_per_task_bytes < 256 * 2**20:
            raise ValueError(f"ray.memory_per_task_bytes={self.memory_per_task_bytes} must be at least {256 * 2**20}")
        if self.straggler_factor < 1 or self.straggler_min_s < 0:
            raise ValueError("ray.straggler_factor must be at least 1 and ray.straggler_min_s not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepConfig:
    """One run of `jetway prep`: raw images and captions in, a data set out."""

    inputs: tuple[str, ...] = ()
    """Folders of images, tables (.csv .tsv .jsonl, also .gz, and .parquet) and WebDataset tars (.tar), local or s3://.

    A folder without images counts as its tables and tars.
    """
    output: str = ""
    """Folder or s3:// prefix of the data set."""
    image: ImageConfig = field(default_factory=ImageConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    missing_caption: Literal["drop", "empty"] = "drop"
    """A sample without caption: drop it (reason `missing_caption`), or keep it with an empty one (class-conditional sets)."""
    samples_per_shard: int = 1000
    """Every shard of a split holds exactly this many samples, except the last of a generation."""
    keep_dropped: bool = False
    """Store the images that were fetched or read and then dropped in dropped/*.tar, with the reason in their JSON."""
    heldout_permille: int = 10
    """Samples per thousand that go to the held-out split, chosen by the hash of the original image bytes."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.samples_per_shard <= 1_000_000:
            raise ValueError(f"samples_per_shard={self.samples_per_shard} must be in 1..1000000")
        room, decode = self.ray.memory_per_task_bytes, self.limits.max_decode_bytes
        if decode > room * 3 // 4:
            raise ValueError(f"limits.max_decode_bytes={decode} must leave a quarter of ray.memory_per_task_bytes={room} free")
        if not 0 <= self.heldout_permille <= 500:
            raise ValueError(f"heldout_permille={self.heldout_permille} must be in 0..500")


DECIDING_DOWNLOAD_SETTINGS = ("respect_robots", "respect_opt_out", "respect_tokens", "max_redirects")
"""The settings of `download` that decide which samples are kept; the others only decide how fast."""


def identity(config: PrepConfig) -> dict[str, Any]:
    """The part of the configuration that decides the bytes of the data set: all but where and how fast it is made."""
    values = to_dict(config)
    del values["ray"], values["output"], values["inputs"]
    values["download"] = {name: values["download"][name] for name in DECIDING_DOWNLOAD_SETTINGS}
    for name in ("scorer_actors", "scorer_gpus"):
        del values["filters"][name]
    return values


def identity_hash(config: PrepConfig) -> str:
    """Hex SHA-256 of `identity`, the `config_hash` of the manifest."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def stored_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The `identity` that a manifest or plan holds, with today's defaults for settings that are newer than it.

    A setting that did not exist had no effect, which is what its default stands for; without this, no older data set could be continued.
    """

    def filled(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        found = {**defaults, **stored}
        return {
            name: filled(value, defaults[name]) if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping) else value
            for name, value in found.items()
        }

    return filled(values, identity(PrepConfig()))
