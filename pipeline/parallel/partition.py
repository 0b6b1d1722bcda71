"""Cuts the layer list into pipeline stages of nearly equal cost. Imports no torch."""

from collections.abc import Sequence
from itertools import pairwise


def partition(costs: Sequence[float], num_stages: int) -> list[int]:
    """Bounds of the contiguous cut into `num_stages` non-empty stages whose most expensive stage is cheapest.

    Exact: dynamic programming over (stages, layers), O(num_stages * n^2). Among equal cuts, the one with the earlier
    boundaries wins, so that every process finds the same.

    Args:
        costs: forward FLOPs of each layer, per example.
        num_stages: pipeline degree, at most the number of layers.

    Returns:
        `num_stages + 1` bounds: stage s holds layers bounds[s] .. bounds[s+1] - 1.

    Raises:
        ValueError: more stages than layers, or fewer than one stage.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be cut into {num_stages} pipeline stages: give each stage at least one layer")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # best[n]: cheapest possible maximum for the first n layers in the stages counted so far; cut[s][n]: where stage s then starts.
    best = [prefix[n] if n else float("inf") for n in range(num_layers + 1)]
    cuts: list[list[int]] = []
    for stages in range(2, num_stages + 1):
        previous, best = best, [float("inf")] * (num_layers + 1)
        cut = [0] * (num_layers + 1)
        for n in range(stages, num_layers + 1):
            for start in range(stages - 1, n):
                largest = max(previous[start], prefix[n] - prefix[start])
                if largest < best[n]:
                    best[n], cut[n] = largest, start
        cuts.append(cut)
    bounds = [num_layers]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return [0, *reversed(bounds)] if num_stages > 1 else [0, num_layers]


def cut_layers(costs: Sequence[float], num_stages: int) -> list[int]:
    """`partition` of JetFormer's layer list: the first two layers stay together, because patchify has no parameters to train.

    Raises:
        ValueError: more stages than there are layers to cut.
    """
    return [0, *(bound + 1 for bound in partition([costs[0] + costs[1], *costs[2:]], num_stages)[1:])]


def stage_costs(costs: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """Total cost of each stage."""
    return [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
