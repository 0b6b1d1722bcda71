"""`jetway sample` from a run on disk to files."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from model.config import TextConfig
from model.generate.images import ImageSampling
from pipeline.config import DataConfig
from pipeline.sample import draw_images, image_sampling, main
from pipeline.trained import find_codec, open_trained


def test_grid_single_images_and_settings_are_written(tiny_run, tmp_path, capsys):
    grid = tmp_path / "out" / "grid.png"
    arguments = ["--prompt", "a red circle", "--prompt", "the digit 3", "--num-per-prompt", "3", "--seed", "9", "--temperature", "0.5"]
    assert main([str(tiny_run), *arguments, "--output", str(grid), "--save-images", str(tmp_path / "each")]) == 0
    assert str(grid) in capsys.readouterr().out
    record = json.loads(grid.with_suffix(".json").read_text())
    assert record["prompts"] == ["a red circle", "the digit 3"]
    assert record["settings"] == {"cfg_scale": 2.0, "cfg_rule": "analytic", "temperature": 0.5, "temperature_probs": 1.0, "seed": 9}
    assert "step 3" in record["origin"]
    assert len(record["files"]) == 6
    trained = open_trained(tiny_run)
    codec = find_codec(trained.config, trained.folder)
    settings = ImageSampling(cfg_scale=2.0, temperature=0.5, seed=9)
    images = draw_images(trained.model, codec, ["a red circle"] * 3 + ["the digit 3"] * 3, settings=settings, progress=False)
    for file, image in zip(record["files"], images.numpy(), strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), image)
    with Image.open(grid) as picture:
        assert picture.width > picture.height  # three columns, two rows


def test_batch_size_changes_no_image(tiny_run):
    trained = open_trained(tiny_run)
    codec = find_codec(trained.config, trained.folder)
    prompts = ["a red circle", "the digit 3", "two blue squares", "a handwritten seven", "x"]
    settings = image_sampling(trained.config.sampling)
    assert settings == ImageSampling(cfg_scale=2.0, temperature=0.9, seed=5)
    large, small = (draw_images(trained.model, codec, prompts, settings=settings, batch_size=size, progress=False) for size in (8, 2))
    assert large.shape == (5, 8, 8, 3)
    assert (large != small).float().mean() < 0.02  # a rounding error may cross a grey level
    assert draw_images(trained.model, codec, [], settings=settings, progress=False).shape == (0, 8, 8, 3)


def test_prompts_come_from_a_file_or_from_the_run(tiny_run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  the digit 3 \n")
    assert main([str(tiny_run), "--prompts-file", str(tmp_path / "prompts.txt"), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == ["a red circle", "the digit 3"]
    assert main([str(tiny_run), "--dry-run", "--cfg-rule", "rejection"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["prompts"] == ["a red circle"]
    assert shown["settings"]["cfg_rule"] == "rejection"


def test_dry_run_writes_nothing(tiny_run, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert main([str(tiny_run), "--dry-run", "--output", str(tmp_path / "grid.png")]) == 0
    assert sorted(tmp_path.iterdir()) == before


def test_class_conditional_model_takes_class_numbers(tiny_config, write_run, tmp_path):
    text = TextConfig(length=1, num_pieces=10, num_repeats=3, tie_logits=True)
    config = dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, text=text), data=DataConfig(text="label"))
    run = write_run(tmp_path / "labels", config, tokenizer=False)
    assert main([str(run), "--prompt", "7", "--output", str(tmp_path / "seven.png")]) == 0
    with pytest.raises(UserError, match="not a class"):
        main([str(run), "--prompt", "a seven", "--output", str(tmp_path / "seven.png")])


def test_grey_images_are_written_as_such(tiny_config, write_run, tmp_path):
    image = dataclasses.replace(tiny_config.model.image, channels=1)
    run = write_run(tmp_path / "grey", dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, image=image)))
    assert main([str(run), "--output", str(tmp_path / "grid.png"), "--save-images", str(tmp_path / "each")]) == 0
    with Image.open(tmp_path / "each" / "00000.png") as picture:
        assert (picture.mode, picture.size) == ("L", (8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg-scale", "-1"], "cfg_scale"),
        (["--num-per-prompt", "0"], "--num-per-prompt"),
        (["--output", "grid.jpg"], "PNG"),
        (["--prompts-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_explained(tiny_run, arguments, message):
    with pytest.raises(UserError, match=message):
        main([str(tiny_run), *arguments])


def test_no_prompt_at_all_is_explained(tiny_config, write_run, tmp_path):
    config = dataclasses.replace(tiny_config, sampling=dataclasses.replace(tiny_config.sampling, prompts=()))
    with pytest.raises(UserError, match="nothing to draw"):
        main([str(write_run(tmp_path / "run", config))])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_missing_gpu_is_explained(tiny_run):
    with pytest.raises(UserError, match="no CUDA device"):
        main([str(tiny_run), "--device", "cuda"])


def test_a_graph_where_there_can_be_none_is_refused(tiny_run, tmp_path):
    arguments = [str(tiny_run), "--prompt", "a red circle", "--device", "cpu", "--output", str(tmp_path / "grid.png")]
    with pytest.raises(UserError, match="loop=graph"):
        main([*arguments, "--loop", "graph"])
    assert main([*arguments, "--loop", "eager"]) == 0
