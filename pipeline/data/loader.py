"""From the sample order to micro-batches: the loader of training, and the one of evaluation.

Both are functions of positions; the only state of training is how many samples were seen. B examples of a micro-batch.
Samples that were taken down are never read: in training another one stands in for each, in evaluation none does.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import UserError
from model import streams
from model.batch import Batch, NoiseSettings, draw_drop_prefix, draw_text_first, make_batch
from model.config import JetFormerConfig
from model.patchify import noise_sigma
from model.streams import Stream
from pipeline.config import RunConfig
from pipeline.data.batching import BatchPlan, split_evenly
from pipeline.data.dataset import Dataset, DatasetSplit
from pipeline.data.hashing import Int64Array
from pipeline.data.live_order import LiveOrder
from pipeline.data.order import SampleOrder
from pipeline.data.prefetch import Prefetcher
from pipeline.data.provenance import SampleName, name_samples
from pipeline.data.reader import Sample, SampleReader
from pipeline.data.samples import DEFAULT_CACHE_BYTES, SampleArrays, SampleSource
from pipeline.data.text import TextCodec, dataset_codec

logger = logging.getLogger(__name__)

_EVAL_ORDER_SEED = 0
"""Order of held-out samples: the same in every run, so that the first N of two runs are the same N."""
_EVAL_OPEN_SHARDS = 16
_WINDOWS_AHEAD = 2
"""Windows of a training order whose shards are fetched: the present one and the next. So many are open at a time."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    batch: Batch
    num_cut: int


class TrainLoader:
    """Micro-batches of one data-parallel rank, step after step, prepared ahead by a thread.

    Iterate, or call `next`: first all micro-batches of a step, then those of the next. Every tensor- and pipeline-parallel
    rank of one replica builds its own loader and gets the same batches (without images where `needs_image` is False).
    Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        *,
        dp_rank: int = 0,
        dp_degree: int = 1,
        needs_image: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        pin_memory: bool = False,
    ) -> None:
        """
        Args:
            needs_image: this rank runs the flow; the others skip reading and decoding
            cache_bytes: a split whose decoded samples fit in this is kept in memory
            pin_memory: the thread leaves batches in page-locked memory, for a GPU to copy while the host goes on

        Raises:
            UserError: the data set does not fit the model, or the split is unknown, empty, all taken down or half-written.
            ValueError: the global batch does not divide.
        """
        self.config = config
        self.dataset = dataset
        self.codec = open_codec(config, dataset)
        split, window = dataset.split(config.data.split), config.data.shuffle_window_shards
        num_open_shards = max(_WINDOWS_AHEAD * window, _EVAL_OPEN_SHARDS)
        reader = SampleReader(dataset, split, labels=config.data.text == "label", num_open_shards=num_open_shards)
        self.order = LiveOrder(SampleOrder(split.counts, seed=config.seed, window=window), split.excluded)
        self.plan = BatchPlan(
            global_batch_size=config.data.global_batch_size,
            dp_degree=dp_degree,
            micro_batch_size=config.data.micro_batch_size or max(config.data.global_batch_size // dp_degree, 1),
        )
        self.num_captions = 0
        """Texts handed out by this loader since it was built."""
        self.num_captions_cut = 0
        """Those among them that were longer than the text slots."""
        self._source = SampleSource(reader, self.codec, config.model.text, with_images=needs_image, cache_bytes=cache_bytes)
        self._dp_rank = dp_rank
        self._pin_memory = pin_memory
        self._first_step = 0
        self._prefetcher: Prefetcher[_Prepared] | None = None

    @property
    def num_samples(self) -> int:
        """The length of an epoch: samples of the split, with those that another one stands in for."""
        return self.order.num_samples

    @property
    def num_excluded(self) -> int:
        """Samples of the split that were taken down."""
        return self.order.num_excluded

    def micro_batch(self, step: int, number: int) -> Batch:
        """Micro-batch `number` of `step`, read now, in this thread: nothing of the iteration changes."""
        return self._prepare(step, number).batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._prefetcher is None:
            per_step = self.plan.num_micro_batches
            start = self._first_step * per_step
            self._prefetcher = Prefetcher(lambda number: self._prepare(*divmod(number, per_step)), start=start, depth=self.config.data.num_prefetch)
        prepared = self._prefetcher.get()
        self.num_captions += len(prepared.batch)
        self.num_captions_cut += prepared.num_cut
        return prepared.batch

    def seek(self, step: int) -> None:
        """The next batch is the first one of `step`. Takes the same time for any step."""
        self._stop_thread()
        self._first_step = step

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint taken before `step` must hold, JSON-able: samples seen by source, from which manifest, under which takedown."""
        manifest = self.dataset.manifest
        return {
            "samples_seen": {self.config.data.split: self.plan.samples_seen(step)},
            "generation": manifest.generation,
            "manifest_sha256": self.dataset.fingerprint,
            "takedown": self.dataset.tombstones.number,
        }

    def load_state(self, state: Mapping[str, Any], step: int) -> None:
        """Goes on at `step` with the first sample not seen, also when the global batch size has changed since.

        Raises:
            UserError: the state is of another split or generation, or knows a takedown that the data set has lost.
        """
        split, seen = self.config.data.split, state["samples_seen"]
        if split not in seen or state["manifest_sha256"] != self.dataset.fingerprint:
            raise UserError(
                "the checkpoint was trained on other data than this run would go on with",
                got=f"split {split!r} of {self._describe(self.dataset.manifest.generation, self.dataset.fingerprint)}",
                expected=f"split {', '.join(map(repr, seen))} of {self._describe(state['generation'], state['manifest_sha256'])}",
                fix=f"set data.path, data.split and data.generation={state['generation']} to the checkpoint's, or start a new run",
            )
        self._report_takedowns(state.get("takedown", 0))
        origin = seen[split] - step * self.plan.global_batch_size
        self.plan = BatchPlan(
            global_batch_size=self.plan.global_batch_size,
            dp_degree=self.plan.dp_degree,
            micro_batch_size=self.plan.micro_batch_size,
            origin=origin,
        )
        self.seek(step)

    def which_samples(self, step: int) -> list[SampleName]:
        """The samples that all ranks together read at `step`, without reading them."""
        return name_samples(self.order, self._source.reader, self.plan.step_positions(step))

    def close(self) -> None:
        """Stops the thread and closes the shards."""
        self._stop_thread()
        self._source.close()

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _report_takedowns(self, before: int) -> None:
        now = self.dataset.tombstones.number
        if now < before:
            raise UserError(
                "the checkpoint was trained under a takedown that the data set no longer has: its samples would come back",
                got=f"{now or 'no'} takedowns in {self.dataset.storage.url}/tombstones",
                expected=f"at least {before}",
                fix="restore tombstones/ from where the data set was copied",
            )
        if now > before:
            logger.info(
                "takedown %d is in force now (%s when the checkpoint was saved): %d of %d samples of split %r are excluded, others stand in for them",
                *(now, before or "none", self.num_excluded, self.num_samples, self.config.data.split),
            )

    @staticmethod
    def _describe(generation: int, fingerprint: str) -> str:
        return f"generation {generation} (manifest {fingerprint[:12]})"

    def _stop_thread(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _prepare(self, step: int, number: int) -> _Prepared:
        positions = self.plan.positions(step, dp_rank=self._dp_rank, micro_batch=number)
        ahead = self.order.order.shards_from(int(positions[0]), _WINDOWS_AHEAD)
        samples = self._source.fetch(self.order.locate(positions), ahead=ahead.tolist())
        if samples.images is not None and self.config.data.flip_lr:
            _flip(samples.images, self.config.seed, positions)
        noise = NoiseSettings(seed=self.config.seed, sigma=self._sigma(step), train=True)
        options = {"valid_text_fraction": self._valid_text_fraction(step)}
        batch = _batch(self.config.model, positions, samples, noise, **options)
        return _Prepared(batch.pin_memory() if self._pin_memory else batch, int(samples.text.cut.sum()))

    def _sigma(self, step: int) -> float:
        curriculum = self.config.curriculum
        total = curriculum.total_steps or self.config.total_steps
        return noise_sigma(step, total_steps=total, start=curriculum.sigma_start, end=curriculum.sigma_end)

    def _valid_text_fraction(self, step: int) -> float:
        """Share of the step's global batch whose caption is not dropped: a function of positions, so no rank has to ask another."""
        objective = self.config.model.objective
        if not objective.loss_on_prefix:
            return 1.0
        positions = torch.from_numpy(self.plan.step_positions(step))
        text_first = draw_text_first(objective, self.config.seed, positions)
        return 1.0 - float(draw_drop_prefix(objective, self.config.seed, positions, text_first).double().mean())


class EvalLoader:
    """The first N held-out samples in a fixed order, dealt to the data-parallel ranks: each sample once, none left out.

    Samples that were taken down are passed over; the others keep their places and with them their noise.
    Every rank gets the same number of batches (`num_batches`), so that ranks stay in step; their sizes differ by at most
    one from each other, between ranks too. Noise depends on `eval.seed` and on the sample's place in the fixed order only. Iterating
    again gives the same batches again.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        *,
        dp_rank: int = 0,
        dp_degree: int = 1,
        needs_image: bool = True,
        text_first: bool | None = None,
        sigma: float = 0.0,
    ) -> None:
        """
        Args:
            text_first: order of all examples; None draws it as in training
            sigma: RGB noise in grey levels

        Raises:
            UserError: as `TrainLoader`; also fewer held-out samples than data-parallel ranks.
        """
        self.config = config
        self.dataset = dataset
        self.codec = open_codec(config, dataset)
        split = dataset.split(config.data.eval_split)
        self._order = _eval_order(split)
        self._positions = self._order.live_positions(config.eval.num_examples)
        self.num_examples = len(self._positions)
        """N, over all ranks."""
        if self.num_examples < dp_degree:
            raise UserError(
                "fewer evaluation samples than data-parallel ranks",
                got=f"{self.num_examples} of split {config.data.eval_split!r}",
                expected=f"at least {dp_degree}",
                fix="raise eval.num_examples, prepare a larger held-out split, or evaluate with fewer processes",
            )
        reader = SampleReader(dataset, split, labels=config.data.text == "label", num_open_shards=_EVAL_OPEN_SHARDS)
        self._source = SampleSource(reader, self.codec, config.model.text, with_images=needs_image)
        shares = split_evenly(self.num_examples, dp_degree)
        # As many as the largest share needs, but none empty: with batch_size=1 and unequal shares some batches hold two.
        self.num_batches = min(-(-int(np.diff(shares).max()) // config.eval.batch_size), int(np.diff(shares).min()))
        """Batches of each rank."""
        start, stop = int(shares[dp_rank]), int(shares[dp_rank + 1])
        self._bounds = start + split_evenly(stop - start, self.num_batches)
        self._text_first = text_first
        self._sigma = sigma

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        noise = NoiseSettings(seed=self.config.eval.seed, sigma=self._sigma, train=False)
        for start, stop in zip(self._bounds[:-1].tolist(), self._bounds[1:].tolist(), strict=True):
            positions = self._positions[start:stop]
            samples = self._source.fetch(self._order.locate(positions))
            text_first = None if self._text_first is None else torch.full((len(positions),), self._text_first)
            yield _batch(self.config.model, positions, samples, noise, text_first=text_first, score_all=True)

    def close(self) -> None:
        """Closes the shards."""
        self._source.close()

    def __enter__(self) -> "EvalLoader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_codec(config: RunConfig, dataset: Dataset) -> TextCodec:
    """The run's text codec, after checking that the data set fits the model.

    Raises:
        UserError: another resolution, other channels, or a tokenizer that is not the model's.
    """
    labels = config.data.text == "label"
    dataset.check_model(config.model.image, config.model.text, captions=not labels)
    return dataset_codec(config.model.text, dataset, labels=labels)


def first_samples(config: RunConfig, dataset: Dataset, num: int) -> list[Sample]:
    """The first samples of the evaluation split in `EvalLoader`'s order: prompts for sampling, references for captioning.

    Returns:
        `num` samples, or as many as there are.
    """
    split = dataset.split(config.data.eval_split)
    reader = SampleReader(dataset, split, labels=config.data.text == "label", num_open_shards=_EVAL_OPEN_SHARDS)
    try:
        order = _eval_order(split)
        located = order.locate(order.live_positions(num))
        reader.prefetch(np.unique(located.shard).tolist())
        return [reader.read(shard, member) for shard, member in zip(located.shard.tolist(), located.member.tolist(), strict=True)]
    finally:
        reader.close()


def _eval_order(split: DatasetSplit) -> LiveOrder:
    return LiveOrder(SampleOrder(split.counts, seed=_EVAL_ORDER_SEED, window=_EVAL_OPEN_SHARDS), split.excluded)


def _flip(images: npt.NDArray[np.uint8], seed: int, positions: Int64Array) -> None:
    """Mirrors half of the images in place."""
    flipped = (streams.uniform(seed, Stream.FLIP, torch.from_numpy(positions), ()) < 0.5).numpy()
    images[flipped] = images[flipped][:, :, ::-1]


def _batch(config: JetFormerConfig, positions: Int64Array, samples: SampleArrays, noise: NoiseSettings, **options: Any) -> Batch:
    """Arrays to the model's batch: the one place that knows how it is made."""
    return make_batch(
        config,
        positions=torch.from_numpy(positions),
        text=torch.from_numpy(samples.text.ids),
        text_mask=torch.from_numpy(samples.text.mask),
        text_loss=torch.from_numpy(samples.text.loss),
        image=None if samples.images is None else torch.from_numpy(samples.images),
        noise=noise,
        **options,
    )
