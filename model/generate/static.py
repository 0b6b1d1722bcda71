"""The decoder one position at a time, in which nothing changes but the contents of tensors: a CUDA graph can replay such a step.

Letters: B rows, I steps, P positions of the buffers, D width, G key-value heads, H head width.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from model.decoder.attention import AttentionContext, KvCache
from model.decoder.rope import rope_tables
from model.generate.cached import CachedDecoder

logger = logging.getLogger(__name__)

_ALIGNMENT = 16
"""Positions of the buffers are a multiple of it: fused attention copies masks whose rows are not aligned."""
_WARM_UP_STEPS = 2


class StaticCache(KvCache):
    """Keys and values in buffers that are written at a position which is a tensor, and attended whole."""

    def __init__(self, past: KvCache, rows: Tensor, *, length: int, position: Tensor) -> None:
        """
        Args:
            past: what came before; row i goes on from its row `rows[i]`.
            length: P.
            position: int64 [1], where the next keys go; advanced by the owner.
        """
        _, num_kv_heads, _, head_dim = past.keys.shape
        super().__init__(batch_size=len(rows), num_kv_heads=num_kv_heads, length=length, head_dim=head_dim, like=past.keys)
        super().append(past.keys[rows, :, : past.length], past.values[rows, :, : past.length])
        self.position = position

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes [B, G, 1, H] and returns the whole buffers, [B, G, P, H]: the mask hides what is not written yet."""
        self.keys.index_copy_(2, self.position, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.position, values.to(self.values.dtype))
        return self.keys, self.values


class StaticDecoder:
    """Continues a `CachedDecoder` by one position per step, equal to it up to rounding.

    Attention reads the whole buffers in every step. At I = 256 image tokens after 66 of the caption that is 320 positions in place of
    194 on average: 8 KiB more per row and layer at one bf16 head of 64 for keys and values each, against megabytes of weights.
    """

    def __init__(self, past: CachedDecoder, rows: Tensor, *, steps: int) -> None:
        """
        Args:
            past: the decoder after a prefix; row i goes on from its row `rows[i]`: equal prefixes are read once.
            steps: I, the most steps that will be made.
        """
        self.model = past.model
        like, start = past.caches[0].keys, past.length
        length = -(-(start + steps) // _ALIGNMENT) * _ALIGNMENT
        self.index = torch.zeros(1, dtype=torch.int64, device=like.device)
        """int64 [1], steps made so far."""
        self._position = torch.full((1,), start, device=like.device)
        self._caches = [StaticCache(cache, rows, length=length, position=self._position) for cache in past.caches]
        seen = torch.ones(1, start, dtype=torch.bool, device=like.device) if past.key_mask is None else past.key_mask[rows]
        # Added to the scores, in their dtype: of a boolean mask, attention would make one in every layer.
        self._mask = torch.full((len(seen), 1, 1, length), -torch.inf, dtype=like.dtype, device=like.device)
        self._mask[..., :start].masked_fill_(seen[:, None, None], 0.0)
        positions = seen.sum(1, keepdim=True) + torch.arange(steps, device=like.device)
        self._cos, self._sin = rope_tables(positions, self.model.config.decoder.head_dim)

    def step(self, x: Tensor) -> Tensor:
        """Feeds one more position, [B, 1, D]; returns what the heads read, [B, 1, D]."""
        self._mask.index_fill_(-1, self._position, 0.0)
        context = AttentionContext(self._cos.index_select(2, self.index), self._sin.index_select(2, self.index), self._mask)
        for index, cache in enumerate(self._caches):
            x = self.model.block(index).decode(x, context, cache)
        self.index.add_(1)
        self._position.add_(1)
        return self.model.head.norm(x)


def run_steps(step: Callable[[], object], count: int, *, on_step: Callable[[], object]) -> None:
    """Calls `step` `count` times."""
    for _ in range(count):
        step()
        on_step()


def replay_steps(step: Callable[[], object], count: int, *, on_step: Callable[[], object], device: torch.device, required: bool) -> None:
    """As `run_steps`, with all but the first steps replayed from a CUDA graph of one: the host then launches one graph per step.

    The first steps run as they are and warm up the libraries, so nothing is computed in vain. The graph lives as long as this call:
    it holds the addresses of this batch, and recording it costs about one step on the host.

    Args:
        step: reads and writes the same tensors each time and never waits for the device.
        on_step: called after each step, at most one step ahead of the device.
        device: of the step.
        required: raise where the step cannot be recorded; otherwise warn, and run it as it is.
    """
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    warm_up = min(_WARM_UP_STEPS, count)
    with torch.cuda.stream(stream):
        run_steps(step, warm_up, on_step=on_step)
        graph = _record(step, stream, required=required) if count > warm_up else None
        if graph is None:
            run_steps(step, count - warm_up, on_step=on_step)
        else:
            finished = torch.cuda.Event()
            for _ in range(count - warm_up):
                graph.replay()
                finished.synchronize()  # of the step before this one
                finished.record()
                on_step()
    # The graph's memory must not go back to the allocator while the device still runs it.
    stream.synchronize()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are recorded; one for all calls, as cuBLAS keeps a workspace for every stream that it has run on."""
    return torch.cuda.Stream(device)


def _record(step: Callable[[], object], stream: torch.cuda.Stream, *, required: bool) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads of a run (data loading, collectives) may use the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        if required:
            raise
        logger.warning("sampling without a CUDA graph, as a step could not be recorded: %s", error)
        return None
    return graph
