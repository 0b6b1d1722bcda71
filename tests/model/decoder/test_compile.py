"""`kernels.compile=layers`: the loss and gradients of plain torch, one compilation for all layers, and a plain word where nothing compiles."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters

from configs.errors import UserError
from model import init, streams
from model.flow.vit import CouplingNetwork
from model.kernels import inductor
from model.kernels.config import KernelsConfig
from model.kernels.splitmix import DropoutKey, keep_mask
from model.layers import layer_specs
from model.streams import Stream
from pipeline.parallel.stage import PipelineStage


@pytest.fixture(autouse=True)
def _own_compilations(monkeypatch):
    """Starts from nothing compiled, and leaves nothing."""
    torch._dynamo.reset(), counters.clear()
    yield
    torch._dynamo.reset(), counters.clear()


@pytest.fixture
def traced_only(monkeypatch):
    """Runs the captured graphs without generating code, and fails where one cannot be captured whole."""
    compiled = {}

    def trace(function):
        return compiled.setdefault(function, torch.compile(function, backend="eager", fullgraph=True))

    monkeypatch.setattr(inductor, "_compiled", trace)
    monkeypatch.setattr(inductor, "require_compiler", lambda device_type: None)


def config_of(small_config, *, depth=3):
    return dataclasses.replace(
        small_config,
        flow=dataclasses.replace(small_config.flow, kinds=("channels", "spatial"), depth=depth),
        decoder=dataclasses.replace(small_config.decoder, depth=depth),
    )


def losses_and_gradients(config, batches, randomise, compile_, recompute):
    model = PipelineStage(
        layer_specs(config, kernels=KernelsConfig(compile=compile_)), config=config, previous=None, is_last=True, recompute=recompute
    )
    for module in model.modules():
        if isinstance(module, CouplingNetwork):
            module.compiles = compile_ == "layers"
    init.initialise(model.named_parameters(), config, 0)
    randomise(model)
    found = []
    for batch in batches:
        model.zero_grad()
        model.feed.load([batch])
        loss = model(torch.zeros(()))
        loss.backward()
        found.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    return found


def assert_alike(found, expected):
    for (loss, gradients), (expected_loss, expected_gradients) in zip(found, expected, strict=True):
        assert torch.allclose(loss, expected_loss, rtol=1e-6)
        for name, gradient in gradients.items():
            difference = (gradient - expected_gradients[name]).norm()
            assert difference <= 1e-5 * expected_gradients[name].norm() + 1e-8, name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_captured_layers_give_the_loss_and_gradients_of_plain_torch(small_config, build_batch, randomise, traced_only, recompute):
    config = config_of(small_config)
    batches = [build_batch(config, size=size) for size in (12, 8, 6)]
    found = losses_and_gradients(config, batches, randomise, "layers", recompute)
    assert_alike(found, losses_and_gradients(config, batches, randomise, "off", recompute))
    captured = Counter(counters["stats"])["unique_graphs"]
    # The coupling network of an input without gradient, of others, and under no_grad; one for all blocks. Other batch sizes add none.
    assert captured == 4, dict(counters["stats"])
    assert not counters["graph_break"]


def test_evaluation_and_sampling_paths_agree_with_plain_torch(small_config, build_batch, randomise, traced_only):
    config = config_of(small_config)
    with torch.no_grad():
        batch = build_batch(config, train=False)
        found = []
        for compile_ in ("layers", "off"):
            model = PipelineStage(layer_specs(config, kernels=KernelsConfig(compile=compile_)), config=config, previous=None, is_last=True)
            init.initialise(model.named_parameters(), config, 0)
            model.feed.load([batch])
            found.append(randomise(model)(torch.zeros(())))
    assert torch.allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 8), (3, 7), (1,)])
def test_masks_are_the_same_bits_when_captured(shape):
    positions = torch.tensor([0, 5, 2**40])
    keys = streams.substream_keys(2**63 + 5, Stream.DROPOUT, positions, 4)[3]
    capture = torch.compile(lambda keys: keep_mask(DropoutKey(keys, 0.3), shape), backend="eager", fullgraph=True)
    expected = streams.keep_mask(2**63 + 5, Stream.DROPOUT, positions, shape, drop_probability=0.3, substream=3)
    assert torch.equal(capture(keys), expected)


@pytest.mark.slow
@pytest.mark.skipif(bool(inductor.compiler_obstacle("cpu")), reason="nothing to compile with")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_layers_give_the_loss_and_gradients_of_plain_torch(small_config, build_batch, randomise, recompute):
    config = config_of(small_config, depth=2)
    batches = [build_batch(config, size=size) for size in (8, 12)]
    with torch._inductor.config.patch(compile_threads=1):
        found = losses_and_gradients(config, batches, randomise, "layers", recompute)
    assert counters["stats"]["unique_graphs"] == 4
    assert_alike(found, losses_and_gradients(config, batches, randomise, "off", recompute))


@pytest.mark.slow
@pytest.mark.skipif(bool(inductor.compiler_obstacle("cpu")), reason="nothing to compile with")
@pytest.mark.parametrize("shape", [(50, 33), (6, 64)], ids=["odd width", "width of whole words"])
def test_masks_are_the_same_bits_when_compiled(shape):
    """By themselves, and in one piece of code with what they mask, where the place of an element is the compiler's to simplify."""
    positions = torch.tensor([0, 5, 2**40])
    keys = streams.substream_keys(7, Stream.DROPOUT, positions, 4)[3]
    expected = streams.keep_mask(7, Stream.DROPOUT, positions, shape, drop_probability=0.3, substream=3)
    x = torch.rand(3, *shape)
    with torch._inductor.config.patch(compile_threads=1):
        alone = torch.compile(lambda keys: keep_mask(DropoutKey(keys, 0.3), shape))(keys)
        fused = torch.compile(lambda keys, x: 1 + torch.where(keep_mask(DropoutKey(keys, 0.3), shape), x, -1))(keys, x)
    assert torch.equal(alone, expected)
    assert torch.equal(fused, 1 + torch.where(expected, x, -1))


def test_without_a_compiler_the_error_says_so(small_config, build_batch, randomise, monkeypatch):
    monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    inductor.require_compiler.cache_clear()
    with pytest.raises(UserError, match=r"(?s)kernels.compile=layers.*C\+\+ compiler.*not on PATH.*kernels.compile=off"):
        losses_and_gradients(config_of(small_config), [build_batch(small_config)], randomise, "layers", "none")
    inductor.require_compiler.cache_clear()


@pytest.mark.parametrize(("device", "said"), [("cuda", "Triton"), ("mps", "mps")])
def test_other_devices_are_told_what_is_missing(device, said, monkeypatch):
    monkeypatch.setattr(inductor, "has_triton", lambda: False)
    assert said in inductor.compiler_obstacle(device)
