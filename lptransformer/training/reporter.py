"""What a run says and writes while it trains: rows of metrics, the progress line, messages, which checkpoints stay. On
global rank 0, of the reports of all processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lptransformer.config import pretrained
from lptransformer.config.checks import product_dtype
from lptransformer.config.epochs import steps
from lptransformer.config.schema import Config
from lptransformer.console import bar, megabytes
from lptransformer.data.prepare import Prepared
from lptransformer.engine.interface import Report, TrainingEngine, UpdateResult
from lptransformer.engine.p2p import Control
from lptransformer.errors import LostProcessError, RunError, TakenOverError, TrainingError
from lptransformer.methods.heads import label
from lptransformer.models.blueprint import Blueprint
from lptransformer.planning.devices import Cluster, Device, load_devices
from lptransformer.planning.disk import checkpoint_bytes
from lptransformer.planning.dry_run import print_stages
from lptransformer.planning.plan import copies_remark
from lptransformer.run_folder import checkpoint, history, layout, retention
from lptransformer.run_folder.loss_plot import plot_losses
from lptransformer.run_folder.metrics import Aggregator, MetricsRow, SavedReport, TraceReport, text_counts
from lptransformer.run_folder.metrics_log import MetricsWriter, read_metrics
from lptransformer.run_folder.trace import TraceWriter
from lptransformer.training.progress import Progress


def in_force(config: Config, blueprint: Blueprint) -> str:
    """One line on how a pretrained model is trained further, and what else there is."""
    train, sizes = config.train, [span.last - span.first + 1 for span in blueprint.objective.usual.spans]
    heads = f", heads {label(blueprint.head)}" if len(blueprint.objective.heads) > 1 else ""
    inside = [
        below.last_block
        for below, above in itertools.pairwise(blueprint.stages)
        if below.pipeline_rank != above.pipeline_rank and any(p.crossing(above.index) for p in blueprint.phases)
    ]
    crossed = f"; gradients cross from rank to rank behind the blocks {inside}" if inside else ""
    return (
        f"from {config.model.pretrained}: {config.objective.name}, losses over {sizes} blocks{heads}; learning rate "
        f"{train.learning_rate:g}, {train.lr_scheduler}, warm-up {train.warmup_steps}, weight decay "
        f"{config.optimizer.weight_decay:g}{crossed}. By backprop: objective.name=backprop (delayed: one update late)"
    )


def known(device: torch.device) -> Device | None:
    """A device as planning/devices.yaml knows it by its name; of a CPU nobody does."""
    return load_devices().called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The FLOP/s of a device at its peak, where it is known."""
    listed = known(device)
    return listed.flops.get(dtype) if listed else None


def copies_at_the_start(config: Config, blueprint: Blueprint, device: torch.device) -> str | None:
    """`copies_remark` on a device that is known, as if all processes were on one host and did nothing but compute."""
    listed, dtype = known(device), product_dtype(config)
    if listed is None or dtype not in listed.flops:
        return None
    cluster = Cluster(listed, 1, config.parallel.pipeline * config.parallel.data, listed.intra_link)
    return copies_remark(config, blueprint, cluster, listed.compute_seconds(blueprint.process_flops(1), dtype))


class Reporter:
    """Shows and writes the reports of all processes, on global rank 0; on the others it does nothing."""

    def __init__(
        self,
        engine: TrainingEngine,
        config: Config,
        data: Prepared,
        folder: Path,
        resume: bool,
        until: int | None = None,
        said: Sequence[str] = (),
    ) -> None:
        """`said` are lines to begin with."""
        self.open = engine.world.global_rank == 0
        self.steps = steps(config)
        self.last_update = until or self.steps  # an early stop makes it smaller
        if not self.open:
            return
        engine.before_commit, engine.after_commit, engine.on_problem = self.sync, self.prune, self.problem
        self.config, self.first_update, self.until = config, engine.update, until
        self.watched = config.checkpoint.keep_best or next(iter(config.data.valid_names), None)
        self.owed = layout.owed(folder, config, engine.update, until)
        self.folder, self.may_commit = folder, engine.may_commit
        self.stages = [(plan.index, plan.first_block, plan.last_block) for plan in engine.stages]
        self.writer = MetricsWriter(folder, engine.update if resume else None, config.run.trackers)
        self.losses = retention.losses_of(self.writer.kept, self.watched)
        newest = next((row for row in reversed(self.writer.kept) if "stages" in row), None)
        self.writer.kept = []  # of a long run they take much memory
        after, tokens, seconds = (newest["update"], newest["tokens"], newest["seconds"]) if newest else (0, 0, 0.0)
        # Where rows are lost their tokens still follow from the data: the head that sees most counts.
        fraction = max(engine.blueprint.head_fractions.get(plan.index, 1.0) for plan in engine.stages)
        tokens += sum(engine.label_tokens(update, fraction) for update in range(after, engine.update))
        texts = {name: text_counts(token_set.manifest) for name, token_set in data.valid.items()}
        self.aggregator = Aggregator(
            self.stages,
            engine.world.data_size,
            texts,
            update=engine.update,
            tokens=tokens,
            seconds=seconds,
            process_flops=engine.blueprint.process_flops,
            peak_flops=peak_flops(engine.world.device, product_dtype(config)),
        )
        windows = {name: len(token_set) for name, token_set in data.valid.items()}
        at_once = engine.blueprint.micro_batch_size * engine.world.data_size
        self.micro_batches = {name: -(-many // at_once) for name, many in windows.items()}
        self.trace = TraceWriter(folder) if config.run.trace else None
        self.progress = Progress(self.last_update, self.stages)
        print_stages(f"run folder: {folder}", config, engine.blueprint)
        if config.checkpoint.every:
            need, free = checkpoint_bytes(config, engine.blueprint), shutil.disk_usage(folder).free
            what = f"{need.many} checkpoints of {megabytes(need.each)}, {megabytes(need.total)} in all"
            self.progress.message(f"on disk at the end: {what}; {megabytes(free)} are free")
        for line in (*said, self.writer.lost, copies_at_the_start(config, engine.blueprint, engine.world.device)):
            if line:
                self.progress.message(line)
        if config.model.pretrained is not None:
            self.progress.message(in_force(config, engine.blueprint))
        if warning := pretrained.warning(config):
            self.progress.message(warning)

    def __enter__(self) -> Reporter:
        if self.open:
            self.progress.__enter__()
        return self

    def watch(self, update: Callable[[], UpdateResult]) -> UpdateResult:
        """An update; when it is the one that ends the run, what was reported until then is kept."""
        try:
            return update()
        except TrainingError as error:
            self.take(error.reports)
            raise

    @contextlib.contextmanager
    def evaluating(self, name: str) -> Iterator[Callable[[int], None]]:
        """A bar for the evaluation of a validation set, in micro-batches of this replica."""
        total = self.micro_batches[name] if self.open else 0
        console = self.progress.console if self.open else None
        with bar(f"evaluating {name}", total, shown=self.open, console=console) as advance:
            yield advance

    def take(self, reports: Iterable[Report]) -> None:
        if not self.open:
            return
        for report in reports:
            assert not isinstance(report, SavedReport), "the engine keeps those"
            self.may_commit()
            if isinstance(report, TraceReport):
                assert self.trace is not None
                self.trace.write(report)
                continue
            for row in self.aggregator.add(report):
                try:
                    self.writer.write(row)
                except OSError as error:
                    raise TrainingError(f"the metrics in {self.folder} cannot be written: {error}") from error
                self.losses |= retention.losses_of([row], self.watched)
                if "evaluation" in row:
                    self.progress.evaluation(row)
                else:
                    self.progress.update(row)
                    self._report_skips(row)

    def sync(self, reports: list[Report]) -> list[Report]:
        """What came before a checkpoint is written, and outlives a power cut. Nothing is left to take."""
        self.take(reports)
        self.writer.sync()
        return []

    def prune(self) -> None:
        """Checkpoints that nothing keeps go. What cannot be removed is no reason to end."""
        if self.config.checkpoint.keep_last is not None:
            try:
                retention.prune(self.folder, self.config.checkpoint, self.losses)
            except (OSError, RunError) as error:
                self.problem(f"checkpoints that are not kept could not be removed: {error}")

    def check_saved(self, update: int) -> None:
        """Raises TrainingError where the checkpoint of the last update could not be written."""
        if not self.open or update in (saved := checkpoint.complete_updates(self.folder)):
            return
        there = f"the newest is after update {saved[-1]}" if saved else "there is none"
        raise TrainingError(
            f"the run has made {update} updates, and they are not saved ({there}): --resume makes them again"
        )

    def at_the_start(self) -> str:
        """As JSON: the validation sets that are owed an evaluation, and the last update of the run."""
        if self.config.train.patience is not None and self.is_enough(self.first_update):
            self.steps = self.last_update = self.first_update  # it had ended there
        return json.dumps([self.owed, self.last_update])

    def is_enough(self, update: int) -> bool:
        """Whether the evaluation after `update` is the last, because those before it have become no better for
        `train.patience` times."""
        every, patience = self.config.train.eval_every, self.config.train.patience
        if patience is None or not every or update % every:
            return False
        regular = [loss for at, loss in sorted(self.losses.items()) if at % every == 0 and 0 < at < update]
        return retention.early(regular, patience)

    def enough(self, engine: TrainingEngine) -> Control:
        """Whether the next update is the last (`is_enough`). Waits for the evaluation before it, so that nothing
        depends on how long that takes to get here. Raises LostProcessError where it does not come."""
        if not self.open or self.config.train.patience is None:
            return Control.NOTHING
        following, every = engine.update + 1, self.config.train.eval_every
        before = engine.update // every * every
        known = before < self.first_update or (before == self.first_update and self.watched not in self.owed)
        deadline = time.monotonic() + engine.world.timeout.total_seconds()
        while following % every == 0 and before and not known and before not in self.losses and not engine.is_stopping:
            if time.monotonic() > deadline:
                raise LostProcessError(f"the evaluation after update {before} has not come: another process has gone")
            self.take(engine.collect())
            time.sleep(0.01)
        if not self.is_enough(following):
            return Control.NOTHING
        many, last = self.config.train.patience, f"the one after update {following} is the last"
        self.progress.message(f"no better on {self.watched} for {many} evaluations: {last}")
        self.steps = self.last_update = following
        return Control.EVALUATE | Control.SAVE | Control.STOP

    def problem(self, problem: str) -> None:
        self.progress.message(problem)

    def say_what_is_next(self, update: int, complete: bool) -> None:
        """The commands that one types after a run that is complete, or has stopped before its end."""
        if not self.open:
            return
        if complete:
            call = f"{history.program()} {{}} {self.folder}".format
            lines = [f"next: {call('report')}", f"or: {call('export')} OUT"]
        else:
            again = history.command_to_resume() or "the same command with --resume"
            where = "in the last evaluation, " if update >= self.steps else ""
            lines = [f"stopped {where}after update {update} of {self.steps}, saved; go on with: {again}"]
        for line in lines:
            self.progress.message(line)

    def _report_skips(self, row: MetricsRow) -> None:
        for stage in row["stages"]:
            if stage["skipped"]:
                self.progress.message(f"stage {stage['stage']} skipped update {row['update']}: not finite")

    def __exit__(self, *exc: Any) -> None:
        if not self.open:
            return
        self.progress.__exit__(*exc)
        self.writer.close()
        with contextlib.suppress(TakenOverError):
            self.may_commit()
            try:
                rows = read_metrics(self.folder)
                if any("stages" in row for row in rows):
                    plot_losses(rows, self.folder / "loss.png", self.stages)
            except Exception as error:  # a picture: the run is what it is
                self.problem(f"loss.png could not be drawn: {error}")
