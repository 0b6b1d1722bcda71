"""`jetway sample`: images from prompts, as one PNG grid with the settings beside it."""

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from model.generate.images import CfgRule, ImageSampling, Loop, sample_images
from model.jetformer import JetFormer
from pipeline.config import RunConfig, SamplingConfig
from pipeline.data.text import TextCodec
from pipeline.image_grid import encode_png, image_grid
from pipeline.trained import find_codec, open_trained, read_trained_config

logger = logging.getLogger(__name__)

BATCH_SIZE = 128
"""Images drawn at a time; guidance doubles the rows."""


def image_sampling(config: SamplingConfig) -> ImageSampling:
    """The settings of a run as the model's."""
    return ImageSampling(cfg_scale=config.cfg_scale, cfg_rule=config.cfg_rule, temperature=config.temperature, seed=config.seed)


def draw_images(
    model: JetFormer,
    codec: TextCodec,
    prompts: Sequence[str],
    *,
    settings: ImageSampling,
    batch_size: int = BATCH_SIZE,
    loop: Loop = "auto",
    progress: bool = True,
) -> Tensor:
    """One image per prompt; image i depends on the seed, i and prompt i, not on the others.

    Args:
        prompts: captions, or class labels in decimal, as the codec takes them.
        loop: see `model.generate.images.Loop`.
        progress: show a bar on stderr.

    Returns:
        uint8 [N, H, W, channels] on the CPU.

    Raises:
        UserError: a prompt that the codec refuses, or a `loop` that cannot run here.
    """
    device, encoded = next(model.parameters()).device, codec.encode(prompts)
    if encoded.cut.any():
        logger.warning(
            "%d of %d prompts are longer than the model's %d text slots and were cut", encoded.cut.sum(), len(prompts), encoded.ids.shape[1]
        )
    ids, mask = torch.from_numpy(encoded.ids).to(device), torch.from_numpy(encoded.mask).to(device)
    positions = torch.arange(len(prompts), device=device)
    images = []
    num_batches = -(-len(prompts) // batch_size)
    with tqdm(total=num_batches * model.config.image.num_tokens, desc="sampling", unit="token", disable=not progress, leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            some = slice(start, start + batch_size)
            drawn = sample_images(model, ids[some], mask[some], settings=settings, positions=positions[some], loop=loop, on_token=bar.update)
            images.append(drawn.cpu())
    image = model.config.image
    return torch.cat(images) if images else torch.zeros(0, image.resolution, image.resolution, image.channels, dtype=torch.uint8)


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway sample`."""
    arguments = _parser().parse_args(argv)
    config, folder = read_trained_config(arguments.source)
    prompts = _prompts(arguments, config)
    settings = _settings(arguments, config)
    codec = find_codec(config, folder, arguments.tokenizer)
    codec.encode(prompts)  # a prompt that is none shows before the weights are read
    every = [prompt for prompt in prompts for _ in range(arguments.num_per_prompt)]
    output = Path(arguments.output)
    record = {
        "source": str(arguments.source),
        "weights": "ema" if arguments.ema else "raw",
        "settings": dataclasses.asdict(settings),
        "num_per_prompt": arguments.num_per_prompt,
        "prompts": prompts,
    }
    if arguments.dry_run:
        print(json.dumps({**record, "images": len(every), "output": str(output)}, indent=1, ensure_ascii=False))
        return 0
    trained = open_trained(arguments.source, ema=arguments.ema, device=arguments.device)
    images = draw_images(trained.model, codec, every, settings=settings, batch_size=arguments.batch_size, loop=arguments.loop)
    columns = arguments.num_per_prompt if arguments.num_per_prompt > 1 else None
    _write(output, encode_png(image_grid(images, num_columns=columns)))
    if arguments.save_images is not None:
        record["files"] = _save_each(images, Path(arguments.save_images))
    record["origin"] = trained.origin
    _write(output.with_suffix(".json"), (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"{output}: {len(every)} images from {trained.origin}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway sample",
        description="Draw images from prompts. Writes a PNG grid, and a JSON file of the same name with prompts and settings.",
        epilog='example: jetway sample runs/digits --prompt "a handwritten seven" --num-per-prompt 8 --output sevens.png',
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder, one of its checkpoints, or an exported .safetensors file")
    parser.add_argument("--prompt", action="append", default=[], help="caption, or class number for a class-conditional model; may be repeated")
    parser.add_argument("--prompts-file", metavar="FILE", help="text file with one prompt per line")
    parser.add_argument("--num-per-prompt", type=int, default=1, metavar="N", help="images per prompt: a row of the grid (default 1)")
    parser.add_argument("--cfg-scale", type=float, metavar="W", help="guidance weight, 0 for none (default: the run's sampling.cfg_scale)")
    parser.add_argument("--cfg-rule", choices=get_args(CfgRule), help="default: the run's sampling.cfg_rule")
    parser.add_argument("--temperature", type=float, metavar="T", help="multiplies the mixture's scales (default: the run's sampling.temperature)")
    parser.add_argument("--seed", type=int, help="default: the run's sampling.seed")
    parser.add_argument("--output", default="samples.png", metavar="GRID.png", help="default: samples.png")
    parser.add_argument("--save-images", metavar="DIR", help="also write every image by itself, as 00000.png, 00001.png, ...")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"images at a time (default {BATCH_SIZE}); does not change the images")
    parser.add_argument(
        "--loop",
        choices=get_args(Loop),
        default="auto",
        help="replay each step from a CUDA graph, or not (default: on CUDA, where the rule allows it)",
    )
    add_model_arguments(parser)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every verb using a trained model has."""
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model file (default: the run's own, or its data set's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would be done, write nothing")


def _prompts(arguments: argparse.Namespace, config: RunConfig) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        try:
            lines = Path(arguments.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompts in {arguments.prompts_file}", got=error, expected="a UTF-8 text file") from None
        prompts += [line.strip() for line in lines if line.strip()]
    prompts = prompts or list(config.sampling.prompts)
    if not prompts:
        raise UserError("nothing to draw", got="no prompt", fix='give --prompt "..." or --prompts-file FILE')
    for name, value in (("--num-per-prompt", arguments.num_per_prompt), ("--batch-size", arguments.batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1", got=value)
    if Path(arguments.output).suffix.lower() != ".png":
        raise UserError("the grid is a PNG file", got=f"--output {arguments.output}", expected="a name that ends in .png")
    return prompts


def _settings(arguments: argparse.Namespace, config: RunConfig) -> ImageSampling:
    given: dict[str, Any] = {name: getattr(arguments, name) for name in ("cfg_scale", "cfg_rule", "temperature", "seed")}
    try:
        return dataclasses.replace(image_sampling(config.sampling), **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError("cannot sample like this", got=error) from None


def _save_each(images: Tensor, folder: Path) -> list[str]:
    files = [f"{index:05d}.png" for index in range(len(images))]
    for name, image in zip(files, images.numpy(), strict=True):
        _write(folder / name, encode_png(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)))
    return [str(folder / name) for name in files]


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}", got=error, fix="choose another folder") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
