"""Small models and batches for the tests of model/."""

from collections.abc import Callable, Iterator

import pytest
import torch

from model.batch import Batch, NoiseSettings, make_batch
from model.config import DecoderConfig, FlowConfig, GmmConfig, ImageConfig, JetFormerConfig, ObjectiveConfig, TextConfig
from model.jetformer import JetFormer, build_jetformer
from tests.model.kernels.interpreter import arrays_of_one_as_indices, rounding_to_nearest


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter() -> Iterator[None]:
    """Triton's interpreter cuts fp32 off to bf16; here it rounds to the nearest, as GPUs do."""
    with rounding_to_nearest(), arrays_of_one_as_indices():
        yield


@pytest.fixture
def small_config() -> JetFormerConfig:
    return JetFormerConfig(
        image=ImageConfig(resolution=8, channels=3, patch_size=2),
        text=TextConfig(length=5, num_pieces=20),
        flow=FlowConfig(depth=3, block_depth=1, width=16, num_heads=2, kinds=("channels", "channels", "spatial")),
        decoder=DecoderConfig(width=24, depth=2, mlp_dim=32, num_heads=4, num_kv_heads=1, head_dim=6),
        gmm=GmmConfig(num_mixtures=5, soft_dim=7),
        objective=ObjectiveConfig(text_loss_weight=0.1),
    )


@pytest.fixture
def randomise() -> Callable[[JetFormer], JetFormer]:
    """Replaces every parameter, so that no zero-initialised one hides an error."""

    def apply(model: JetFormer, seed: int = 0, scale: float = 0.3) -> JetFormer:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(noise / fan_in**0.5 + (1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else 0.0))
        return model

    return apply


@pytest.fixture
def small_model(small_config: JetFormerConfig, randomise: Callable[[JetFormer], JetFormer]) -> JetFormer:
    return randomise(build_jetformer(small_config))


@pytest.fixture
def build_batch() -> Callable[..., Batch]:
    """A batch of random captions and images for a configuration."""

    def build(config: JetFormerConfig, size: int = 6, *, train: bool = True, sigma: float = 0.0, first_position: int = 0, **options: object) -> Batch:
        generator = torch.Generator().manual_seed(first_position + size)
        image = config.image
        ones = torch.ones(size, config.text.length, dtype=torch.bool)
        values: dict[str, object] = {
            "positions": torch.arange(first_position, first_position + size),
            "text": torch.randint(0, config.text.num_pieces, (size, config.text.length), generator=generator),
            "text_mask": ones,
            "text_loss": ones,
            "image": torch.randint(0, 256, (size, image.resolution, image.resolution, image.channels), generator=generator, dtype=torch.uint8),
            "noise": NoiseSettings(seed=1, sigma=sigma, train=train),
        }
        return make_batch(config, **(values | options))  # type: ignore[arg-type]

    return build
