"""A small data set of random images, written with the schema's own classes and the standard library's tar."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import xxhash
from PIL import Image

from data_prep.schema import (
    TOKENIZER_FILE,
    Counts,
    ImageInfo,
    Manifest,
    ShardIndex,
    ShardInfo,
    Split,
    TokenizerInfo,
    index_path,
    tar_path,
)
from data_prep.storage import open_storage
from data_prep.tombstones import Hits, TombstoneFile, numbers, tombstones_path
from model.config import DecoderConfig, FlowConfig, GmmConfig, ImageConfig, JetFormerConfig, TextConfig
from pipeline.config import DataConfig, EvalConfig, RunConfig

NUM_PIECES = 300
RESOLUTION = 8


@dataclass(frozen=True)
class Written:
    """What the data set holds, to compare with: by (shard name, number in the shard)."""

    path: Path
    images: dict[tuple[str, int], np.ndarray]
    captions: dict[tuple[str, int], str]
    keys: dict[tuple[str, int], str]
    shards: dict[str, tuple[str, ...]]
    """Shard names of each split."""


def caption_of(number: int) -> str:
    """Two or three words."""
    return f"{('A Red', 'a small green', 'the blue')[number % 3]} {('circle', 'square')[number % 2]}"


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model of NUM_PIECES pieces, EOS 1 and pad 0."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([caption_of(number).lower() for number in range(60)]),
        model_writer=buffer,
        vocab_size=NUM_PIECES,
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    assert processor.get_piece_size() <= NUM_PIECES
    return buffer.getvalue()


@pytest.fixture(scope="session")
def num_pieces(tokenizer_model: bytes) -> int:
    return int(sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).get_piece_size())


WriteDataset = Callable[..., Written]


@pytest.fixture(scope="session")
def write_dataset(tokenizer_model: bytes, num_pieces: int) -> WriteDataset:
    """write_dataset(path, train=(7, 5, 9), heldout=(6,), channels=1, extension="png", shape=(8, 8)) -> Written."""

    def write(
        path: Path,
        *,
        train: tuple[int, ...] = (7, 5, 9),
        heldout: tuple[int, ...] = (6,),
        channels: int = 1,
        extension: str = "png",
        shape: tuple[int, int] = (RESOLUTION, RESOLUTION),
    ) -> Written:
        storage = open_storage(path)
        rng = np.random.default_rng(0)
        written = Written(path, {}, {}, {}, {})
        splits = {}
        for split, counts in (("train", train), ("heldout", heldout)):
            infos = []
            for shard_number, count in enumerate(counts):
                name = f"{split}-{shard_number:06d}"
                samples = []
                for member in range(count):
                    place, number = (name, member), len(written.keys)
                    pixels = rng.integers(0, 256, (*shape, channels), dtype=np.uint8)
                    written.images[place], written.captions[place] = pixels, caption_of(number)
                    written.keys[place] = f"{number:08x}"
                    contents = (encode(pixels, extension), caption_of(number).encode(), json.dumps({"label": number % 10}).encode())
                    samples.append((written.keys[place], contents))
                infos.append(_write_shard(storage, name, samples, extension))
            splits[split] = Split(num_samples=sum(counts), shards=tuple(infos))
            written.shards[split] = tuple(info.name for info in infos)
        storage.put_bytes(TOKENIZER_FILE, tokenizer_model)
        num = len(written.keys)
        Manifest(
            generation=1,
            config={},
            config_hash="0" * 64,
            image=ImageInfo(resolution=RESOLUTION, channels=channels, extension=extension),
            splits=splits,
            tokenizer=TokenizerInfo(file=TOKENIZER_FILE, sha256=hashlib.sha256(tokenizer_model).hexdigest(), num_pieces=num_pieces),
            counts=Counts(read=num, kept=num),
        ).dump(storage)
        return written

    return write


@pytest.fixture
def written(write_dataset: WriteDataset, tmp_path: Path) -> Written:
    """A gray PNG data set of 21 training samples in three shards and 6 held-out ones: damage it as you like."""
    return write_dataset(tmp_path / "data")


@pytest.fixture(scope="session")
def intact(write_dataset: WriteDataset, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The same, shared by tests that only read."""
    return write_dataset(tmp_path_factory.mktemp("intact") / "data")


def take_down(path: Path, **rows: list[int]) -> int:
    """Writes the next takedown, of these rows of these shards (train_000001=[3]); returns its number."""
    storage = open_storage(path)
    number = len(numbers(storage)) + 1
    shards = {name.replace("_", "-"): Hits(rows=tuple(found), keys=tuple(map(str, found))) for name, found in rows.items()}
    file = TombstoneFile(number=number, reason="test", rules_sha256="", generations=(1,), shards=shards)
    storage.put_bytes(tombstones_path(number), file.to_bytes())
    return number


@pytest.fixture
def make_config(num_pieces: int) -> Callable[..., RunConfig]:
    """make_config(path, channels=1, model_text={...}, evaluation={...}, seed=11, **data fields): a run whose model fits the data set."""

    def make(path: Path, *, channels: int = 1, model_text: dict | None = None, evaluation: dict | None = None, seed: int = 11, **data) -> RunConfig:
        model = JetFormerConfig(
            image=ImageConfig(resolution=RESOLUTION, channels=channels, patch_size=4),
            text=TextConfig(**{"length": 8, "num_pieces": num_pieces, **(model_text or {})}),
            flow=FlowConfig(depth=2, block_depth=1, width=8, num_heads=1),
            decoder=DecoderConfig(width=16, depth=1, mlp_dim=16, num_heads=2, head_dim=8),
            gmm=GmmConfig(num_mixtures=2, soft_dim=4),
        )
        data_config = DataConfig(**{"path": str(path), "global_batch_size": 12, "num_prefetch": 2, "shuffle_window_shards": 2, **data})
        return RunConfig(seed=seed, total_steps=10, model=model, data=data_config, eval=EvalConfig(**(evaluation or {})))

    return make


def encode(pixels: np.ndarray, extension: str) -> bytes:
    """Bytes of an image file."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **({"lossless": True} if extension == "webp" else {}))
    return buffer.getvalue()


def _write_shard(storage, name: str, samples: list[tuple[str, tuple[bytes, bytes, bytes]]], extension: str) -> ShardInfo:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, contents in samples:
            for suffix, content in zip((extension, "txt", "json"), contents, strict=True):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets = [member.offset_data for member in tar.getmembers()]
    contents = [contents for _, contents in samples]
    index = ShardIndex(
        keys=np.array([key.encode() for key, _ in samples], dtype="S"),
        offsets=np.array(offsets, dtype=np.int64).reshape(-1, 3),
        sizes=np.array([[len(part) for part in parts] for parts in contents], dtype=np.int64).reshape(-1, 3),
        xxh3=np.array([[xxhash.xxh3_64_intdigest(part) for part in parts] for parts in contents], dtype=np.uint64).reshape(-1, 3),
        sha256=np.array([list(hashlib.sha256(parts[0]).digest()) for parts in contents], dtype=np.uint8).reshape(-1, 32),
    )
    storage.put_bytes(tar_path(name), data)
    storage.put_bytes(index_path(name), index.to_bytes())
    return ShardInfo(
        name=name,
        num_samples=len(samples),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        index_sha256=hashlib.sha256(index.to_bytes()).hexdigest(),
    )
