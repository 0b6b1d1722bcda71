"""A model filled from a checkpoint is the model that was saved; another architecture is refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.errors import UserError
from configs.loader import to_dict
from model.config import DecoderConfig, FlowConfig, GmmConfig, ImageConfig, JetFormerConfig, TextConfig
from model.jetformer import JetFormer, build_jetformer
from model.parallel import Shard, mark_shard
from pipeline.checkpoint.format import Fragment
from pipeline.checkpoint.reader import CheckpointReader, open_checkpoint
from pipeline.checkpoint.weights import load_model_config, load_run_config, load_weights, persistent_buffers
from pipeline.checkpoint.writer import save
from pipeline.config import RunConfig

TINY = JetFormerConfig(
    image=ImageConfig(resolution=4, channels=1, patch_size=2),
    text=TextConfig(length=3, num_pieces=8),
    flow=FlowConfig(depth=2, block_depth=1, width=8, num_heads=2),
    decoder=DecoderConfig(width=8, depth=1, mlp_dim=16, num_heads=2, head_dim=4),
    gmm=GmmConfig(num_mixtures=2, soft_dim=2),
)
RUN = RunConfig(name="tiny", model=TINY)


def save_model(run: Path, model: nn.Module, *, ema: bool = False) -> CheckpointReader:
    fragments = [Fragment.whole(f"param/{name}", parameter) for name, parameter in model.named_parameters()]
    fragments += [Fragment.whole(f"buffer/{name}", buffer) for name, buffer in persistent_buffers(model)]
    if ema:
        fragments += [Fragment.whole(f"ema/{name}", parameter * 2) for name, parameter in model.named_parameters()]
    save(run, 3, fragments, {"config": to_dict(RUN)})
    return open_checkpoint(run)


def perturbed(model: nn.Module, seed: int = 1) -> nn.Module:
    """Every tensor different from what initialisation gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def test_a_loaded_model_equals_the_saved_one_buffers_included(tmp_path: Path) -> None:
    model = perturbed(build_jetformer(TINY, seed=1))
    reader = save_model(tmp_path, model)
    other = build_jetformer(TINY, seed=2)
    for _, buffer in persistent_buffers(other):
        buffer.zero_()
    load_weights(reader, other, config=TINY)
    saved, loaded = model.state_dict(), other.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_the_moving_average_is_loaded_on_request_and_only_then(tmp_path: Path) -> None:
    model = perturbed(build_jetformer(TINY))
    other = build_jetformer(TINY)
    load_weights(save_model(tmp_path / "with", model, ema=True), other, ema=True)
    assert all(torch.equal(a * 2, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match="holds no moving average"):
        load_weights(save_model(tmp_path / "without", model), other, ema=True)


def test_the_configuration_comes_back(tmp_path: Path) -> None:
    save_model(tmp_path, build_jetformer(TINY))
    assert load_run_config(tmp_path) == RUN
    assert load_model_config(tmp_path / "checkpoints" / "step_00000003") == TINY


def test_another_architecture_is_refused_with_the_fields_and_tensors_that_differ(tmp_path: Path) -> None:
    reader = save_model(tmp_path, build_jetformer(TINY))
    wider = replace(TINY, decoder=replace(TINY.decoder, mlp_dim=32))
    with pytest.raises(UserError, match=r"(?s)another architecture.*model.decoder.mlp_dim is 16 in the checkpoint, 32 here.*param/blocks.0.*shape"):
        load_weights(reader, JetFormer(wider), config=wider)
    shallower = replace(TINY, flow=replace(TINY.flow, depth=1))
    with pytest.raises(UserError, match=r"param/couplings.1.* is not in the model"):
        load_weights(reader, JetFormer(shallower))
    deeper = replace(TINY, flow=replace(TINY.flow, depth=3))
    with pytest.raises(UserError, match=r"param/couplings.2.* is missing"):
        load_weights(reader, JetFormer(deeper))


def test_a_refused_model_is_left_as_it_was(tmp_path: Path) -> None:
    reader = save_model(tmp_path, build_jetformer(TINY, seed=1))
    other = build_jetformer(replace(TINY, flow=replace(TINY.flow, depth=1)), seed=2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(reader, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


class Split(nn.Module):
    """One tensor-parallel rank's part of a matrix [6, 5], beside a replicated bias."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        shape = [6, 5]
        shape[shard.dim] = shard.size
        self.weight, self.bias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(5))
        mark_shard(self.weight, shard)


@pytest.mark.parametrize("shard", [Shard(0, 0, 2, 6), Shard(0, 2, 4, 6), Shard(1, 0, 3, 5), Shard(1, 3, 2, 5)])
def test_a_tensor_parallel_rank_gets_its_slice(shard: Shard, tmp_path: Path) -> None:
    weight, bias = torch.randn(6, 5), torch.randn(5)
    save(tmp_path, 1, [Fragment.whole("param/weight", weight), Fragment.whole("param/bias", bias)], {})
    module = Split(shard)
    load_weights(open_checkpoint(tmp_path), module)
    assert torch.equal(module.weight, weight.narrow(shard.dim, shard.start, shard.size))
    assert torch.equal(module.bias, bias)


def test_a_checkpoint_without_configuration_says_so(tmp_path: Path) -> None:
    save(tmp_path, 1, [Fragment.whole("param/x", torch.ones(2))], {})
    with pytest.raises(UserError, match="holds no configuration"):
        load_run_config(tmp_path)
