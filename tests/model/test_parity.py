"""The model against recorded outputs and gradients of the official code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model import parity
from model.config import DecoderConfig, FlowConfig, GmmConfig, ImageConfig, JetFormerConfig, TextConfig
from model.convert.big_vision import from_official, to_official
from model.jetformer import build_jetformer

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures" / "parity").glob("*.npz"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_loss_outputs_and_gradients_agree_with_the_official_code(path):
    results = parity.compare(path)
    beyond = [f"{r.name}: {r.error:.2e} > {r.tolerance:.0e}" for r in results if not r.agrees]
    assert not beyond
    names = {r.name for r in results}
    outputs = ("z", "logdet", "rest_nll", "soft_nll", "text_logits", "image_logits", "nll_text", "nll_image")
    assert {"loss", *(f"out/{name}" for name in outputs)} <= names
    assert any(r.name.startswith("grads/params_adaptor") for r in results)


def test_a_wrong_weight_is_noticed(tmp_path):
    with np.load(FIXTURES[0]) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = "params/decoder/layers/mlp/linear"
    arrays[name] = arrays[name].copy()
    arrays[name][0, 0, 0] += 0.5
    np.savez(tmp_path / "wrong.npz", **arrays)
    assert parity.main([str(tmp_path / "wrong.npz")]) == 1


def test_command_accepts_right_fixtures_and_names_a_file_that_is_none(tmp_path, capsys):
    assert parity.main([str(FIXTURES[0])]) == 0
    assert "out/z" in capsys.readouterr().out
    (tmp_path / "text.npz").write_text("no")
    assert parity.main([str(tmp_path / "text.npz")]) == 2


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_official_layout_round_trips_exactly(path):
    config = parity.model_config(path)
    with np.load(path) as archive:
        params = {name.removeprefix("params/"): archive[name] for name in archive.files if name.startswith("params/")}
    back = to_official(from_official(params, config), config)
    assert back.keys() == params.keys()
    for name, value in params.items():
        assert np.array_equal(back[name], value), name


def test_image_channels_are_read_off_the_permutations():
    config = JetFormerConfig(
        image=ImageConfig(resolution=8, channels=1, patch_size=4),
        text=TextConfig(length=3, num_pieces=9),
        flow=FlowConfig(depth=2, block_depth=1, width=8, num_heads=2),
        decoder=DecoderConfig(width=8, depth=1, mlp_dim=8, num_heads=2, head_dim=4),
        gmm=GmmConfig(num_mixtures=2, soft_dim=4),
    )
    values = {
        "resolution": 8, "patch_size": 4, "soft_dim": 4, "num_mixtures": 2, "text_len": 3, "vocab_size": 12,
        "bos_id": 9, "boi_id": 10, "nolabel_id": 11,
        "flow": {"depth": 2, "block_depth": 1, "emb_dim": 8, "num_heads": 2},
        "decoder": {"width": 8, "depth": 1, "mlp_dim": 8, "num_heads": 2, "head_dim": 4, "untie_output_vocab": True},
    }  # fmt: skip
    source = build_jetformer(config)
    rebuilt = parity.build_official(values, to_official(source.state_dict(), config))
    assert rebuilt.config.image.channels == 1
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), rebuilt.parameters(), strict=True))
