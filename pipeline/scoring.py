"""Forward passes without gradients through the stages of any layout: evaluation, and the noise-free figure of a log step."""

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import Batch
from model.stats import METRICS
from pipeline.parallel.layout import Layout
from pipeline.parallel.stage import PipelineStage

_MAX_DIMS = 4


class Scorer:
    """Passes micro-batches from stage to stage by plain sends, and returns the metric sums of this rank's layers."""

    def __init__(self, stage: PipelineStage, layout: Layout) -> None:
        self._stage, self._layout = stage, layout

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """One micro-batch; every rank of its pipeline calls this with the same examples.

        Returns:
            fp64 [2, metrics] sums and counts of this rank, on the device; add them over all ranks.
        """
        layout = self._layout
        incoming = None if layout.is_first_stage else self._receive(layout.neighbour(-1))
        state = self._stage.run(incoming, batch.to(layout.device))
        if not layout.is_last_stage:
            self._send(self._stage.pack(state), layout.neighbour(1))
        sums = state.stats
        return torch.zeros(2, len(METRICS), dtype=torch.float64, device=layout.device) if sums is None else sums.to(layout.device)

    def _send(self, edge: Tensor, rank: int) -> None:
        # Shapes differ between micro-batches: the last one of a split is smaller.
        header = torch.zeros(1 + _MAX_DIMS, dtype=torch.int64)
        header[0] = edge.dim()
        header[1 : 1 + edge.dim()] = torch.tensor(edge.shape)
        dist.send(header.to(edge.device), rank)
        dist.send(edge.contiguous(), rank)

    def _receive(self, rank: int) -> Tensor:
        header = torch.zeros(1 + _MAX_DIMS, dtype=torch.int64, device=self._layout.device)
        dist.recv(header, rank)
        num_dims, *sizes = header.tolist()
        edge = torch.empty(sizes[:num_dims], dtype=next(self._stage.parameters()).dtype, device=self._layout.device)
        dist.recv(edge, rank)
        return edge


def sum_over_world(sums: Tensor) -> Tensor:
    """Adds a tensor up over all ranks, in place. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums
