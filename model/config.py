"""What a JetFormer is made of, as data. Imports no torch, so that a login node can validate a run.

Dimensions: I image tokens, C pixel channels of a patch (p*p*channels), T text slots, S sequence, D model width.
"""

from dataclasses import dataclass, field
from typing import Literal

CouplingKind = Literal["channels", "checkerboard", "checkerboard-inv", "vstripes", "vstripes-inv", "hstripes", "hstripes-inv", "spatial"]


def _check_positive(section: str, config: object, *names: str) -> None:
    """Raises ValueError for a field below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{section}.{name}={getattr(config, name)} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """Pixels in, pixels out."""

    resolution: int = 256
    """Height and width in pixels."""
    channels: Literal[1, 3] = 3
    patch_size: int = 16

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.patch_size < 1 or self.resolution % self.patch_size:
            raise ValueError(
                f"resolution={self.resolution} is not divisible by patch_size={self.patch_size}: choose a patch_size that divides the resolution"
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.resolution // self.patch_size

    @property
    def num_tokens(self) -> int:
        """I: patches per image."""
        return self.grid_size**2

    @property
    def token_dim(self) -> int:
        """C: subpixels per patch."""
        return self.patch_size**2 * self.channels

    @property
    def num_subpixels(self) -> int:
        """Subpixels per image, the unit in which image loss is counted."""
        return self.resolution**2 * self.channels


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Text slots and ids (spec 1.1, 1.5). The three special ids follow the tokenizer's pieces."""

    length: int = 64
    """T: text slots per example, EOS included."""
    num_pieces: int = 32_000
    """Tokenizer pieces, or classes for a class-conditional model; BOS, BOI and NOLABEL come after them."""
    special_ids: tuple[int, int, int] | None = None
    """BOS, BOI and NOLABEL, where they are not the three ids after the pieces."""
    eos_id: int = 1
    pad_id: int = 1
    """Value written in unused slots (the reference trains on pads, and pads with EOS: `ignore_pad=False`)."""
    ignore_pad: bool = False
    """True: unused slots are masked out of attention and loss (spec 1.1)."""
    num_repeats: int = 1
    """Copies of the prefix, each with an embedding table of its own; 16 for the class-conditional model (spec 1.5)."""
    tie_logits: bool = False
    """Text logits reuse the embedding (class-conditional reference); otherwise a Dense layer of their own."""
    logits_init_std: float = 1.0
    """Std of the text head's kernel at init: 1 is the reference (134 nats/token at start), width**-0.5 starts near ln V."""

    def __post_init__(self) -> None:
        _check_positive("text", self, "length", "num_pieces", "num_repeats")

    @property
    def vocab_size(self) -> int:
        """Pieces plus BOS, BOI, NOLABEL."""
        return self.num_pieces + 3

    @property
    def bos_id(self) -> int:
        """Begin of sequence."""
        return self.special_ids[0] if self.special_ids else self.num_pieces

    @property
    def boi_id(self) -> int:
        """Begin of image. The EOS doubles as BOI when pads are ignored (spec 1.1)."""
        if self.special_ids:
            return self.special_ids[1]
        return self.eos_id if self.ignore_pad else self.num_pieces + 1

    @property
    def nolabel_id(self) -> int:
        """Embedding of the dropped prefix, for classifier-free guidance."""
        return self.special_ids[2] if self.special_ids else self.num_pieces + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    """Jet, the normalizing flow (spec 1.3): `depth` affine couplings, each with a small ViT inside."""

    depth: int = 32
    """Number of couplings."""
    block_depth: int = 4
    """ViT blocks inside one coupling."""
    width: int = 512
    num_heads: int = 8
    kinds: tuple[CouplingKind, ...] = ("channels",)
    """Kinds of coupling, repeated in turn."""
    permutation_seed: int = 0

    def __post_init__(self) -> None:
        _check_positive("flow", self, "width", "num_heads")
        if self.width % self.num_heads:
            raise ValueError(f"flow.width={self.width} is not divisible by flow.num_heads={self.num_heads}")
        if not self.kinds:
            raise ValueError("flow.kinds is empty: name at least one kind of coupling, e.g. ['channels']")

    @property
    def mlp_dim(self) -> int:
        """Width of the ViT's MLP."""
        return 4 * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Gemma-style causal decoder (spec 1.6)."""

    width: int = 1024
    """D: model width."""
    depth: int = 24
    mlp_dim: int = 4096
    num_heads: int = 16
    num_kv_heads: int = 1
    head_dim: int = 64
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_positive("decoder", self, "width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"decoder.num_heads={self.num_heads} is not divisible by decoder.num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"decoder.head_dim={self.head_dim} must be even: rotary embedding rotates pairs")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"decoder.dropout={self.dropout} must lie in 0..1, below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class GmmConfig:
    """The image head: a mixture of diagonal Gaussians over soft tokens (spec 1.7)."""

    num_mixtures: int = 1024
    soft_dim: int = 128
    """Channels of each latent token that the decoder models; the other C - soft_dim are scored by N(0, 1)."""
    init_symmetry_std: float = 0.02
    """Std of the mean biases at init. 0 is the reference, with which the mixture never splits (spec 1.7)."""

    def __post_init__(self) -> None:
        _check_positive("gmm", self, "num_mixtures")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """How the two losses are made and mixed (spec 1.4, 1.5, 1.8)."""

    text_first_probability: float = 0.5
    """Share of examples with the caption before the image (they learn to draw); 1.0 for class-conditional."""
    order: Literal["bernoulli", "alternate"] = "bernoulli"
    """`alternate`: the share is met exactly in every run of consecutive examples, for static shapes; same expectation."""
    text_loss_weight: float = 0.0025
    loss_on_prefix: bool = False
    stop_grad_flow_on_image_prefix: bool = True
    input_noise_max_std: float = 0.3
    """Noise on soft tokens: std ~ U(0, this) per text-first example, in training."""
    label_drop_probability: float = 0.1
    rgb_noise_on_image_prefix: bool = False

    def __post_init__(self) -> None:
        for name in ("text_first_probability", "label_drop_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name}={getattr(self, name)} must lie in 0..1")


@dataclass(frozen=True, slots=True, kw_only=True)
class JetFormerConfig:
    """One JetFormer. Defaults are the published 350M image-text model at 256 px."""

    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    gmm: GmmConfig = field(default_factory=GmmConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        if not 0 < self.gmm.soft_dim <= self.image.token_dim:
            raise ValueError(
                f"gmm.soft_dim={self.gmm.soft_dim} must lie in 1..{self.image.token_dim} (patch_size**2 * channels = subpixels per token)"
            )
        channels_used = any(kind == "channels" for kind in self.flow.kinds)
        if channels_used and self.image.token_dim % 2:
            raise ValueError(f"a channel coupling halves the {self.image.token_dim} subpixels of a patch: choose an even patch_size or spatial kinds")
        if any(kind != "channels" for kind in self.flow.kinds) and (self.image.num_tokens % 2 or self.image.token_dim % 2):
            raise ValueError("a spatial coupling halves the tokens and folds channels in two: both counts must be even")

    @property
    def sequence_length(self) -> int:
        """S: decoder positions per example (prefix + one marker each + image, last token dropped; spec 1.5)."""
        return self.text.length * self.text.num_repeats + self.image.num_tokens + 1
