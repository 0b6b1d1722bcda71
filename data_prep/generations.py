"""`jetway generations`: the history of a data set, what changed in it, going back, and compaction.

Generations are immutable and only ever added to: going back publishes a new one with the content of an old one.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from configs.errors import UserError
from configs.loader import load_config
from data_prep.compact import Compaction, clear_records, compact, delete_old, plan_compaction, plan_deletion
from data_prep.config import RayConfig
from data_prep.generation_diff import diff, what_changed
from data_prep.lease import only_writer
from data_prep.schema import Manifest, generations, tar_path
from data_prep.storage import Storage, open_storage
from data_prep.tombstones import load as load_tombstones


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway generations`."""
    arguments = _parser().parse_args(argv)
    storage = open_storage(arguments.data_set)
    if arguments.action == "diff":
        found = diff(storage, Manifest.load(storage, arguments.before), Manifest.load(storage, arguments.after))
        print(json.dumps(found.to_json(), ensure_ascii=False) if arguments.json else "\n".join(found.lines()))
    elif arguments.action == "rollback":
        _rollback(storage, arguments.generation, dry_run=arguments.dry_run)
    elif arguments.action == "compact":
        _compact(storage, arguments)
    else:
        rows = history(storage)
        print(json.dumps(rows, ensure_ascii=False) if arguments.json else _table(rows))
    return 0


def history(storage: Storage) -> list[dict[str, Any]]:
    """All generations, oldest first, as JSON-able values.

    Raises:
        UserError: there is no data set, or a manifest or takedown of it is damaged.
    """
    Manifest.load(storage)  # where there is no data set, this says why
    manifests = {number: Manifest.load(storage, number) for number in generations(storage)}
    tombstones = load_tombstones(storage)
    rows = []
    for number, manifest in manifests.items():
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        rows.append(
            {
                "generation": number,
                "action": manifest.action,
                "base": manifest.base,
                "samples": {name: split.num_samples for name, split in manifest.splits.items()},
                "taken_down": tombstones.count(shard.name for shard in shards),
                "shards": len(shards),
                "bytes": sum(shard.num_bytes for shard in shards),
                "dropped": dict(manifest.counts.dropped),
                "tokenizer_sha256": manifest.tokenizer.sha256,
                "changed": what_changed(manifests.get(manifest.base or 0), manifest),
            }
        )
    return rows


def rollback(storage: Storage, number: int) -> Manifest | None:
    """Publishes a new generation with the content of generation `number`; nothing is deleted. The caller is the only writer.

    Returns:
        The new manifest; None where the newest generation has that content already.

    Raises:
        UserError: no such generation, a shard of it that is gone, a tokenizer that is not its own any more, or an unfinished `jetway prep`.
    """
    manifest = plan_rollback(storage, number)
    if manifest is not None:
        manifest.dump(storage)
    return manifest


def plan_rollback(storage: Storage, number: int) -> Manifest | None:
    """The manifest that `rollback` would publish."""
    wanted, newest = Manifest.load(storage, number), Manifest.load(storage)
    if _content(wanted) == _content(newest):
        return None
    check_nothing_unfinished(storage, newest.generation + 1)
    _check_complete(storage, wanted)
    # Keys are never given twice, so the count of samples goes on from the highest, whatever generation it stands in.
    num_planned = max(Manifest.load(storage, other).num_planned for other in generations(storage))
    return replace(wanted, generation=newest.generation + 1, action="rollback", base=number, num_planned=num_planned)


def check_nothing_unfinished(storage: Storage, generation: int) -> None:
    """Raises:
    UserError: a `jetway prep` or `retry` has begun this generation: both would name their shards alike.
    """
    path = f"plans/{generation:06d}.json"
    if storage.exists(path):
        raise UserError(
            f"generation {generation} of {storage.url} has been begun by `jetway prep` or `jetway retry`",
            expected="no unfinished generation",
            fix=f"run that command again to finish it, or delete {path} and parts/ to give it up",
        )


def _content(manifest: Manifest) -> tuple[object, ...]:
    return manifest.splits, manifest.tokenizer, manifest.image, manifest.config_hash, manifest.counts


def _check_complete(storage: Storage, manifest: Manifest) -> None:
    listed = set(storage.list("shards/"))
    missing = [shard.name for split in manifest.splits.values() for shard in split.shards if tar_path(shard.name) not in listed]
    if missing:
        raise UserError(
            f"{len(missing):,} shards of generation {manifest.generation} are gone",
            got=f"no {', '.join(map(tar_path, missing[:3]))}{' ...' if len(missing) > 3 else ''}",
            fix="restore them, or choose another generation",
        )
    # Reads it and compares its checksum: a generation whose tokenizer was overwritten cannot be trained on.
    from data_prep.tokenizer import load_tokenizer

    load_tokenizer(storage, manifest)


def _rollback(storage: Storage, number: int, *, dry_run: bool) -> None:
    if dry_run:
        manifest = plan_rollback(storage, number)
    else:
        with only_writer(storage):
            manifest = rollback(storage, number)
    if manifest is None:
        print(f"the newest generation of {storage.url} has the content of generation {number} already: nothing to do")
        return
    samples = sum(split.num_samples for split in manifest.splits.values())
    does = "would publish" if dry_run else "published"
    print(f"{does} generation {manifest.generation} with the content of generation {number}: {samples:,} samples; nothing is deleted")


def _compact(storage: Storage, arguments: argparse.Namespace) -> None:
    if arguments.delete_old and not (arguments.yes or arguments.dry_run):
        raise UserError(
            "--delete-old deletes all generations before the compaction for good: runs that train on them cannot be resumed",
            fix="look with --dry-run first, then add --yes",
        )
    ray = load_config(RayConfig, None, [text.removeprefix("ray.") for text in arguments.settings])
    if arguments.dry_run:
        plan = _plan(storage)
        print(_describe(plan) if plan else f"{storage.url}: generation {generations(storage)[-1]} holds no sample that was taken down")
        if arguments.delete_old:
            print("afterwards, all generations before it and the shards that only they name would be deleted")
        return
    with only_writer(storage) as lease:
        plan = _plan(storage)
        if plan is None:
            clear_records(storage)
            print(f"{storage.url}: generation {generations(storage)[-1]} holds no sample that was taken down: nothing to compact")
        else:
            print(_describe(plan))
            manifest = compact(storage, plan, ray, lease)
            print(f"published generation {manifest.generation}")
        if arguments.delete_old:
            deletion = plan_deletion(storage)
            delete_old(storage, deletion)
            names = ", ".join(map(str, deletion.generations)) or "none"
            print(f"deleted the generations before {deletion.since} ({names}) and {len(deletion.paths):,} files of their shards")


def _plan(storage: Storage) -> Compaction | None:
    newest = Manifest.load(storage)
    plan = plan_compaction(newest, load_tombstones(storage), newest.generation + 1)
    if plan is not None:
        check_nothing_unfinished(storage, plan.generation)
    return plan


def _describe(plan: Compaction) -> str:
    copied = sum(shard.num_samples for shard in plan.shards)
    size = sum(shard.num_bytes for shard in plan.replaced)
    return (
        f"generation {plan.base.generation} -> {plan.generation}: {plan.num_removed:,} samples go, {copied:,} of their neighbours are copied from "
        f"{len(plan.replaced):,} shards ({size / 2**20:,.1f} MiB) into {len(plan.shards):,}; all other shards stay"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    titles = ("generation", "action", "base", "train", "heldout", "taken down", "shards", "MiB", "what changed")
    cells = [
        (
            f"{row['generation']}{'*' if row is rows[-1] else ''}",
            row["action"],
            "-" if row["base"] is None else str(row["base"]),
            *(f"{row['samples'].get(name, 0):,}" for name in ("train", "heldout")),
            f"{row['taken_down']:,}",
            f"{row['shards']:,}",
            f"{row['bytes'] / 2**20:,.1f}",
            row["changed"],
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [titles, *cells]) for column in range(len(titles))]
    is_text = [column in (0, 1, len(titles) - 1) for column in range(len(titles))]
    lines = []
    for line in [titles, *cells]:
        parts = [text.ljust(width) if left else text.rjust(width) for text, width, left in zip(line, widths, is_text, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join([*lines, "* the newest: what training reads unless data.generation names another"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway generations",
        description="The history of a data set. Without a second verb: all generations.",
        epilog="Examples: `jetway generations DATA`, `jetway generations DATA diff 1 3`, `jetway generations DATA rollback 2 --dry-run`.",
    )
    parser.add_argument("data_set", metavar="DATASET", help="folder or s3:// prefix")
    _add_flags(parser)
    common = argparse.ArgumentParser(add_help=False)  # after the second verb too, without undoing one before it
    _add_flags(common, default=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="action", metavar="{diff,rollback,compact}")
    compare = verbs.add_parser("diff", parents=[common], help="what differs between two generations")
    compare.add_argument("before", type=int, metavar="A")
    compare.add_argument("after", type=int, metavar="B")
    back = verbs.add_parser("rollback", parents=[common], help="publish a new generation with the content of an old one; nothing is deleted")
    back.add_argument("generation", type=int, metavar="N")
    compaction = verbs.add_parser("compact", parents=[common], help="replace the shards that hold samples taken down by shards without them")
    compaction.add_argument("--delete-old", action="store_true", help="then delete all generations before, and the shards that only they name")
    compaction.add_argument("--yes", action="store_true", help="really delete them")
    compaction.add_argument("settings", nargs="*", metavar="ray.key=value", help="where the copying runs, e.g. ray.address=auto")
    return parser


def _add_flags(parser: argparse.ArgumentParser, default: Any = False) -> None:
    parser.add_argument("--json", action="store_true", default=default, help="print JSON (list and diff)")
    parser.add_argument("--dry-run", action="store_true", default=default, help="say what would be done; write nothing")
