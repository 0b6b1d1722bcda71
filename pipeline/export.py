"""`jetway export`: the weights of a checkpoint as one file, for other programs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from model.convert.big_vision import to_official
from pipeline.checkpoint.export import export_module, export_safetensors
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.official_files import write_official
from pipeline.trained import is_exported, open_trained, read_trained_config

SUFFIXES = {"safetensors": ".safetensors", "big_vision": ".npz"}


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway export`."""
    arguments = _parser().parse_args(argv)
    source, output, suffix = Path(arguments.source), Path(arguments.output), SUFFIXES[arguments.format]
    if output.suffix != suffix:
        raise UserError(f"a {arguments.format} file ends in {suffix}", got=f"--output {output}", fix=f"use --output {output.with_suffix(suffix)}")
    config, _ = read_trained_config(source)
    if arguments.dry_run:
        image = config.model.image
        print(f"{source}: {image.resolution} px model, {'moving average' if arguments.ema else 'weights'}; would write {output} ({arguments.format})")
        return 0
    if arguments.format == "safetensors" and not is_exported(source):
        with open_checkpoint(source) as reader:
            export_safetensors(reader, output, ema=arguments.ema)
            origin = f"step {reader.step} of {reader.path}"
    else:
        trained = open_trained(source, ema=arguments.ema, device="cpu")
        origin = trained.origin
        if arguments.format == "safetensors":
            export_module(trained.model, config.model, output)
        else:
            write_official(output, to_official(trained.model.state_dict(), config.model), config.model)
    print(f"{output}: {origin}, {output.stat().st_size / 1e6:.1f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway export",
        description="Write the weights of a checkpoint as one file, with the model's configuration inside: safetensors under this project's names, "
        "or an .npz archive in the layout of the official code (big_vision).",
        epilog="example: jetway export runs/digits --format big_vision --output digits.npz",
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder, one of its checkpoints, or an exported .safetensors file")
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="safetensors")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, replaced if it exists")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
