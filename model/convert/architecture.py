"""Whether official arrays are those of a given configuration, before any is converted."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from configs.errors import UserError
from model.config import JetFormerConfig
from model.convert.big_vision import CHANNEL_MASKS, SPATIAL_MASKS, to_official
from model.jetformer import JetFormer

Shape = tuple[int, ...]


def official_shapes(config: JetFormerConfig) -> dict[str, Shape]:
    """Name -> shape of every array of the official checkpoint of this model, found on one with single layers."""
    single = dataclasses.replace(
        config,
        flow=dataclasses.replace(config.flow, depth=min(1, config.flow.depth)),
        decoder=dataclasses.replace(config.decoder, depth=min(1, config.decoder.depth)),
    )
    shapes = {name: value.shape for name, value in to_official(JetFormer(single).state_dict(), single).items()}
    for name, shape in shapes.items():
        if name.startswith("params_adaptor/"):
            shapes[name] = (config.flow.depth, *shape[1:])
        elif name.startswith("decoder/layers/"):
            shapes[name] = (config.decoder.depth, *shape[1:])
    return shapes


def check_architecture(arrays: Mapping[str, np.ndarray], config: JetFormerConfig, *, source: str) -> None:
    """Compares names and shapes.

    Args:
        arrays: official names without a `params/` prefix; only shapes are looked at.
        source: what to call them in the message.

    Raises:
        UserError: they differ; the message names the first mismatches.
    """
    expected, problems = official_shapes(config), []
    for name, shape in sorted(expected.items()):
        # The kind of coupling that a model does not use may be left out.
        if name not in arrays and name not in (CHANNEL_MASKS, SPATIAL_MASKS):
            problems.append(f"{name} is missing")
        elif name in arrays and arrays[name].shape != shape:
            problems.append(f"{name} has shape {list(arrays[name].shape)}, the configuration says {list(shape)}")
    problems += [f"{name} {list(arrays[name].shape)} is in no such model" for name in sorted(arrays) if name not in expected]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{source} is of another architecture than the configuration",
            got="; ".join(problems[:3]) + more,
            expected=f"{len(expected)} arrays in the layout of big_vision's JetFormer",
            fix="name the configuration of this checkpoint with --config, or correct it with key=value",
        )
