"""Samples come back as they were written, and damage is found and named."""

import json

import numpy as np
import pytest

from configs.errors import UserError
from data_prep.schema import ShardIndex, manifest_path, tar_path
from pipeline.data.dataset import open_dataset
from pipeline.data.reader import SampleReader, decode_image
from tests.pipeline.data.conftest import encode


def _reader(path, split="train", **options) -> SampleReader:
    dataset = open_dataset(str(path))
    return SampleReader(dataset, dataset.split(split), **options)


@pytest.mark.parametrize(("extension", "channels"), [("png", 1), ("png", 3), ("webp", 1), ("webp", 3), ("jpg", 1), ("jpg", 3)])
def test_every_sample_comes_back(write_dataset, tmp_path, extension, channels):
    written = write_dataset(tmp_path / "data", extension=extension, channels=channels)
    for split, shards in written.shards.items():
        reader = _reader(written.path, split)
        for shard, name in enumerate(shards):
            for member in range(int(reader.split.counts[shard])):
                sample, place = reader.read(shard, member), (name, member)
                assert (sample.shard, sample.key, sample.text) == (name, written.keys[place], written.captions[place])
                assert sample.image.dtype == np.uint8
                assert sample.image.shape == (8, 8, channels)
                if extension != "jpg":
                    np.testing.assert_array_equal(sample.image, written.images[place])
        reader.close()


def test_labels_come_from_the_json(intact):
    assert [_reader(intact.path, labels=True).read(1, member).text for member in range(3)] == ["7", "8", "9"]


def test_an_image_is_not_touched_unless_wanted(written):
    """Damage in the images does not matter to a stage that reads only text."""
    _flip_byte(written.path, "train-000000", member=2, kind=0)
    sample = _reader(written.path).read(0, 2, with_image=False)
    assert sample.image is None
    assert sample.text == written.captions["train-000000", 2]


@pytest.mark.parametrize(("kind", "name"), [(0, "image"), (1, "txt")])
def test_a_flipped_bit_is_named(written, kind, name):
    _flip_byte(written.path, "train-000001", member=3, kind=kind)
    reader = _reader(written.path)
    key = written.keys["train-000001", 3]
    with pytest.raises(UserError, match=f"shard train-000001, sample {key}: its {name} is damaged"):
        reader.read(1, 3)
    reader.read(1, 2)


def test_a_member_beyond_the_end_of_the_file_is_damage(written):
    """The file keeps its size in the manifest's eyes, but the reader meets its end: short read, not garbage."""
    reader = _reader(written.path)
    reader.read(0, 0)
    path = written.path / tar_path("train-000000")
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match="is damaged"):
        reader.read(0, 6)


def test_few_open_shards_are_enough(intact):
    reader = _reader(intact.path, num_open_shards=1)
    for shard in (0, 2, 1, 0, 2):
        assert reader.read(shard, 1).key == intact.keys[intact.shards["train"][shard], 1]


def test_an_image_of_another_shape_or_no_image_is_refused(intact):
    reader = _reader(intact.path)
    index = ShardIndex.load(reader.dataset.storage, "train-000000")
    data = (intact.path / tar_path("train-000000")).read_bytes()
    png = data[index.offsets[0, 0] :][: index.sizes[0, 0]]
    with pytest.raises(UserError, match=r"(?s)sample x: the image is not what.*\(8, 8, 1\).*\(16, 16, 1\)"):
        decode_image(png, "png", (16, 16, 1), "sample x")
    with pytest.raises(UserError, match="sample x: the image does not decode"):
        decode_image(png[:40], "png", (8, 8, 1), "sample x")
    with pytest.raises(UserError, match="sample x: the image does not decode"):
        decode_image(png, "jpg", (8, 8, 1), "sample x")


@pytest.mark.parametrize(("extension", "channels"), [("png", 1), ("webp", 3), ("jpg", 3), ("jpg", 1)])
@pytest.mark.parametrize("size", [(8, 8), (8, 13), (14, 8)])
def test_a_picture_of_any_shape_gives_its_centred_square(extension, channels, size):
    whole = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    data = encode(whole, extension)
    found = decode_image(data, extension, (8, 8, channels), "sample x", crop=True)
    top, left = (size[0] - 8) // 2, (size[1] - 8) // 2
    expected = decode_image(data, extension, (*size, channels), "sample x")[top : top + 8, left : left + 8]
    np.testing.assert_array_equal(found, expected)
    if size != (8, 8):
        with pytest.raises(UserError, match=r"the image is not what"):
            decode_image(data, extension, (8, 8, channels), "sample x")


@pytest.mark.parametrize("size", [(7, 20), (9, 12), (20, 20)])
def test_a_picture_whose_shorter_side_is_another_is_refused(size):
    data = encode(np.zeros((*size, 1), dtype=np.uint8), "png")
    with pytest.raises(UserError, match=r"(?s)sample x: the image is not what.*longer side"):
        decode_image(data, "png", (8, 8, 1), "sample x", crop=True)


def test_a_data_set_that_keeps_ratios_is_read_as_squares(write_dataset, tmp_path):
    written = write_dataset(tmp_path / "data", shape=(8, 12))
    path = written.path / manifest_path(1)
    path.write_bytes(path.read_bytes().replace(b'"center_crop"', b'"keep_ratio"'))
    for place, image in written.images.items():
        if place[0] == "train-000001":
            np.testing.assert_array_equal(_reader(written.path).read(1, place[1]).image, image[:, 2:10])


def test_two_shards_that_changed_places_are_noticed(written):
    first, second = (written.path / tar_path(f"train-00000{number}") for number in (0, 2))
    content = first.read_bytes()
    assert len(content) == len(second.read_bytes()), "else the size would tell"
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    key = written.keys["train-000000", 0]
    with pytest.raises(UserError, match=f"shard train-000000, sample {key}: its image is damaged"):
        _reader(written.path).read(0, 0)


@pytest.mark.parametrize("content", [{}, {"label": "seven"}, {"label": 1.5}, []])
def test_a_missing_label_is_named(content):
    from pipeline.data.reader import _label

    with pytest.raises(UserError, match="sample x has no integer `label`"):
        _label(json.dumps(content).encode(), "sample x")


def _flip_byte(path, shard: str, *, member: int, kind: int) -> None:
    dataset = open_dataset(str(path))
    index = ShardIndex.load(dataset.storage, shard)
    tar = path / tar_path(shard)
    data = bytearray(tar.read_bytes())
    data[index.offsets[member, kind] + index.sizes[member, kind] - 1] ^= 0x10
    tar.write_bytes(data)
