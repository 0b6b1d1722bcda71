"""What a step trains on is a function of (seed, step): not of ranks, micro-batches, threads, caches or restarts."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from configs.errors import UserError
from data_prep.schema import ShardIndex, tar_path
from data_prep.tombstones import tombstones_path
from model.patchify import noise_sigma
from pipeline.config import CurriculumConfig, RunConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.loader import EvalLoader, TrainLoader, first_samples
from pipeline.data.provenance import steps_of_sample
from tests.pipeline.data.conftest import take_down


def _open(config: RunConfig, **options) -> TrainLoader:
    return TrainLoader(config, open_dataset(config.data.path), **options)


def _examples(batches) -> dict[int, tuple]:
    """Everything of each example by position, independent of the order in the batch; fails on a repeated position."""
    found = {}
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            assert position not in found
            image = None if batch.image is None else batch.image[row].numpy().tobytes()
            flags = (bool(batch.text_first[row]), bool(batch.drop_prefix[row]), batch.noise)
            found[position] = (image, *(tensor[row].tolist() for tensor in (batch.text, batch.text_mask, batch.text_loss)), *flags)
    return found


def _steps(loader: TrainLoader, num_steps: int) -> list:
    return [next(loader) for _ in range(num_steps * loader.plan.num_micro_batches)]


@pytest.fixture
def reference(intact, make_config):
    """Six steps of 12 of the 21 samples, read by one rank in one micro-batch."""
    with _open(make_config(intact.path)) as loader:
        return _examples(_steps(loader, 6))


@pytest.mark.parametrize(("dp_degree", "micro"), [(1, None), (1, 3), (2, None), (2, 2), (3, 4), (4, 1), (12, 1)])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_union_over_ranks_and_micro_batches_is_the_same_in_every_layout(intact, make_config, reference, dp_degree, micro, cache_bytes):
    config = make_config(intact.path, micro_batch_size=micro)
    batches = []
    for rank in range(dp_degree):
        with _open(config, dp_rank=rank, dp_degree=dp_degree, cache_bytes=cache_bytes) as loader:
            mine = _steps(loader, 6)
            assert {len(batch) for batch in mine} == {micro or 12 // dp_degree}
            batches += mine
    assert _examples(batches) == reference


@pytest.mark.parametrize("num_prefetch", [0, 1, 7])
def test_prefetching_changes_nothing(intact, make_config, reference, num_prefetch):
    with _open(make_config(intact.path, num_prefetch=num_prefetch)) as loader:
        assert _examples(_steps(loader, 6)) == reference


@pytest.mark.parametrize("num_prefetch", [0, 2])
def test_batches_for_a_gpu_are_pinned_by_the_thread(intact, make_config, reference, num_prefetch, monkeypatch):
    threads = set()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: threads.add(threading.current_thread().name) or self.clone())
    config = make_config(intact.path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_prefetch=num_prefetch))
    with _open(config, pin_memory=True) as loader:
        assert _examples(_steps(loader, 6)) == reference
    assert threads == {"jetway-reader" if num_prefetch else threading.main_thread().name}


@pytest.mark.gpu
def test_pinned_batch_reaches_the_gpu_whole(intact, make_config):
    with _open(make_config(intact.path), pin_memory=True) as loader, _open(make_config(intact.path)) as plain:
        for _ in range(6):
            batch, other = next(loader), next(plain)
            assert batch.image.is_pinned()
            assert batch.text.is_pinned()
            assert torch.equal(batch.to("cuda").image.cpu(), other.image)


def test_samples_are_those_of_the_order(intact, make_config):
    with _open(make_config(intact.path, model_text={"length": 64})) as loader:
        found = _examples(_steps(loader, 6))
        located = loader.order.locate(np.arange(72))
        for position, shard, member in zip(range(72), located.shard, located.member, strict=True):
            place = (intact.shards["train"][shard], int(member))
            image, ids = found[position][:2]
            assert image == intact.images[place].tobytes()
            assert loader.codec.decode(ids) == intact.captions[place].lower()


def test_batches_are_sorted_and_carry_the_noise_of_their_step(intact, make_config):
    config = make_config(intact.path)
    with _open(config) as loader:
        for step, batch in enumerate(_steps(loader, 10)):
            assert batch.text_first.tolist() == sorted(batch.text_first.tolist(), reverse=True)
            assert batch.num_text_first == batch.text_first.sum()
            assert batch.noise.sigma == noise_sigma(step, total_steps=10, start=64.0, end=3.0)
            assert batch.noise.seed == config.seed
            assert batch.noise.train
            assert batch.image.dtype == torch.uint8
            assert batch.image.shape == (12, 8, 8, 1)


def test_the_curriculum_may_be_shorter_than_the_run(intact, make_config):
    config = dataclasses.replace(make_config(intact.path), curriculum=CurriculumConfig(total_steps=4))
    with _open(config) as loader:
        assert [loader.micro_batch(step, 0).noise.sigma for step in (0, 4, 9)] == [64.0, 3.0, 3.0]


def test_without_images_everything_else_is_the_same(intact, make_config, reference):
    with _open(make_config(intact.path), needs_image=False) as loader:
        found = _examples(_steps(loader, 6))
    assert {position: values[1:] for position, values in found.items()} == {position: values[1:] for position, values in reference.items()}
    assert all(values[0] is None for values in found.values())


@pytest.mark.parametrize("step", [0, 1, 5, 10**9])
def test_seek_goes_to_any_step_at_once(intact, make_config, step):
    with _open(make_config(intact.path, micro_batch_size=4)) as loader:
        next(loader)
        loader.seek(step)
        resumed = _examples(_steps(loader, 2))
        assert sorted(resumed) == list(range(step * 12, step * 12 + 24))
        assert resumed == _examples(loader.micro_batch(step + late, number) for late in (0, 1) for number in range(3))


def test_state_is_one_integer_and_survives_another_layout_and_batch_size(intact, make_config, reference):
    with _open(make_config(intact.path)) as loader:
        state = loader.state(3)
    assert state["samples_seen"] == {"train": 36}
    with _open(make_config(intact.path, global_batch_size=6, micro_batch_size=2)) as loader:
        loader.load_state(state, 3)
        assert loader.state(3)["samples_seen"] == {"train": 36}
        found = _examples(_steps(loader, 2))
        assert sorted(found) == list(range(36, 48))
        strip = {position: values[:-1] for position, values in found.items()}
        assert strip == {position: reference[position][:-1] for position in range(36, 48)}


def test_a_state_of_other_data_is_refused(intact, make_config, write_dataset, tmp_path):
    write_dataset(tmp_path / "other", train=(4,))
    with _open(make_config(intact.path)) as loader, _open(make_config(tmp_path / "other")) as other:
        with pytest.raises(UserError, match="trained on other data"):
            other.load_state(loader.state(1), 1)
        with pytest.raises(UserError, match="'heldout'"):
            loader.load_state({**loader.state(1), "samples_seen": {"heldout": 12}}, 1)


def test_a_data_set_smaller_than_a_batch_wraps(write_dataset, make_config, tmp_path):
    written = write_dataset(tmp_path / "data", train=(2, 1))
    with _open(make_config(written.path)) as loader:
        images = [values[0] for _, values in sorted(_examples(_steps(loader, 3)).items())]
    everything = sorted(written.images[name, member].tobytes() for name, member in written.images if name.startswith("train"))
    for epoch in range(12):
        assert sorted(images[epoch * 3 : epoch * 3 + 3]) == everything


def test_one_image_is_enough_to_train_on(write_dataset, make_config, tmp_path):
    written = write_dataset(tmp_path / "data", train=(1,))
    with _open(make_config(written.path)) as loader:
        assert len(next(loader)) == 12


def test_flip_mirrors_about_half_by_position(intact, make_config, reference):
    with _open(make_config(intact.path, flip_lr=True)) as loader:
        flipped = _examples(_steps(loader, 6))
        again = _examples(_steps_from(loader, 2))
    mirrored = 0
    for position, values in flipped.items():
        before = np.frombuffer(reference[position][0], dtype=np.uint8).reshape(8, 8)
        after = np.frombuffer(values[0], dtype=np.uint8).reshape(8, 8)
        assert (after == before).all() or (after == before[:, ::-1]).all()
        mirrored += bool((after != before).any())
    assert 20 < mirrored < 52
    assert again == {position: flipped[position] for position in again}


def _steps_from(loader: TrainLoader, step: int) -> list:
    loader.seek(step)
    return _steps(loader, 1)


def test_labels_fill_one_slot(intact, make_config):
    config = make_config(intact.path, text="label", model_text={"length": 1, "num_pieces": 10, "num_repeats": 4})
    with _open(config) as loader:
        batch = next(loader)
        labels = dict(zip(batch.positions.tolist(), batch.text[:, 0].tolist(), strict=True))
        assert batch.text_mask.all()
        assert batch.text_loss.all()
        for name in loader.which_samples(0):
            assert labels[name.position] == int(name.key, 16) % 10


def test_cut_captions_are_counted_as_they_are_handed_out(intact, make_config):
    with _open(make_config(intact.path, model_text={"length": 2}, num_prefetch=5)) as loader:
        assert (loader.num_captions, loader.num_captions_cut) == (0, 0)
        _steps(loader, 2)
        assert (loader.num_captions, loader.num_captions_cut) == (24, 24)
    with _open(make_config(intact.path, model_text={"length": 64})) as loader:
        _steps(loader, 2)
        assert (loader.num_captions, loader.num_captions_cut) == (24, 0)


@pytest.mark.parametrize("num_prefetch", [0, 3])
def test_damage_met_by_the_thread_reaches_the_trainer_and_does_not_hang(written, make_config, num_prefetch):
    dataset = open_dataset(str(written.path))
    index = ShardIndex.load(dataset.storage, "train-000002")
    path = written.path / tar_path("train-000002")
    data = bytearray(path.read_bytes())
    data[index.offsets[4, 0] + 5] ^= 1
    path.write_bytes(data)
    with _open(make_config(written.path, num_prefetch=num_prefetch)) as loader:
        for _ in range(2):
            with pytest.raises(UserError, match=f"sample {written.keys['train-000002', 4]}: its image is damaged"):
                _steps(loader, 3)
    assert not any(thread.name == "jetway-reader" for thread in threading.enumerate())


def test_closing_twice_and_closing_unused_is_fine(intact, make_config):
    loader = _open(make_config(intact.path))
    loader.close()
    loader.close()


def test_a_model_of_another_shape_is_refused(intact, make_config):
    with pytest.raises(UserError, match="another channels"):
        _open(make_config(intact.path, channels=3))
    with pytest.raises(UserError, match="model.text.num_pieces=5"):
        _open(make_config(intact.path, model_text={"num_pieces": 5}))


def test_which_samples_names_what_the_step_reads_and_steps_of_sample_is_its_inverse(intact, make_config, reference):
    with _open(make_config(intact.path)) as loader:
        by_key = {key: place for place, key in intact.keys.items()}
        for step in (0, 4):
            names = loader.which_samples(step)
            assert [name.position for name in names] == list(range(step * 12, step * 12 + 12))
            for name in names:
                place = by_key[name.key]
                assert place[0] == name.shard
                assert reference[name.position][0] == intact.images[place].tobytes()
        shard, member = 1, 3
        steps = steps_of_sample(loader.order, loader.plan, shard=shard, member=member, num_steps=6)
        wanted = intact.keys["train-000001", 3]
        assert steps == [step for step in range(6) for name in loader.which_samples(step) if name.key == wanted]
        assert len(steps) >= 3


@pytest.mark.parametrize("limit", [None, 1, 4, 6, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
@pytest.mark.parametrize("dp_degree", [1, 2, 3, 4, 5])
def test_evaluation_sees_each_of_the_first_examples_once_in_every_layout(intact, make_config, limit, batch_size, dp_degree):
    config = make_config(intact.path, evaluation={"num_examples": limit, "batch_size": batch_size})
    dataset = open_dataset(config.data.path)
    num = min(limit or 6, 6)
    if num < dp_degree:
        with pytest.raises(UserError, match="fewer evaluation samples"):
            EvalLoader(config, dataset, dp_degree=dp_degree)
        return
    loaders = [EvalLoader(config, dataset, dp_rank=rank, dp_degree=dp_degree) for rank in range(dp_degree)]
    batches = [list(loader) for loader in loaders]
    assert len({len(loader) for loader in loaders}) == 1
    assert [len(mine) for mine in batches] == [len(loader) for loader in loaders]
    sizes = [len(batch) for mine in batches for batch in mine]
    assert min(sizes) >= 1
    assert max(sizes) <= max(batch_size, 2)
    assert loaders[0].num_examples == num
    found = _examples(batch for mine in batches for batch in mine)
    whole = _examples(EvalLoader(make_config(intact.path), dataset))
    assert found == {position: whole[position] for position in range(num)}
    assert len({values[0] for values in found.values()}) == num, "as many different images"
    assert _examples(batch for loader in loaders for batch in loader) == found, "a second pass is the same"


def test_evaluation_noise_is_fixed_and_not_the_trainings(intact, make_config):
    for seed in (1, 2):
        config = make_config(intact.path, seed=seed, evaluation={"seed": 42})
        for batch in EvalLoader(config, open_dataset(config.data.path), sigma=3.5):
            assert (batch.noise.seed, batch.noise.sigma, batch.noise.train) == (42, 3.5, False)
            assert batch.score_all
            assert not batch.drop_prefix.any()


@pytest.mark.parametrize("text_first", [True, False])
def test_evaluation_order_can_be_set(intact, make_config, text_first):
    config = make_config(intact.path)
    batches = list(EvalLoader(config, open_dataset(config.data.path), text_first=text_first))
    assert all((batch.text_first == text_first).all() and batch.num_text_first == len(batch) * text_first for batch in batches)


def test_first_samples_are_those_of_the_evaluation(intact, make_config):
    config = make_config(intact.path)
    dataset = open_dataset(config.data.path)
    whole = _examples(EvalLoader(config, dataset))
    for num in (0, 4, 100):
        samples = first_samples(config, dataset, num)
        assert [sample.image.tobytes() for sample in samples] == [whole[position][0] for position in range(min(num, 6))]
        assert all(intact.captions[sample.shard, 0] for sample in samples)


def _images(found: dict[int, tuple]) -> list[bytes]:
    return [found[position][0] for position in sorted(found)]


def test_samples_taken_down_are_replaced_and_nothing_else_changes(written, make_config, reference):
    taken = {("train-000000", 2), ("train-000001", 0), ("train-000002", 8)}
    take_down(written.path, train_000000=[2], train_000002=[8])
    take_down(written.path, train_000001=[0])
    gone = {written.images[place].tobytes() for place in taken}
    with _open(make_config(written.path)) as loader:
        assert (loader.num_excluded, loader.num_samples) == (3, 21)
        found = _examples(_steps(loader, 6))
        names = [name for step in range(6) for name in loader.which_samples(step)]
    assert sorted(found) == sorted(reference)
    assert {written.images[name.shard, int(name.key, 16) - _first_key(written, name.shard)].tobytes() for name in names} == set(_images(found))
    for position, before in reference.items():
        if before[0] in gone:
            assert found[position][0] not in gone
            assert found[position][4:] == before[4:], "order of the modalities and noise belong to the position"
        else:
            assert found[position] == before
    assert sum(values[0] in gone for values in reference.values()) >= 9


def _first_key(written, shard: str) -> int:
    return int(written.keys[shard, 0], 16)


@pytest.mark.parametrize(
    ("dp_degree", "micro", "cache_bytes", "num_prefetch"), [(1, 3, 0, 2), (2, None, 1 << 20, 0), (3, 2, 0, 0), (12, 1, 1 << 20, 1)]
)
def test_replacements_are_the_same_in_every_layout(written, make_config, dp_degree, micro, cache_bytes, num_prefetch):
    take_down(written.path, train_000000=[0, 1, 2, 3, 4, 5, 6], train_000002=[1, 3])
    with _open(make_config(written.path)) as loader:
        expected = _examples(_steps(loader, 6))
    batches = []
    for rank in range(dp_degree):
        config = make_config(written.path, micro_batch_size=micro, num_prefetch=num_prefetch)
        with _open(config, dp_rank=rank, dp_degree=dp_degree, cache_bytes=cache_bytes) as loader:
            batches += _steps(loader, 6)
    assert _examples(batches) == expected


def test_a_resume_under_newer_takedowns_goes_on_and_says_so(written, make_config, reference, caplog):
    with _open(make_config(written.path)) as loader:
        state = loader.state(3)
    assert state["takedown"] == 0
    with caplog.at_level("INFO"), _open(make_config(written.path)) as loader:
        loader.load_state(state, 3)
    assert not caplog.messages
    take_down(written.path, train_000000=[2], heldout_000000=[0])
    take_down(written.path, train_000001=[4])
    with caplog.at_level("INFO"), _open(make_config(written.path)) as loader:
        loader.load_state(state, 3)
        assert loader.state(3)["takedown"] == 2
        found = _examples(_steps(loader, 2))
    assert len(caplog.messages) == 1
    assert "takedown 2 is in force now (none when the checkpoint was saved): 2 of 21 samples of split 'train' are excluded" in caplog.text
    assert sorted(found) == list(range(36, 60))
    assert sum(found[position] == reference[position] for position in found) >= 18


def test_a_resume_after_takedowns_were_lost_is_refused(written, make_config):
    number = take_down(written.path, train_000000=[2])
    with _open(make_config(written.path)) as loader:
        state = loader.state(3)
    (written.path / tombstones_path(number)).unlink()
    with _open(make_config(written.path)) as loader, pytest.raises(UserError, match=r"(?s)no longer has.*got: no takedowns.*at least 1"):
        loader.load_state(state, 3)


def test_a_checkpoint_from_before_there_were_takedowns_is_resumed(written, make_config):
    with _open(make_config(written.path)) as loader:
        state = loader.state(3)
        del state["takedown"]
        loader.load_state(state, 3)


def test_a_damaged_sample_can_be_taken_down_to_go_on(written, make_config, reference):
    dataset = open_dataset(str(written.path))
    index = ShardIndex.load(dataset.storage, "train-000002")
    path = written.path / tar_path("train-000002")
    data = bytearray(path.read_bytes())
    data[index.offsets[4, 0] + 5] ^= 1
    path.write_bytes(data)
    with _open(make_config(written.path)) as loader, pytest.raises(UserError, match=f"jetway takedown .* --key {written.keys['train-000002', 4]}"):
        _steps(loader, 6)
    take_down(written.path, train_000002=[4])
    with _open(make_config(written.path)) as loader:
        found = _examples(_steps(loader, 6))
    damaged = written.images["train-000002", 4].tobytes()
    assert {position for position in found if found[position] != reference[position]} == {
        position for position, values in reference.items() if values[0] == damaged
    }


@pytest.mark.parametrize("dp_degree", [1, 2, 4])
@pytest.mark.parametrize("limit", [None, 3, 4, 5])
def test_evaluation_passes_over_what_was_taken_down(written, make_config, limit, dp_degree):
    config = make_config(written.path, evaluation={"num_examples": limit, "batch_size": 2})
    whole = _examples(EvalLoader(make_config(written.path), open_dataset(str(written.path))))
    take_down(written.path, heldout_000000=[1, 4])
    gone = {written.images["heldout-000000", row].tobytes() for row in (1, 4)}
    dataset = open_dataset(str(written.path))
    num = min(limit or 4, 4)
    if num < dp_degree:
        with pytest.raises(UserError, match="fewer evaluation samples"):
            EvalLoader(config, dataset, dp_degree=dp_degree)
        return
    loaders = [EvalLoader(config, dataset, dp_rank=rank, dp_degree=dp_degree) for rank in range(dp_degree)]
    found = _examples(batch for loader in loaders for batch in loader)
    left = [position for position in sorted(whole) if whole[position][0] not in gone]
    assert loaders[0].num_examples == num
    assert found == {position: whole[position] for position in left[:num]}, "each once, in its own place, with its own noise"
    samples = first_samples(config, dataset, 3)
    assert [sample.image.tobytes() for sample in samples] == [whole[position][0] for position in left[:3]]


def test_steps_of_a_sample_count_where_it_stands_in(written, make_config):
    take_down(written.path, train_000000=[0, 1, 2], train_000001=[3])
    with _open(make_config(written.path)) as loader:
        names = {step: [name.key for name in loader.which_samples(step)] for step in range(6)}
        for shard, count in enumerate((7, 5, 9)):
            for member in range(count):
                steps = steps_of_sample(loader.order, loader.plan, shard=shard, member=member, num_steps=6)
                key = written.keys[f"train-{shard:06d}", member]
                assert steps == [step for step in range(6) for name in names[step] if name == key]
