"""The model alone as one safetensors file: full fp32 tensors under their global names, with the configuration in the metadata.

The bytes depend on the weights only, not on the layout or machine that trained them.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from configs.errors import UserError
from configs.loader import build_config, to_dict
from model.config import JetFormerConfig
from model.parallel import global_shape, shard_of
from pipeline.checkpoint.files import Entry, fsync_folder, write_safetensors
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.weights import BUFFER, EMA, PARAMETER, persistent_buffers, run_config_of

FORMAT = "jetway-model/1"


def export_safetensors(reader: CheckpointReader, path: Path | str, *, ema: bool = False) -> Path:
    """Writes the model of a checkpoint to one file, atomically; one tensor at a time is in memory.

    Raises:
        UserError: no moving average stored (with `ema`), or the file cannot be written.
    """
    prefix = EMA if ema else PARAMETER
    names = {name.removeprefix(prefix): name for name in reader.names(prefix)}
    if not names:
        raise UserError(f"the checkpoint {reader.path} holds no {'moving average' if ema else 'weights'}")
    names |= {name.removeprefix(BUFFER): name for name in reader.names(BUFFER)}
    entries = []
    for name, stored in sorted(names.items()):
        dtype = torch.float32 if reader.dtype(stored).is_floating_point else reader.dtype(stored)
        entries.append(Entry(name, reader.shape(stored), dtype, lambda stored=stored, dtype=dtype: reader.read_full(stored).to(dtype)))  # type: ignore[misc]
    return _write(Path(path), entries, run_config_of(reader).model, {"step": str(reader.step), "weights": "ema" if ema else "raw"})


def export_module(module: nn.Module, config: JetFormerConfig, path: Path | str, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a plain (unsplit) model to one file, as `export_safetensors` does."""
    tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(persistent_buffers(module))}
    entries = []
    for name, tensor in sorted(tensors.items()):
        if shard_of(tensor) is not None:
            raise ValueError(f"{name} is a tensor-parallel slice: export from a checkpoint instead")
        dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
        entries.append(Entry(name, tuple(tensor.shape), dtype, lambda tensor=tensor, dtype=dtype: tensor.detach().to(dtype)))  # type: ignore[misc]
    return _write(Path(path), entries, config, dict(metadata or {}))


def _write(path: Path, entries: list[Entry], config: JetFormerConfig, extra: Mapping[str, str]) -> Path:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    metadata = {"format": FORMAT, "config": json.dumps(to_dict(config), sort_keys=True), **extra}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(temporary, entries, metadata)
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}", got=error, fix="free space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def read_safetensors_config(path: Path | str) -> JetFormerConfig:
    """The configuration in the metadata of an exported file.

    Raises:
        UserError: not an exported model.
    """
    metadata = _open_file(path).metadata() or {}
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise UserError(f"{path} is not a model exported by Jetway", got=metadata.get("format"), expected=FORMAT)
    return build_config(JetFormerConfig, json.loads(metadata["config"]), source=f"the configuration in {path}")


def load_safetensors(path: Path | str, module: nn.Module) -> None:
    """Fills `module` (plain, or a tensor-parallel slice of the model) from an exported file.

    Raises:
        UserError: not a safetensors file, or of another architecture.
    """
    file = _open_file(path)
    targets: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(persistent_buffers(module))}
    stored = set(file.keys())
    problems = [f"{name} is missing" for name in targets if name not in stored]
    problems += [f"{name} is not in the model" for name in sorted(stored) if name not in targets]
    for name in stored & set(targets):
        shape, wanted = tuple(file.get_slice(name).get_shape()), global_shape(targets[name])
        if shape != wanted:
            problems.append(f"{name} has shape {list(shape)}, the model's is {list(wanted)}")
    if problems:
        raise UserError(f"{path} is of another architecture", got="; ".join(problems[:4]), fix="build the model from the file's own configuration")
    with torch.no_grad():
        for name, target in targets.items():
            value, shard = file.get_tensor(name), shard_of(target)
            target.copy_(value if shard is None else value.narrow(shard.dim, shard.start, shard.size))


def _open_file(path: Path | str) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise UserError("no such file", got=path) from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file", got=error) from None
