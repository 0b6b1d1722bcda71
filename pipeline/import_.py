"""`jetway import`: official big_vision weights into a run's folder, from where they sample, caption,
export and train on (with fresh optimiser moments); or into one file."""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from configs.errors import UserError
from configs.loader import load_config, to_dict, to_yaml
from model.config import JetFormerConfig
from model.convert.architecture import check_architecture
from model.convert.big_vision import from_official
from model.jetformer import JetFormer
from pipeline.checkpoint.export import export_module
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.format import Fragment
from pipeline.checkpoint.weights import BUFFER, PARAMETER, persistent_buffers
from pipeline.checkpoint.writer import save
from pipeline.config import DataConfig, RunConfig
from pipeline.official_files import read_official
from pipeline.tracker import CONFIG
from pipeline.trained import TOKENIZER_FILE


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway import`."""
    arguments = _parser().parse_intermixed_args(argv)  # key=value may follow the options
    source, output = Path(arguments.source), Path(arguments.output)
    as_file = output.suffix == ".safetensors"
    checkpoint = read_official(source)
    config = _run_config(arguments, checkpoint.config)
    if not as_file and CheckpointFolder(output).steps():
        raise UserError(f"{output} holds checkpoints already", fix="choose another --output, so that they stay")
    tokenizer = _check_tokenizer(arguments.tokenizer)
    check_architecture(checkpoint.arrays, config.model, source=str(source))
    num_parameters = sum(value.size for name, value in checkpoint.arrays.items() if not name.endswith("FREEZE_ME"))
    if arguments.dry_run:
        print(f"{source}: {len(checkpoint.arrays)} arrays, {num_parameters:,} parameters, all as the configuration says; would write {output}")
        return 0
    model = build_from_official(checkpoint.arrays, config.model)
    if as_file:
        written = export_module(model, config.model, output, {"imported_from": source.name})
    else:
        written = _save_run(model, dataclasses.replace(config, output_dir=str(output)), output, source.name)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, (output.parent if as_file else output) / TOKENIZER_FILE)
    print(f"{written}: {num_parameters:,} parameters from {source}")
    return 0


def build_from_official(arrays: dict[str, np.ndarray], config: JetFormerConfig) -> JetFormer:
    """The model that official arrays describe, after `check_architecture`."""
    model = JetFormer(config)
    model.load_state_dict(from_official(arrays, config), assign=False)
    return model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway import",
        description="Read a checkpoint of the official code (big_vision): an .npz archive with bare names or names below params/, or a folder of "
        "TensorStore arrays. Only weights are taken, not optimiser state.",
        epilog="example: jetway import jetformer_b.npz --preset image_text_350m --tokenizer cc_en.model --output runs/official_b",
    )
    parser.add_argument("source", metavar="FILE.npz|FOLDER")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of the configuration, e.g. model.text.length=32")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", metavar="CONFIG", help="the run's configuration: a YAML file, or the name of a shipped one such as train/digits")
    which.add_argument("--preset", metavar="NAME", help="a shipped configuration by its short name, such as image_text_350m")
    parser.add_argument("--output", required=True, metavar="RUN_DIR|FILE.safetensors", help="a new run's folder, or one file with the weights")
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model file to store with the weights")
    parser.add_argument("--dry-run", action="store_true", help="compare names and shapes with the configuration, write nothing")
    return parser


def _run_config(arguments: argparse.Namespace, stored: JetFormerConfig | None) -> RunConfig:
    """The configuration named on the command line, else a default run around the one stored with the weights."""
    name = arguments.config or (f"train/{arguments.preset}" if arguments.preset else None)
    if name is not None:
        return load_config(RunConfig, name, arguments.overrides)
    if stored is None:
        raise UserError(
            f"{arguments.source} does not say what model it is",
            expected="a configuration of the same architecture",
            fix="name one: --preset image_text_350m, or --config FILE",
        )
    if arguments.overrides:
        raise UserError("key=value needs a configuration to change", got=" ".join(arguments.overrides), fix="add --config or --preset")
    labels = stored.text.tie_logits and stored.text.length == 1
    return RunConfig(model=stored, data=DataConfig(text="label" if labels else "caption"))


def _check_tokenizer(given: str | None) -> Path | None:
    if given is None:
        return None
    if not Path(given).is_file():
        raise UserError("no such tokenizer", got=given, expected="a SentencePiece model file")
    return Path(given)


def _save_run(model: JetFormer, config: RunConfig, run_dir: Path, source: str) -> Path:
    """A run at step 0: its configuration and one checkpoint of weights."""
    fragments = [Fragment.whole(PARAMETER + name, parameter) for name, parameter in model.named_parameters()]
    fragments += [Fragment.whole(BUFFER + name, buffer) for name, buffer in persistent_buffers(model)]
    with torch.no_grad():
        path = save(run_dir, 0, fragments, {"config": to_dict(config), "imported_from": source})
    (run_dir / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
