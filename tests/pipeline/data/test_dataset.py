"""A data set that cannot serve the run is refused at the start, with what is wrong and what to do."""

import pytest

from configs.errors import UserError
from data_prep.schema import index_path, manifest_path, tar_path
from data_prep.tombstones import tombstones_path
from model.config import ImageConfig, TextConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.reader import SampleReader
from tests.pipeline.data.conftest import take_down


def _refused(call, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "to fix:" in message
    for part in parts:
        assert part in message


def test_an_intact_data_set_opens(intact):
    dataset = open_dataset(str(intact.path))
    assert dataset.split("train").counts.tolist() == [7, 5, 9]
    assert dataset.split("heldout").num_samples == 6
    assert dataset.read_tokenizer()


def test_a_missing_path_is_named(tmp_path):
    _refused(lambda: open_dataset(str(tmp_path / "nowhere")), "nowhere does not exist", "jetway prep")


def test_an_empty_folder_is_no_data_set(tmp_path):
    _refused(lambda: open_dataset(str(tmp_path)), "holds no data set", "jetway prep")


def test_shards_without_a_manifest_are_half_written(written):
    (written.path / manifest_path(1)).unlink()
    _refused(lambda: open_dataset(str(written.path)), "half-written")


def test_a_missing_generation_is_refused(intact):
    with pytest.raises(UserError, match="no generation 7"):
        open_dataset(str(intact.path), 7)


def test_an_unknown_split_lists_the_known_ones(intact):
    _refused(lambda: open_dataset(str(intact.path)).split("valid"), "no split 'valid'", "train, heldout")


def test_an_empty_split_is_refused(write_dataset, tmp_path):
    write_dataset(tmp_path / "data", heldout=())
    _refused(lambda: open_dataset(str(tmp_path / "data")).split("heldout"), "split 'heldout'", "is empty", "train: 21")


def test_a_missing_shard_is_named(written):
    (written.path / tar_path("train-000001")).unlink()
    _refused(lambda: open_dataset(str(written.path)).split("train"), "half-written", "1 of 3", "train-000001.tar")
    open_dataset(str(written.path)).split("heldout")


def test_a_truncated_shard_is_named(written):
    path = written.path / tar_path("train-000002")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    _refused(lambda: open_dataset(str(written.path)).split("train"), "train-000002.tar is half-written", "got: 1000 bytes", f"expected: {size} bytes")


def test_a_shard_that_shrinks_after_the_start_is_named_when_it_is_opened(written):
    dataset = open_dataset(str(written.path))
    split = dataset.split("train")
    path = written.path / tar_path("train-000002")
    path.write_bytes(path.read_bytes()[:1000])
    _refused(lambda: SampleReader(dataset, split).read(2, 0), "train-000002.tar is half-written")


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_bad_index_is_named(written, damage):
    dataset = open_dataset(str(written.path))
    path = written.path / index_path("train-000000")
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    _refused(lambda: SampleReader(dataset, dataset.split("train")).read(0, 0), "train-000000.idx.npz")


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ({"resolution": 16, "channels": 1, "patch_size": 4}, ("resolution", "8 in the data set", "model.image.resolution=16")),
        ({"resolution": 8, "channels": 3, "patch_size": 4}, ("channels", "1 in the data set", "model.image.channels=3")),
    ],
)
def test_images_of_another_shape_are_refused(intact, num_pieces, image, parts):
    dataset = open_dataset(str(intact.path))
    _refused(lambda: dataset.check_model(ImageConfig(**image), TextConfig(num_pieces=num_pieces), captions=True), *parts)


def test_another_vocabulary_is_refused_for_captions_only(intact, num_pieces):
    dataset, image = open_dataset(str(intact.path)), ImageConfig(resolution=8, channels=1, patch_size=4)
    _refused(lambda: dataset.check_model(image, TextConfig(), captions=True), f"{num_pieces} pieces", "model.text.num_pieces=32000")
    dataset.check_model(image, TextConfig(num_pieces=10, length=1), captions=False)


@pytest.mark.parametrize(("content", "part"), [(b"another", "tokenizer of another data set"), (None, "is missing")])
def test_the_tokenizer_must_be_the_manifests(written, content, part):
    path = written.path / "tokenizer.model"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    _refused(open_dataset(str(written.path)).read_tokenizer, "tokenizer.model", part)


def test_weights_keep_to_the_tokenizer_they_came_with(intact, tmp_path):
    dataset, copy = open_dataset(str(intact.path)), tmp_path / "tokenizer.model"
    dataset.check_tokenizer(copy, otherwise="go away")
    copy.write_bytes(dataset.read_tokenizer())
    dataset.check_tokenizer(copy, otherwise="go away")
    copy.write_bytes(dataset.read_tokenizer()[:-1])
    _refused(lambda: dataset.check_tokenizer(copy, otherwise="go away"), "weights came with", str(copy), "go away")


def test_fingerprint_is_the_contents_and_not_the_places(intact, written, write_dataset, tmp_path):
    other = write_dataset(tmp_path / "other", train=(7, 5, 8))
    prints = [open_dataset(str(data.path)).fingerprint for data in (intact, written, other)]
    assert prints[0] == prints[1] != prints[2]


def test_takedowns_are_read_with_the_data_set(written):
    assert open_dataset(str(written.path)).tombstones.number == 0
    take_down(written.path, train_000001=[0, 4])
    take_down(written.path, train_000001=[2])
    dataset = open_dataset(str(written.path))
    assert dataset.tombstones.number == 2
    split = dataset.split("train")
    assert [rows.tolist() for rows in split.excluded] == [[], [0, 2, 4], []]
    assert (split.num_samples, split.num_excluded) == (21, 3)
    assert dataset.split("heldout").num_excluded == 0
    assert open_dataset(str(written.path), takedown=1).split("train").num_excluded == 2
    assert dataset.fingerprint == open_dataset(str(written.path), takedown=0).fingerprint, "the generation is the same"


def test_a_split_that_was_taken_down_whole_is_refused(written):
    take_down(written.path, heldout_000000=list(range(6)))
    _refused(lambda: open_dataset(str(written.path)).split("heldout"), "every sample of split 'heldout'", "takedown 1")
    open_dataset(str(written.path)).split("train")


def test_a_shard_whose_samples_were_all_taken_down_may_be_gone(written):
    take_down(written.path, train_000001=list(range(5)))
    (written.path / tar_path("train-000001")).unlink()
    assert open_dataset(str(written.path)).split("train").num_excluded == 5


def test_takedowns_of_another_data_set_are_refused(written):
    take_down(written.path, train_000001=[5])
    _refused(lambda: open_dataset(str(written.path)).split("train"), "do not fit", "sample 5 of train-000001")


def test_lost_and_damaged_takedowns_are_refused(written):
    for row in range(2):
        take_down(written.path, train_000001=[row])
    path = written.path / tombstones_path(1)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    _refused(lambda: open_dataset(str(written.path)), "tombstones/000001.json is damaged")
    path.unlink()
    _refused(lambda: open_dataset(str(written.path)), "tombstones/000001.json is missing")


def test_images_of_an_unknown_shape_are_refused(written, num_pieces):
    path = written.path / manifest_path(1)
    path.write_bytes(path.read_bytes().replace(b'"center_crop"', b'"hexagon"'))
    dataset, image = open_dataset(str(written.path)), ImageConfig(resolution=8, channels=1, patch_size=4)
    _refused(lambda: dataset.check_model(image, TextConfig(num_pieces=num_pieces), captions=True), "'hexagon'", "center_crop, keep_ratio")
