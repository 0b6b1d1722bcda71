"""Decoding in fixed shapes: equal to the growing cache, and fit to be recorded once and replayed."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.errors import UserError
from model.generate import images, static
from model.generate.cached import CachedDecoder
from model.generate.images import ImageSampling, sample_images, sample_soft_tokens
from model.generate.static import StaticDecoder

SETTINGS = {
    "plain": ImageSampling(temperature=0.9, temperature_probs=1.3, seed=3),
    "analytic": ImageSampling(cfg_scale=2.0, temperature=0.9, seed=3),
    "clipped": ImageSampling(cfg_scale=2.0, cfg_rule="clipped", temperature=0.9, seed=3),
    "rejection": ImageSampling(cfg_scale=2.0, cfg_rule="rejection", temperature=0.9, seed=3),
}
CLOSED_FORM = {name: settings for name, settings in SETTINGS.items() if name != "rejection"}


def captions(config, lengths, device="cpu"):
    text = torch.randint(0, config.text.num_pieces, (len(lengths), config.text.length), generator=torch.Generator().manual_seed(2))
    slots = torch.arange(config.text.length)
    mask = slots < torch.tensor(lengths)[:, None] if config.text.ignore_pad else torch.ones_like(text, dtype=torch.bool)
    return text.to(device), mask.to(device)


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations of one step, their numbers and the memory of their tensors fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        fresh = [isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given for x in tree_leaves(out)]
        self.calls.append((func, args, kwargs, out, fresh))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out, fresh in self.calls:
            for old, new, is_fresh in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), fresh, strict=True):
                if is_fresh:
                    old.copy_(new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padded", [False, True])
def test_static_steps_equal_the_growing_cache(padded, dtype, small_model):
    small_model.to(dtype)
    x = torch.randn(4, 12, small_model.config.decoder.width, generator=torch.Generator().manual_seed(3)).to(dtype)
    rows, mask = torch.tensor([1, 0, 0, 1]), None
    if padded:
        mask = torch.ones(2, 5, dtype=torch.bool)
        mask[1, 2:4] = False
    with torch.no_grad():
        past = CachedDecoder(small_model, batch_size=2, length=5)
        past.extend(x[:2, :5], mask)
        growing, fixed = past.take(rows, extra=7), StaticDecoder(past, rows, steps=7)
        for position in range(5, 12):
            new = x[:, position : position + 1]
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(fixed.step(new), growing.extend(new), rtol=tolerance, atol=tolerance)
    assert fixed.index.item() == 7


@pytest.mark.parametrize("name", CLOSED_FORM)
@pytest.mark.parametrize("kind", ["small_config", "padded_config", "label_config"])
def test_one_recorded_step_draws_every_token(kind, name, build_random, request, monkeypatch):
    """Nothing that changes from step to step is a number of the host, and nothing waits for the device."""
    model = build_random(request.getfixturevalue(kind))
    text, mask = captions(model.config, [0, 2, 5])
    expected = sample_soft_tokens(model, text, mask, settings=CLOSED_FORM[name], positions=torch.arange(3))

    def run_recorded(step, count, *, on_step):
        recording = Recording()
        with recording:
            step()
        for _ in range(count - 1):
            recording.replay()
        names = {func.overloadpacket.__name__ for func, *_ in recording.calls}
        assert not names & {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero", "equal"}

    monkeypatch.setattr(images, "run_steps", run_recorded)
    found = sample_soft_tokens(model, text, mask, settings=CLOSED_FORM[name], positions=torch.arange(3))
    assert torch.equal(found, expected)


def test_padding_of_the_buffers_is_never_seen(small_model, monkeypatch):
    """Longer buffers, the same samples."""
    text, mask = captions(small_model.config, [5, 3])
    short, long = [], []
    for samples, alignment in ((short, 1), (long, 64)):
        monkeypatch.setattr(static, "_ALIGNMENT", alignment)
        samples.append(sample_soft_tokens(small_model, text, mask, settings=SETTINGS["analytic"], positions=torch.arange(2)))
    torch.testing.assert_close(short[0], long[0], rtol=1e-5, atol=1e-5)


def test_a_graph_is_refused_where_there_can_be_none(small_model):
    text, mask = captions(small_model.config, [5])
    with pytest.raises(UserError, match="loop=graph"):
        sample_images(small_model, text, mask, settings=SETTINGS["plain"], loop="graph")
    for loop in ("auto", "eager"):
        assert not images._has_graph(loop, SETTINGS["plain"], torch.device("cpu"))
    assert images._has_graph("auto", SETTINGS["clipped"], torch.device("cuda"))
    assert not images._has_graph("eager", SETTINGS["clipped"], torch.device("cuda"))
    assert not images._has_graph("auto", SETTINGS["rejection"], torch.device("cuda"))
    with pytest.raises(UserError, match="rejection"):
        images._has_graph("graph", SETTINGS["rejection"], torch.device("cuda"))
    unguided = dataclasses.replace(SETTINGS["rejection"], cfg_scale=0.0)
    assert images._has_graph("auto", unguided, torch.device("cuda"))


def test_rejection_without_guidance_is_a_plain_draw(small_model):
    text, mask = captions(small_model.config, [5, 5])
    first, second = (
        sample_soft_tokens(small_model, text, mask, settings=ImageSampling(cfg_rule=rule), positions=torch.arange(2))
        for rule in ("rejection", "clipped")
    )
    assert torch.equal(first, second)


def test_an_image_of_one_token_takes_no_step(small_config, build_random):
    image = dataclasses.replace(small_config.image, resolution=2)
    config = dataclasses.replace(small_config, image=image, flow=dataclasses.replace(small_config.flow, kinds=("channels",) * 3))
    model = build_random(config)
    text, mask = captions(config, [5])
    assert sample_soft_tokens(model, text, mask, settings=SETTINGS["analytic"], positions=torch.arange(1)).shape == (1, 1, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CLOSED_FORM)
@pytest.mark.parametrize("size", [1, 16])
def test_graph_equals_eager_on_cuda(size, name, dtype, padded_config, build_random):
    model = build_random(padded_config).to("cuda", dtype)
    text, mask = captions(padded_config, [i % 6 for i in range(size)], "cuda")
    positions, calls = torch.arange(size, device="cuda"), []

    def run(loop):
        return sample_soft_tokens(model, text, mask, settings=CLOSED_FORM[name], positions=positions, loop=loop, on_token=calls.append)

    eager, first, second = run("eager"), run("graph"), run("graph")
    assert sum(calls) == 3 * padded_config.image.num_tokens
    assert torch.equal(first, eager)
    assert torch.equal(first, second)
    assert torch.equal(run("auto"), first)


@pytest.mark.gpu
def test_graph_frees_its_memory(padded_config, build_random):
    model = build_random(padded_config).to("cuda")
    text, mask = captions(padded_config, [5, 2], "cuda")
    allocated = []
    for _ in range(3):
        sample_images(model, text, mask, settings=SETTINGS["analytic"], loop="graph")
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[2] == allocated[1]


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_runs_as_it_is(caplog):
    counter = torch.zeros(1, device="cuda")

    def step():
        counter.add_(1)
        counter.item()

    static.replay_steps(step, 6, on_step=lambda: None, device=counter.device, required=False)
    assert counter.item() == 6
    assert "CUDA graph" in caplog.text
    with pytest.raises(RuntimeError):
        static.replay_steps(step, 6, on_step=lambda: None, device=counter.device, required=True)
