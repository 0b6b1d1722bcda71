"""`jetway export`: formats, moving average, mistakes. The round trips are in test_import.py."""

import numpy as np
import pytest
import torch

from configs.errors import UserError
from model.convert.big_vision import to_official
from pipeline.checkpoint.export import read_safetensors_config
from pipeline.export import main
from pipeline.official_files import read_official
from pipeline.trained import open_trained


def test_safetensors_holds_weights_and_configuration(tiny_run, tiny_config, tmp_path, capsys):
    output = tmp_path / "model.safetensors"
    assert main([str(tiny_run), "--output", str(output)]) == 0
    assert "step 3" in capsys.readouterr().out
    assert read_safetensors_config(output) == tiny_config.model


def test_moving_average_is_exported_in_both_formats(tiny_run, tmp_path):
    ema = open_trained(tiny_run, ema=True).model
    assert main([str(tiny_run), "--ema", "--output", str(tmp_path / "ema.safetensors")]) == 0
    exported = open_trained(tmp_path / "ema.safetensors").model.state_dict()
    assert all(torch.equal(value, exported[name]) for name, value in ema.state_dict().items())
    assert main([str(tiny_run), "--ema", "--format", "big_vision", "--output", str(tmp_path / "ema.npz")]) == 0
    found = read_official(tmp_path / "ema.npz")
    assert found.config == ema.config
    for name, value in to_official(ema.state_dict(), ema.config).items():
        assert np.array_equal(found.arrays[name], value)


def test_names_in_the_archive_are_below_params(tiny_run, tmp_path):
    assert main([str(tiny_run), "--format", "big_vision", "--output", str(tmp_path / "model.npz")]) == 0
    with np.load(tmp_path / "model.npz") as archive:
        assert "params/decoder/final_norm/scale" in archive.files
        assert [name for name in archive.files if not name.startswith("params/")] == ["jetway_config"]


def test_dry_run_writes_nothing(tiny_run, tmp_path, capsys):
    assert main([str(tiny_run), "--output", str(tmp_path / "model.safetensors"), "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())


def test_mistakes_are_explained(tiny_run, tiny_config, write_run, tmp_path):
    with pytest.raises(UserError, match="ends in .npz"):
        main([str(tiny_run), "--format", "big_vision", "--output", str(tmp_path / "model.safetensors")])
    with pytest.raises(UserError, match="no checkpoint here"):
        main([str(tmp_path / "none"), "--output", str(tmp_path / "model.safetensors")])
    without = write_run(tmp_path / "run", tiny_config)
    for name, format_name in (("a.safetensors", "safetensors"), ("a.npz", "big_vision")):
        with pytest.raises(UserError, match="no moving average"):
            main([str(without), "--ema", "--format", format_name, "--output", str(tmp_path / name)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        main([str(without), "--format", "big_vision", "--output", str(tmp_path / "file" / "model.npz")])
