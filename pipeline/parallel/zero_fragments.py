"""Training state out of, and back into, DeepSpeed's flat ZeRO-1 partitions, under global names.

DeepSpeed flattens the parameters of each optimiser group and gives every data-parallel rank a range of it in fp32 (the
master) with its two moments. `param._hp_mapping` says which part of a parameter's own elements this rank holds and where.
The checkpoint stores such parts with their place in the global tensor, so any layout reads any other's.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.parallel import global_shape, shard_of
from pipeline.checkpoint.format import Fragment
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.weights import EMA, load_buffers, persistent_buffers
from pipeline.optim import MOMENTS, WeightAverage, create_adam_state, get_adam_step, set_adam_step
from pipeline.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class _Owned:
    """The part of one parameter whose master this rank holds."""

    name: str
    parameter: nn.Parameter
    group: int
    """Index of the optimiser group."""
    group_start: int
    """Where the part starts in the group's flat partition."""
    flat_start: int
    """Where it starts in the flattened parameter."""
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """The part's view of a tensor laid out like the group's partition."""
        return flat.detach().narrow(0, self.group_start, self.numel)


class ZeroState:
    """Masters, Adam moments and the weight average of one rank's stage, as fragments of global tensors."""

    def __init__(self, module: nn.Module, optimizer: Any, layout: Layout, average_decay: float | None = None) -> None:
        """Wraps what DeepSpeed has built.

        Args:
            module: the stage, its parameters under global names.
            optimizer: the engine's ZeRO-1 or bf16 optimiser.
            average_decay: keep a moving average of the weights with this decay.
        """
        self._module, self._optimizer, self._layout = module, optimizer, layout
        self._adam: torch.optim.Optimizer = optimizer.optimizer
        self._masters: list[Tensor] = [group["params"][0] for group in self._adam.param_groups]
        create_adam_state(self._adam)
        self._states: list[dict[str, Tensor]] = [self._adam.state[master] for master in self._masters]
        self.average = WeightAverage(self._masters, average_decay) if average_decay is not None else None
        self._owned = list(self._find_owned())

    @property
    def adam_step(self) -> int:
        """Updates that Adam has made."""
        return get_adam_step(self._adam)

    def fragments(self) -> list[Fragment]:
        """Everything of this rank that a checkpoint must hold, without copies: the caller writes before it trains on."""
        fragments = []
        for owned in self._owned:
            shard = shard_of(owned.parameter)
            if shard is None and self._layout.tensor_rank > 0:
                continue  # tensor-parallel peers hold the same
            for kind, flat in self._kinds(owned.group):
                fragments.append(
                    Fragment(
                        name=f"{kind}/{owned.name}",
                        global_shape=global_shape(owned.parameter),
                        tensor=owned.of(flat),
                        flat_start=owned.flat_start,
                        **({} if shard is None else {"shard_dim": shard.dim, "shard_start": shard.start, "shard_size": shard.size}),
                    )
                )
        if self._layout.tensor_rank == self._layout.data_rank == 0:
            fragments += [Fragment.whole(f"buffer/{name}", buffer) for name, buffer in persistent_buffers(self._module)]
        return fragments

    @torch.no_grad()
    def load(self, reader: CheckpointReader, *, adam_step: int | None) -> None:
        """Fills masters, moments, average and buffers from a checkpoint of any layout, and refreshes the model's parameters.

        Where the checkpoint holds no weight average but this run keeps one, it starts from the loaded weights.

        Args:
            adam_step: updates that Adam had made; None leaves Adam as it is, for a checkpoint of weights only.

        Raises:
            UserError: the checkpoint lacks a tensor.
        """
        has_average = bool(reader.names(EMA))
        absent = {*(() if has_average else ("ema",)), *(MOMENTS if adam_step is None else ())}
        for owned in self._owned:
            self._load_owned(owned, reader, absent)
        if adam_step is not None:
            set_adam_step(self._adam, adam_step)
        load_buffers(self._module, reader)
        if self.average is not None and not has_average:
            self.average.restart()
        # Copies each rank's masters into its share of the (bf16 or fp32) parameters and gathers the other shares.
        self._optimizer.update_lp_params()

    def _load_owned(self, owned: _Owned, reader: CheckpointReader, absent: Set[str]) -> None:
        shard = shard_of(owned.parameter)
        place = {} if shard is None else {"shard_dim": shard.dim, "shard_start": shard.start, "shard_size": shard.size}
        for kind, flat in self._kinds(owned.group):
            if kind in absent:
                continue
            target = owned.of(flat)
            target.copy_(reader.read(f"{kind}/{owned.name}", flat_start=owned.flat_start, flat_len=owned.numel, **place))

    def _kinds(self, group: int) -> Iterator[tuple[str, Tensor]]:
        """(kind, flat tensor laid out like the group's master) of all that is stored per parameter."""
        yield "param", self._masters[group]
        for moment in MOMENTS:
            yield moment, self._states[group][moment]
        if self.average is not None:
            yield "ema", self.average.values[group]

    def _find_owned(self) -> Iterator[_Owned]:
        for name, parameter in self._module.named_parameters():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # wholly in another data-parallel rank's range
                continue
            place = mapping.get_hp_fragment_address()
            yield _Owned(
                name=name,
                parameter=parameter,
                group=mapping.param_group_index,
                group_start=place.start,
                flat_start=mapping.lp_fragment_address.start,
                numel=place.numel,
            )
