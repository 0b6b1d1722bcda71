"""`jetway prep`, `peek` and `stats` from their command lines."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from configs.errors import UserError
from data_prep import peek, run, stats
from data_prep.schema import Manifest
from data_prep.storage import open_storage
from tests.data_prep.conftest import files_below

SETTINGS = ["image.resolution=16", "samples_per_shard=8", "tokenizer.vocab_size=300", "image.format=png"]


@pytest.mark.usefixtures("ray_cluster")
def test_prep_writes_a_data_set_and_then_has_nothing_to_do(
    make_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(make_folder(12)), "--output", str(tmp_path / "set"), *SETTINGS]
    assert run.main(arguments) == 0
    assert "12" in capsys.readouterr().out
    assert Manifest.load(open_storage(tmp_path / "set")).counts.kept == 12
    assert run.main(arguments) == 0
    assert "is finished (generation 1): nothing to do" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_writes_nothing(make_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run", *SETTINGS, "--input", str(make_folder(12)), "--output", str(tmp_path / "set")]) == 0
    output = capsys.readouterr().out
    assert "12 samples" in output
    assert "tasks   2" in output
    assert "resolution: 16" in output
    assert not (tmp_path / "set").exists()


def test_prep_needs_an_input_and_an_output_outside_it(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(1)
    with pytest.raises(UserError, match="no input given"):
        run.main(["--output", str(tmp_path / "set")])
    with pytest.raises(UserError, match="no output given"):
        run.main(["--input", str(folder)])
    for output in (folder, folder / "deep" / "set"):
        with pytest.raises(UserError, match="lies inside the input"):
            run.main(["--input", str(folder), "--output", str(output)])
    with pytest.raises(UserError, match=r"image\.resoluton \(did you mean image\.resolution\?\)"):
        run.main(["--input", str(folder), "--output", str(tmp_path / "set"), "image.resoluton=3"])


@pytest.mark.usefixtures("ray_cluster")
def test_embedded_set_becomes_an_ordinary_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["data/shapes", "--embedded", "shapes", "--count", "40", "image.resolution=32"]
    assert run.main([*arguments, "--dry-run"]) == 0
    with pytest.raises(UserError, match="--count must be at least 1"):
        run.main([*arguments, "--count", "0"])
    assert files_below(tmp_path) == {}
    assert run.main(arguments) == 0
    assert len(list((tmp_path / "data" / "shapes-raw").glob("*.png"))) == 40
    assert Manifest.load(open_storage("data/shapes")).counts.kept == 40
    assert run.main(arguments) == 0
    assert "is not written again" in capsys.readouterr().out


def test_peek_draws_every_sample_and_lists_it(data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    assert peek.main([str(data_set), "--count", "7", "--output", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all("a soft picture number" in line for line in lines[:7])
    with Image.open(sheet) as picture:
        assert picture.size == (6 * (peek.CELL + 8) + 8, 2 * (peek.CELL + peek.CAPTION_LINES * peek.LINE_HEIGHT + 8) + 8)
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 100
    assert peek.main([str(data_set), "--split", "heldout", "--start", "1", "--count", "2", "--dry-run"]) == 0
    assert "heldout-000000" in capsys.readouterr().out


def test_peek_draws_captions_of_any_script(data_set: Path) -> None:
    from data_prep.samples import stored_samples

    storage = open_storage(data_set)
    (sample, *_) = stored_samples(storage, Manifest.load(storage), "train")
    import dataclasses

    for caption in ("עברית 日本語 😀", "w" * 500, "", "word " * 200):
        buffer = io.BytesIO()
        peek.contact_sheet([dataclasses.replace(sample, caption=caption)]).save(buffer, "PNG")
        assert buffer.tell() > 100


def test_peek_names_an_empty_split(data_set: Path) -> None:
    with pytest.raises(UserError, match="has"):
        peek.main([str(data_set), "--start", "10000"])


def test_stats_counts_every_sample(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stats.main([str(data_set)]) == 0
    text = capsys.readouterr().out
    for title in ("shorter side", "caption length", "original format", "label"):
        assert title in text
    assert stats.main([str(data_set), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["statistics"]
    assert found["num_samples"] == 30
    assert found["formats"] == {"png": 30}
    assert found["labels"] == {"0": 10, "1": 10, "2": 10}
    assert found["sides"]["median"] == 20
    assert found["tokens"]["min"] >= 5
    assert stats.main([str(data_set), "--json", "--max-samples", "10"]) == 0
    assert json.loads(capsys.readouterr().out)["statistics"]["num_samples"] <= 12


def test_inspection_of_nothing_is_a_user_error(tmp_path: Path) -> None:
    for main in (peek.main, stats.main):
        with pytest.raises(UserError, match="holds no data set"):
            main([str(tmp_path / "nothing")])
