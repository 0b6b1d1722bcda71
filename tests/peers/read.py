"""Reads a data set with one other tool and writes what it found, as JSON lines. Runs in that tool's own environment.

    python read.py TOOL DATASET OUT

A line is {"key": ..., "jpg": SHA-256 of the image, "txt": the caption, "json": the object}. Only the tool decides what is a sample.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Found = Iterator[dict[str, Any]]


def tars(folder: Path) -> list[str]:
    """All shards of all splits."""
    return sorted(str(path) for path in (folder / "shards").glob("*.tar"))


def entry(key: str, image: bytes, text: bytes, values: bytes) -> dict[str, Any]:
    """A line of the output, from the bytes of the three members."""
    return {"key": key, "jpg": hashlib.sha256(image).hexdigest(), "txt": text.decode(), "json": json.loads(values)}


def read_webdataset(folder: Path) -> Found:
    """webdataset, whichever version this environment has."""
    import webdataset

    for sample in webdataset.WebDataset(tars(folder), shardshuffle=False):
        yield entry(sample["__key__"], sample["jpg"], sample["txt"], sample["json"])


def read_datasets(folder: Path) -> Found:
    """Hugging Face datasets, streaming; it decodes texts and objects itself, and fills in fields that a sample lacks."""
    import datasets

    found = datasets.load_dataset("webdataset", data_files={"train": tars(folder)}, split="train", streaming=True)
    for sample in found.cast_column("jpg", datasets.Image(decode=False)):
        digest = hashlib.sha256(sample["jpg"]["bytes"]).hexdigest()
        yield {"key": sample["__key__"], "jpg": digest, "txt": sample["txt"], "json": sample["json"]}


def read_ray(folder: Path) -> Found:
    """Ray Data, without decoding."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    for sample in ray.data.read_webdataset(tars(folder), decoder=None).iter_rows():
        yield entry(sample["__key__"], sample["jpg"], sample["txt"], sample["json"])
    ray.shutdown()


def read_energon(folder: Path) -> Found:
    """Megatron-Energon after `energon prepare`, through its own loader; the image is left encoded."""
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless

    @stateless
    def as_it_is(sample: Any) -> Any:
        return sample

    class Plain(DefaultTaskEncoder):
        """Hands the raw members on."""

        cookers = [Cooker(cook=as_it_is)]
        decoder = None

        def batch(self, samples: list[Any]) -> list[Any]:
            return samples

        def encode_batch(self, batch: list[Any]) -> list[Any]:
            return batch

    data = get_val_dataset(
        folder, split_part="train", batch_size=1, worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0), task_encoder=Plain()
    )
    for (sample,) in get_loader(data):
        yield entry(sample["__key__"], sample["jpg"], sample["txt"], sample["json"])


READERS: dict[str, Callable[[Path], Found]] = {
    "webdataset": read_webdataset,
    "datasets": read_datasets,
    "ray": read_ray,
    "energon": read_energon,
}


def main() -> None:
    """Writes one line for every sample that the tool yields."""
    tool, folder, out = sys.argv[1:]
    with open(out, "w", encoding="utf-8") as file:
        for sample in READERS[tool](Path(folder)):
            file.write(json.dumps(sample) + "\n")


if __name__ == "__main__":
    main()
