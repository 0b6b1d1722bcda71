"""What differs between two generations of a data set: settings, inputs, shards, counts, and which samples came and went."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.config import stored_identity
from data_prep.plan import differences
from data_prep.schema import Manifest, ShardIndex, ShardInfo
from data_prep.storage import Storage

NUM_EXAMPLES = 5
"""Keys shown of those that came, and of those that went."""
_NUM_READERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitChange:
    """One split in both generations."""

    samples_before: int
    samples_after: int
    shards_added: tuple[str, ...]
    shards_removed: tuple[str, ...]
    num_shards_kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """What one generation has that the other has not."""

    before: int
    after: int
    settings: tuple[str, ...]
    """`key: old -> new`"""
    inputs_added: tuple[str, ...]
    inputs_removed: tuple[str, ...]
    lists_changed: tuple[str, ...]
    """Block lists, takedown lists and evaluation sets that are new, gone or of other content."""
    splits: Mapping[str, SplitChange]
    dropped: Mapping[str, tuple[int, int]]
    """Samples dropped before and after, for the reasons where the two differ."""
    tokenizer_is_same: bool
    num_keys_added: int
    num_keys_removed: int
    keys_added: tuple[str, ...]
    """The first few."""
    keys_removed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for people; nothing about what is the same, but for the tokenizer."""
        lines = [f"generation {self.before} -> {self.after}"]
        lines += [f"setting    {text}" for text in self.settings]
        lines += [f"input      + {text}" for text in self.inputs_added] + [f"input      - {text}" for text in self.inputs_removed]
        lines += [f"list       {text}" for text in self.lists_changed]
        for name, split in self.splits.items():
            change = split.samples_after - split.samples_before
            shards = f"{len(split.shards_added):,} shards added, {len(split.shards_removed):,} removed, {split.num_shards_kept:,} kept"
            lines.append(f"{name:<10} {split.samples_before:,} -> {split.samples_after:,} samples ({change:+,}); {shards}")
        lines += [f"dropped    {reason}: {before:,} -> {after:,}" for reason, (before, after) in self.dropped.items()]
        lines.append(
            f"keys       {_shown('added', self.num_keys_added, self.keys_added)}; {_shown('removed', self.num_keys_removed, self.keys_removed)}"
        )
        lines.append(f"tokenizer  {'the same' if self.tokenizer_is_same else 'ANOTHER: a model of one does not fit the other'}")
        return lines


def diff(storage: Storage, before: Manifest, after: Manifest) -> Diff:
    """Compares two generations. Reads the indexes of the shards that only one of them has.

    Raises:
        UserError: such an index is missing or damaged.
    """
    splits = {name: _compare_split(before, after, name) for name in dict.fromkeys([*before.splits, *after.splits])}
    old, new = _shards(before), _shards(after)
    gone = _keys(storage, [shard for name, shard in old.items() if name not in new])
    come = _keys(storage, [shard for name, shard in new.items() if name not in old])
    removed, added = np.setdiff1d(gone, come), np.setdiff1d(come, gone)
    reasons = sorted({*before.counts.dropped, *after.counts.dropped})
    dropped = {reason: (before.counts.dropped.get(reason, 0), after.counts.dropped.get(reason, 0)) for reason in reasons}
    return Diff(
        before=before.generation,
        after=after.generation,
        settings=tuple(differences(stored_identity(before.config), stored_identity(after.config))),
        inputs_added=tuple(text for text in after.inputs if text not in before.inputs),
        inputs_removed=tuple(text for text in before.inputs if text not in after.inputs),
        lists_changed=tuple(path for path in sorted({*before.lists, *after.lists}) if before.lists.get(path) != after.lists.get(path)),
        splits=splits,
        dropped={reason: pair for reason, pair in dropped.items() if pair[0] != pair[1]},
        tokenizer_is_same=before.tokenizer.sha256 == after.tokenizer.sha256,
        num_keys_added=len(added),
        num_keys_removed=len(removed),
        keys_added=tuple(key.decode() for key in added[:NUM_EXAMPLES].tolist()),
        keys_removed=tuple(key.decode() for key in removed[:NUM_EXAMPLES].tolist()),
    )


def what_changed(base: Manifest | None, manifest: Manifest) -> str:
    """A few words on a generation against the one that it continues, from the two manifests alone."""
    if base is None:
        return "" if manifest.base is None else f"generation {manifest.base} was deleted"
    parts = []
    for name in dict.fromkeys([*base.splits, *manifest.splits]):
        split = _compare_split(base, manifest, name)
        if split.samples_after != split.samples_before:
            parts.append(f"{name} {split.samples_after - split.samples_before:+,}")
    old, new = _shards(base), _shards(manifest)
    if old.keys() != new.keys():
        parts.append(f"shards +{len(new.keys() - old.keys()):,} -{len(old.keys() - new.keys()):,}")
    if base.tokenizer.sha256 != manifest.tokenizer.sha256:
        parts.append("another tokenizer")
    settings = [text.partition(":")[0] for text in differences(stored_identity(base.config), stored_identity(manifest.config))]
    if settings:
        parts.append(f"{', '.join(settings[:3])}{' ...' if len(settings) > 3 else ''} changed")
    return "; ".join(parts) or "the same content"


def _compare_split(before: Manifest, after: Manifest, name: str) -> SplitChange:
    old = {shard.name: shard for shard in before.splits[name].shards} if name in before.splits else {}
    new = {shard.name: shard for shard in after.splits[name].shards} if name in after.splits else {}
    return SplitChange(
        samples_before=sum(shard.num_samples for shard in old.values()),
        samples_after=sum(shard.num_samples for shard in new.values()),
        shards_added=tuple(shard for shard in new if shard not in old),
        shards_removed=tuple(shard for shard in old if shard not in new),
        num_shards_kept=len(old.keys() & new.keys()),
    )


def _shards(manifest: Manifest) -> dict[str, ShardInfo]:
    return {shard.name: shard for split in manifest.splits.values() for shard in split.shards}


def _keys(storage: Storage, shards: Sequence[ShardInfo]) -> np.ndarray:
    """All keys of these shards, bytes `S*`."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        found = list(pool.map(lambda shard: ShardIndex.load(storage, shard.name, sha256=shard.index_sha256).keys, shards))
    return np.concatenate([np.empty(0, dtype="S1"), *found])


def _shown(word: str, number: int, examples: Sequence[str]) -> str:
    return f"{number:,} {word}" + (f" ({', '.join(examples)}{', ...' if number > len(examples) else ''})" if examples else "")
