"""Which images of a micro-batch a rank sends through the flow, and for which of them it needs gradients.

Inside a tensor-parallel group the flow splits the images instead of repeating the work (design: it sees whole images).
Image-first examples give the flow no gradient (spec 1.4), so they go through under no_grad: exact, and a third cheaper.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch
from model.config import JetFormerConfig
from model.parallel import TensorParallel


@dataclass(frozen=True, slots=True)
class FlowRows:
    """Half-open ranges of batch rows. State.x holds the trained rows, then the frozen ones."""

    trained: tuple[int, int]
    """Rows with gradient, never empty: a rank with none of its own takes row 0 with weight zero, so that every parameter
    gets a gradient on every rank and no collective is missed (spec 3.9)."""
    frozen: tuple[int, int]
    placeholder: bool
    """The one trained row is such a stand-in."""
    num_text_first: int
    """How many of the trained rows have the caption first: the first ones."""
    num_scored: int
    """How many of the trained rows count in the loss: the first ones."""

    @staticmethod
    def of(batch: Batch, config: JetFormerConfig, tp: TensorParallel, rank: int | None = None) -> "FlowRows":
        """The rows of tensor-parallel rank `rank` (this one by default)."""
        size, text_first = len(batch), batch.num_text_first
        objective = config.objective
        freezes = objective.stop_grad_flow_on_image_prefix and not batch.scores_prefix(objective)
        boundary = text_first if freezes else size
        trained = tp.bounds(boundary, rank)
        frozen_start, frozen_stop = tp.bounds(size - boundary, rank)
        frozen = (boundary + frozen_start, boundary + frozen_stop)
        if trained[0] == trained[1]:
            return FlowRows((0, 1), frozen, placeholder=True, num_text_first=0, num_scored=0)
        num_text_first = max(min(trained[1], text_first) - trained[0], 0)
        num_scored = trained[1] - trained[0] if objective.loss_on_prefix else num_text_first
        return FlowRows(trained, frozen, placeholder=False, num_text_first=num_text_first, num_scored=num_scored)

    @property
    def num_trained(self) -> int:
        """Rows with gradient."""
        return self.trained[1] - self.trained[0]

    @property
    def num_frozen(self) -> int:
        """Rows without."""
        return self.frozen[1] - self.frozen[0]

    @property
    def num_rows(self) -> int:
        """Rows of the local state."""
        return self.num_trained + self.num_frozen

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [num_rows, ...] -> (trained rows, frozen ones without gradient if there are any), as views."""
        return x[: self.num_trained], x[self.num_trained :].detach() if self.num_frozen else None

    def local_index(self, device: torch.device) -> Tensor:
        """int64 [num_rows]: the batch row of each local row."""
        return torch.cat([torch.arange(*self.trained, device=device), torch.arange(*self.frozen, device=device)])

    def scored(self, per_row: Tensor) -> Tensor:
        """The entries of [num_trained or more, ...] that count in the loss."""
        return per_row[: self.num_scored]


def gather_index(batch: Batch, config: JetFormerConfig, tp: TensorParallel) -> tuple[Tensor, int]:
    """Where each batch row stands among the ranks' local rows: (int64 [B] rank * max_rows + local row, max_rows)."""
    plans = [FlowRows.of(batch, config, tp, rank) for rank in range(tp.size)]
    max_rows = max(plan.num_rows for plan in plans)
    index = torch.empty(len(batch), dtype=torch.int64)
    for rank, plan in enumerate(plans):
        first = rank * max_rows
        if not plan.placeholder:
            index[plan.trained[0] : plan.trained[1]] = first + torch.arange(plan.num_trained)
        index[plan.frozen[0] : plan.frozen[1]] = first + plan.num_trained + torch.arange(plan.num_frozen)
    return index, max_rows
