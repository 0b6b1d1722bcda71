"""Blocks with fused kernels: the same loss and gradients as plain torch; what a pass shares is made once; each branch has its own mask."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from model import streams
from model.config import JetFormerConfig
from model.decoder.block import Block
from model.decoder.context import DecoderContext
from model.jetformer import build_jetformer
from model.kernels.config import KernelsConfig
from model.kernels.dispatch import has_triton, is_interpreting
from model.layers import layer_specs
from model.parallel import TensorParallel
from model.state import State, unpack
from model.streams import Stream
from pipeline.parallel.stage import PipelineStage
from tests.model.kernels import checks

FUSED = KernelsConfig(rms_norm="triton", rope="triton", geglu="triton")
PLAIN = KernelsConfig(rms_norm="reference", rope="reference", geglu="reference")


def padded(config: JetFormerConfig) -> JetFormerConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, ignore_pad=True))


def gradients(config, batch, randomise, kernels, dtype, *, weights=torch.float32):
    """Loss, and the gradients of the blocks' parameters; weights are rounded to `weights` first."""
    model = randomise(build_jetformer(config, kernels=kernels)).to(weights).to(dtype)
    loss = model(batch).total_loss()
    loss.backward()
    parts = {name: parameter.grad.detach().clone() for name, parameter in model.named_parameters() if name.startswith("blocks")}
    return loss.detach(), parts


@pytest.mark.skipif(not has_triton() or not is_interpreting(), reason="Triton is not interpreting")
@pytest.mark.parametrize("pads", [False, True], ids=["whole captions", "pads"])
def test_fused_kernels_give_the_loss_and_gradients_of_plain_torch(small_config, build_batch, randomise, pads):
    config = padded(small_config) if pads else small_config
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    batch = build_batch(config, size=3, **({"text_mask": mask, "text_loss": mask} if pads else {}))
    plain_loss, plain = gradients(config, batch, randomise, PLAIN, torch.float32)
    fused_loss, fused = gradients(config, batch, randomise, FUSED, torch.float32)
    assert torch.allclose(fused_loss, plain_loss, rtol=1e-6)
    for name in plain:
        assert checks.relative_error(fused[name], plain[name]) < 5e-6, name


@pytest.mark.skipif(not has_triton() or not is_interpreting(), reason="Triton is not interpreting")
def test_fused_kernels_in_bf16_are_as_exact_as_plain_torch(small_config, build_batch, randomise):
    batch = build_batch(small_config, size=3)
    _, fused = gradients(small_config, batch, randomise, FUSED, torch.bfloat16, weights=torch.bfloat16)
    _, eager = gradients(small_config, batch, randomise, PLAIN, torch.bfloat16, weights=torch.bfloat16)
    _, truth = gradients(small_config, batch, randomise, PLAIN, torch.float32, weights=torch.bfloat16)

    def together(parts):
        return {"blocks": torch.cat([(parts[name].float() / truth[name].norm()).flatten() for name in truth])}

    checks.assert_as_exact_as_eager(together(fused), together(eager), together(truth), dtype=torch.bfloat16)


def test_each_branch_is_dropped_by_its_own_substream(small_config, build_batch, randomise):
    config = dataclasses.replace(small_config, decoder=dataclasses.replace(small_config.decoder, dropout=0.4))
    batch = build_batch(config)
    index = 1
    block = randomise(nn.ModuleDict({"block": Block(config, index, TensorParallel.single())}))["block"]
    x = torch.randn(len(batch), config.sequence_length, config.decoder.width)
    found = block(State(hidden=x), batch).hidden
    attention = DecoderContext.build(batch, x, config).attention

    def drop(values, branch):
        keep = streams.keep_mask(
            batch.noise.seed, Stream.DROPOUT, batch.positions, values.shape[1:], drop_probability=0.4, substream=2 * index + branch
        )
        return values * keep / 0.6

    x = x + drop(block.attn(functional.rms_norm(x, x.shape[-1:], 1 + block.norm1.scale, 1e-6), attention), 0)
    normed = functional.rms_norm(x, x.shape[-1:], 1 + block.norm2.scale, 1e-6)
    expected = x + drop(block.mlp(normed), 1)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_blocks_share_is_made_once_per_pass_and_stage(small_config, build_batch, recompute, monkeypatch):
    config = dataclasses.replace(small_config, decoder=dataclasses.replace(small_config.decoder, depth=4))
    built, build = [], DecoderContext.build
    monkeypatch.setattr(DecoderContext, "build", staticmethod(lambda *arguments: built.append(None) or build(*arguments)))
    specs = layer_specs(config)
    cut = next(i for i, spec in enumerate(specs) if spec.name == "blocks.2")
    first = PipelineStage(specs[:cut], config=config, previous=None, is_last=False, recompute=recompute)
    second = PipelineStage(specs[cut:], config=config, previous=specs[cut - 1], is_last=True, recompute=recompute)
    for parameter in [*first.parameters(), *second.parameters()]:
        nn.init.normal_(parameter, std=0.1)
    batch = build_batch(config)
    first.feed.load([batch, batch]), second.feed.load([batch, batch])
    edge = first(torch.zeros(()))
    assert len(built) == 1
    loss = second(edge)
    assert len(built) == 2
    shape = {"width": config.decoder.width, "num_tokens": config.image.num_tokens, "soft_dim": config.gmm.soft_dim}
    assert unpack(edge, flow=False, **shape).context is None
    loss.backward()
    assert len(built) == 2 + (2 if recompute == "full" else 0)  # the first block of a stage runs from what it was given, which was nothing
    first(torch.zeros(()))
    assert len(built) == 3 + (2 if recompute == "full" else 0)
