"""The two sides of the comparison as command lines, and what they left behind."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PEER = "img2dataset==1.47.0"
PEER_ENV = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
"""The peer's libraries would ask the internet for a newer version at every start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison: the same work for both sides."""

    name: str
    note: str
    peer: Mapping[str, str]
    ours: Sequence[str]
    gates: bool = False
    """Whether the bars hold for this row."""


ROWS = {
    row.name: row
    for row in (
        Row(
            name="same",
            note="the same output: shorter side 256, ratio kept, JPEG quality 95, 4:2:0; our tokenizer is given, as the peer trains none",
            peer={"image_size": "256", "resize_mode": "keep_ratio"},
            ours=("image.resize_mode=keep_ratio", "image.subsampling=420", "image.quality=95"),
            gates=True,
        ),
        Row(
            name="defaults",
            note="our defaults (256 px square, quality 95, 4:4:4) against the peer's center_crop, which halves the chroma all the same",
            peer={"image_size": "256", "resize_mode": "center_crop"},
            ours=(),
        ),
        Row(
            name="full",
            note="shorter side 512: the pictures are hardly larger, so both decode every pixel and scaling in the decoder gains nothing",
            peer={"image_size": "512", "resize_mode": "keep_ratio"},
            ours=("image.resolution=512", "image.resize_mode=keep_ratio", "image.subsampling=420", "image.quality=95"),
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run left on disk."""

    read: int
    kept: int
    num_bytes: int
    """Of the tars."""
    num_bytes_all: int
    """Of everything in the output folder."""


def peer_command(python: Path, urls: Path, output: Path, row: Row, *, processes: int = 2, threads: int = 32, shard: int = 1000) -> list[str]:
    """img2dataset over a URL list."""
    flags = {
        **{"url_list": urls, "output_folder": output, "input_format": "parquet", "url_col": "url", "caption_col": "caption"},
        **{"save_additional_columns": '["similarity"]', "output_format": "webdataset", "encode_quality": 95},
        **{"processes_count": processes, "thread_count": threads, "number_sample_per_shard": shard},
        **{"enable_wandb": False, **row.peer},
    }
    return [str(python.with_name("img2dataset")), *(f"--{name}={value}" for name, value in flags.items())]


def our_command(inputs: Path, output: Path, overrides: Sequence[str]) -> list[str]:
    """`jetway prep` over a URL list or a folder."""
    settings = ("download.contact=bench@localhost", "download.allowed_networks=[127.0.0.0/8]", *overrides)
    return [str(Path(sys.executable).with_name("jetway")), "prep", "--input", str(inputs), "--output", str(output), *settings]


def peer_outcome(output: Path) -> Outcome:
    """Counts of img2dataset's own statistics."""
    stats = [json.loads(path.read_text()) for path in sorted(output.glob("*_stats.json"))]
    return Outcome(read=sum(s["count"] for s in stats), kept=sum(s["successes"] for s in stats), **_sizes(output))


def our_outcome(output: Path) -> Outcome:
    """Counts of the newest manifest."""
    manifests = sorted((output / "manifests").glob("*.json"))
    if not manifests:
        return Outcome(read=0, kept=0, **_sizes(output))
    counts = json.loads(manifests[-1].read_text())["counts"]
    return Outcome(read=counts["read"], kept=counts["kept"], **_sizes(output))


def _sizes(output: Path) -> dict[str, int]:
    sizes = {Path(folder) / name: os.path.getsize(Path(folder) / name) for folder, _, names in os.walk(output) for name in names}
    return {"num_bytes": sum(size for path, size in sizes.items() if path.suffix == ".tar"), "num_bytes_all": sum(sizes.values())}
