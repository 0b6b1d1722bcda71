"""One run: data, engine, checkpoints, evaluation and records, step after step, on every rank alike."""

import contextlib
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from configs.errors import UserError
from configs.loader import to_dict
from model.batch import Batch
from model.stats import summarise
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.ranks import Ranks
from pipeline.checkpoint.reader import CheckpointReader, open_latest
from pipeline.checkpoint.weights import can_resume, check_architecture
from pipeline.checkpoint.writer import KeepPolicy, SaveFailed, save
from pipeline.config import RunConfig
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.engine import Engine, StepResult, check_forced_kernels
from pipeline.evaluate import evaluate, summary_line
from pipeline.metrics import MetricsMeter, console_line
from pipeline.parallel.agreement import SharedUserError, open_dataset_together, together
from pipeline.parallel.layout import Layout
from pipeline.parallel.stage import as_jetformer
from pipeline.preemption import StopRequest
from pipeline.provenance import git_revision
from pipeline.report.build import build_report
from pipeline.schedule import learning_rate
from pipeline.scoring import Scorer, sum_over_world
from pipeline.showcase import Showcase
from pipeline.tracker import Tracker
from pipeline.trained import TOKENIZER_FILE

logger = logging.getLogger(__name__)

MAX_NAMED_SAMPLES = 8
"""Samples named in the message about a loss that is not finite."""


class DivergenceError(SharedUserError):
    """A loss or gradient is not finite: raised on every rank at the same step, and never saved."""


class Trainer:
    """A run from its configuration (or newest checkpoint) to its last step. Every method is collective over all ranks."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        """Opens data and checkpoint, builds the engine, loads the state to continue from.

        Raises:
            SharedUserError: on every rank, if the data set, the checkpoint or the folder does not fit the run, or a forced kernel cannot run.
        """
        self.config, self.layout = config, layout
        together(layout, lambda: check_forced_kernels(config, layout))
        self.run_dir = Path(config.output_dir)
        reader = self._open_checkpoint()
        resumes = reader is not None and can_resume(reader)
        state: dict[str, Any] = reader.state if reader is not None and resumes else {}
        self.step = reader.step if reader is not None and resumes else 0
        # One that the configuration names is opened as named: if it is not the checkpoint's, loading the state says so.
        generation = config.data.generation if config.data.generation is not None or not resumes else state["data"]["generation"]
        self.dataset = open_dataset_together(layout, config.data.path, generation)
        rank, degree, first = layout.data_rank, layout.data, layout.is_first_stage
        pins = layout.device.type == "cuda"
        self.loader = together(layout, lambda: TrainLoader(config, self.dataset, dp_rank=rank, dp_degree=degree, needs_image=first, pin_memory=pins))
        self.eval_loader = together(layout, lambda: EvalLoader(config, self.dataset, dp_rank=rank, dp_degree=degree, needs_image=first))
        self.engine = Engine(config, layout)
        self.scorer = Scorer(self.engine.stage, layout)
        if reader is not None:
            self._load(reader, state)
        self.tracker = together(layout, lambda: self._open_tracker(resumed=resumes, state=state))
        self.showcase = Showcase(config, self.dataset, self.loader.codec) if layout.is_main and config.eval.num_samples else None
        self.meter = MetricsMeter(config, world_size=layout.world_size, device=layout.device) if layout.is_main else None
        self._saved_step = self.step if resumes else None

    def run(self, stop: StopRequest) -> bool:
        """Trains to `total_steps`, or until `stop` is requested.

        Returns:
            Whether the run is finished (otherwise the same command continues it).

        Raises:
            DivergenceError: a loss or gradient is not finite.
        """
        config, finished = self.config, False
        if self.step >= config.total_steps:
            logger.info("%s has done its %d steps already; raise total_steps to go on", self.run_dir, self.step)
            self._report()
            return True
        self._announce()
        with self.loader, self.eval_loader, self._progress_bar() as bar:
            while not finished:
                self._train_step()
                bar.update()
                finished = self.step >= config.total_steps
                with self._excluded():
                    self._after_step(finished)
                    if not finished and stop.agreed(self.layout.device):
                        self._save(must_succeed=True)
                        logger.info("stopped at step %d (%s): run the same command to continue", self.step, stop.received or "another rank's signal")
                        break
        self._report()
        if self.tracker is not None:
            self.tracker.close()
        return finished

    # One step

    def _train_step(self) -> None:
        step, is_logged = self.step, self._is_due(self.step + 1, self.config.log.every_steps)
        with self._timed("data"):
            batches = [self._to_device(next(self.loader), is_logged) for _ in range(self.engine.num_micro_batches)]
        rate = learning_rate(self.config.optimizer, step, self.config.total_steps)
        result = self.engine.train_step(batches, rate)
        if not result.is_finite:
            raise self._divergence(batches, step)
        self.step += 1
        if self.meter is not None:
            self.meter.step_done()
        if is_logged:
            self._log(result, batches, rate)

    def _to_device(self, batch: Batch, is_logged: bool) -> Batch:
        return dataclasses.replace(batch.to(self.layout.device), log_stats=is_logged)

    def _log(self, result: StepResult, batches: Sequence[Batch], rate: float) -> None:
        """Reduces the metric sums of this step over all ranks, and records and prints them on rank 0."""
        sums = torch.stack([self.engine.take_stats(), self._score_without_noise(batches[0])])
        sums = sum_over_world(sums)
        if not math.isfinite(summarise(sums[0]).get("loss", 0.0)):
            raise self._divergence(batches, self.step - 1)
        captions, cut = self.loader.num_captions, self.loader.num_captions_cut
        if self.meter is None or self.tracker is None:
            return
        clean = summarise(sums[1])
        record = self.meter.record(
            self.step,
            sums[0],
            grad_norm=float(result.grad_norm),
            learning_rate=rate,
            sigma=batches[0].noise.sigma,
            extra={
                **({"image_bits_clean": clean["image_bits"]} if "image_bits" in clean else {}),
                "samples": self.loader.plan.samples_seen(self.step),
                "captions_cut": cut / max(captions, 1),
            },
        )
        self.tracker.log(record)
        logger.info("%s", console_line(record, self.config.total_steps))

    def _score_without_noise(self, batch: Batch) -> torch.Tensor:
        """Metric sums of one micro-batch without RGB noise, dropout and input noise: one forward pass per log step."""
        quiet = dataclasses.replace(batch.noise, sigma=0.0, train=False)
        return self.scorer.score(dataclasses.replace(batch, noise=quiet, drop_prefix=torch.zeros_like(batch.drop_prefix), log_stats=True))

    def _divergence(self, batches: Sequence[Batch], step: int) -> DivergenceError:
        """The error that names samples and step, counted from 1 as on the console; the same on all ranks."""
        terms = self.engine.stage.terms
        suspects = [batch.positions.tolist() for batch, term in zip(batches, terms, strict=False) if not bool(torch.isfinite(term))]
        gathered = Ranks(self.layout.control_group).all_gather([position for positions in suspects for position in positions])
        positions = sorted({position for part in gathered for position in part})
        names = [f"{sample.shard}/{sample.key}" for sample in self.loader.which_samples(step) if sample.position in set(positions)]
        where = f"loss not finite in the micro-batches of positions {_ranges(positions)}" if positions else "every loss is finite, a gradient is not"
        shown = ", ".join(names[:MAX_NAMED_SAMPLES]) + (f" and {len(names) - MAX_NAMED_SAMPLES} more" if len(names) > MAX_NAMED_SAMPLES else "")
        saved = "none saved yet" if self._saved_step is None else f"the newest is of step {self._saved_step}"
        return DivergenceError(
            f"training stopped: not finite at step {step + 1}\n"
            f"  got: {where}{f' ({shown})' if names else ''}\n"
            f"  expected: finite loss and gradients; checkpoints are intact ({saved})\n"
            "  to fix: look at these samples, lower optimizer.learning_rate, or lengthen the warm-up; the same command resumes"
        )

    # Around a step

    def _after_step(self, finished: bool) -> None:
        config = self.config
        if finished or self._is_due(self.step, config.eval.every_steps):
            self._evaluate()
        shows = finished or self._is_due(self.step, config.eval.sample_every_steps)
        # Where no rank holds the whole model, samples are drawn from a checkpoint.
        needs_checkpoint = shows and config.eval.num_samples > 0 and not self.layout.is_alone
        if finished or needs_checkpoint or self._is_due(self.step, config.checkpoint.every_steps):
            self._save(must_succeed=finished)
        if shows and config.eval.num_samples > 0:
            self._show()

    def _evaluate(self) -> None:
        figures = evaluate(self.engine.stage, self.layout, self.eval_loader)
        record = {"step": self.step, **figures, "split": self.config.data.eval_split, "eval_seed": self.config.eval.seed, "weights": "raw"}
        if self.tracker is not None:
            self.tracker.log_eval(record)
            logger.info("step %d evaluated: %s", self.step, summary_line(record))

    def _show(self) -> None:
        if self.showcase is not None and self.tracker is not None:
            if self.layout.is_alone:
                self.showcase.show(as_jetformer(self.engine.stage, self.config.model), self.step, self.tracker)
            elif self._saved_step == self.step:
                path = CheckpointFolder(self.run_dir).step_path(self.step)
                self.showcase.show_checkpoint(path, self.layout.device, self.step, self.tracker)
        Ranks(self.layout.control_group).broadcast(None)  # the others wait here, not in a collective of the next step

    def _save(self, *, must_succeed: bool) -> None:
        """Commits a checkpoint of this step. A disk that refuses costs the checkpoint, not the run, unless the run is about to end."""
        if self._saved_step == self.step:
            return
        state = {
            "config": to_dict(self.config),
            "data": self.loader.state(self.step),
            "adam_step": self.engine.zero.adam_step,
            "wandb_run_id": None if self.tracker is None else self.tracker.wandb_run_id,
            "layout": self.layout.name,
            "git": git_revision() if self.layout.is_main else None,
            "time": time.time(),
        }
        keep = KeepPolicy(keep_last=self.config.checkpoint.keep_last, keep_every_steps=self.config.checkpoint.keep_every_steps)
        try:
            save(self.run_dir, self.step, self.engine.zero.fragments(), state, group=self.layout.control_group, keep=keep)
        except SaveFailed as error:
            if must_succeed:
                raise SharedUserError(str(error)) from None
            logger.warning("step %d: %s\n  training goes on", self.step, error)
        else:
            self._saved_step = self.step

    def _report(self) -> None:
        if self.layout.is_main:
            logger.info("report: %s", build_report(self.run_dir))

    # Start

    def _open_checkpoint(self) -> CheckpointReader | None:
        if not self.config.checkpoint.resume:
            return None
        return together(self.layout, lambda: open_latest(self.run_dir, group=self.layout.control_group))

    def _load(self, reader: CheckpointReader, state: dict[str, Any]) -> None:
        """Takes up a run where it was saved; with no `state`, starts one from the weights of a checkpoint that holds nothing else."""
        stage, config = self.engine.stage, self.config
        together(self.layout, lambda: check_architecture(reader, stage, config=config.model, partial=self.layout.pipe > 1))
        if state:
            together(self.layout, lambda: self.loader.load_state(state["data"], self.step))
            if state["config"].get("seed") != config.seed:
                logger.warning("seed was %s and is %s now: sample order and noise change from here on", state["config"].get("seed"), config.seed)
        else:
            together(self.layout, self._check_tokenizer)
        with reader:
            together(self.layout, lambda: self.engine.zero.load(reader, adam_step=state.get("adam_step")))
        if state:
            logger.info("resuming %s at step %d (saved on %s, now on %s)", self.run_dir, self.step, state.get("layout"), self.layout.name)
        else:
            logger.info("starting %s at step 0 from the weights in %s, which hold no optimiser state: fresh moments", self.run_dir, reader.path)

    def _check_tokenizer(self) -> None:
        """Weights that came with a tokenizer are of no use with another one of the same size."""
        if self.config.data.text == "caption":
            path = self.run_dir / TOKENIZER_FILE
            self.dataset.check_tokenizer(path, otherwise=f"remove {path}: the model then learns the data set's pieces anew")

    def _open_tracker(self, *, resumed: bool, state: dict[str, Any]) -> Tracker | None:
        """Rank 0's log files, and a copy of the tokenizer, without which nobody can use the model."""
        if not self.layout.is_main:
            return None
        tracker = Tracker(
            self.run_dir,
            self.config,
            resumed_step=self.step if resumed else None,
            wandb_run_id=state.get("wandb_run_id"),
            session={
                "layout": self.layout.name,
                "world_size": self.layout.world_size,
                "generation": self.dataset.manifest.generation,
                "takedown": self.dataset.tombstones.number,
            },
        )
        if self.config.data.text == "caption":
            try:
                (self.run_dir / TOKENIZER_FILE).write_bytes(self.dataset.read_tokenizer())
            except OSError as error:
                raise UserError("the run's folder cannot be written", got=error, fix="choose another output_dir") from None
        return tracker

    def _announce(self) -> None:
        num = self.loader.num_samples
        epochs = self.config.total_steps * self.config.data.global_batch_size / num
        left_out = self.loader.num_excluded
        excluded = f", {left_out} of them taken down (takedown {self.dataset.tombstones.number})" if left_out else ""
        logger.info("%s: %d samples%s, %.1f epochs; %s", self.config.name, num, excluded, epochs, self.engine.describe())

    # Small helpers

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.total_steps)

    def _timed(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.meter is None else self.meter.timed(name)

    def _excluded(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.meter is None else self.meter.excluded()

    @contextlib.contextmanager
    def _progress_bar(self) -> "Iterator[tqdm[Any]]":
        """A bar on rank 0's terminal, above which the log lines scroll; nothing where the output is a file."""
        is_shown = self.layout.is_main and sys.stderr.isatty()
        with contextlib.ExitStack() as stack:
            if is_shown:
                stack.enter_context(logging_redirect_tqdm())
            yield stack.enter_context(tqdm(total=self.config.total_steps, initial=self.step, desc="training", unit="step", disable=not is_shown))


def _ranges(positions: Sequence[int]) -> str:
    """Sorted integers as `3-5, 9`."""
    parts: list[list[int]] = []
    for position in positions:
        if parts and position == parts[-1][1] + 1:
            parts[-1][1] = position
        else:
            parts.append([position, position])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)
