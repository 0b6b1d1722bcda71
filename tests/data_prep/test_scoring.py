"""Scores from a user's class on Ray actors."""

import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_prep.config import DownloadConfig, FilterConfig, ScoreConfig
from data_prep.prepare import prepare
from data_prep.scoring import load_scorer
from tests.data_prep.conftest import encoded, files_below, small_config, smooth_pixels
from tests.data_prep.web_server import WebServer

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Brightness:
    """Mean level of every image, and the process that measured it."""

    def score(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, list[float]]:
        return {
            "brightness": [float(image.mean()) for image in images],
            "words": [len(caption.split()) for caption in captions],
            "pid": [os.getpid()] * len(images),
        }


class Odd:
    def score(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, list[float]]:
        return {"words": [len(caption.split()) for caption in captions], "odd": [float("nan")] * len(images)}


class Wrong:
    def score(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, list[float]]:
        return {"short": [1.0]}


class Neighbours:
    """Place of every image in its batch: the extreme of a model whose figures depend on what is beside an image."""

    def score(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, list[float]]:
        return {"place": list(map(float, range(len(images))))}


def test_scores_do_not_depend_on_what_arrived_first(tmp_path: Path) -> None:
    pages = {f"/p{i:03d}.png": encoded(smooth_pixels(20, 24, seed=i)) for i in range(12)}
    download = DownloadConfig(contact="test@example.org", allowed_networks=("127.0.0.0/8",), timeout_s=5)
    with WebServer(pages, delay_s=(0.0, 0.2), seed=1) as server:
        (tmp_path / "urls.jsonl").write_text("".join(json.dumps({"url": server.url(path), "caption": path}) + "\n" for path in pages))
        filters = FilterConfig(scorer=f"{__name__}:Neighbours")
        config = small_config(tmp_path / "urls.jsonl", tmp_path / "set", filters=filters, download=download, samples_per_shard=12)
        prepare(config)
    places = {}
    for path in (tmp_path / "set" / "shards").glob("*.tar"):
        with tarfile.open(path) as archive:
            rows = [json.loads(archive.extractfile(name).read()) for name in archive.getnames() if name.endswith("json")]  # type: ignore[union-attr]
        places.update({int(row["key"]): row["scores"]["place"] for row in rows})
    assert places == {number: number for number in range(12)}


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


def test_columns_and_scores_are_bounded_together(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(8)
    for number in range(8):
        (folder / f"p{number:03d}.json").write_text(json.dumps({"similarity": number / 10}))
    bounds = (ScoreConfig(name="similarity", min=0.25), ScoreConfig(name="words", min=3))
    config = small_config(folder, tmp_path / "set", filters=FilterConfig(scorer=f"{__name__}:Odd", scores=bounds))
    manifest, _ = prepare(config)
    assert (manifest.counts.kept, manifest.counts.dropped) == (5, {"score": 3})
    with tarfile.open(tmp_path / "set" / "shards" / "train-000000.tar") as archive:
        text = next(archive.extractfile(name).read() for name in archive.getnames() if name.endswith("json"))  # type: ignore[union-attr]
    assert json.loads(text, parse_constant=pytest.fail)["scores"] == {"words": 5.0, "odd": None}


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
