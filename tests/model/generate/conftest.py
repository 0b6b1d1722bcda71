"""The plain forward pass that generation is compared with."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.batch import Batch, NoiseSettings, make_batch
from model.config import JetFormerConfig, TextConfig
from model.jetformer import JetFormer, build_jetformer
from model.state import State


@pytest.fixture(scope="session")
def full_hidden() -> Callable[..., Tensor]:
    """What the heads read when the whole sequence is fed at once, by the code that trains: [B, S, D] in the order of the rows."""

    def run(
        model: JetFormer,
        text: Tensor,
        text_mask: Tensor,
        soft: Tensor,
        *,
        text_first: bool,
        drop: Tensor | None = None,
    ) -> Tensor:
        size = len(text)
        batch: Batch = make_batch(
            model.config,
            positions=torch.arange(size),
            text=text,
            text_mask=text_mask,
            text_loss=text_mask,
            image=None,
            noise=NoiseSettings(seed=0),
            text_first=torch.full((size,), text_first),
            drop_prefix=torch.zeros(size, dtype=torch.bool) if drop is None else drop,
        )
        with torch.no_grad():
            state = State(hidden=model.embed.embed(batch, soft), soft=soft)
            for block in model.blocks:
                state = block(state, batch)
            assert state.hidden is not None
            return model.head.norm(state.hidden)

    return run


@pytest.fixture
def padded_config(small_config: JetFormerConfig) -> JetFormerConfig:
    """Pads are masked out, and the EOS stands for BOI."""
    return dataclasses.replace(small_config, text=TextConfig(length=5, num_pieces=20, ignore_pad=True, pad_id=0))


@pytest.fixture
def label_config(small_config: JetFormerConfig) -> JetFormerConfig:
    """Class-conditional: one label, repeated."""
    return dataclasses.replace(small_config, text=TextConfig(length=1, num_pieces=10, num_repeats=3, tie_logits=True))


@pytest.fixture
def build_random(randomise: Callable[[JetFormer], JetFormer]) -> Callable[[JetFormerConfig], JetFormer]:
    return lambda config: randomise(build_jetformer(config))
