"""The history of a data set: listed, compared, and gone back in, without ever changing what was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.generation_diff import diff, what_changed
from data_prep.generations import history, main, plan_rollback, rollback
from data_prep.schema import Manifest, generations, manifest_path
from data_prep.storage import Storage, open_storage
from data_prep.takedown import main as takedown
from tests.data_prep.conftest import files_below
from tests.data_prep.history import facts, numbers_of, split_of, write_generation

NEW = range(40, 52)
NUM_NEW_TRAIN = sum(split_of(number) == "train" for number in NEW)
NUM_OLD_TRAIN = sum(split_of(number) == "train" for number in range(30))
TRAIN, HELDOUT = NUM_OLD_TRAIN + NUM_NEW_TRAIN, 42 - NUM_OLD_TRAIN - NUM_NEW_TRAIN


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Two generations: 30 samples, and 12 more."""
    write_generation(tmp_path / "set", range(30))
    write_generation(tmp_path / "set", NEW)
    return open_storage(tmp_path / "set")


def test_all_generations_are_listed(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    takedown([storage.url, "--key", facts(1).key, "--key", facts(41).key])
    capsys.readouterr()
    assert main([storage.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["generation", "action", "base", "train", "heldout", "taken", "down", "shards", "MiB", "what", "changed"]
    assert lines[1].split()[:6] == ["1", "prep", "-", str(NUM_OLD_TRAIN), str(30 - NUM_OLD_TRAIN), "1"]
    assert lines[2].split()[:6] == ["2*", "grow", "1", str(TRAIN), str(HELDOUT), "2"]
    assert f"train +{NUM_NEW_TRAIN}; heldout +{12 - NUM_NEW_TRAIN}; shards +" in lines[2]
    assert main([storage.url, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["generation"], row["action"], row["base"], row["taken_down"]) for row in rows] == [(1, "prep", None, 1), (2, "grow", 1, 2)]
    assert rows == history(storage)
    assert rows[1]["samples"] == {"train": TRAIN, "heldout": HELDOUT}


def test_a_diff_names_everything_that_differs(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = Manifest.load(storage, 1), Manifest.load(storage, 2)
    found = diff(storage, before, after)
    assert found.inputs_added == ("list-2.parquet",)
    assert found.settings == ()
    assert found.splits["train"].num_shards_kept == 3
    assert found.splits["train"].shards_removed == ()
    assert found.splits["train"].shards_added == tuple(shard.name for shard in after.splits["train"].shards[3:])
    assert (found.num_keys_added, found.num_keys_removed) == (12, 0)
    assert found.keys_added == tuple(facts(number).key for number in range(40, 45))
    assert found.tokenizer_is_same
    back = diff(storage, after, before)
    assert (back.num_keys_removed, back.keys_removed, back.inputs_removed) == (12, found.keys_added, ("list-2.parquet",))
    config = {**after.config, "samples_per_shard": 9, "image": {**after.config["image"], "quality": 1}}
    counts = replace(after.counts, dropped={"corrupt": 1, "dns": 4})
    other = replace(after, config=config, counts=counts, lists={"a.txt": "1"}, tokenizer=replace(after.tokenizer, sha256="0"))
    found = diff(storage, after, other)
    assert found.settings == ("image.quality: 95 -> 1", "samples_per_shard: 8 -> 9")
    assert found.dropped == {"corrupt": (2, 1), "dns": (0, 4)}
    assert found.lists_changed == ("a.txt",)
    assert not found.tokenizer_is_same
    assert (found.num_keys_added, found.num_keys_removed) == (0, 0)
    text = "\n".join(found.lines())
    for part in ("image.quality: 95 -> 1", "dns: 0 -> 4", "a.txt", "ANOTHER", "0 added; 0 removed"):
        assert part in text
    assert main([storage.url, "diff", "1", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(diff(storage, before, after).to_json()))
    assert main([storage.url, "diff", "1", "2"]) == 0
    assert "keys       12 added (0000000040, 0000000041, 0000000042, 0000000043, 0000000044, ...); 0 removed" in capsys.readouterr().out


def test_what_changed_is_said_in_a_few_words(storage: Storage) -> None:
    first, second = Manifest.load(storage, 1), Manifest.load(storage, 2)
    assert what_changed(None, first) == ""
    assert what_changed(None, second) == "generation 1 was deleted"
    assert what_changed(first, first) == "the same content"
    other = replace(first, config={**first.config, "missing_caption": "empty"}, tokenizer=replace(first.tokenizer, sha256="0"))
    assert what_changed(first, other) == "another tokenizer; missing_caption changed"


def test_rollback_publishes_old_content_anew_and_changes_nothing_else(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Manifest.load(storage, 1), Manifest.load(storage, 2)
    before = files_below(Path(storage.url))
    assert main([storage.url, "rollback", "1", "--dry-run"]) == 0
    assert "would publish generation 3" in capsys.readouterr().out
    assert files_below(Path(storage.url)) == before
    assert main([storage.url, "rollback", "1"]) == 0
    after = files_below(Path(storage.url))
    assert {name: after[name] for name in before} == before
    found = Manifest.load(storage)
    assert (found.generation, found.action, found.base) == (3, "rollback", 1)
    assert (found.splits, found.counts, found.inputs, found.tokenizer) == (first.splits, first.counts, first.inputs, first.tokenizer)
    assert found.num_planned == second.num_planned > first.num_planned, "keys that were given once are not given again"
    assert main([storage.url, "rollback", "1"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert generations(storage) == [1, 2, 3]
    assert main([storage.url, "rollback", "2"]) == 0
    assert Manifest.load(storage).splits == second.splits
    assert numbers_of(Manifest.load(storage), storage) == numbers_of(second, storage)


def test_rollback_to_what_is_incomplete_is_refused(storage: Storage) -> None:
    with pytest.raises(UserError, match="no generation 7"):
        rollback(storage, 7)
    name = Manifest.load(storage, 1).splits["train"].shards[1].name
    tar = storage.read_bytes(f"shards/{name}.tar")
    storage.delete(f"shards/{name}.tar")
    with pytest.raises(UserError, match=rf"(?s)1 shards of generation 1 are gone.*shards/{name}.tar"):
        rollback(storage, 1)
    storage.put_bytes(f"shards/{name}.tar", tar)
    storage.put_bytes("tokenizer.model", b"another")
    with pytest.raises(UserError, match="not the tokenizer of this data set"):
        rollback(storage, 1)
    assert generations(storage) == [1, 2]


def test_an_unfinished_generation_is_not_overtaken(storage: Storage) -> None:
    storage.put_bytes("plans/000002.json", b"{}")
    assert plan_rollback(storage, 1) is not None, "a finished one is no hindrance"
    storage.put_bytes("plans/000003.json", b"{}")
    with pytest.raises(UserError, match=r"(?s)generation 3 .* has been begun.*delete plans/000003.json"):
        rollback(storage, 1)


def test_of_two_that_publish_at_once_one_is_refused(storage: Storage) -> None:
    mine, theirs = plan_rollback(storage, 1), replace(Manifest.load(storage), generation=3)
    assert mine is not None
    theirs.dump(storage)
    with pytest.raises(UserError, match=r"manifests/000003.json exists with other content"):
        mine.dump(storage)
    assert Manifest.load(storage) == theirs
    theirs.dump(storage)


def test_a_second_writer_is_refused(storage: Storage) -> None:
    from data_prep.lease import only_writer

    with only_writer(storage):
        for arguments in (["rollback", "1"], ["compact"]):
            with pytest.raises(UserError, match="another run is writing"):
                main([storage.url, *arguments])
        with pytest.raises(UserError, match="another run is writing"):
            takedown([storage.url, "--key", "1"])
        assert main([storage.url]) == 0
    assert generations(storage) == [1, 2]


def test_without_a_data_set_there_is_no_history(tmp_path: Path) -> None:
    for arguments in ([], ["diff", "1", "2"], ["rollback", "1"], ["compact", "--dry-run"]):
        with pytest.raises(UserError, match="holds no data set"):
            main([str(tmp_path / "nothing"), *arguments])
    assert not (tmp_path / "nothing" / manifest_path(1)).exists()
