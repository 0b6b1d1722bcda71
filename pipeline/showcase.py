"""What a run shows on its way: images drawn from prompts and captions of held-out images, for the report."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.generate.images import ImageSampling
from model.jetformer import JetFormer
from pipeline.caption import caption_images
from pipeline.config import RunConfig
from pipeline.data.dataset import Dataset
from pipeline.data.loader import first_samples
from pipeline.data.text import TextCodec
from pipeline.sample import draw_images, image_sampling
from pipeline.tracker import Tracker
from pipeline.trained import open_trained

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Reference:
    key: str
    text: str


class Showcase:
    """Fixed prompts and images, so that the grids of a run can be compared. Used by one process."""

    def __init__(self, config: RunConfig, dataset: Dataset, codec: TextCodec) -> None:
        """Reads the held-out samples whose images are captioned, and whose captions are the prompts where none are given."""
        self._codec = codec
        self._settings: ImageSampling = image_sampling(config.sampling)
        samples = first_samples(config, dataset, config.eval.num_samples)
        self.prompts: Sequence[str] = (config.sampling.prompts or tuple(sample.text for sample in samples))[: config.eval.num_samples]
        self._references = [_Reference(sample.key, sample.text) for sample in samples]
        images = [sample.image for sample in samples if sample.image is not None]
        self._images: Tensor | None = torch.from_numpy(np.stack(images)) if images else None
        self._writes_captions = (
            not config.model.text.tie_logits and config.data.text == "caption" and config.model.objective.text_first_probability < 1
        )

    def show(self, model: JetFormer, step: int, tracker: Tracker) -> None:
        """Draws and captions with `model`, and saves both."""
        if self.prompts:
            images = draw_images(model, self._codec, self.prompts, settings=self._settings, progress=False)
            tracker.save_samples(step, images, self.prompts)
        if self._writes_captions and self._images is not None:
            captions = caption_images(model, self._codec, self._images, progress=False)
            rows = [{"key": r.key, "caption": caption, "reference": r.text} for r, caption in zip(self._references, captions, strict=True)]
            tracker.save_captions(step, rows, self._images)

    def show_checkpoint(self, path: Path, device: torch.device, step: int, tracker: Tracker) -> None:
        """The same with the whole model loaded from a checkpoint of this moment: where no rank holds all of it.

        A model that does not fit beside this rank's part of the run is skipped with a warning; the run goes on.
        """
        try:
            self.show(open_trained(path, device=device.type, verify=False).model, step, tracker)
        except torch.OutOfMemoryError:
            logger.warning("no samples at step %d: the whole model does not fit on rank 0's device beside the run", step)
            torch.cuda.empty_cache()
