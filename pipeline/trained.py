"""Opens what training left behind, ready to sample: model, configuration, text codec."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.errors import UserError
from model.config import JetFormerConfig
from model.jetformer import JetFormer
from model.kernels.config import KernelsConfig
from pipeline.checkpoint.export import load_safetensors, read_safetensors_config
from pipeline.checkpoint.folder import FOLDER, CheckpointFolder
from pipeline.checkpoint.reader import CheckpointReader, open_checkpoint
from pipeline.checkpoint.weights import load_weights, run_config_of
from pipeline.config import DataConfig, RunConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.text import TextCodec, build_codec
from pipeline.parallel.layout import set_matmul_precision

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.model"
"""In the run's folder: the tokenizer that it was trained with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A model with what is needed to use it."""

    model: JetFormer
    """Whole, on one device, in evaluation mode."""
    config: RunConfig
    origin: str
    """Where the weights come from, for people."""
    folder: Path
    """Where files that belong to it are looked for: the run's folder, or that of the exported file."""


def open_trained(path: Path | str, *, ema: bool = False, device: str = "auto", verify: bool = True) -> TrainedModel:
    """Loads a run's newest good checkpoint, one checkpoint, or an exported `.safetensors` file. Not collective: any one process may call it.

    Fused operations are chosen for this machine, whatever the run was forced to use on its own.

    Args:
        ema: take the moving average of the weights.
        device: `auto`, `cpu` or `cuda`.
        verify: check the digests of all files of a checkpoint, those of the optimiser state too.

    Raises:
        UserError: nothing there, damaged, no moving average, or no such device.
    """
    target = choose_device(device)
    path = Path(path)
    if is_exported(path):
        model_config = read_safetensors_config(path)
        if ema:
            raise UserError(
                f"{path} holds one set of weights", got="--ema", fix="export the moving average from the checkpoint with `jetway export --ema`"
            )
        config = _bare_config(model_config)
        set_matmul_precision(target, tf32=config.kernels.tf32)
        model = JetFormer(model_config)
        load_safetensors(path, model)
        return TrainedModel(model=model.eval().to(target), config=config, origin=str(path), folder=path.parent)
    with open_checkpoint(path, alone=True, verify=verify) as reader:
        config = run_config_of(reader)
        set_matmul_precision(target, tf32=config.kernels.tf32)
        model = JetFormer(config.model, kernels=portable_kernels(config.kernels))
        load_weights(reader, model, ema=ema, config=config.model)
        origin = f"step {reader.step} of {reader.path}{', moving average' if ema else ''}"
        return TrainedModel(model=model.eval().to(target), config=config, origin=origin, folder=run_folder(reader))


def read_trained_config(path: Path | str) -> tuple[RunConfig, Path]:
    """Configuration and folder of what `open_trained` would open, without reading the weights.

    Raises:
        UserError: as `open_trained`.
    """
    path = Path(path)
    if is_exported(path):
        return _bare_config(read_safetensors_config(path)), path.parent
    steps = CheckpointFolder(path).candidates()
    try:
        # Checksums of all weights take a minute at a billion parameters: `open_trained` checks them.
        with CheckpointReader(CheckpointFolder(path).step_path(steps[0]) if steps else path) as reader:
            return run_config_of(reader), run_folder(reader)
    except (OSError, ValueError):
        with open_checkpoint(path, alone=True) as reader:
            return run_config_of(reader), run_folder(reader)


def is_exported(path: Path) -> bool:
    """Whether a path names an exported file rather than a run or a checkpoint."""
    return path.is_file() or path.suffix == ".safetensors"


def run_folder(reader: CheckpointReader) -> Path:
    """Folder of the run that a checkpoint belongs to; the checkpoint's own if it was moved out of one."""
    return reader.path.parent.parent if reader.path.parent.name == FOLDER else reader.path


def portable_kernels(kernels: KernelsConfig) -> KernelsConfig:
    """A run's precision and memory; its implementations are for the machine it was trained on, and chosen anew on this one."""
    return KernelsConfig(tf32=kernels.tf32, workspace_mib=kernels.workspace_mib)


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device", got="device cuda", fix="use --device cpu, or see `jetway doctor`")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def find_codec(config: RunConfig, folder: Path, tokenizer: Path | str | None = None) -> TextCodec:
    """The text codec of a trained model.

    The tokenizer is the given file, else the copy in `folder`, else that of the data set in the configuration.

    Raises:
        UserError: none found, or not the model's.
    """
    labels = config.data.text == "label"
    return build_codec(config.model.text, labels=labels, tokenizer=None if labels else _read_tokenizer(config, folder, tokenizer))


def _read_tokenizer(config: RunConfig, folder: Path, given: Path | str | None) -> bytes:
    candidate = Path(given) if given is not None else folder / TOKENIZER_FILE
    try:
        return candidate.read_bytes()
    except OSError as error:
        if given is not None:
            raise UserError(f"cannot read the tokenizer {candidate}", got=error) from None
    try:
        return open_dataset(config.data.path, config.data.generation).read_tokenizer()
    except UserError as error:
        raise UserError(
            "no tokenizer for this model",
            got=f"no {candidate}, and the data set it was trained on is not usable: {error.what}",
            fix="name a SentencePiece model file with --tokenizer",
        ) from None


def _bare_config(model: JetFormerConfig) -> RunConfig:
    """A run's configuration around a model that comes without one."""
    labels = model.text.length == 1 and (model.text.tie_logits or model.text.num_repeats > 1)
    return dataclasses.replace(RunConfig(), model=model, data=DataConfig(text="label" if labels else "caption"))
