"""Official checkpoints in and out, through files."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.loader import to_yaml
from model import parity
from model.convert.big_vision import config_from_official
from pipeline.config import RunConfig
from pipeline.export import main as export
from pipeline.import_ import main as import_
from pipeline.official_files import read_official
from pipeline.trained import open_trained

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures" / "parity").glob("*.npz"))


def read(path):
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def params(arrays):
    return {name.removeprefix("params/"): value for name, value in arrays.items() if name.startswith("params/")}


@pytest.fixture
def config_file(tmp_path):
    """The configuration of the first fixture, as a file for --config."""
    model = config_from_official(json.loads(str(read(FIXTURES[0])["config_json"])))
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(RunConfig(model=model)))
    return path


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_import_and_export_give_back_the_same_arrays(path, tmp_path):
    original = read(path)
    run, exported = tmp_path / "run", tmp_path / "exported.npz"
    assert import_([str(path), "--output", str(run)]) == 0
    assert export([str(run), "--format", "big_vision", "--output", str(exported)]) == 0
    back = read(exported)
    assert params(back).keys() == params(original).keys()
    for name, value in params(original).items():
        assert np.array_equal(params(back)[name], value), name
        assert params(back)[name].dtype == np.float32
    rebuilt = tmp_path / "rebuilt.npz"
    np.savez(rebuilt, **(original | {name: value for name, value in back.items() if name.startswith("params/")}))
    assert parity.main([str(rebuilt)]) == 0


def test_chain_of_formats_loses_nothing(tmp_path):
    """big_vision -> safetensors -> big_vision -> run -> safetensors."""
    source = FIXTURES[0]
    first, second, third = tmp_path / "a.safetensors", tmp_path / "b.npz", tmp_path / "c.safetensors"
    assert import_([str(source), "--output", str(first)]) == 0
    assert export([str(first), "--format", "big_vision", "--output", str(second)]) == 0
    assert import_([str(second), "--output", str(tmp_path / "run")]) == 0  # the configuration stands in the archive
    assert export([str(tmp_path / "run"), "--format", "safetensors", "--output", str(third)]) == 0
    models = [open_trained(path).model.state_dict() for path in (first, tmp_path / "run", third)]
    for model in models[1:]:
        assert all(torch.equal(value, models[0][name]) for name, value in model.items())


def test_bare_names_need_a_configuration(tmp_path, config_file):
    bare = tmp_path / "bare.npz"
    np.savez(bare, **params(read(FIXTURES[0])))
    with pytest.raises(UserError, match="does not say what model it is"):
        import_([str(bare), "--output", str(tmp_path / "run")])
    assert import_([str(bare), "--config", str(config_file), "--output", str(tmp_path / "run"), "total_steps=7"]) == 0
    assert open_trained(tmp_path / "run").config.total_steps == 7


def test_bfloat16_and_optimiser_state_are_understood(tmp_path):
    original = read(FIXTURES[0])
    name = "params/EmbedImage/kernel"
    bits = (original[name].view(np.uint32) >> 16).astype(np.uint16)
    np.savez(tmp_path / "mixed.npz", **(original | {name: bits.view("V2"), "opt/0/mu/EmbedImage/kernel": np.zeros(3)}))
    found = read_official(tmp_path / "mixed.npz").arrays
    assert found.keys() == params(original).keys()
    assert np.array_equal(found["EmbedImage/kernel"], (bits.astype(np.uint32) << 16).view(np.float32))


def write_zarr(folder, value, chunks, *, compressor="gzip", dtype="<f4"):
    folder.mkdir(parents=True)
    meta = {"zarr_format": 2, "shape": value.shape, "chunks": chunks, "dtype": dtype, "order": "C", "fill_value": None, "filters": None}
    (folder / ".zarray").write_text(json.dumps(meta | {"compressor": {"id": compressor} if compressor else None}))
    for index in np.ndindex(*(-(-size // chunk) for size, chunk in zip(value.shape, chunks, strict=True))):
        block = np.zeros(chunks, value.dtype)
        part = value[tuple(slice(i * chunk, (i + 1) * chunk) for i, chunk in zip(index, chunks, strict=True))]
        block[tuple(slice(0, size) for size in part.shape)] = part
        if block.any():
            data = block.tobytes()
            (folder / (".".join(map(str, index)) or "0")).write_bytes(gzip.compress(data) if compressor == "gzip" else data)


def test_folder_of_tensorstore_arrays_is_read_like_the_archive(tmp_path, config_file):
    """The layout that big_vision's trainer writes: one array per folder, chunked, a pointer to the last step beside it."""
    original = params(read(FIXTURES[0]))
    for number, (name, value) in enumerate(original.items()):
        chunks = tuple(max(1, (size + 1) // 2) for size in value.shape)
        write_zarr(
            tmp_path / "checkpoint.bv-000000500" / f"params~{name.replace('/', '~')}", value, chunks, compressor="gzip" if number % 2 else None
        )
    write_zarr(tmp_path / "checkpoint.bv-000000500" / "opt~0~count", np.zeros((), np.int32), (), dtype="<i4")
    (tmp_path / "checkpoint.bv-LAST").write_text("000000500")
    found = read_official(tmp_path / "checkpoint.bv").arrays
    assert found.keys() == original.keys()
    assert all(np.array_equal(found[name], value) for name, value in original.items())
    command = [str(tmp_path / "checkpoint.bv"), "--config", str(config_file), "--output", str(tmp_path / "run")]
    assert import_(command) == 0


def test_folder_in_another_format_is_explained(tmp_path):
    write_zarr(tmp_path / "ckpt" / "params~x", np.ones((2, 2), np.float32), (2, 2), compressor="blosc")
    with pytest.raises(UserError, match="compressor blosc"):
        read_official(tmp_path / "ckpt")


def test_other_architecture_names_the_first_mismatch(tmp_path, config_file):
    command = [str(FIXTURES[0]), "--config", str(config_file), "--output", str(tmp_path / "run")]
    for override, message in (
        ("model.decoder.mlp_dim=65", r"decoder/layers/mlp/gating_einsum has shape \[2, 2, 32, 64\], the configuration says \[2, 2, 32, 65\]"),
        ("model.decoder.depth=3", r"decoder/layers/attn/attn_vec_einsum/w has shape \[2,"),
        ("model.flow.block_depth=2", "is missing|is in no such model"),
        ("model.flow.depth=5", "channel_coupling_masks-FREEZE_ME has shape"),
        ("model.gmm.num_mixtures=3", "LogitsImage/bias has shape"),
        ("model.decoder.num_kv_heads=4", "qkv_einsum/w is missing"),
    ):
        with pytest.raises(UserError, match=message):
            import_([*command, override])
    assert not (tmp_path / "run").exists()


def test_every_missing_or_foreign_array_is_found(tmp_path):
    original = read(FIXTURES[0])
    name = "params/decoder/final_norm/scale"
    np.savez(tmp_path / "less.npz", **{key: value for key, value in original.items() if key != name})
    with pytest.raises(UserError, match="decoder/final_norm/scale is missing"):
        import_([str(tmp_path / "less.npz"), "--output", str(tmp_path / "run")])
    np.savez(tmp_path / "more.npz", **(original | {"params/TextNorm/scale": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match=r"TextNorm/scale \[3\] is in no such model"):
        import_([str(tmp_path / "more.npz"), "--output", str(tmp_path / "run")])


def test_mistakes_are_explained_and_nothing_is_overwritten(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        import_([str(tmp_path / "none.npz"), "--output", str(tmp_path / "run")])
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UserError, match="cannot read"):
        import_([str(tmp_path / "text.npz"), "--output", str(tmp_path / "run")])
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match="one array"):
        import_([str(tmp_path / "one.npy"), "--output", str(tmp_path / "run")])
    with pytest.raises(UserError, match="no such tokenizer"):
        import_([str(FIXTURES[0]), "--tokenizer", str(tmp_path / "none.model"), "--output", str(tmp_path / "run")])
    assert import_([str(FIXTURES[0]), "--output", str(tmp_path / "run")]) == 0
    with pytest.raises(UserError, match="holds checkpoints already"):
        import_([str(FIXTURES[0]), "--output", str(tmp_path / "run")])


def test_dry_run_checks_and_writes_nothing(tmp_path, capsys):
    assert import_([str(FIXTURES[0]), "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_tokenizer_travels_with_the_weights(tmp_path, tiny_tokenizer):
    (tmp_path / "spm.model").write_bytes(tiny_tokenizer)
    assert import_([str(FIXTURES[0]), "--tokenizer", str(tmp_path / "spm.model"), "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == tiny_tokenizer
