"""Start values, the weight-decay mask, and parameter counts."""

import dataclasses

import pytest
import torch

from model import flops, init
from model.config import DecoderConfig, FlowConfig, JetFormerConfig, TextConfig
from model.jetformer import JetFormer, build_jetformer
from model.parallel import Shard, mark_shard

PUBLISHED = {
    # spec 1.12: width, depth, MLP, head width, flow block depth -> image-text, class-conditional totals
    "350m": ((1024, 24, 4096, 64, 4), 1_117_618_435, 1_068_477_440),
    "750m": ((1536, 24, 6144, 96, 4), 1_729_556_739, 1_655_861_248),
    "1p3b": ((1536, 48, 6144, 96, 6), 2_731_184_387, 2_657_488_896),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_equal_the_published_table(size):
    (width, depth, mlp_dim, head_dim, block_depth), image_text, class_conditional = PUBLISHED[size]
    config = JetFormerConfig(
        flow=FlowConfig(block_depth=block_depth), decoder=DecoderConfig(width=width, depth=depth, mlp_dim=mlp_dim, head_dim=head_dim)
    )
    assert flops.count_parameters(config).total == image_text
    labels = dataclasses.replace(config, text=TextConfig(length=1, num_pieces=1000, num_repeats=16, tie_logits=True))
    assert flops.count_parameters(labels).total == class_conditional


@pytest.mark.parametrize("tie_logits", [False, True])
def test_counted_parameters_are_those_that_exist(small_config, tie_logits):
    config = dataclasses.replace(small_config, text=dataclasses.replace(small_config.text, tie_logits=tie_logits))
    assert sum(p.numel() for p in JetFormer(config).parameters()) == flops.count_parameters(config).total


def test_flops_of_the_350m_model_match_the_table():
    assert flops.forward_flops(JetFormerConfig()) / 1e9 == pytest.approx(613.6, rel=1e-3)
    # Exact skips: 1841 -> about 1395 GF (spec 1.13).
    assert flops.training_flops(JetFormerConfig()) / 1e9 == pytest.approx(1395, rel=5e-3)


def test_weight_decay_mask_is_the_references(small_config):
    decayed = {name for name, _ in JetFormer(small_config).named_parameters() if init.decays(name)}
    for name in decayed:
        assert name.endswith("weight"), name
    kept = {name for name, _ in JetFormer(small_config).named_parameters()} - decayed
    assert "embed.text.weight" in kept
    assert "couplings.0.dnn.posemb" in kept
    assert {"head.text.weight", "head.gmm.component_weight", "head.gmm.logit_weight", "embed.image.weight", "blocks.0.attn.q.weight"} <= decayed
    assert all("norm" in n or n.endswith("bias") or n in ("embed.text.weight",) or n.endswith("posemb") for n in kept)


def test_start_values_have_the_stated_spread():
    config = JetFormerConfig(
        image=dataclasses.replace(JetFormerConfig().image, resolution=16, patch_size=8),
        flow=FlowConfig(depth=1, block_depth=1),
        decoder=DecoderConfig(width=512, depth=1, mlp_dim=1024, num_heads=8),
        gmm=dataclasses.replace(JetFormerConfig().gmm, num_mixtures=64, soft_dim=32),
    )
    values = dict(build_jetformer(config).named_parameters())

    def std(name: str) -> float:
        return values[name].std().item()

    assert std("blocks.0.mlp.gate.weight") == pytest.approx(512**-0.5, rel=0.02)
    assert std("blocks.0.mlp.down.weight") == pytest.approx(1024**-0.5, rel=0.02)
    assert values["blocks.0.mlp.gate.weight"].abs().max() <= 2 * 512**-0.5 / 0.8796 + 1e-6
    assert std("couplings.0.dnn.blocks.0.attention.qkv.weight") == pytest.approx((6 / 1024) ** 0.5 / 3**0.5, rel=0.02)
    assert std("embed.text.weight") == pytest.approx(1.0, rel=0.02)
    assert std("head.text.weight") == pytest.approx(1.0, rel=0.02)
    assert std("couplings.0.dnn.posemb") == pytest.approx(512**-0.5, rel=0.05)
    assert std("head.gmm.component_bias") == pytest.approx(0.02 / 2**0.5, rel=0.1)
    assert not values["couplings.0.dnn.final_proj.weight"].any()


def test_a_slice_is_initialised_as_part_of_the_whole(small_config):
    whole = build_jetformer(small_config, seed=5).blocks[0].mlp.down.weight
    part = torch.nn.Parameter(torch.empty(whole.shape[0], 8))
    mark_shard(part, Shard(1, 16, 8, whole.shape[1]))
    init.initialise([("blocks.0.mlp.down.weight", part)], small_config, 5)
    assert torch.equal(part, whole[:, 16:24])


def test_an_unknown_parameter_has_no_rule():
    with pytest.raises(KeyError, match="no initialisation rule"):
        init.decays("somewhere.else")
