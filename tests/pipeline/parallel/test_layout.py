"""Ranks have the coordinates of DeepSpeed's and Megatron's order; what cannot work is refused with numbers."""

import pytest
import torch

from configs.errors import ConfigError, UserError
from configs.loader import build_config
from pipeline.config import RunConfig
from pipeline.parallel.layout import Layout, check_layout
from tests.distributed.worker import BASE, merged


def layouts(tensor: int, data: int, pipe: int) -> list[Layout]:
    size = tensor * data * pipe
    cpu = torch.device("cpu")
    return [Layout(rank=r, world_size=size, local_rank=r, tensor=tensor, data=data, pipe=pipe, device=cpu) for r in range(size)]


def test_tensor_varies_fastest_then_data_then_pipe() -> None:
    found = [(layout.stage, layout.data_rank, layout.tensor_rank) for layout in layouts(2, 3, 2)]
    assert found == [(stage, data, tensor) for stage in range(2) for data in range(3) for tensor in range(2)]


def test_neighbour_is_the_same_place_on_the_next_stage() -> None:
    ranks = layouts(2, 2, 3)
    for layout in ranks:
        if not layout.is_last_stage:
            other = ranks[layout.neighbour(1)]
            assert (other.stage, other.data_rank, other.tensor_rank) == (layout.stage + 1, layout.data_rank, layout.tensor_rank)
            assert other.neighbour(-1) == layout.rank


@pytest.mark.parametrize(
    ("changes", "world_size", "named"),
    [
        ({"parallel": {"tensor": 2}}, 3, "not divisible by parallel.tensor"),
        ({"parallel": {"data": 4}}, 2, "parallel.data=4"),
        ({}, 3, "data.global_batch_size=8 is not divisible by the data-parallel degree 3"),
        ({"data": {"micro_batch_size": 3}}, 1, "data.micro_batch_size=3"),
        ({"parallel": {"pipeline": 8}}, 8, "more pipeline stages than layers"),
    ],
)
def test_layout_that_cannot_work_is_refused(changes: dict, world_size: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_layout(build_config(RunConfig, merged(BASE, changes)), world_size)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        *(("data", name, 0) for name in ("global_batch_size", "micro_batch_size", "shuffle_window_shards")),
        *(("checkpoint", name, 0) for name in ("keep_last", "keep_every_steps")),
        *(("eval", name, 0) for name in ("batch_size", "num_examples")),
        ("data", "num_prefetch", -1),
        ("parallel", "data", 0),
    ],
)
def test_number_that_would_fail_later_is_refused_at_once(section: str, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.{name}={value} must be at least"):
        build_config(RunConfig, merged(BASE, {section: {name: value}}))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("decoder", "dropout", 1.0), ("objective", "text_first_probability", 1.5), ("objective", "label_drop_probability", -0.1)],
)
def test_share_beyond_its_range_is_refused(section: str, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} must lie in"):
        build_config(RunConfig, merged(BASE, {"model": {section: {name: value}}}))


def test_layout_that_works_gives_the_micro_batches() -> None:
    assert check_layout(build_config(RunConfig, BASE), 2) == (2, 2)
