"""What `jetway prep` does: decide which generation is to be made, and make it.

An output without a data set gets generation 1 of all inputs. An unfinished generation is finished first, whatever the inputs hold by now.
On a finished data set, what the inputs have gained becomes the next generation; when they have gained nothing, there is nothing to do.
"""

import logging
import os
from dataclasses import replace

from configs.errors import UserError
from data_prep.build import Lease, build_generation
from data_prep.config import PrepConfig, identity, identity_hash, stored_identity
from data_prep.dedup.evaluation import plan_evaluation
from data_prep.filters.row import RowFilter, list_digests
from data_prep.lease import only_writer
from data_prep.ledger import LEDGER
from data_prep.part import PARTS
from data_prep.plan import PLANS, Plan, differences, grow_plan, make_plan, plan_path, planned, settings
from data_prep.schema import Manifest, generations
from data_prep.scoring import load_scorer
from data_prep.storage import LocalStorage, Storage, open_storage
from data_prep.takedown import apply_stored_rules, takedown_rules
from data_prep.tokenizer import check_given_model

logger = logging.getLogger(__name__)


def prepare(config: PrepConfig, *, from_generation: int | None = None) -> tuple[Manifest, bool]:
    """Makes the data set of `config`, finishes it, or adds what its inputs have gained.

    Args:
        config: the run.
        from_generation: the generation to continue; None is the newest.

    Returns:
        The newest manifest, and whether anything had to be done.

    Raises:
        UserError: unusable input, an output of another configuration or in use by another run, a full disk, or not one usable sample.
    """
    storage = open_storage(config.output)
    lists = check_settings(config)
    untouched = not planned(storage) and not generations(storage)
    fresh = make_plan(config, lists=lists) if untouched else None  # before anything is written: the input may be unusable
    with only_writer(storage) as lease:
        if isinstance(storage, LocalStorage):
            storage.clear_scratch()
        plan = unfinished_plan(storage)
        if plan is not None:
            refuse_another_base(plan, from_generation, storage)
            plan = same_settings(plan, config, lists, storage)
            if plan.action == "retry":
                logger.warning("finishing the second-chance pass of generation %d first", plan.generation)
        else:
            clean_up(config, storage)
            plan = growth(config, storage, from_generation, lists) if generations(storage) else fresh or make_plan(config, lists=lists)
            if plan is None:
                return Manifest.load(storage), False
            begin(plan, storage)
        return finish(config, plan, storage, lease), True


def begin(plan: Plan, storage: Storage) -> None:
    """Stores the plan of a new generation. The caller is the only writer.

    What an earlier attempt at a generation of this number left (it found no usable sample, or its plan was deleted to give it up) goes
    first: its failures and parts are of other samples.
    """
    for leftover in (f"{PARTS}/", f"{LEDGER}/{plan.generation:06d}/", f"dropped/{plan.generation:06d}/", f"stats/{plan.generation:06d}"):
        _delete(storage, leftover)
    plan.dump(storage)


def clean_up(config: PrepConfig, storage: Storage) -> None:
    """Does what is left to do where a run was killed after its manifest. The caller is the only writer, and nothing is unfinished."""
    published = set(generations(storage))
    leftovers = {path.split("/")[1] for path in storage.list(f"{PARTS}/")}
    for number in sorted(int(name) for name in leftovers if name.isdecimal() and int(name) in published):
        _apply_takedowns(config, storage, number)
    _delete(storage, f"{PARTS}/")


def finish(config: PrepConfig, plan: Plan, storage: Storage, lease: Lease) -> Manifest:
    """Makes the generation of a stored plan and cleans up behind it."""
    manifest = build_generation(absolute(config), plan, storage, lease, takedowns=takedown_rules(storage))
    _apply_takedowns(config, storage, manifest.generation)
    _delete(storage, f"{PARTS}/")
    if isinstance(storage, LocalStorage):
        storage.clear_scratch()
    return manifest


def check_settings(config: PrepConfig) -> dict[str, str]:
    """Looks at everything that the settings name, so that it fails now and not hours later; returns the digests of the lists.

    Raises:
        UserError: a tokenizer model, list, scorer or evaluation set that cannot be used.
    """
    check_given_model(config.tokenizer)
    plan_evaluation(config)
    if config.filters.scorer is not None:
        load_scorer(config.filters.scorer)
    RowFilter.from_config(config.filters)
    return list_digests(config.filters)


def unfinished_plan(storage: Storage) -> Plan | None:
    """The plan of a generation that was begun and has no manifest yet."""
    newest = max(generations(storage), default=0)  # a plan may outlive its manifest, which goes after a compaction
    open_plans = [number for number in planned(storage) if number > newest]
    return Plan.load(storage, open_plans[-1]) if open_plans else None


def next_generation(storage: Storage) -> int:
    """The number of the next generation."""
    return max([0, *planned(storage), *generations(storage)]) + 1


def num_numbered(storage: Storage, base: Manifest) -> int:
    """Samples numbered so far, also by generations that `base` does not continue: a key is never given twice."""
    return max(base.num_planned, Manifest.load(storage).num_planned)


def absolute(config: PrepConfig) -> PrepConfig:
    """The configuration for workers, whose current folder may be another. The stored one keeps the paths as they were given."""

    def full(path: str | None) -> str | None:
        return os.path.abspath(path) if path and "://" not in path else path

    filters = config.filters
    return replace(
        config,
        output=full(config.output) or "",
        tokenizer=replace(config.tokenizer, model_file=full(config.tokenizer.model_file)),
        dedup=replace(config.dedup, evaluation=tuple(full(path) or "" for path in config.dedup.evaluation)),
        filters=replace(
            filters,
            blocked_urls=full(filters.blocked_urls),
            blocked_domains=full(filters.blocked_domains),
            blocked_text=full(filters.blocked_text),
            takedown=full(filters.takedown),
        ),
    )


def same_settings(plan: Plan, config: PrepConfig, lists: dict[str, str], storage: Storage) -> Plan:
    """The stored plan, if it is of this configuration."""
    changed = differences(stored_identity(plan.config), identity(config))
    if changed and plan.base is None and all(change.startswith("tokenizer.") for change in changed):
        # The tokenizer comes last: its settings may be mended as long as nothing is published.
        plan = replace(plan, config=identity(config), config_hash=identity_hash(config), settings=settings(config))
        storage.put_bytes(plan_path(plan.generation), plan.to_bytes())
    elif changed:
        raise UserError(
            f"{storage.url} holds an unfinished generation {plan.generation} of another configuration",
            got="; ".join(changed),
            expected="the settings it was begun with (old -> new)",
            fix="choose another output, or go back to the old settings",
        )
    if changed_lists := differences(plan.lists, lists):
        raise UserError(
            f"a list has changed since generation {plan.generation} of {storage.url} was begun",
            got="; ".join(changed_lists),
            expected="the same content until the generation is finished",
            fix="restore it, finish, then run again with the new one",
        )
    return plan


def growth(config: PrepConfig, storage: Storage, from_generation: int | None, lists: dict[str, str]) -> Plan | None:
    """The plan of what the inputs have gained since a finished generation; None if that is nothing."""
    base = Manifest.load(storage, from_generation)
    changed = differences(stored_identity(base.config), identity(config))
    if changed:
        raise UserError(
            f"{storage.url} was made with another configuration",
            got="; ".join(changed),
            expected="the settings of the first run (old -> new)",
            fix="choose another output, or go back to the old settings",
        )
    try:
        first = num_numbered(storage, base)
        plan = grow_plan(config, storage, generation=next_generation(storage), base=base.generation, first_sample=first, lists=lists)
    except UserError as error:
        if not any(os.path.exists(path) or "://" in path for path in config.inputs):
            logger.info("the input is gone, as it may be: %s", error.what)
            return None
        raise
    if not plan.tasks:
        return None
    logger.info("%d new samples since generation %d", plan.num_samples, base.generation)
    return plan


def _apply_takedowns(config: PrepConfig, storage: Storage, generation: int) -> None:
    """Takes down what got into a new generation all the same: parts that a killed run wrote before a takedown were not judged by it."""
    if takedown_rules(storage):
        apply_stored_rules(storage, ray=config.ray, generation=generation)


def refuse_another_base(plan: Plan, from_generation: int | None, storage: Storage) -> None:
    if from_generation is not None and plan.base != from_generation:
        raise UserError(
            f"{storage.url} holds an unfinished generation {plan.generation} on generation {plan.base}",
            got=f"--from-generation {from_generation}",
            fix=f"run once without --from-generation, or delete {PLANS}/{plan.generation:06d}.json to give it up",
        )


def _delete(storage: Storage, prefix: str) -> None:
    storage.delete_many(storage.list(prefix))
    if isinstance(storage, LocalStorage):
        storage.remove_empty(prefix)
