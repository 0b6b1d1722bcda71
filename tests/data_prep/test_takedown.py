"""`jetway takedown` finds what the rules name in every generation, writes it down once, and never again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep import takedown
from data_prep.config import RayConfig
from data_prep.schema import Manifest, ShardIndex
from data_prep.storage import Storage, open_storage
from data_prep.takedown import apply_stored_rules, main, take_down, takedown_rules
from data_prep.takedown_rules import Rules
from data_prep.tombstones import load, load_files, tombstones_path
from tests.data_prep.conftest import files_below
from tests.data_prep.history import facts, url, write_generation

RAY = RayConfig(num_cpus=2)


@pytest.fixture
def history(tmp_path: Path) -> Storage:
    """Two generations: 30 samples, and 12 more."""
    path = tmp_path / "set"
    write_generation(path, range(30))
    write_generation(path, range(40, 52))
    return open_storage(path)


def places(storage: Storage, numbers: set[int]) -> dict[str, list[int]]:
    """Rows by shard of these samples in the newest generation."""
    wanted = {facts(number).key.encode() for number in numbers}
    found = {}
    for split in Manifest.load(storage).splits.values():
        for shard in split.shards:
            rows = [row for row, key in enumerate(ShardIndex.load(storage, shard.name).keys.tolist()) if key in wanted]
            if rows:
                found[shard.name] = rows
    return found


def taken(storage: Storage) -> dict[str, list[int]]:
    return {name: rows.tolist() for name, rows in load(storage).shards.items()}


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


CASES: dict[str, tuple[Callable[[Path], list[str]], set[int]]] = {
    "url": (lambda at: ["--url", url(5), "--url", url(47).replace("https", "http"), "--url", "https://nowhere.example/"], {5, 47}),
    "urls": (lambda at: ["--urls", write(at, "# asked for by mail", "", url(3), f" {url(29)} ")], {3, 29}),
    "domains": (lambda at: ["--domains", write(at, "images.example.org")], {n for n in (*range(30), *range(40, 52)) if n % 3 == 1}),
    "sha256": (lambda at: ["--sha256", write(at, f"{hashlib.sha256(b'original 11').hexdigest()}  some file.png")], {11}),
    "phash": (lambda at: ["--phash", write(at, f"{facts(8).phash ^ 0b101:016X}"), "--distance", "2"], {8}),
    "keys": (lambda at: ["--keys", write(at, "0000000000", "0000000051", "0000000035"), "--key", "0000000012"], {0, 12, 51}),
    "rules": (lambda at: ["--rules", write(at, "key 0000000001", f"sha256 {facts(2).sha256.hex()}", "domain nowhere.example")], {1, 2}),
}


@pytest.mark.parametrize("sidecars", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_a_rule_names_is_found_in_every_shard_and_only_that(tmp_path: Path, case: str, sidecars: bool) -> None:
    """With sidecars, and in an older data set without them, from its index and members."""
    path = tmp_path / "set"
    write_generation(path, range(30), sidecars=sidecars)
    write_generation(path, range(40, 52), sidecars=sidecars)
    arguments, expected = CASES[case]
    storage = open_storage(path)
    before = files_below(path)
    assert main([str(path), *arguments(tmp_path / "list.txt"), "--reason", "a letter"]) == 0
    assert taken(storage) == places(storage, expected)
    (file,) = load_files(storage)
    assert {key for hits in file.shards.values() for key in hits.keys} == {facts(number).key for number in expected}
    assert (file.number, file.reason, file.generations) == (1, "a letter", (1, 2))
    after = files_below(path)
    assert {name: after[name] for name in before} == before, "nothing else is touched"


def test_the_report_says_what_where_and_what_to_do(history: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([history.url, "--key", "0000000003", "--key", "0000000041", "--key", "0000000042", "--key", "1", "--url", url(3), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "nothing was written" in text
    assert not (Path(history.url) / "tombstones").exists()
    assert main([history.url, "--key", "0000000003", "--key", "0000000041", "--key", "0000000042", "--key", "1", "--url", url(3)]) == 0
    text = capsys.readouterr().out
    assert "3 samples in 2 shards" in text
    assert "key             4 rules, 3 of them hit a sample" in text
    assert "url             1 rules, 1 of them hit a sample" in text
    assert "generation 1: 1 in 1 shards (train-000000: 1)" in text
    assert "generation 2: 3 in 2 shards (train-000000: 1, train-g0002-000000: 2)" in text
    assert "wrote tombstones/000001.json" in text
    assert main([history.url, "--key", "0000000003", "--key", "0000000005", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["takedown"], found["samples"], found["known"], found["rules_without_hit"]) == (2, 1, 1, [])
    assert found["generations"] == {"1": 1, "2": 1}


def test_files_are_numbered_added_to_and_never_repeated(history: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (3, 4, 3):
        main([history.url, "--key", facts(number).key])
    assert "nothing new: no file was written" in capsys.readouterr().out
    assert [file.number for file in load_files(history)] == [1, 2]
    assert [file.num_samples for file in load_files(history)] == [1, 1]
    assert taken(history) == places(history, {3, 4})
    first = history.read_bytes(tombstones_path(1))
    main([history.url, "--key", facts(3).key, "--key", facts(9).key])
    assert load_files(history)[2].num_samples == 1, "what was taken down before is not repeated"
    assert history.read_bytes(tombstones_path(1)) == first


def test_rules_without_a_hit_are_kept_and_apply_to_what_comes_later(history: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    later = facts(60)
    main([history.url, "--url", later.url, "--key", facts(63).key, "--reason", "in advance"])
    assert load_files(history)[0].num_samples == 0
    assert takedown_rules(history) == (f"url {later.url}",)
    assert Rules.parse(takedown_rules(history), "stored").url == (later.url,)
    write_generation(history.url, range(60, 70))
    assert main([history.url]) == 0
    assert taken(history) == places(history, {60, 63})
    file = load_files(history)[1]
    assert (file.reason, file.rules_sha256, file.generations) == (takedown.AGAIN, "", (1, 2, 3))
    capsys.readouterr()
    assert main([history.url]) == 0
    assert "nothing new" in capsys.readouterr().out
    found, nothing = apply_stored_rules(history, ray=RAY)
    assert nothing is None
    assert found.known == {facts(60).key, facts(63).key}


def test_without_any_rule_there_is_nothing_to_do(history: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([history.url]) == 0
    assert "no takedown so far" in capsys.readouterr().out
    assert load(history).number == 0
    with pytest.raises(UserError, match="a reason without a rule"):
        main([history.url, "--reason", "because"])


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_on_ray_finds_the_same(history: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules.parse(["domain images.example.org", f"sha256 {facts(2).sha256.hex()}"], "here")
    expected = takedown.search(history, rules, load(history), RAY)
    monkeypatch.setattr(takedown, "NUM_SHARDS_IN_PROCESS", 0)
    monkeypatch.setattr(takedown, "_SHARDS_PER_TASK", 2)
    found = takedown.search(history, rules, load(history), RAY)
    assert found == expected
    assert list(found.shards) == list(expected.shards), "whatever comes first"
    assert expected.num_samples == 15


def test_of_two_takedowns_at_once_one_is_refused(history: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one gets the number after this one has looked."""
    put_new = type(history).put_new

    def late(self: Storage, path: str, data: bytes) -> bool:
        put_new(self, path, b"the other's")
        return put_new(self, path, data)

    monkeypatch.setattr(type(history), "put_new", late)
    with pytest.raises(UserError, match="another takedown"):
        take_down(history, Rules.parse(["key 0000000001"], "here"), reason="", ray=RAY)
    assert history.read_bytes(tombstones_path(1)) == b"the other's"


def test_a_takedown_whose_success_was_not_heard_of_counts(history: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put_new = type(history).put_new
    monkeypatch.setattr(type(history), "put_new", lambda self, path, data: bool(put_new(self, path, data)) and False)
    _, file = take_down(history, Rules.parse(["key 0000000001"], "here"), reason="", ray=RAY)
    assert file is not None
    assert load_files(history) == [file]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_rules_that_were_lost_are_noticed(history: Storage, damage: str) -> None:
    main([history.url, "--key", facts(3).key])
    (path,) = [path for path in history.list("tombstones/") if "rules" in path]
    if damage == "missing":
        history.delete(path)
    else:
        history.put_bytes(path, b"key 1\n")
    with pytest.raises(UserError, match=rf"tombstones/rules-\w+\.txt is {'missing' if damage == 'missing' else 'damaged'}"):
        takedown_rules(history)
    assert load(history).number == 1, "readers need no rules"


def test_bad_lists_are_named(history: Storage, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"list\.txt, line 2 is no takedown rule"):
        main([history.url, "--sha256", write(tmp_path / "list.txt", "", "12")])
    with pytest.raises(UserError, match=r"cannot read(?s:.*)write it into a file"):
        main([history.url, "--urls", str(tmp_path / "nothing.txt")])
    with pytest.raises(UserError, match="holds no data set"):
        main([str(tmp_path / "nowhere"), "--key", "1", "--dry-run"])
