"""From a checkpoint to a model that can be evaluated or sampled, on any layout."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, UserError
from configs.loader import build_config, to_dict
from model.config import JetFormerConfig
from model.parallel import global_shape, shard_of
from pipeline.checkpoint.reader import CheckpointReader, open_checkpoint
from pipeline.config import RunConfig

PARAMETER, BUFFER, EMA, MOMENT = "param/", "buffer/", "ema/", "exp_avg/"
"""Prefixes of stored names: fp32 master weights, persistent buffers, the moving average of the weights, and Adam's first moments."""


def run_config_of(reader: CheckpointReader) -> RunConfig:
    """The resolved configuration of the run that wrote a checkpoint.

    Raises:
        UserError: the checkpoint holds none, or one of another version of this program.
    """
    values = reader.state.get("config")
    if not isinstance(values, dict):
        raise UserError(f"the checkpoint {reader.path} holds no configuration", expected="`config` in its state")
    return build_config(RunConfig, values, source=f"the configuration stored in {reader.path}")


def load_run_config(path: Path | str) -> RunConfig:
    """The resolved configuration stored in a checkpoint, or in the newest good one of a run's folder."""
    with open_checkpoint(path) as reader:
        return run_config_of(reader)


def load_model_config(path: Path | str) -> JetFormerConfig:
    """What the model in a checkpoint is made of."""
    return load_run_config(path).model


def can_resume(reader: CheckpointReader) -> bool:
    """Whether a checkpoint holds a run's whole state; False for one of weights only, as `jetway import` makes it."""
    return bool(reader.names(MOMENT))


def load_weights(
    reader: CheckpointReader, module: nn.Module, *, ema: bool = False, config: JetFormerConfig | None = None, partial: bool = False
) -> None:
    """Fills every parameter and persistent buffer of `module` in place, whatever layout the checkpoint was written on.

    Args:
        module: a model whose `state_dict` names are the global names; parameters split over tensor-parallel ranks get their slices.
        ema: take the moving average instead of the weights themselves.
        config: the module's configuration, for a better message when the checkpoint is of another architecture.
        partial: `module` is one stage of the model; that the checkpoint holds more is no error.

    Raises:
        UserError: no moving average stored, or another architecture: the message names the first differing fields and tensors.
    """
    prefix = EMA if ema else PARAMETER
    if ema and not reader.names(EMA):
        raise UserError(f"the checkpoint {reader.path} holds no moving average", fix="load the plain weights, or train with optimizer.ema_decay set")
    check_architecture(reader, module, config=config, partial=partial)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_read_slice(reader, prefix + name, parameter))
        load_buffers(module, reader)


def load_buffers(module: nn.Module, reader: CheckpointReader) -> None:
    """Fills the persistent buffers of `module` (a model or a stage of one).

    Through `load_state_dict`, because a coupling derives its inverse permutation from the loaded one there.
    """
    module.load_state_dict({name: reader.read_full(BUFFER + name) for name, _ in persistent_buffers(module)}, strict=False)


def check_architecture(reader: CheckpointReader, module: nn.Module, *, config: JetFormerConfig | None = None, partial: bool = False) -> None:
    """Raises UserError unless the checkpoint holds exactly `module`'s tensors, naming what differs first.

    Args:
        config: the module's configuration, compared with the stored one.
        partial: `module` is one stage of the model; that the checkpoint holds more is no error.
    """
    expected = {PARAMETER + name: global_shape(parameter) for name, parameter in module.named_parameters()}
    expected |= {BUFFER + name: global_shape(buffer) for name, buffer in persistent_buffers(module)}
    problems = []
    for name, shape in expected.items():
        if name not in reader:
            problems.append(f"{name} is missing")
        elif reader.shape(name) != shape:
            problems.append(f"{name} has shape {list(reader.shape(name))}, the model's is {list(shape)}")
    if not partial:
        stored = [*reader.names(PARAMETER), *reader.names(BUFFER)]
        problems += [f"{name} is not in the model" for name in stored if name not in expected]
    if not problems:
        return
    fields = list(_differing_fields(reader, config)) if config is not None else []
    raise UserError(
        f"the checkpoint {reader.path} is of another architecture",
        got="; ".join([*fields[:4], *problems[:3]]) + (f"; and {len(problems) - 3} more tensors" if len(problems) > 3 else ""),
        expected="the architecture it was trained with",
        fix="use the run's own configuration (config.yaml in its folder), or another output_dir to start a new run",
    )


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(global name, buffer) of the buffers that belong to a checkpoint."""
    saved = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in saved:
            yield name, buffer


def _read_slice(reader: CheckpointReader, name: str, target: Tensor) -> Tensor:
    shard = shard_of(target)
    if shard is None:
        return reader.read_full(name)
    return reader.read(name, shard_dim=shard.dim, shard_start=shard.start, shard_size=shard.size).view(target.shape)


def _differing_fields(reader: CheckpointReader, config: JetFormerConfig) -> Iterator[str]:
    try:
        stored = to_dict(run_config_of(reader).model)
    except ConfigError as error:
        yield f"its configuration is not readable here: {error.what}"
        return
    except UserError:
        return
    yield from _compare(stored, to_dict(config), "model")


def _compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in wanted.items():
        other = stored.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _compare(other, value, f"{path}.{key}")
        elif other != value:
            yield f"{path}.{key} is {other!r} in the checkpoint, {value!r} here"
