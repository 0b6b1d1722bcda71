"""A trained-looking run for the verbs that use one."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch

from configs.loader import to_dict
from model.config import DecoderConfig, FlowConfig, GmmConfig, ImageConfig, JetFormerConfig, TextConfig
from model.jetformer import JetFormer
from pipeline.checkpoint.format import Fragment
from pipeline.checkpoint.weights import persistent_buffers
from pipeline.checkpoint.writer import save
from pipeline.config import DataConfig, RunConfig, SamplingConfig

CAPTIONS = ("a handwritten seven", "the digit 3", "a red circle", "two blue squares")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> bytes:
    """A SentencePiece model with EOS 1 and pad 0."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 5),
        model_writer=buffer,
        vocab_size=290,
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: bytes) -> RunConfig:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer).get_piece_size()
    return RunConfig(
        model=JetFormerConfig(
            image=ImageConfig(resolution=8, channels=3, patch_size=4),
            text=TextConfig(length=12, num_pieces=pieces),
            flow=FlowConfig(depth=2, block_depth=1, width=8, num_heads=1),
            decoder=DecoderConfig(width=16, depth=2, mlp_dim=16, num_heads=2, head_dim=8),
            gmm=GmmConfig(num_mixtures=3, soft_dim=4),
        ),
        data=DataConfig(path="nowhere"),
        sampling=SamplingConfig(prompts=("a red circle",), cfg_scale=2.0, temperature=0.9, seed=5),
    )


@pytest.fixture(scope="session")
def build_random_model() -> Callable[..., JetFormer]:
    """A model with every parameter random, none left at zero."""

    def build(config: JetFormerConfig, seed: int = 0) -> JetFormer:
        model, generator = JetFormer(config), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 / fan_in**0.5)
        return model

    return build


WriteRun = Callable[..., Path]


@pytest.fixture(scope="session")
def write_run(tiny_tokenizer: bytes, build_random_model: Callable[..., JetFormer]) -> WriteRun:
    """write_run(run_dir, config, step=3, ema=False, tokenizer=True) -> run_dir, with one checkpoint as training writes them."""

    def write(run_dir: Path, config: RunConfig, *, step: int = 3, ema: bool = False, tokenizer: bool = True) -> Path:
        model = build_random_model(config.model)
        fragments = [Fragment.whole(f"param/{name}", p) for name, p in model.named_parameters()]
        fragments += [Fragment.whole(f"buffer/{name}", b) for name, b in persistent_buffers(model)]
        if ema:
            fragments += [Fragment.whole(f"ema/{name}", p * 0.5) for name, p in model.named_parameters()]
        save(run_dir, step, fragments, {"config": to_dict(config)})
        if tokenizer:
            (run_dir / "tokenizer.model").write_bytes(tiny_tokenizer)
        return run_dir

    return write


@pytest.fixture(scope="session")
def tiny_run(write_run: WriteRun, tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder; tests only read it."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_config, ema=True)
