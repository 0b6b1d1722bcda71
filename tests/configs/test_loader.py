"""Files, bases and overrides into frozen dataclasses; every mistake named with its path."""

from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from configs.errors import ConfigError
from configs.loader import CONFIG_DIR, build_config, config_hash, load_config, resolve_path, to_dict, to_yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    rate: float = 0.1
    kind: Literal["slow", "fast"] = "slow"
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    name: str = "x"
    count: int = 3
    flag: bool = False
    limit: int | None = None
    leaf: Leaf = field(default_factory=Leaf)
    other: Leaf | None = None

    def __post_init__(self) -> None:
        if self.count > 100:
            raise ValueError(f"count={self.count} is above 100: choose fewer")


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_precedence_defaults_base_file_overrides(write) -> None:
    write("count: 4\nname: base\nleaf: {rate: 0.2, kind: fast}\n", "base.yaml")
    path = write("base: base.yaml\nname: file\nleaf: {rate: 0.3}\n")
    config = load_config(Root, path, ["leaf.rate=0.4"])
    assert (config.flag, config.count, config.leaf.kind, config.name, config.leaf.rate) == (False, 4, "fast", "file", 0.4)


def test_base_of_a_base_is_found_beside_it(write) -> None:
    write("count: 7\n", "deep/first.yaml")
    write("base: first.yaml\nname: second\n", "deep/second.yaml")
    config = load_config(Root, write("base: deep/second.yaml\n"))
    assert (config.count, config.name) == (7, "second")


def test_base_circle_is_refused(write) -> None:
    write("base: run.yaml\n", "other.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load_config(Root, write("base: other.yaml\n"))


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E3", 1e3), ("2.5", 2.5), (".5", 0.5), ("-1e-2", -0.01), ("4", 4.0)])
def test_numbers_in_every_notation_are_floats(write, text: str, value: float) -> None:
    assert load_config(Root, write(f"leaf: {{rate: {text}}}")).leaf.rate == value
    assert load_config(Root, None, [f"leaf.rate={text}"]).leaf.rate == value


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "2026-01-31"])
def test_yaml_words_stay_strings(word: str) -> None:
    assert load_config(Root, None, [f"name={word}"]).name == word
    with pytest.raises(ConfigError, match="flag"):
        load_config(Root, None, [f"flag={word}"])


def test_all_unknown_keys_are_named_with_suggestions(write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Root, write("coutn: 3\nleaf: {rat: 1.0}\nother: {zzz: 1}\n"))
    message = str(caught.value)
    assert "coutn (did you mean count?)" in message
    assert "leaf.rat (did you mean leaf.rate?)" in message
    assert "other.zzz (known: rate, kind, sizes)" in message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("count=yes", "count"),
        ("count=1.5", "count"),
        ("flag=1", "flag"),
        ("leaf.kind=medium", "leaf.kind"),
        ("leaf.sizes=3", "leaf.sizes"),
        ("name=3", "name"),
        ("count=101", "count=101 is above 100"),
        ("leaf=3", "leaf"),
    ],
)
def test_wrong_values_are_named_by_path(override: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Root, None, [override])
    assert named in str(caught.value)


def test_message_names_the_file_and_the_overrides(write) -> None:
    path = write("name: x\n")
    with pytest.raises(ConfigError, match=f"unknown key in {path} with cuont=3"):
        load_config(Root, path, ["cuont=3"])


def test_wrong_types_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Root, None, ["count=a", "leaf.rate=b"])
    assert "count=" in str(caught.value)
    assert "leaf.rate=" in str(caught.value)


@pytest.mark.parametrize("override", ["count", "=3", "name.deeper=1", "count=[1"])
def test_malformed_overrides_are_refused(write, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(Root, write("name: x\n"), [override])


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", "base: 3\n", "base: nowhere.yaml\n"])
def test_broken_files_are_refused(write, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(Root, write(text))


def test_file_that_is_no_text_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="is not a YAML file"):
        load_config(Root, tmp_path / "picture.yaml")
    for folder in (tmp_path, Path(".")):
        with pytest.raises(ConfigError, match="no such configuration file"):
            load_config(Root, folder)


def test_optional_group_and_null() -> None:
    config = load_config(Root, None, ["other.rate=0.5", "limit=null"])
    assert config.other == Leaf(rate=0.5)
    assert config.limit is None


def test_result_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        load_config(Root).count = 4  # type: ignore[misc]


def test_dict_and_yaml_round_trip(write) -> None:
    config = load_config(Root, None, ["leaf.rate=1e-5", "other.sizes=[4, 5]", "name=on"])
    assert build_config(Root, to_dict(config)) == config
    assert load_config(Root, write(to_yaml(config))) == config


def test_hash_tells_values_apart_and_ignores_key_order() -> None:
    one = build_config(Root, {"name": "a", "leaf": {"rate": 0.5, "kind": "fast"}})
    two = build_config(Root, {"leaf": {"kind": "fast", "rate": 0.5}, "name": "a"})
    assert config_hash(one) == config_hash(two)
    assert config_hash(one) != config_hash(load_config(Root))


def test_shipped_file_is_found_by_name_and_a_wrong_name_gets_a_suggestion() -> None:
    assert resolve_path("train/digits") == CONFIG_DIR / "train" / "digits.yaml"
    with pytest.raises(ConfigError, match="train/digits"):
        resolve_path("train/digit")
