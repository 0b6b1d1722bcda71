"""`jetway takedown`: takes samples out of a data set by address, domain, content, look or key.

Looks through the shards of all generations, and writes one immutable file, `tombstones/000001.json`, that names what was hit. Training
leaves those samples out from its next start or resume on; `jetway generations DATASET compact` then removes their bytes. The rules are
kept: later preparation drops what they name, with the reason `takedown`, and without rules the command applies them once more.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.loader import load_config
from data_prep import metadata
from data_prep.cluster import ray_session, run_tasks
from data_prep.config import RayConfig
from data_prep.images.encode import decode_stored
from data_prep.images.phash import phash
from data_prep.lease import only_writer
from data_prep.schema import Manifest, ShardIndex, ShardInfo, generation_of, generations, tar_path
from data_prep.storage import LocalStorage, Storage, open_storage
from data_prep.takedown_rules import DISTANCE, Matcher, Rules
from data_prep.tombstones import FOLDER, Hits, TombstoneFile, Tombstones, load_files, merge, tombstones_path

NUM_SHARDS_IN_PROCESS = 512
"""Up to so many shards are searched by threads of this process; more of them on Ray, which takes seconds to start."""
_SHARDS_PER_TASK = 64
_NUM_THREADS = 8
_NUM_SHOWN = 10

AGAIN = "rules of earlier takedowns, applied to shards that are newer"
"""Reason of a takedown that applies stored rules only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found."""

    shards: Mapping[str, Hits]
    """Hits that no earlier takedown named, by shard. After a compaction, several shards may hold the same sample."""
    known: frozenset[str]
    """Keys of the samples that one did name."""
    used: frozenset[str]
    """The rules that hit anything, as lines."""
    generations: Mapping[int, tuple[str, ...]]
    """Names of the shards of each generation that was searched."""

    @property
    def num_samples(self) -> int:
        """Samples hit for the first time, each once."""
        return len({key for hits in self.shards.values() for key in hits.keys})


def takedown_rules(storage: Storage) -> tuple[str, ...]:
    """All rules of all takedowns of a data set, one a line as `filters.takedown` takes them; keys, which name published samples, left out.

    Raises:
        UserError: rules are missing or damaged.
    """
    return tuple(line for line in stored_rules(storage, load_files(storage)).lines() if not line.startswith("key "))


def take_down(storage: Storage, rules: Rules, *, reason: str, ray: RayConfig, generation: int | None = None) -> tuple[Found, TombstoneFile | None]:
    """Searches all generations, and writes the next takedown. The caller is the only writer.

    Args:
        generation: look only through the shards that this generation added.

    Returns:
        What was found, and what was written: None where the rules are stored already and nothing new was hit.

    Raises:
        UserError: a sidecar or index is missing or damaged, or another takedown was written meanwhile.
    """
    files = load_files(storage)
    found = search(storage, rules, merge(files), ray, generation=generation)
    known = stored_rules(storage, files)
    if not found.shards and known | rules == known:
        return found, None
    is_new = known | rules != known
    file = TombstoneFile(
        number=len(files) + 1,
        reason=reason,
        rules_sha256=_put_rules(storage, rules) if is_new else "",
        generations=tuple(sorted(found.generations)),
        shards=found.shards,
    )
    data = file.to_bytes()
    # Of two at once, one gets the number. The one that got it may not have heard so, and finds its own bytes.
    if not storage.put_new(tombstones_path(file.number), data) and storage.read_bytes(tombstones_path(file.number)) != data:
        raise UserError(f"another takedown of {storage.url} was written at this moment", fix="run the same command again")
    return found, file


def apply_stored_rules(storage: Storage, *, ray: RayConfig, generation: int | None = None) -> tuple[Found, TombstoneFile | None]:
    """Applies the rules of earlier takedowns once more: for shards that were published since. The caller is the only writer.

    Args:
        generation: to the shards that this generation added; None: to all.
    """
    return take_down(storage, stored_rules(storage, load_files(storage)), reason=AGAIN, ray=ray, generation=generation)


def stored_rules(storage: Storage, files: Sequence[TombstoneFile]) -> Rules:
    """The rules of these takedowns together.

    Raises:
        UserError: rules are missing or damaged.
    """
    found = Rules()
    for digest in dict.fromkeys(file.rules_sha256 for file in files if file.rules_sha256):
        where, fix = f"{storage.url}/{rules_path(digest)}", "restore the file from where the data set was copied"
        try:
            data = storage.read_bytes(rules_path(digest))
        except FileNotFoundError:
            raise UserError(f"{where} is missing", fix=fix) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{where} is damaged", fix=fix)
        found |= Rules.parse(data.decode("utf-8", "surrogateescape").split("\n"), where)
    return found


def rules_path(sha256: str) -> str:
    """Path of rules inside the data set; named by their content, so that two runs never write different ones to one place."""
    return f"{FOLDER}/rules-{sha256[:16]}.txt"


def search(storage: Storage, rules: Rules, known: Tombstones, ray: RayConfig, generation: int | None = None) -> Found:
    """Looks for what the rules name in every shard of every generation, each shard once; reads the columns of the sidecars that it needs.

    Args:
        known: what was taken down before.
        generation: look only through the shards that this generation added.

    Raises:
        UserError: there is no data set, or a sidecar or index is missing or damaged.
    """
    Manifest.load(storage)  # where there is no data set, this says why
    manifests = [Manifest.load(storage, number) for number in (generations(storage) if generation is None else [generation])]
    named = {manifest.generation: tuple(s.name for split in manifest.splits.values() for s in split.shards) for manifest in manifests}
    shards = {shard.name: shard for manifest in manifests for split in manifest.splits.values() for shard in split.shards}
    if generation is not None:
        shards = {name: shard for name, shard in shards.items() if generation_of(name) == generation}
    chunks = [list(shards.values())[start : start + _SHARDS_PER_TASK] for start in range(0, len(shards), _SHARDS_PER_TASK)]
    hits: dict[str, Hits] = {}
    used: set[str] = set()
    known_keys: set[str] = set()
    for name, rows, keys, lines in (result for results in _searched(storage, chunks, rules, ray) for result in results):
        used |= lines
        old = set(known.rows(name).tolist())
        fresh = [(row, key) for row, key in zip(rows, keys, strict=True) if row not in old]
        known_keys.update(key for row, key in zip(rows, keys, strict=True) if row in old)
        if fresh:
            hits[name] = Hits(rows=tuple(row for row, _ in fresh), keys=tuple(key for _, key in fresh))
    in_order = {name: hits[name] for name in shards if name in hits}
    return Found(shards=in_order, known=frozenset(known_keys), used=frozenset(used), generations=named)


_Result = tuple[str, list[int], list[str], set[str]]
"""Shard, rows, keys, rules that hit."""


def search_shards(url: str, shards: Sequence[ShardInfo], rules: Rules) -> list[_Result]:
    """The hits in each of these shards; those without any are left out."""
    storage, matcher = open_storage(url), Matcher(rules)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return [result for result in pool.map(lambda shard: _search_shard(storage, shard, matcher), shards) if result[1]]


def _searched(storage: Storage, chunks: Sequence[Sequence[ShardInfo]], rules: Rules, ray: RayConfig) -> Iterator[list[_Result]]:
    url = str(storage.root) if isinstance(storage, LocalStorage) else storage.url
    if sum(map(len, chunks)) <= NUM_SHARDS_IN_PROCESS:
        yield from (search_shards(url, chunk, rules) for chunk in chunks)
        return
    with ray_session(ray):
        import ray as ray_module

        shared = ray_module.put(rules)  # once per node and not once per task: there may be millions
        yield from run_tasks(search_shards, [(url, chunk, shared) for chunk in chunks], ray)


def _search_shard(storage: Storage, shard: ShardInfo, matcher: Matcher) -> _Result:
    columns = matcher.rules.columns
    if shard.metadata_sha256:
        table = metadata.load(storage, shard.name, columns=columns, sha256=shard.metadata_sha256)
    else:
        table = _table_without_sidecar(storage, shard, columns)
    rows, used = matcher.match(table)
    return shard.name, rows.tolist(), table.column("key").take(rows).to_pylist(), used


def _table_without_sidecar(storage: Storage, shard: ShardInfo, columns: Sequence[str]) -> Any:
    """The same columns from the index and, where that does not do, from the members of an older data set's shard."""
    import pyarrow as pa

    index = ShardIndex.load(storage, shard.name, sha256=shard.index_sha256)
    values: dict[str, list[Any]] = {"key": [key.decode() for key in index.keys.tolist()]}
    if "sha256" in columns:
        values["sha256"] = [row.tobytes() for row in index.sha256]
    if "url" in columns or "phash" in columns:
        try:
            data = storage.read_bytes(tar_path(shard.name))
        except FileNotFoundError:
            raise UserError(f"{storage.url}/{tar_path(shard.name)} is missing", fix="restore it; `jetway verify` lists all damage") from None
        spans = [[slice(int(o), int(o + s)) for o, s in zip(*pair, strict=True)] for pair in zip(index.offsets, index.sizes, strict=True)]
        if "url" in columns:
            values["url"] = [_address(json.loads(data[span[2]])) for span in spans]
        if "phash" in columns:
            values["phash"] = [phash(decode_stored(data[span[0]])) for span in spans]
    schema = metadata.schema()
    return pa.table({name: pa.array(values[name], type=schema.field(name).type) for name in columns})


def _address(values: Mapping[str, Any]) -> str:
    extra = values.get("extra")
    found = values.get("url") or (extra.get("url") if isinstance(extra, Mapping) else None)
    return found if isinstance(found, str) else ""


def _put_rules(storage: Storage, rules: Rules) -> str:
    data = "".join(line + "\n" for line in rules.lines()).encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(data).hexdigest()
    storage.put_bytes(rules_path(digest), data)
    return digest


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway takedown`."""
    arguments = _parser().parse_intermixed_args(argv)
    storage = open_storage(arguments.data_set)
    ray = load_config(RayConfig, None, [text.removeprefix("ray.") for text in arguments.settings])
    given = _given_rules(arguments)
    if not given and arguments.reason:
        raise UserError("a reason without a rule", fix="say what to take down, e.g. --urls FILE")
    if arguments.dry_run:
        files = load_files(storage)
        rules = given or stored_rules(storage, files)
        found, file = search(storage, rules, merge(files), ray), None
    else:
        with only_writer(storage):
            rules = given or stored_rules(storage, load_files(storage))
            found, file = take_down(storage, rules, reason=arguments.reason if given else AGAIN, ray=ray)
    if arguments.json:
        print(json.dumps(_as_json(rules, found, file), ensure_ascii=False))
    else:
        print("\n".join(_report(storage, rules, found, file, dry_run=arguments.dry_run)))
    return 0


def _given_rules(arguments: argparse.Namespace) -> Rules:
    rules = Rules.parse([*(f"url {text}" for text in arguments.url), *(f"key {text}" for text in arguments.key)], "the command line")
    for kind in ("url", "domain", "sha256", "phash", "key"):
        path = getattr(arguments, f"{kind}_file")
        if path is not None:
            # A checksum may be followed by a file name, as sha256sum writes it.
            lines = [line.split()[0] if kind in ("sha256", "phash", "key") and line.split() else line.strip() for line in _read_lines(path)]
            suffix = f" {arguments.distance}" if kind == "phash" else ""
            rules |= Rules.parse([f"{kind} {line}{suffix}" if line and not line.startswith("#") else "" for line in lines], str(path))
    if arguments.rules is not None:
        rules |= Rules.parse(_read_lines(arguments.rules), str(arguments.rules))
    return rules


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) else error
        fix = "write it into a file and name that; one address or key goes on the command line with --url or --key"
        raise UserError(f"cannot read {path}", got=got, expected="a UTF-8 text file, one rule a line", fix=fix) from None


def _report(storage: Storage, rules: Rules, found: Found, file: TombstoneFile | None, *, dry_run: bool) -> list[str]:
    if not rules:
        return [f"{storage.url}: no takedown so far, and none asked for"]
    given = Counter(line.split()[0] for line in rules.lines())
    used = Counter(line.split()[0] for line in found.used)
    lines = [f"{kind:<7} {number:>9,} rules, {used[kind]:,} of them hit a sample" for kind, number in given.items()]
    known = f" ({len(found.known):,} were taken down before)" if found.known else ""
    lines.append(f"{found.num_samples:,} samples in {len(found.shards):,} shards{known}")
    for generation, names in found.generations.items():
        hit = [name for name in names if name in found.shards]
        if hit:
            number = sum(len(found.shards[name].rows) for name in hit)
            shown = ", ".join(f"{name}: {len(found.shards[name].rows):,}" for name in hit[:_NUM_SHOWN])
            lines.append(f"  generation {generation}: {number:,} in {len(hit):,} shards ({shown}{', ...' if len(hit) > _NUM_SHOWN else ''})")
    if dry_run:
        return [*lines, "nothing was written"]
    if file is None:
        return [*lines, "nothing new: no file was written"]
    lines.append(f"wrote {tombstones_path(file.number)}; in force for training from its next start or resume")
    if found.num_samples:
        lines.append(f"`jetway generations {storage.url} compact` replaces the shards that hold them")
    return lines


def _as_json(rules: Rules, found: Found, file: TombstoneFile | None) -> dict[str, Any]:
    return {
        "takedown": None if file is None else file.number,
        "samples": found.num_samples,
        "known": len(found.known),
        "shards": {name: {"rows": list(hits.rows), "keys": list(hits.keys)} for name, hits in found.shards.items()},
        "generations": {
            number: sum(len(found.shards[name].rows) for name in names if name in found.shards) for number, names in found.generations.items()
        },
        "rules_without_hit": [line for line in rules.lines() if line not in found.used],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway takedown",
        description="Take samples out of a data set. Training leaves them out from its next start or resume on; nothing is rewritten.",
        epilog="Without any rule, those of earlier takedowns are applied again, for shards that are newer. "
        "Example: `jetway takedown DATA --urls requests.txt --reason 'request of 3 May'`.",
    )
    parser.add_argument("data_set", metavar="DATASET", help="folder or s3:// prefix")
    parser.add_argument("--url", action="append", default=[], metavar="U", help="an address; may be repeated")
    parser.add_argument("--key", action="append", default=[], metavar="K", help="the key of a sample; may be repeated")
    for kind, name, text in (
        ("url", "--urls", "addresses, one a line; http and https are one"),
        ("domain", "--domains", "domains, one a line; subdomains included"),
        ("sha256", "--sha256", "SHA-256 of original files, one a line, in hex"),
        ("phash", "--phash", "64-bit perceptual hashes, one a line, in hex"),
        ("key", "--keys", "keys of samples, one a line"),
    ):
        parser.add_argument(name, dest=f"{kind}_file", type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--distance", type=int, default=DISTANCE, help="bits in which a perceptual hash may differ from one of --phash (default %(default)s)"
    )
    parser.add_argument("--rules", type=Path, metavar="FILE", help="lines of several kinds, as filters.takedown takes them")
    parser.add_argument("--reason", default="", help="why, to be kept with the takedown")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--dry-run", action="store_true", help="search and report; write nothing")
    parser.add_argument("settings", nargs="*", metavar="ray.key=value", help="where a search of many shards runs, e.g. ray.address=auto")
    return parser
