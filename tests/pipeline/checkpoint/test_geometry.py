"""A region is the same set of elements as plain indexing of the tensor."""

import random
from math import prod

import pytest
import torch

from pipeline.checkpoint.format import make_region
from pipeline.checkpoint.geometry import Region, box_span, overlap, view_box


def random_region(rng: random.Random, shape: tuple[int, ...]) -> Region:
    dim = rng.choice([None, *range(len(shape))])
    start = size = 0
    if dim is not None:
        start = rng.randrange(shape[dim])
        size = rng.randint(1, shape[dim] - start)
    whole = make_region(shape, shard_dim=dim, shard_start=start, shard_size=size if dim is not None else None)
    numel = prod(whole.local_shape)
    low = rng.randint(0, numel)
    return make_region(
        shape,
        shard_dim=dim,
        shard_start=start,
        shard_size=size if dim is not None else None,
        flat_start=low,
        flat_len=rng.randint(0, numel - low),
    )


def select(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    local = tensor if region.shard_dim is None else tensor.narrow(region.shard_dim, region.shard_start, region.shard_size)
    return local.reshape(-1)[region.flat_start : region.flat_start + region.flat_len]


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 1, 6), (3, 4, 5), (2, 3, 2, 3)])
def test_boxes_of_a_region_are_its_elements_in_order(shape: tuple[int, ...]) -> None:
    rng, tensor = random.Random(0), torch.arange(prod(shape)).reshape(shape)
    for _ in range(100):
        region = random_region(rng, shape)
        boxes = region.boxes()
        pieces = [tensor[tuple(slice(s, s + n) for s, n in zip(box.start, box.size, strict=True))].reshape(-1) for box in boxes]
        found = torch.cat(pieces) if pieces else tensor.new_empty(0)
        assert torch.equal(found, select(tensor, region)), region
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("shape", [(9,), (5, 7), (3, 4, 5)])
def test_overlaps_copy_exactly_the_shared_elements(shape: tuple[int, ...]) -> None:
    rng, tensor = random.Random(1), torch.arange(prod(shape)).reshape(shape)
    for _ in range(200):
        source, target = random_region(rng, shape), random_region(rng, shape)
        stored, result = select(tensor, source), torch.full((target.flat_len,), -1)
        for a in source.boxes():
            for b in target.boxes():
                shared = overlap(a, b)
                if shared is not None:
                    low, high = box_span(a, *shared)
                    view_box(result, b, *shared).copy_(view_box(stored[low:high], a, *shared, piece_offset=low))
        wanted = select(tensor, target)
        assert torch.equal(result, torch.where(torch.isin(wanted, stored), wanted, -1)), (source, target)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shard_dim": 2},
        {"shard_dim": 0, "shard_start": 3, "shard_size": 3},
        {"shard_dim": 1, "shard_start": -1, "shard_size": 2},
        {"flat_start": 21},
        {"flat_start": 1, "flat_len": 20},
        {"shard_dim": 0, "shard_start": 1, "shard_size": 2, "flat_len": 9},
    ],
)
def test_a_region_that_leaves_its_tensor_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"leaves|dimension|range"):
        make_region((5, 4), **wrong)


def test_a_slice_of_the_whole_dimension_is_no_slice() -> None:
    assert make_region((5, 4), shard_dim=0, shard_start=0, shard_size=5) == make_region((5, 4))
    assert make_region((5, 4), shard_dim=-1, shard_start=1) == make_region((5, 4), shard_dim=1, shard_start=1, shard_size=3)
