"""YAML files and `key=value` overrides into frozen dataclasses.

Precedence: dataclass defaults < `base:` file(s) < the file < command-line overrides. The result is never mutated.
Unknown keys and wrong types are all reported at once, each with its dotted path and a suggestion.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import pydantic
import yaml

from configs.errors import ConfigError

Config = TypeVar("Config")

CONFIG_DIR = Path(__file__).parent
"""Where the shipped YAML files live; a name such as `train/digits` is looked up here."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` as a float and keeps `on`, `off`, `yes`, `no` and dates as strings (YAML 1.2)."""


_YAML_1_1 = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _YAML_1_1]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+|[0-9]+\.[0-9]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def load_config(schema: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Builds one `schema` (a frozen dataclass) from a YAML file and `a.b=value` overrides.

    Args:
        schema: the dataclass to build.
        path: a YAML file, or the name of a shipped one (`train/digits`); None means defaults only.
        overrides: `key.sub=value` strings; the value is parsed as YAML.

    Raises:
        ConfigError: unknown key, wrong type, missing file, malformed override, or a cross-field rule broken.
    """
    values = _read_yaml(resolve_path(path)) if path is not None else {}
    apply_overrides(values, overrides)
    source = str(path) if path is not None else "the defaults"
    return build_config(schema, values, source=f"{source} with {' '.join(overrides)}" if overrides else source)


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets each `key.sub=value` (the value parsed as YAML) in a plain dict, in place, and returns it.

    Raises:
        ConfigError: an override is malformed.
    """
    for override in overrides:
        _apply_override(values, override)
    return values


def build_config(schema: type[Config], values: dict[str, Any], source: str = "the configuration") -> Config:
    """Validates a plain dict (for example one stored in a checkpoint) against `schema`."""
    problems = list(_unknown_keys(schema, values, ()))
    if problems:
        raise ConfigError(f"unknown key in {source}", got="; ".join(problems), fix="correct or remove the key")
    adapter = pydantic.TypeAdapter(schema)
    try:
        return adapter.validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(f"invalid value in {source}", got="; ".join(_describe(error)), fix="correct the value") from None


def resolve_path(path: str | Path) -> Path:
    """The file that `path` names: as given, or among the shipped configurations with or without `.yaml`."""
    given = Path(path)
    for candidate in (given, CONFIG_DIR / given, CONFIG_DIR / f"{given}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = sorted(str(p.relative_to(CONFIG_DIR).with_suffix("")) for p in CONFIG_DIR.rglob("*.yaml"))
    close = difflib.get_close_matches(str(given).removesuffix(".yaml"), shipped, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError("no such configuration file", got=str(path), fix=f"{hint}shipped: {', '.join(shipped)}")


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain JSON types, with every default filled in."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, loadable again by `load_config`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def config_hash(config: Any) -> str:
    """Hex sha256 of the resolved configuration, independent of key order."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError("`base:` files form a circle", got=" -> ".join(str(p) for p in (*seen, path)))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}  # noqa: S506 - a SafeLoader subclass
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not a YAML file", got=error, expected="a text file of `key: value` lines") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values", got=type(values).__name__, expected="a mapping")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"`base` in {path} must name one file", got=base, expected="a path")
    beside = path.parent / base
    base_path = beside if beside.is_file() else resolve_path(base)
    return _merge(_read_yaml(base_path, (*seen, path.resolve())), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError("malformed override", got=repr(override), expected="key.sub=value")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key} is not valid YAML", got=str(error)) from None
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError("override goes through a key that holds no group", got=repr(override))
    values[leaf] = value


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass that an annotation allows (`X`, `X | None`), if exactly one."""
    options = [a for a in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(a) and isinstance(a, type)]
    return options[0] if len(options) == 1 else None


def _unknown_keys(schema: type, values: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    hints = get_type_hints(schema)
    known = [field.name for field in dataclasses.fields(schema)]
    for key, value in values.items():
        dotted = ".".join((*path, str(key)))
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            yield f"{dotted} (did you mean {'.'.join((*path, close[0]))}?)" if close else f"{dotted} (known: {', '.join(known)})"
            continue
        child = _dataclass_in(hints[key])
        if child is not None and isinstance(value, dict):
            yield from _unknown_keys(child, value, (*path, str(key)))


def _describe(error: pydantic.ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        location = ".".join(str(part) for part in item["loc"]) or "(whole)"
        context_error = item.get("ctx", {}).get("error")
        if item["type"] == "value_error" and context_error is not None:
            yield f"{location}: {context_error}" if location != "(whole)" else str(context_error)
        elif item["type"] == "missing":
            yield f"{location}: required, but not given"
        elif item["type"] == "tuple_type":
            yield f"{location}={item['input']!r}: a list is wanted, even of one value: [{item['input']}]"
        else:
            yield f"{location}={item['input']!r}: {item['msg']}"
