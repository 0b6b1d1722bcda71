"""Counts the bytes of live tensors while torch runs on the meta device: the peak memory of real shapes, without a GPU that holds them."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within it, `now` and `peak` are the bytes of all storages that operations made and nobody has dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Runs an operation, and counts what it allocated."""
        known = [leaf for leaf in tree_leaves((args, dict(kwargs or {}))) if isinstance(leaf, Tensor)]
        outside = {tensor.untyped_storage()._cdata for tensor in known}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), outside)
        return result

    def _count(self, storage: torch.UntypedStorage, outside: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in outside:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
