"""The exported file depends on the weights alone, and plain torch or safetensors reads it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from configs.loader import to_dict
from model.config import DecoderConfig, FlowConfig, GmmConfig, ImageConfig, JetFormerConfig, TextConfig
from model.jetformer import JetFormer, build_jetformer
from pipeline.checkpoint.export import export_module, export_safetensors, load_safetensors, read_safetensors_config
from pipeline.checkpoint.format import Fragment
from pipeline.checkpoint.reader import CheckpointReader, open_checkpoint
from pipeline.checkpoint.weights import persistent_buffers
from pipeline.checkpoint.writer import save
from pipeline.config import RunConfig

TINY = JetFormerConfig(
    image=ImageConfig(resolution=4, channels=1, patch_size=2),
    text=TextConfig(length=3, num_pieces=8),
    flow=FlowConfig(depth=1, block_depth=1, width=8, num_heads=2),
    decoder=DecoderConfig(width=8, depth=1, mlp_dim=16, num_heads=2, head_dim=4),
    gmm=GmmConfig(num_mixtures=2, soft_dim=2),
)


def save_cut(run: Path, model: JetFormer, pieces: int) -> CheckpointReader:
    """The same model as a run of other layouts would store it: every tensor cut into flat pieces."""
    fragments = [Fragment.whole(f"buffer/{name}", buffer) for name, buffer in persistent_buffers(model)]
    for name, parameter in model.named_parameters():
        start = 0
        for part in parameter.detach().reshape(-1).tensor_split(pieces):
            if part.numel():
                fragments.append(Fragment(name=f"param/{name}", global_shape=tuple(parameter.shape), tensor=part, flat_start=start))
            start += part.numel()
    fragments += [Fragment.whole(f"ema/{name}", parameter + 1) for name, parameter in model.named_parameters()]
    save(run, 2, fragments, {"config": to_dict(RunConfig(model=TINY)), "layout": pieces})
    return open_checkpoint(run)


def test_the_file_is_the_same_whatever_the_layout(tmp_path: Path) -> None:
    model = build_jetformer(TINY, seed=3)
    files = [export_safetensors(save_cut(tmp_path / str(n), model, n), tmp_path / f"{n}.safetensors") for n in (1, 3)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("ema", [False, True])
def test_plain_safetensors_and_a_fresh_model_read_it(ema: bool, tmp_path: Path) -> None:
    model = build_jetformer(TINY, seed=3)
    path = export_safetensors(save_cut(tmp_path, model, 2), tmp_path / "out" / "model.safetensors", ema=ema)
    loaded = load_file(path)
    assert loaded.keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], parameter + 1 if ema else parameter)
    assert read_safetensors_config(path) == TINY
    other = JetFormer(read_safetensors_config(path))
    load_safetensors(path, other)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in other.state_dict().items())


def test_a_module_exports_as_its_checkpoint_does(tmp_path: Path) -> None:
    model = build_jetformer(TINY, seed=3)
    from_checkpoint = export_safetensors(save_cut(tmp_path, model, 2), tmp_path / "a.safetensors")
    from_module = export_module(model, TINY, tmp_path / "b.safetensors", {"step": "2", "weights": "raw"})
    assert from_module.read_bytes() == from_checkpoint.read_bytes()


def test_what_is_not_an_exported_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_safetensors_config(tmp_path / "none.safetensors")
    (tmp_path / "rubbish.safetensors").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_safetensors_config(tmp_path / "rubbish.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a model exported by Jetway"):
        read_safetensors_config(tmp_path / "foreign.safetensors")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = export_module(build_jetformer(TINY), TINY, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="another architecture"):
        load_safetensors(path, JetFormer(replace(TINY, gmm=replace(TINY.gmm, num_mixtures=4))))


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        export_module(build_jetformer(TINY), TINY, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
