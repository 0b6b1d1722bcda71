"""Reads generated digits: a support vector machine trained on the real train split tells whether the prompt was followed.

Its accuracy on real held-out digits is part of every report, because it bounds what a figure about generated ones can say.
"""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from configs.errors import UserError
from data_prep.embedded.digits import RESOLUTION
from data_prep.schema import Manifest, ShardIndex, tar_path
from data_prep.storage import open_storage


@dataclass(frozen=True, slots=True)
class DigitScorer:
    """A trained reader of 8x8 digits."""

    classifier: Any
    """`sklearn.svm.SVC` over pixels scaled to 0..1, flattened."""
    heldout_accuracy: float
    """Share of the real held-out digits that it reads right; NaN without any."""
    num_heldout: int

    def read(self, images: np.ndarray) -> np.ndarray:
        """Digits int64 [N] of uint8 images [N, 8, 8] (or [N, 8, 8, 1 or 3]: channels are averaged)."""
        return np.asarray(self.classifier.predict(_features(images)))

    def accuracy(self, images: np.ndarray, digits: np.ndarray) -> float:
        """Share of images that show the digit asked for."""
        return float(np.mean(self.read(images) == np.asarray(digits)))


def train_scorer(data_set: str) -> DigitScorer:
    """Trains on the train split of a digits data set (folder or s3://), and measures on its held-out split.

    Raises:
        UserError: scikit-learn is missing, or the data set does not hold labelled 8x8 images.
    """
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise UserError("scoring digits needs scikit-learn, which is not installed", fix='pip install -e ".[demo]"') from None
    images, digits = load_split(data_set, "train")
    # scikit-learn's own example has gamma 0.001 on pixels of 0..16; on 0..1 squared distances are 256 times smaller.
    classifier = SVC(gamma=0.25, C=10.0).fit(_features(images), digits)
    scorer = DigitScorer(classifier, float("nan"), 0)
    real, answers = load_split(data_set, "heldout")
    return DigitScorer(classifier, scorer.accuracy(real, answers), len(real)) if len(real) else scorer


def load_split(data_set: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, 8, 8(, 3)], labels int64 [N]) of one split of a prepared data set.

    Raises:
        UserError: other image sizes, or samples without label.
    """
    storage = open_storage(data_set)
    manifest = Manifest.load(storage)
    if manifest.image.resolution != RESOLUTION:
        raise UserError(f"{data_set} is not a digits data set", got=f"images of {manifest.image.resolution} pixels", expected=f"{RESOLUTION} pixels")
    images, labels = [], []
    for shard in manifest.splits[split].shards:
        index = ShardIndex.load(storage, shard.name, sha256=shard.index_sha256)
        data = storage.read_bytes(tar_path(shard.name))
        for row in range(len(index)):
            members = [data[offset : offset + size] for offset, size in zip(index.offsets[row], index.sizes[row], strict=True)]
            label = json.loads(members[2]).get("label")
            if label is None:
                raise UserError(f"{data_set} is not a digits data set", got=f"no label in sample {index.keys[row].decode()}")
            images.append(np.asarray(Image.open(io.BytesIO(members[0]))))
            labels.append(label)
    return np.array(images, dtype=np.uint8), np.array(labels, dtype=np.int64)


def _features(images: np.ndarray) -> np.ndarray:
    gray = images.mean(axis=-1) if images.ndim == 4 else images
    if gray.shape[1:] != (RESOLUTION, RESOLUTION):
        raise ValueError(f"digit images: got {images.shape}, expected [N, {RESOLUTION}, {RESOLUTION}]")
    return gray.reshape(len(gray), -1) / 255.0
