"""Stages one after another compute what the whole model computes, under the same names."""

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import init
from model.flow.coupling import Coupling
from model.jetformer import JetFormer, build_jetformer
from model.layers import layer_specs
from model.stats import METRICS
from pipeline.engine import FlatBuffers, _spare_copies
from pipeline.parallel.layout import Layout
from pipeline.parallel.partition import cut_layers
from pipeline.parallel.stage import PipelineStage, as_jetformer
from tests.distributed.worker import initialise_busily, scenario_config, synthetic_batch

CONFIG = scenario_config("base")


def build_stages(num_stages: int, *, recompute: str = "none") -> list[PipelineStage]:
    specs = layer_specs(CONFIG.model)
    bounds = cut_layers([spec.training_flops for spec in specs], num_stages)
    stages = []
    for start, stop in itertools.pairwise(bounds):
        previous = specs[start - 1] if start else None
        stage = PipelineStage(specs[start:stop], config=CONFIG.model, previous=previous, is_last=stop == len(specs), recompute=recompute)
        initialise_busily(stage.named_parameters(), CONFIG.model, 0)
        stages.append(stage)
    return stages


def reference() -> JetFormer:
    model = build_jetformer(CONFIG.model)
    initialise_busily(model.named_parameters(), CONFIG.model, 0)
    return model


def backward_through(stages: list[PipelineStage], num_micro_batches: int) -> tuple[float, dict[str, Tensor]]:
    """Forward and backward of some micro-batches, edges cut as between processes; (mean loss of the last stage, gradients)."""
    batches = [synthetic_batch(CONFIG, 0, 2 * k, 2) for k in range(num_micro_batches)]
    for stage in stages:
        stage.num_micro_batches = num_micro_batches
        stage.feed.load(batches)
    total = 0.0
    for _ in batches:
        edge, pairs = torch.zeros(1), []
        for stage in stages:
            incoming = edge.detach().requires_grad_()
            edge = stage(incoming)
            pairs.append((incoming, edge))
        total += edge.item() / num_micro_batches
        gradient: Tensor | None = torch.tensor(1.0 / num_micro_batches)
        for incoming, outgoing in reversed(pairs):
            outgoing.backward(gradient)
            gradient = incoming.grad
    return total, {name: p.grad for stage in stages for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "flow", "decoder", "full"])
@pytest.mark.parametrize("num_stages", [1, 2, 4, 7])
def test_stages_give_the_gradients_of_the_whole_model(num_stages: int, recompute: str) -> None:
    model = reference()
    for k in range(2):
        (model(synthetic_batch(CONFIG, 0, 2 * k, 2)).total_loss() / 2).backward()
    _, gradients = backward_through(build_stages(num_stages, recompute=recompute), 2)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys(), "every parameter gets a gradient, under its global name"
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_couplings_and_blocks_are_recomputed_once_and_nothing_else_is() -> None:
    (stage,) = build_stages(1, recompute="full")
    calls: Counter[str] = Counter()
    for name in (spec.name for spec in stage.specs):
        stage.get_submodule(name).register_forward_pre_hook(lambda module, inputs, name=name: calls.update([name]))
    backward_through([stage], 1)
    assert calls == {spec.name: 2 if spec.kind in ("coupling", "block") else 1 for spec in stage.specs}


def test_images_without_gradient_pass_the_flow_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under recomputation, whether they come as the latents of a coupling, from `patchify` or over an edge."""
    stages = build_stages(4, recompute="full")
    assert sum(any(spec.kind == "coupling" for spec in stage.specs) for stage in stages) > 1
    calls: Counter[bool] = Counter()
    advance = Coupling.advance

    def counted(self: Coupling, *args: Any) -> Any:
        calls[torch.is_grad_enabled()] += 1
        return advance(self, *args)

    monkeypatch.setattr(Coupling, "advance", counted)
    backward_through(stages, 1)
    depth = CONFIG.model.flow.depth
    assert calls == {True: 2 * depth, False: depth}


def test_metric_sums_do_not_count_recomputed_layers_twice() -> None:
    sums = []
    for recompute in ("none", "full"):
        stages = build_stages(1, recompute=recompute)
        backward_through(stages, 2)
        sums.append(stages[0].stats.take(torch.device("cpu")))
    torch.testing.assert_close(sums[0], sums[1])
    assert sums[0][1].max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "flow", "decoder", "full"])
@pytest.mark.parametrize("num_text_first", [0, 2, 4])
def test_a_step_neither_mixes_devices_nor_waits_for_one(num_text_first: int, recompute: str, dtype: torch.dtype) -> None:
    """On the meta device, which has no values: an operation that needs one on the host fails, as does one on tensors of two devices."""
    (stage,) = build_stages(1, recompute=recompute)
    stage.to("meta", dtype)
    batch = synthetic_batch(CONFIG, 0, 0, 4)
    batch.num_text_first = num_text_first
    stage.feed.load([batch.to("meta")])
    stage(torch.zeros(1, device="meta")).backward()
    assert {parameter.grad.device.type for parameter in stage.parameters() if parameter.grad is not None} == {"meta"}
    assert stage.stats.take(torch.device("meta")).shape == (2, len(METRICS))


def test_every_stage_can_be_saved_and_loaded_by_global_name() -> None:
    names = [set(stage.state_dict()) for stage in build_stages(4)]
    assert set().union(*names) == set(reference().state_dict())
    assert sum(map(len, names)) == len(reference().state_dict())


def test_whole_stage_lends_its_weights_to_a_jetformer() -> None:
    (stage,) = build_stages(1)
    model = as_jetformer(stage, CONFIG.model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == {name: p.data_ptr() for name, p in stage.named_parameters()}
    batch = synthetic_batch(CONFIG, 0, 0, 4)
    stage.feed.load([batch])
    assert stage(torch.zeros(1)).item() == model(batch).total_loss().item()


def test_micro_batches_left_over_are_noticed() -> None:
    (stage,) = build_stages(1)
    stage.feed.load([synthetic_batch(CONFIG, 0, 0, 2)])
    with pytest.raises(AssertionError, match="not used"):
        stage.feed.load([synthetic_batch(CONFIG, 1, 0, 2)])


def test_flat_buffers_hold_the_elements_in_order_and_are_used_again() -> None:
    flatten = FlatBuffers()
    first = flatten([torch.arange(6.0).view(2, 3).t(), torch.ones(1)])
    assert first.tolist() == [0, 3, 1, 4, 2, 5, 1]
    assert flatten([torch.zeros(7)]).data_ptr() == first.data_ptr()


@pytest.mark.parametrize(("device", "spared"), [("cpu", True), ("cuda", False)])
def test_buffers_of_our_own_are_held_on_the_cpu_only(device: str, spared: bool) -> None:
    optimizer = SimpleNamespace(flatten=torch.cat)
    layout = Layout(rank=0, world_size=2, local_rank=0, tensor=1, data=2, pipe=1, device=torch.device(device))
    _spare_copies(SimpleNamespace(optimizer=optimizer), layout)
    assert isinstance(optimizer.flatten, FlatBuffers) == spared


def test_start_is_the_same_in_stages_and_whole() -> None:
    whole = dict(build_jetformer(CONFIG.model, seed=3).named_parameters())
    for stage in build_stages(3):
        init.initialise(stage.named_parameters(), CONFIG.model, 3)
        assert all(torch.equal(parameter, whole[name]) for name, parameter in stage.named_parameters())
