"""Shapes of the official layout, without converting anything."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from model import parity
from model.convert.architecture import check_architecture, official_shapes

FIXTURES = sorted((Path(__file__).parents[2] / "fixtures" / "parity").glob("*.npz"))


def params(path):
    with np.load(path) as archive:
        return {name.removeprefix("params/"): archive[name] for name in archive.files if name.startswith("params/")}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_shapes_are_those_of_the_official_checkpoint(path):
    config = parity.model_config(path)
    arrays = params(path)
    assert official_shapes(config) == {name: value.shape for name, value in arrays.items()}
    check_architecture(arrays, config, source=path.name)


def test_masks_of_an_unused_kind_may_be_left_out():
    path = next(path for path in FIXTURES if path.stem == "image_text_tiny")
    arrays = params(path)
    del arrays["params_adaptor/spatial_coupling_masks-FREEZE_ME"]
    check_architecture(arrays, parity.model_config(path), source="x")


def test_message_names_the_first_mismatches_and_counts_the_rest():
    config = parity.model_config(FIXTURES[0])
    wider = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, mlp_dim=config.decoder.mlp_dim + 1))
    with pytest.raises(UserError, match=r"gating_einsum has shape .*linear has shape") as caught:
        check_architecture(params(FIXTURES[0]), wider, source="the file")
    assert "the file is of another architecture" in str(caught.value)
    with pytest.raises(UserError, match=r"and \d+ more"):
        check_architecture({}, config, source="the file")
