"""Scores from a user's class on Ray actors."""

import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_prep.config import FilterConfig, ScoreConfig
from data_prep.prepare import prepare
from data_prep.scoring import load_scorer
from tests.data_prep.conftest import files_below, small_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Brightness:
    """Mean level of every image, and the process that measured it."""

    def score(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, list[float]]:
        return {
            "brightness": [float(image.mean()) for image in images],
            "words": [len(caption.split()) for caption in captions],
            "pid": [os.getpid()] * len(images),
        }


class Wrong:
    def score(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, list[float]]:
        return {"short": [1.0]}


def test_scores_bound_what_is_kept_and_stand_in_the_json(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    filters = FilterConfig(scorer=f"{__name__}:Brightness", scores=(ScoreConfig(name="brightness", min=127.0),))
    manifest, _ = prepare(small_config(make_folder(40), tmp_path / "set", filters=filters))
    assert 5 < manifest.counts.kept < 35
    assert manifest.counts.dropped == {"score": 40 - manifest.counts.kept}
    scores = []
    for path in (tmp_path / "set" / "shards").glob("*.tar"):
        with tarfile.open(path) as archive:
            scores += [json.loads(archive.extractfile(name).read())["scores"] for name in archive.getnames() if name.endswith("json")]  # type: ignore[union-attr]
    assert all(entry["brightness"] >= 127 and entry["words"] == 5 for entry in scores)
    assert len({entry["pid"] for entry in scores}) == 1, "one actor, whatever the number of tasks"
    listed = [json.loads(line) for path, data in files_below(tmp_path / "set").items() if path.startswith("ledger/") for line in data.splitlines()]
    assert all("brightness" in entry["detail"] for entry in listed)


@pytest.mark.parametrize("path", ["nowhere.at.all:Class", f"{__name__}:Nothing", "json:dumps"])
def test_a_scorer_that_is_none_is_refused_at_the_start(make_folder: Callable[..., Path], tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"filters\.scorer"):
        load_scorer(path)
    with pytest.raises(UserError, match=r"filters\.scorer"):
        prepare(small_config(make_folder(2), tmp_path / "set", filters=FilterConfig(scorer=path)))
    assert not (tmp_path / "set").exists()


def test_a_scorer_that_returns_nonsense_stops_the_run(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="something else than scores"):
        prepare(small_config(make_folder(9), tmp_path / "set", filters=FilterConfig(scorer=f"{__name__}:Wrong")))
