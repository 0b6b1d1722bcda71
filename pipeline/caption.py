"""`jetway caption`: text for image files, written freely or chosen among candidates."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from model.config import ImageConfig
from model.generate.captions import write_captions
from model.jetformer import JetFormer
from model.score import score_captions
from pipeline.checkpoint.files import replace_text
from pipeline.data.text import TextCodec
from pipeline.sample import add_model_arguments
from pipeline.trained import find_codec, open_trained, read_trained_config

logger = logging.getLogger(__name__)

BATCH_SIZE = 128
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What is taken for an image in a folder."""


def caption_images(
    model: JetFormer,
    codec: TextCodec,
    images: Tensor,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> list[str]:
    """One caption per image.

    Args:
        images: uint8 [N, H, W, channels] of the model's resolution.
        temperature: 0 takes the likeliest piece at every slot.
        seed: key of the dequantisation noise and of the draws; caption i depends on the seed, i and image i.

    Raises:
        UserError: the model writes no text.
    """
    device = next(model.parameters()).device
    captions: list[str] = []
    for start in tqdm(range(0, len(images), batch_size), desc="captioning", unit="batch", disable=not progress, leave=False):
        some = images[start : start + batch_size].to(device)
        positions = torch.arange(start, start + len(some), device=device)
        pieces = write_captions(model, some, temperature=temperature, seed=seed, positions=positions)
        captions += [codec.decode(row) for row in pieces.tolist()]
    return captions


def score_images(
    model: JetFormer,
    codec: TextCodec,
    images: Tensor,
    candidates: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Tensor:
    """log p(candidate | image) in nats, summed over the text: fp32 [N, number of candidates] on the CPU. `.argmax(1)` classifies.

    Args:
        images: uint8 [N, H, W, channels] of the model's resolution.

    Raises:
        UserError: the model scores no text.
    """
    device, encoded = next(model.parameters()).device, codec.encode(candidates)
    text, mask, loss = (torch.from_numpy(array).to(device) for array in (encoded.ids, encoded.mask, encoded.loss))
    scores = []
    for start in tqdm(range(0, len(images), batch_size), desc="scoring", unit="batch", disable=not progress, leave=False):
        some = images[start : start + batch_size].to(device)
        positions = torch.arange(start, start + len(some), device=device)
        scores.append(score_captions(model, some, text, mask, loss, seed=seed, positions=positions, max_rows=batch_size).cpu())
    return torch.cat(scores) if scores else torch.zeros(0, len(candidates))


def load_image(path: Path, config: ImageConfig) -> npt.NDArray[np.uint8]:
    """An image file as the model takes it: upright, its centred square resized as data preparation does it, uint8 [H, W, channels].

    Raises:
        UserError: not a readable image.
    """
    try:
        with Image.open(path) as file:
            image = _to_channels(ImageOps.exif_transpose(file), config.channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}", got=error) from None
    size, side = config.resolution, min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if side != size or image.width != image.height:
        method = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
        image = image.resize((size, size), method, box=(left, top, left + side, top + side))
    pixels = np.array(image)
    return pixels.reshape(size, size, config.channels)


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Grey or RGB on white, whatever the file's mode; 16-bit grey keeps its upper bits."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway caption`; exit code 1 if some of the files could not be read."""
    arguments = _parser().parse_intermixed_args(argv)  # images may follow the options
    if arguments.temperature < 0 or arguments.batch_size < 1:
        raise UserError("--temperature must not be negative, and --batch-size at least 1", got=f"{arguments.temperature}, {arguments.batch_size}")
    config, folder = read_trained_config(arguments.source)
    codec = find_codec(config, folder, arguments.tokenizer)
    paths = list(_image_files(arguments.images))
    if arguments.dry_run:
        print(
            f"{len(paths)} files -> {config.model.image.resolution} px, {config.model.image.channels} channel(s); output {arguments.output or 'none'}"
        )
        return 0
    images, errors = _load_all(paths, config.model.image)
    trained = open_trained(arguments.source, ema=arguments.ema, device=arguments.device)
    stacked, options = torch.from_numpy(np.stack(list(images.values()))), {"seed": arguments.seed, "batch_size": arguments.batch_size}
    if arguments.candidate:
        scores = score_images(trained.model, codec, stacked, arguments.candidate, **options)
        results = [_ranked(arguments.candidate, row) for row in scores.tolist()]
    else:
        results = [{"caption": text} for text in caption_images(trained.model, codec, stacked, temperature=arguments.temperature, **options)]
    found = dict(zip(images, results, strict=True))
    records: list[dict[str, Any]] = [{"file": str(path), **(found[path] if path in found else {"error": errors[path]})} for path in paths]
    for record in records:
        print(f"{record['file']}\t{record.get('caption', '(not readable)')}")
    if arguments.output is not None:
        _write_lines(Path(arguments.output), records)
    return 1 if errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway caption",
        description="Write a caption for each image, or choose the likeliest of some candidates. Prints one line per image.",
        epilog="example: jetway caption runs/digits photo.png scans/ --output captions.jsonl",
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder, one of its checkpoints, or an exported .safetensors file")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", metavar="FILE.jsonl", help="also write one JSON object per image")
    parser.add_argument(
        "--candidate", action="append", default=[], metavar="TEXT", help="score this text instead of writing one; repeat for a choice"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest piece at every step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"images at a time (default {BATCH_SIZE})")
    add_model_arguments(parser)
    return parser


def _image_files(given: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"no images in {path}", expected=f"files ending in {', '.join(SUFFIXES)}")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError("no such file", got=path)
    return list(dict.fromkeys(paths))


def _load_all(paths: Sequence[Path], config: ImageConfig) -> tuple[dict[Path, npt.NDArray[np.uint8]], dict[Path, str]]:
    """Images by path, and what was wrong with the others; one bad file does not cost the rest."""
    images, errors = {}, {}
    for path in tqdm(paths, desc="reading", unit="image", leave=False):
        try:
            images[path] = load_image(path, config)
        except UserError as error:
            logger.warning("%s", error)
            errors[path] = str(error).replace("\n", " ")
    if not images:
        raise UserError("none of the images can be read", got=", ".join(map(str, paths[:4])))
    return images, errors


def _ranked(candidates: Sequence[str], scores: Sequence[float]) -> dict[str, Any]:
    by_score = sorted(zip(candidates, scores, strict=True), key=lambda pair: -pair[1])
    return {"caption": by_score[0][0], "log_probabilities": dict(by_score)}


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    except OSError as error:
        raise UserError(f"cannot write {path}", got=error, fix="choose another file") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
