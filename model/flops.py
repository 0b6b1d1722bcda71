"""Parameters and FLOPs of a JetFormer, counted from its configuration (spec 1.12, 1.13). Imports no torch.

A multiply-add is 2 FLOPs. Counts are per example and forward; a training step is three times that.
"""

from dataclasses import dataclass

from model.config import JetFormerConfig


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Trainable parameters by part, as in the table of spec 1.12."""

    decoder: int
    """Blocks and final norm."""
    gmm_head: int
    embed_image: int
    embed_text: int
    text_head: int
    flow: int

    @property
    def transformer(self) -> int:
        """All but the flow."""
        return self.decoder + self.gmm_head + self.embed_image + self.embed_text + self.text_head

    @property
    def total(self) -> int:
        """All trainable parameters."""
        return self.transformer + self.flow


def count_parameters(config: JetFormerConfig) -> ParameterCounts:
    """Trainable parameters; permutations are indices, not parameters."""
    decoder, gmm, text = config.decoder, config.gmm, config.text
    attention = decoder.width * decoder.head_dim * (2 * decoder.num_heads + 2 * decoder.num_kv_heads)
    block = attention + 3 * decoder.width * decoder.mlp_dim + 2 * decoder.width
    head_outputs = gmm.num_mixtures * (1 + 2 * gmm.soft_dim)
    return ParameterCounts(
        decoder=decoder.depth * block + decoder.width,
        gmm_head=head_outputs * (decoder.width + 1),
        embed_image=(gmm.soft_dim + 1) * decoder.width,
        embed_text=text.vocab_size * text.num_repeats * decoder.width,
        text_head=0 if text.tie_logits else text.vocab_size * (decoder.width + 1),
        flow=config.flow.depth * _coupling_parameters(config),
    )


def _coupling_parameters(config: JetFormerConfig) -> int:
    width, half, mlp = config.flow.width, config.image.token_dim // 2, config.flow.mlp_dim
    block = 4 * (width * width + width) + width * mlp + mlp + mlp * width + width + 4 * width
    ends = half * width + width + config.image.num_tokens * width + 2 * width + (width + 1) * 2 * half
    return ends + config.flow.block_depth * block


def coupling_flops(config: JetFormerConfig) -> float:
    """One coupling: its two projections, and products and attention of its ViT blocks."""
    tokens, width, half = config.image.num_tokens, config.flow.width, config.image.token_dim // 2
    products = half * width + width * 2 * half + config.flow.block_depth * (4 * width * width + 2 * width * config.flow.mlp_dim)
    attention = config.flow.block_depth * 2 * tokens * width
    return 2.0 * tokens * (products + attention)


def block_flops(config: JetFormerConfig) -> float:
    """One decoder block; attention is counted over the whole square, as spec 1.13 and most published MFU figures do."""
    decoder, length = config.decoder, config.sequence_length
    products = decoder.width * decoder.head_dim * (2 * decoder.num_heads + 2 * decoder.num_kv_heads) + 3 * decoder.width * decoder.mlp_dim
    attention = 2 * decoder.num_heads * decoder.head_dim * length
    return 2.0 * length * (products + attention)


def gmm_head_flops(config: JetFormerConfig) -> float:
    """The image head on one whole image."""
    outputs = config.gmm.num_mixtures * (1 + 2 * config.gmm.soft_dim)
    return 2.0 * config.image.num_tokens * config.decoder.width * outputs


def text_head_flops(config: JetFormerConfig) -> float:
    """The text head on one caption."""
    if config.text.tie_logits:
        return 0.0
    return 2.0 * config.text.length * config.decoder.width * config.text.vocab_size


def embed_flops(config: JetFormerConfig) -> float:
    """Soft tokens into the decoder."""
    return 2.0 * config.image.num_tokens * config.gmm.soft_dim * config.decoder.width


def forward_flops(config: JetFormerConfig) -> float:
    """Everything, both heads on every example: the `forward` column of spec 1.13."""
    return (
        config.flow.depth * coupling_flops(config)
        + embed_flops(config)
        + config.decoder.depth * block_flops(config)
        + gmm_head_flops(config)
        + text_head_flops(config)
    )


def training_flops(config: JetFormerConfig) -> float:
    """Model FLOPs of one training example, exact skips left out: heads only where they are scored, no flow backward
    (and no image head) for image-first examples (spec 1.13). This is what MFU counts; recomputation is not.
    """
    objective = config.objective
    scored_image = 1.0 if objective.loss_on_prefix else objective.text_first_probability
    scored_text = 1.0 if objective.loss_on_prefix else 1.0 - objective.text_first_probability
    trains_flow = scored_image if objective.stop_grad_flow_on_image_prefix else 1.0
    flow = config.flow.depth * coupling_flops(config)
    decoder = config.decoder.depth * block_flops(config) + embed_flops(config)
    return flow * (1 + 2 * trains_flow) + 3 * (decoder + scored_image * gmm_head_flops(config) + scored_text * text_head_flops(config))
