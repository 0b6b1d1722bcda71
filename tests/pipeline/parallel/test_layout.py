"""Ranks have the coordinates of DeepSpeed's and Megatron's order; what cannot work is refused with numbers."""

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from configs.errors import ConfigError, UserError
from configs.loader import build_config
from pipeline.config import RunConfig
from pipeline.parallel import layout as layout_module
from pipeline.parallel.environment import ProcessEnvironment
from pipeline.parallel.layout import Layout, check_layout, choose_device, set_matmul_precision, setup_layout
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


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str | None], None]:
    """Pretends that this process sees some GPUs."""

    def pretend(count: int, visible: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return pretend


def test_a_task_that_is_shown_one_gpu_takes_it(gpus: Callable[[int, str | None], None]) -> None:
    """srun --gpus-per-task=1: local rank 3 sees one GPU, its own."""
    config = build_config(RunConfig, merged(BASE, {"device": "auto"}))
    gpus(1, "3")
    assert choose_device(config, 3, 8) == torch.device("cuda", 0)
    gpus(4, "0,1,2,3")
    assert choose_device(config, 3, 8) == torch.device("cuda", 3)


@pytest.mark.parametrize(("count", "visible"), [(1, None), (2, "0,1")])
def test_more_processes_than_gpus_are_refused(gpus: Callable[[int, str | None], None], count: int, visible: str | None) -> None:
    gpus(count, visible)
    with pytest.raises(UserError, match="more processes on this node than GPUs"):
        choose_device(build_config(RunConfig, merged(BASE, {"device": "auto"})), 3, 8)


@pytest.mark.parametrize(("found", "shared"), [(["a", "b", "c"], None), (["a", "b", "a"], "ranks 0, 2")])
def test_two_ranks_on_one_gpu_are_told(monkeypatch: pytest.MonkeyPatch, found: list[str], shared: str | None) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda out, mine, group: out.__setitem__(slice(None), found))
    with pytest.raises(UserError, match=shared) if shared else contextlib.nullcontext():
        layout_module._check_own_gpu(found[0], None)


@pytest.fixture
def untouched_precision() -> Iterator[None]:
    """Puts back the precision of matrix products, which is a setting of the process."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("untouched_precision")
def test_tf32_is_for_cuda_only() -> None:
    before = torch.get_float32_matmul_precision()
    set_matmul_precision(torch.device("cpu"), tf32=True)
    assert torch.get_float32_matmul_precision() == before
    for tf32, expected in ((True, "high"), (False, "highest"), (True, "high")):
        set_matmul_precision(torch.device("cuda"), tf32=tf32)
        assert torch.get_float32_matmul_precision() == expected
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


def test_what_cublas_reads_is_set_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)

    def first_touch(*arguments: object) -> None:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise InterruptedError

    monkeypatch.setattr(layout_module, "choose_device", first_touch)
    with pytest.raises(InterruptedError):
        setup_layout(build_config(RunConfig, merged(BASE, {"deterministic": True})), ProcessEnvironment())
    assert seen == [":4096:8"]


@pytest.mark.gpu
@pytest.mark.usefixtures("untouched_precision")
@pytest.mark.parametrize("tf32", [True, False])
def test_products_have_the_precision_asked_for(tf32: bool) -> None:
    x = torch.randn(512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    set_matmul_precision(x.device, tf32=tf32)
    truth = x.double() @ x.double()
    assert (float((x @ x - truth).norm() / truth.norm()) > 1e-5) == tf32
