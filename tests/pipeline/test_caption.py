"""`jetway caption` from image files to text."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from model.config import ImageConfig
from model.generate.captions import write_captions
from pipeline.caption import caption_images, load_image, main, score_images
from pipeline.trained import find_codec, open_trained


@pytest.fixture
def folder(tmp_path):
    """Three images of the model's size and one larger JPEG."""
    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(images / f"{number}.png")
    Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(images / "photo.JPG", "JPEG")
    return images


def test_captions_are_printed_and_written(tiny_run, folder, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    assert main([str(tiny_run), str(folder), "--output", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["file"] for record in records] == [str(folder / name) for name in ("0.png", "1.png", "2.png", "photo.JPG")]
    assert printed == [f"{record['file']}\t{record['caption']}" for record in records]
    trained = open_trained(tiny_run)
    codec = find_codec(trained.config, trained.folder)
    pixels = np.stack([load_image(folder / f"{number}.png", trained.config.model.image) for number in range(3)])
    expected = [codec.decode(row) for row in write_captions(trained.model, torch.from_numpy(pixels)).tolist()]
    assert [record["caption"] for record in records[:3]] == expected


def test_batch_size_changes_no_caption_and_no_score(tiny_run, folder):
    trained = open_trained(tiny_run)
    codec = find_codec(trained.config, trained.folder)
    names = ("0.png", "1.png", "2.png", "photo.JPG")
    images = torch.from_numpy(np.stack([load_image(folder / name, trained.config.model.image) for name in names]))
    captions = [caption_images(trained.model, codec, images, temperature=1.0, seed=3, batch_size=size, progress=False) for size in (8, 3)]
    assert captions[0] == captions[1]
    scores = [score_images(trained.model, codec, images, ["a red circle", "the digit 3", "x"], batch_size=size, progress=False) for size in (8, 3)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-3)
    assert scores[0].shape == (4, 3)


def test_likeliest_candidate_is_chosen(tiny_run, folder, tmp_path, capsys):
    output = tmp_path / "chosen.jsonl"
    candidates = ["a red circle", "the digit 3"]
    options = [item for text in candidates for item in ("--candidate", text)]
    assert main([str(tiny_run), str(folder / "0.png"), *options, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert set(record["log_probabilities"]) == set(candidates)
    assert record["caption"] == max(candidates, key=lambda text: record["log_probabilities"][text])


def test_one_bad_file_costs_that_file(tiny_run, folder, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    assert main([str(tiny_run), str(folder / "0.png"), str(bad), "--output", str(tmp_path / "out.jsonl")]) == 1
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "caption" in records[0]
    assert "cannot read the image" in records[1]["error"]
    with pytest.raises(UserError, match="none of the images"):
        main([str(tiny_run), str(bad)])


def test_mistakes_are_explained(tiny_run, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        main([str(tiny_run), str(tmp_path / "missing.png")])
    with pytest.raises(UserError, match="no images in"):
        main([str(tiny_run), str(tmp_path)])
    with pytest.raises(UserError, match="--temperature"):
        main([str(tiny_run), str(tmp_path), "--temperature", "-1"])


def test_full_disk_leaves_no_half_of_the_captions(tiny_run, folder, tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "captions.jsonl"
    monkeypatch.setattr("pipeline.checkpoint.files.os.fsync", no_space)
    with pytest.raises(UserError, match="No space left"):
        main([str(tiny_run), str(folder), "--output", str(output)])
    assert list(tmp_path.glob("captions.jsonl*")) == []


def test_images_may_stand_around_the_options(tiny_run, folder, capsys):
    assert main([str(tiny_run), str(folder / "0.png"), "--dry-run", str(folder / "1.png")]) == 0
    assert capsys.readouterr().out.startswith("2 files")


def test_dry_run_counts_the_files(tiny_run, folder, capsys):
    assert main([str(tiny_run), str(folder), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("4 files -> 8 px, 3 channel(s)")


def test_centred_square_is_cut_out_and_averaged(tmp_path):
    pixels = np.zeros((16, 40, 3), np.uint8)
    pixels[:, 12:28] = 200  # the centred square
    pixels[:, 12:14] = 100
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    loaded = load_image(tmp_path / "wide.png", ImageConfig(resolution=8, channels=3, patch_size=4))
    assert loaded.shape == (8, 8, 3)
    assert (loaded[:, 0] == 100).all()
    assert (loaded[:, 1:] == 200).all()


def test_every_kind_of_file_becomes_plain_pixels(tmp_path):
    config = ImageConfig(resolution=4, channels=3, patch_size=4)
    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    deep = Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))
    rotated = Image.fromarray(np.repeat([[10, 200]], 4, 0).repeat(2, 1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    transparent.save(tmp_path / "alpha.png")
    deep.save(tmp_path / "deep.png")
    rotated.save(tmp_path / "rotated.png", exif=exif)
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert (load_image(tmp_path / "alpha.png", config) == 255).all()
    assert (load_image(tmp_path / "deep.png", config) == 100).all()
    assert (load_image(tmp_path / "cmyk.jpg", config) >= 250).all()
    turned = load_image(tmp_path / "rotated.png", config)
    assert turned[0, 0, 0] == 200
    assert turned[0, -1, 0] == 10
    assert load_image(tmp_path / "deep.png", ImageConfig(resolution=4, channels=1, patch_size=4)).shape == (4, 4, 1)
