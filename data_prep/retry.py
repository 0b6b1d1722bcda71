"""`jetway retry`: a second chance for samples that failed, into new full shards and a new generation; published shards stay as they are."""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from configs.errors import ConfigError, UserError
from configs.loader import apply_overrides, build_config
from data_prep import ledger
from data_prep.config import PrepConfig, identity, stored_identity
from data_prep.lease import only_writer
from data_prep.ledger import LedgerFile, ledger_path
from data_prep.plan import Plan, Span, differences, group, plans_of
from data_prep.prepare import (
    begin,
    check_settings,
    clean_up,
    finish,
    next_generation,
    num_numbered,
    refuse_another_base,
    same_settings,
    unfinished_plan,
)
from data_prep.reasons import CAN_HEAL, is_reason, matches
from data_prep.run import summary
from data_prep.schema import Manifest
from data_prep.storage import LocalStorage, Storage, open_storage

logger = logging.getLogger(__name__)

NUM_THREADS = 16
"""Ledger files read at once: on an object store each costs a round trip."""


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway retry`."""
    parser = argparse.ArgumentParser(
        prog="jetway retry",
        description="Try samples again that failed, for example because a server was down; what succeeds becomes a new generation.",
        epilog=f"Without --reason: {','.join(CAN_HEAL)}. `jetway stats DATASET` shows how many samples failed for which reason.",
    )
    parser.add_argument("data_set", metavar="DATASET", help="folder or s3:// prefix")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of speed and place, such as download.timeout_s=60 or ray.num_cpus=4"
    )
    parser.add_argument("--reason", help="reasons to try again, comma-separated; 4xx and 5xx stand for all such answers")
    parser.add_argument("--from-generation", type=int, help="the generation to continue (default: the newest)")
    parser.add_argument("--dry-run", action="store_true", help="say how many samples would be tried again; write nothing")
    arguments = parser.parse_intermixed_args(argv)
    reasons = parse_reasons(arguments.reason)
    storage = open_storage(arguments.data_set)
    if arguments.dry_run:
        base = Manifest.load(storage, arguments.from_generation)
        plan, found = retry_plan(storage, base, reasons)
        named = ", ".join(f"{reason} {number:,}" for reason, number in sorted(found.items()))
        print(f"would try {plan.num_samples:,} samples again ({named or 'none fails for these reasons'}), in {len(plan.tasks):,} tasks")
        return 0
    manifest, worked = retry(arguments.data_set, reasons, arguments.settings, from_generation=arguments.from_generation)
    if not worked:
        print(f"no sample of {arguments.data_set} fails for {', '.join(reasons)}: nothing to do")
    print(summary(manifest))
    return 0


def parse_reasons(text: str | None) -> tuple[str, ...]:
    """The reasons of `--reason`.

    Raises:
        UserError: a word that is no reason.
    """
    found = tuple(sorted({word.strip() for word in text.split(",") if word.strip()})) if text is not None else CAN_HEAL
    unknown = [word for word in found if not is_reason(word)]
    if unknown or not found:
        got = ", ".join(unknown) or "none"
        raise UserError("unknown reason", got=got, expected="dns, timeout, connection, http_404, 4xx, 5xx, ...", fix="see `jetway stats DATASET`")
    return found


def retry(output: str, reasons: Sequence[str], overrides: Sequence[str] = (), *, from_generation: int | None = None) -> tuple[Manifest, bool]:
    """Tries the samples again that fail for one of `reasons`, or finishes such a pass that was interrupted.

    Args:
        output: the data set.
        reasons: of `data_prep.reasons`, with `4xx` and `5xx`.
        overrides: `key=value` of settings that do not decide the bytes.
        from_generation: the generation to continue; None is the newest.

    Returns:
        The newest manifest, and whether any sample failed for these reasons.

    Raises:
        UserError: no data set, another run is writing it, an unfinished generation of another kind, or settings that may not change.
    """
    storage = open_storage(output)
    base = Manifest.load(storage, from_generation)
    config = _config(storage, base, output, overrides)
    lists = check_settings(config)
    with only_writer(storage) as lease:
        if isinstance(storage, LocalStorage):
            storage.clear_scratch()
        plan = unfinished_plan(storage)
        if plan is None:
            clean_up(config, storage)
            base = Manifest.load(storage, from_generation)  # again: another run may have published while we had no lease
            plan, _ = retry_plan(storage, base, reasons)
            plan = replace(plan, lists=lists)
            if not plan.tasks:
                return base, False
            begin(plan, storage)
        elif plan.action != "retry" or set(plan.tasks[0].reasons) != set(reasons):
            got = f"--reason {','.join(plan.tasks[0].reasons)}" if plan.action == "retry" else "`jetway prep`"
            raise UserError(f"{storage.url} holds an unfinished generation {plan.generation}", got=got, fix="finish it with the same command first")
        else:
            refuse_another_base(plan, from_generation, storage)
            plan = same_settings(plan, config, lists, storage)
        return finish(config, plan, storage, lease), True


def retry_plan(storage: Storage, base: Manifest, reasons: Sequence[str]) -> tuple[Plan, Counter[str]]:
    """The plan of a second-chance pass on `base` (perhaps without a task), and how many samples it tries, by reason."""
    plans = plans_of(storage, base.generation)[::-1]
    if not plans:
        raise UserError(f"{storage.url} holds no plan of generation {base.generation}", expected="a data set that `jetway prep` made")
    spans = _histories(plans)
    wanted = frozenset(reasons)

    def count(span: Span) -> Counter[str]:
        numbers = range(span.first_sample, span.first_sample + span.part.count)
        own = set(span.part.rows or range(span.part.count))
        found = ledger.failing(storage, span.history, numbers).values()
        return Counter(failure.reason for failure in found if matches(failure.reason, wanted) and failure.number - span.first_sample in own)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        counted = list(tqdm(pool.map(count, spans), total=len(spans), desc="ledger", unit="input", disable=len(spans) < 1000))
    failing = [(span, sum(counts.values())) for span, counts in zip(spans, counted, strict=True) if counts]
    size = int(base.config["samples_per_shard"])
    plan = replace(
        plans[-1],
        generation=next_generation(storage),
        action="retry",
        base=base.generation,
        first_sample=num_numbered(storage, base),
        tasks=group([span for span, _ in failing], size, [number for _, number in failing], reasons),
    )
    return plan, sum(counted, Counter())


def _histories(plans: Sequence[Plan]) -> list[Span]:
    """Every span that the plans (oldest first) have ever prepared, with the ledger files that tell what became of it."""
    spans: dict[tuple[Any, ...], Span] = {}
    for plan in plans:
        for task in plan.tasks:
            file = LedgerFile(path=ledger_path(plan.generation, task.number), retried=task.reasons)
            for span in task.spans:
                # With the rows: what a table has grown by lies in a slice that begins where that of the rows before begins.
                name = (span.first_sample, span.part.path, span.part.start, span.part.rows)
                known = spans.get(name)
                spans[name] = replace(span, history=(*(known.history if known else ()), file))
    return list(spans.values())


def _config(storage: Storage, base: Manifest, output: str, overrides: Sequence[str]) -> PrepConfig:
    """The settings of the generation to be continued, with changes to those that do not decide the bytes."""
    plans = plans_of(storage, base.generation)
    values = {**(plans[0].settings if plans else {}), "output": output}
    apply_overrides(values, overrides)
    config = build_config(PrepConfig, values, source=f"the settings of {output}")
    if changed := differences(stored_identity(base.config), identity(config)):
        raise ConfigError(
            "a second-chance pass cannot change what the data set holds", got="; ".join(changed), expected="settings of `download` and `ray`"
        )
    return config
