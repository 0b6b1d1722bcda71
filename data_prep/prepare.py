"""From inputs to a published data set: plan -> parts -> shards -> tokenizer -> manifest.

Every step leaves a record on the output. A rerun takes up what is there and ends with the same bytes as a run that was never
interrupted. The manifest comes last: before it, there is no data set.
"""

import fcntl
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from tqdm import tqdm

from configs.errors import UserError
from data_prep.cluster import ray_session, run_tasks
from data_prep.config import PrepConfig, identity, identity_hash
from data_prep.plan import PLAN_FILE, Plan, Task, differences, make_plan
from data_prep.process import PARTS, PartRecord, finished_parts, finished_shards, plan_shards, write_part, write_shard
from data_prep.reasons import explain
from data_prep.schema import SPLITS, Counts, ImageInfo, Manifest, ShardInfo, Split, TokenizerInfo, generations
from data_prep.storage import LocalStorage, Storage, open_storage, writing
from data_prep.tokenizer import check_given_model, make_tokenizer

logger = logging.getLogger(__name__)

LEDGER = "ledger"


def prepare(config: PrepConfig) -> tuple[Manifest, bool]:
    """Makes the data set of `config`, or finishes or finds the one that is there.

    Returns:
        The manifest, and whether anything had to be done.

    Raises:
        UserError: unusable input, an output of another configuration, a full disk, or not one usable sample.
    """
    storage = open_storage(config.output)
    fresh = None if Plan.load(storage) else make_plan(config)  # before anything is written: the input may be unusable
    if not generations(storage):
        check_given_model(config.tokenizer)  # not first hours later, when it is needed
    with _only_writer(storage):
        if isinstance(storage, LocalStorage):
            storage.clear_scratch()
        plan = _agree_on_plan(config, storage, fresh)
        if generations(storage):
            manifest = Manifest.load(storage)
            _delete(storage, f"{PARTS}/")
            _report_changed_input(plan, config)
            return manifest, False
        located = _absolute(config)
        with ray_session(config.ray):
            parts = _make_parts(plan, located, storage)
            _require_samples(parts, storage)
            splits = _make_shards(parts, located, storage)
            tokenizer = _make_tokenizer(splits, located)
        manifest = _manifest(plan, parts, splits, tokenizer, config)
        manifest.dump(storage)
        _delete(storage, f"{PARTS}/")
        if isinstance(storage, LocalStorage):
            storage.clear_scratch()
        return manifest, True


def _agree_on_plan(config: PrepConfig, storage: Storage, fresh: Plan | None) -> Plan:
    """The stored plan, if it is of this configuration; on an untouched output, the fresh one, now stored."""
    stored = Plan.load(storage)
    if stored is None:
        if generations(storage) or fresh is None:
            raise UserError(f"{storage.url} holds a data set without {PLAN_FILE}", fix="choose another output")
        _delete(storage, f"{PARTS}/")  # of a run that found no usable sample
        _delete(storage, f"{LEDGER}/")
        fresh.dump(storage)
        return fresh
    changed = differences(stored.config, identity(config))
    if changed and not generations(storage) and all(change.startswith("tokenizer.") for change in changed):
        # The tokenizer comes last: its settings may be mended as long as nothing is published.
        stored = replace(stored, config=identity(config), config_hash=identity_hash(config))
        stored.dump(storage)
    elif changed:
        raise UserError(
            f"{storage.url} was made with another configuration",
            got="; ".join(changed),
            expected="the settings of the first run (old -> new)",
            fix="choose another output, or go back to the old settings",
        )
    return stored


def _make_parts(plan: Plan, config: PrepConfig, storage: Storage) -> list[PartRecord]:
    records = finished_parts(storage)
    remaining = [_absolute_task(task) for task in plan.tasks if task.number not in records]
    if records:
        logger.info("%d of %d tasks were finished by an earlier run", len(records), len(plan.tasks))
    done = sum(record.read for record in records.values())
    with tqdm(total=plan.num_samples, initial=done, desc="images", unit="img", smoothing=0.1) as progress:
        dropped = sum(record.read - record.kept for record in records.values())
        for record in run_tasks(write_part, [(config, task) for task in remaining], config.ray):
            records[record.number] = record
            dropped += record.read - record.kept
            progress.set_postfix(dropped=dropped, refresh=False)
            progress.update(record.read)
    return [records[task.number] for task in plan.tasks]


def _require_samples(parts: Sequence[PartRecord], storage: Storage) -> None:
    """Raises if nothing was kept, and forgets the attempt, so that a run on the mended input starts afresh."""
    if any(part.kept for part in parts):
        return
    dropped = _dropped(parts)
    _delete(storage, f"{PARTS}/")
    storage.delete(PLAN_FILE)
    raise UserError(
        "not one sample of the input is usable: no data set was written",
        got=", ".join(f"{number} x {reason} ({explain(reason)})" for reason, number in dropped.items()),
        expected="images with captions",
        fix=f"see {storage.url}/{LEDGER}/ for every file",
    )


def _make_shards(parts: Sequence[PartRecord], config: PrepConfig, storage: Storage) -> dict[str, Split]:
    planned = plan_shards(parts, config)
    finished = finished_shards(storage)
    remaining = [(config, shard) for shard in planned if shard.name not in finished]
    with tqdm(total=len(planned), initial=len(planned) - len(remaining), desc="shards", unit="shard") as progress:
        for info in run_tasks(write_shard, remaining, config.ray):
            finished[info.name] = info
            progress.update()
    splits = {}
    for split in SPLITS:
        shards = tuple(finished[shard.name] for shard in planned if shard.is_heldout == (split == "heldout"))
        splits[split] = Split(num_samples=sum(shard.num_samples for shard in shards), shards=shards)
    if config.heldout_permille and not splits["heldout"].shards:
        logger.warning(
            "the held-out split is empty: %d samples are too few for heldout_permille=%d; evaluation will need another set",
            splits["train"].num_samples,
            config.heldout_permille,
        )
    return splits


def _make_tokenizer(splits: dict[str, Split], config: PrepConfig) -> TokenizerInfo:
    arguments: tuple[str, tuple[ShardInfo, ...], object] = (config.output, splits["train"].shards, config.tokenizer)
    with tqdm(total=1, desc="tokenizer", unit="model") as progress:
        (tokenizer,) = run_tasks(make_tokenizer, [arguments], config.ray)
        progress.update()
    if config.tokenizer.model_file is None and tokenizer.num_pieces != config.tokenizer.vocab_size:
        logger.warning(
            "the captions support a tokenizer of %d pieces, not tokenizer.vocab_size=%d: train with model.text.num_pieces=%d",
            tokenizer.num_pieces,
            config.tokenizer.vocab_size,
            tokenizer.num_pieces,
        )
    return tokenizer


def _manifest(plan: Plan, parts: Sequence[PartRecord], splits: dict[str, Split], tokenizer: TokenizerInfo, config: PrepConfig) -> Manifest:
    image = config.image
    return Manifest(
        generation=1,
        config=plan.config,
        config_hash=plan.config_hash,
        image=ImageInfo(resolution=image.resolution, channels=image.channels, extension=image.format),
        splits=splits,
        tokenizer=tokenizer,
        counts=Counts(read=sum(part.read for part in parts), kept=sum(part.kept for part in parts), dropped=_dropped(parts)),
    )


def _dropped(parts: Sequence[PartRecord]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part.dropped)
    return dict(sorted(total.items()))


def _report_changed_input(plan: Plan, config: PrepConfig) -> None:
    """A finished data set stays as it is; say so when the input has changed since."""
    try:
        now = make_plan(config)
    except UserError:
        return  # the input is gone, as it may be
    if now.digest != plan.digest:
        logger.warning(
            "the input has changed since this data set was made (%d samples then, %d now): to use it, prepare it to another output",
            plan.num_samples,
            now.num_samples,
        )


def _absolute(config: PrepConfig) -> PrepConfig:
    """The configuration for workers, whose current folder may be another. The stored one keeps the paths as they were given."""
    model = config.tokenizer.model_file
    tokenizer = replace(config.tokenizer, model_file=os.path.abspath(model) if model else None)
    return replace(config, output=config.output if "://" in config.output else os.path.abspath(config.output), tokenizer=tokenizer)


def _absolute_task(task: Task) -> Task:
    return replace(task, slices=tuple(replace(part, path=os.path.abspath(part.path)) for part in task.slices))


def _delete(storage: Storage, prefix: str) -> None:
    for path in storage.list(prefix):
        storage.delete(path)
    if isinstance(storage, LocalStorage):
        storage.remove_empty(prefix)


@contextmanager
def _only_writer(storage: Storage) -> Iterator[None]:
    """Keeps two runs on this machine from writing one local data set. (On an object store they would write the same bytes.)"""
    if not isinstance(storage, LocalStorage):
        yield
        return
    with writing(storage.url):
        storage.root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(storage.root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {storage.url}", fix="wait for it, or choose another output") from None
        yield
    finally:
        os.close(descriptor)
