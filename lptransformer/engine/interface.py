"""The interface of a training engine: what it takes and gives, whichever engine it is, and what all engines share.

`train_batch() -> UpdateResult`, `eval_batch(name) -> reports`, `save_checkpoint(run)`, `load_checkpoint(run)`,
`request(control)`, `label_tokens` and `close()` are all that training calls; it reads `world`, `update`, `stages`,
`valid`, `blueprint`, `is_stopping` and `cut_short`, and sets `describe_run`, `generation` and `may_commit`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lptransformer.data.token_set import Batch, whole_rounds
from lptransformer.engine.p2p import Control
from lptransformer.engine.process_groups import World, leave, translate_lost_processes
from lptransformer.engine.saving import Commits, Save, agreed_step, say
from lptransformer.errors import DataError, LostProcessError, RunError, TrainingError
from lptransformer.methods.cost import labels_seen
from lptransformer.methods.stages import StagePlan
from lptransformer.models.adapters import merged
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.whole_model import whole_model, whole_weights
from lptransformer.processes import forget_peak_memory, peak_memory_bytes
from lptransformer.run_folder import layout, saved_stage
from lptransformer.run_folder.metrics import EvaluationReport, SavedReport, StageReport, TraceReport, report_from_dict
from lptransformer.run_folder.saved_stage import SavedStage

P = ParamSpec("P")
R = TypeVar("R")
ASKING_SECONDS = 2.0
DATA_KEY = "wrong data"  # in the store: what a process found
Report = StageReport | EvaluationReport | TraceReport | SavedReport


class Stream(Protocol):
    """Micro-batches by their number since the start of the run; the same on every pipeline rank."""

    def batch(self, index: int) -> Batch: ...

    def label_counts(self, index: int) -> Sequence[int]:
        """The labels of each row of a micro-batch, known without it: a loss is divided by those of its whole update."""
        ...

    def position(self, index: int) -> dict[str, int]: ...

    def index(self, position: Mapping[str, int]) -> int: ...


class ValidSet(Protocol):
    """A validation set: micro-batches of full shape, padded with positions that have no label."""

    def batches(self, micro_batch_size: int) -> Iterable[Batch]: ...


@dataclass(frozen=True)
class UpdateResult:
    """After an update: its number, what pipeline rank 0 has decided to follow, and reports.

    On global rank 0 `reports` holds what has arrived from all processes since the last call, elsewhere this process's.
    """

    update: int
    control: Control
    reports: list[Report]


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine beside the blueprint; they change no result.

    `channel` is the backend between pipeline ranks, `trace` the first and last update to trace (counted from 1). With
    `stop_without_checkpoint` a save that fails ends the run. `tf32` is the one that rounds results, on GPUs.
    """

    max_skipped_updates: int
    channel: str = "gloo"
    trace: Sequence[int] | None = None
    stop_without_checkpoint: bool = False
    tf32: bool = False


@contextlib.contextmanager
def products_in_tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA may compute products and convolutions of fp32 in TF32, in this process. By itself torch lets
    convolutions."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def telling_of_wrong_data(call: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A call of an engine in which what one process finds wrong with its rows ends all: the others raise the same
    DataError, not that a process has gone."""

    @wraps(call)
    def told(self: TrainingEngine, *args: P.args, **named: P.kwargs) -> R:
        store = self.world.store
        try:
            return call(self, *args, **named)
        except DataError as error:
            store.set(DATA_KEY, str(error))
            store.set("all done", "")  # who has come to its end already does not wait
            raise
        except (LostProcessError, RuntimeError):  # a collective of replicas raises the latter
            if wrong := self.wrong_data(ASKING_SECONDS):
                raise DataError(wrong) from None
            raise

    return told


class TrainingEngine(ABC):
    """The stages of one process and the update loop."""

    def __init__(
        self,
        world: World,
        blueprint: Blueprint,
        stream: Stream,
        valid: Mapping[str, ValidSet],
        options: EngineOptions,
    ) -> None:
        self.world = world
        self.blueprint = blueprint
        self.stages = blueprint.stages
        self.stream = stream
        self.valid = valid
        self.options = options
        self.update = 0
        self.describe_run: Callable[[Path, bool], None] | None = None
        self.generation = 0  # of the start of the run, for the checkpoints
        # On global rank 0, before a checkpoint counts: takes the reports that came before it, and gives back the rest.
        self.before_commit: Callable[[list[Report]], list[Report]] = lambda reports: reports
        self.after_commit: Callable[[], None] = lambda: None
        self.on_problem: Callable[[str], None] = say
        self._saving: Save | None = None
        self._own_saved: list[SavedReport] = []
        self._commits = Commits(world.size)
        self._settled = 0
        self._newest_save: tuple[Path, int] | None = None
        self.cut_short = False  # the last evaluation, by a stop
        self._unseen: list[Report] = []  # for the next call that gives reports
        self.may_commit: Callable[[], None] = lambda: None  # raises TakenOverError where others write the run by now
        self._label_tokens: dict[tuple[int, float, int | None], int] = {}
        self._requested = Control.NOTHING
        self._stop_requested = False
        self._until_it_leaves = contextlib.ExitStack()
        self._until_it_leaves.enter_context(products_in_tf32(options.tf32))

    def label_tokens(self, update: int, fraction: float, replica: int | None = None) -> int:
        """The labels that a head which sees this fraction of them sees in update `update` (from 0): of all replicas, or
        of one."""
        key = update, fraction, replica
        if key not in self._label_tokens:
            self._label_tokens = {old: n for old, n in self._label_tokens.items() if abs(old[0] - update) <= 1}
            many, replicas = self.blueprint.micro_batches, self.blueprint.replicas
            own = range(update * many + (replica or 0), (update + 1) * many, 1 if replica is None else replicas)
            counts = (count for index in own for count in self.stream.label_counts(index))
            self._label_tokens[key] = sum(labels_seen(count, fraction) for count in counts)
        return self._label_tokens[key]

    # ------------------------------------------------------------------------------------------ the calls

    @abstractmethod
    def train_batch(self) -> UpdateResult:
        """One update of every stage of this process.

        Raises TrainingError when too many updates in a row were skipped, or another process has gone.
        """

    @abstractmethod
    def eval_batch(self, name: str, advance: Callable[[int], None] = lambda done: None) -> list[Report]:
        """Sums of the losses of every local head over all windows of the validation set `name`.

        Every process calls this at the same update; replica i takes each i-th micro-batch. `advance` hears of
        micro-batches that are done. A stop that was requested ends it within few of them, `cut_short` in every process:
        then nothing is reported.
        """

    def save_checkpoint(self, run: str | Path) -> None:
        """Begin to write the stages of this process below the run folder `run`; returns when they may change.

        The checkpoint counts some time later, at the latest after `settle` or `close`. Twice after the same update is
        once. A folder that is no run folder
        yet becomes one, so that it can be evaluated and exported. Raises TakenOverError, and writes nothing, where
        another start of the run has taken over.
        """
        self.may_commit()
        if self._newest_save == (Path(run), self.update):
            return
        self._newest_save = Path(run), self.update
        if self.world.global_rank == 0 and self.describe_run is not None and not layout.holds_run(Path(run)):
            self.describe_run(Path(run), False)
        started = time.perf_counter()
        if self._saving is not None:
            self._saving.wait()  # one at a time
            self._own_saved.append(self._saving.report())
        self._commits.begun.add((str(run), self.update))
        self._saving = self._begin_save(Path(run))
        self._saving.lost_seconds = time.perf_counter() - started

    def load_checkpoint(self, run: str | Path, update: int | None = None) -> int:
        """Continue from a complete checkpoint of `run`, the newest one unless `update` says which.

        It must have been written by the same engine with stages of the same shape. Returns its number of updates.
        Raises RunError when there is none, or a file of it is damaged or would execute code when read; DataError when
        its place in the data is none of this stream's.
        """
        self._unseen = self.settle()
        self._newest_save = None
        update = agreed_step(self.world, Path(run), update)
        self._load(Path(run), update)
        forget_peak_memory(self.world.device)
        self.update = update
        return update

    def collect(self) -> list[Report]:
        """Reports that have arrived since the last call, on global rank 0; elsewhere nothing."""
        return self._gather([])

    def settle(self) -> list[Report]:
        """Wait until every process has written what it had begun to save, and it counts; every process calls this.

        What could not be saved can be saved again, also after the same update. Returns reports as `train_batch` does.
        """
        if self._saving is not None:
            self._saving.wait()
        self._unseen = self._gather([])
        self._settled += 1
        store, key = self.world.store, f"not saved {self._settled}"
        with translate_lost_processes():
            self.world.wait_for_all(f"settled {self._settled}")
            try:
                return self._gather([])
            finally:
                if self.world.global_rank == 0:
                    store.set(key, json.dumps(self._commits.take_failed()))
                if self._newest_save in [(Path(run), update) for run, update in json.loads(store.get(key))]:
                    self._newest_save = None

    def request(self, control: Control, urgent: bool = False) -> None:
        """Ask for something to follow the update under way. Pipeline rank 0 decides for all, elsewhere this is ignored.

        An urgent request means save and stop. It counts on every process, and may be made in a signal handler.
        """
        if urgent:
            self._stop_requested = True  # only ever set: a handler may run between any two steps of the loop
        elif self.world.pipeline_rank == 0:
            self._requested |= control

    @telling_of_wrong_data
    def close(self) -> list[Report]:
        """Leave the run, when every process has come to its end; returns the last reports on global rank 0."""
        settled = self.settle()
        self._finish()
        self.world.wait_for_all("done")
        if wrong := self.wrong_data(None):
            raise DataError(wrong)
        self.world.leave_at_the_end()
        reports = settled + self._gather([]) if self.world.global_rank == 0 else []
        self._release()
        self._until_it_leaves.close()
        leave(self.world)
        return reports

    def wrong_data(self, seconds: float | None) -> str | None:
        """What another process has found wrong with its rows; None also where the store has not answered so long: its
        host may have gone."""
        found: list[str] = []

        def ask() -> None:
            with contextlib.suppress(dist.DistError):
                if self.world.store.check([DATA_KEY]):
                    found.append(self.world.store.get(DATA_KEY).decode())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(seconds)
        return found[0] if found else None

    @property
    def is_stopping(self) -> bool:
        """Whether this process was asked to save and stop."""
        return self._stop_requested

    @property
    def global_steps(self) -> int:
        """Updates that were made so far, under DeepSpeed's name for them."""
        return self.update

    def pretrained_model(self) -> nn.Module:
        """The Hugging Face model as it is trained so far: a copy in fp32, untied, on the CPU, in evaluation mode.

        For one pipeline rank, whose replicas call it together; raises RunError where a process holds fewer stages.
        """
        if self.world.pipeline_size > 1:
            raise RunError(
                f"pretrained_model(): the model is on {self.world.pipeline_size} pipeline ranks, and no process has "
                "all of it; save a checkpoint and export that"
            )
        parts, added, of_stages = self.blueprint.parts, self.blueprint.adapters, self._weights()
        weights = whole_weights(parts, (merged(one, added, parts) if added else one for one in of_stages))
        own = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
        return whole_model(self.blueprint.model_config, own)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Leave the run; after an error without waiting for the others."""
        if error is None:
            self.close()
            return
        self._release()
        self._until_it_leaves.close()
        if isinstance(error, DataError):
            self.world.leave_the_store()
        leave(self.world)

    @property
    @abstractmethod
    def waited_seconds(self) -> float:
        """What this process has waited for others in its updates so far: its idle time."""

    # ------------------------------------------------------------------------------------------ parts

    def _new_save(self, run: Path) -> Save:
        return Save(run, self.update, self.world.global_rank, self.generation, self.may_commit)

    @abstractmethod
    def _begin_save(self, run: Path) -> Save: ...

    @abstractmethod
    def _load(self, run: Path, update: int) -> None: ...

    @abstractmethod
    def _weights(self) -> list[dict[str, Tensor]]:
        """Of every stage of this process, under the names of a checkpoint."""

    def _gather(self, reports: list[Report]) -> list[Report]:
        """`gather_reports`, and what has become of saves: on global rank 0 those count that all have reported."""
        if self._saving is not None and self._saving.is_done:
            self._own_saved.append(self._saving.report())
            self._saving = None
        told, self._own_saved = [*reports, *self._own_saved], []
        arrived = gather_reports(self.world, told)
        seen, self._unseen = [*self._unseen, *(one for one in arrived if not isinstance(one, SavedReport))], []
        if self.world.global_rank == 0:
            for report in arrived:
                if isinstance(report, SavedReport):
                    self._commits.take(report)
            if self._commits.waiting:
                seen = self._commit(seen)
        return seen

    def _gather_saves(self) -> None:
        """In the middle of an evaluation: a checkpoint need not wait for its end. Costs nothing where none is on its
        way."""
        begun = self._saving is not None or bool(self._own_saved)
        if begun or (self.world.global_rank == 0 and self._commits.begun):
            self._unseen = self._gather([])

    def _commit(self, reports: list[Report]) -> list[Report]:
        """Make the checkpoints count that all processes have reported. Reports of a process arrive in order, so these
        and those that were returned before are all up to there. Returns those that nobody has taken.

        Raises TrainingError where one was not saved and the run is to stop for it.
        """
        self.may_commit()
        left = self.before_commit(reports)
        problems = self._commits.finish(self.generation)
        self.after_commit()
        for problem in problems:
            if self.options.stop_without_checkpoint:
                raise TrainingError(problem, left)
            self.on_problem(problem)
        return left

    def _finish(self) -> None:  # noqa: B027 - an engine that has nothing on its way
        """At the end of the run, before the others have ended: send and receive what is in transit."""

    def _release(self) -> None:  # noqa: B027
        """After that: drop what holds process groups."""

    def _take_requests(self) -> Control:
        """What was requested on this process since the last call."""
        requested, self._requested = self._requested, Control.NOTHING
        return requested | Control.SAVE | Control.STOP if self._stop_requested else requested

    def _description(self, plan: StagePlan) -> dict[str, Any]:
        """What state.json says of a stage."""
        position = self.stream.position(self.update * self.blueprint.micro_batches)
        head = self.blueprint.head.model_dump()
        return saved_stage.describe(plan, len(self.stages), self.update, position, self.blueprint.dtype, head)

    def _check_position(self, saved: SavedStage, update: int) -> None:
        """Raises DataError unless the place in the data of a stage's checkpoint is that of its update."""
        taken, of_update = self.stream.index(saved.state["position"]), self.blueprint.micro_batches
        if taken != update * of_update:
            raise DataError(
                f"the checkpoint after {update} updates has taken {taken} micro-batches, but train."
                f"micro_batches_per_update = {of_update} makes that {update * of_update}: give the number of its run"
            )

    def _own_batches(self, name: str) -> Iterator[tuple[int, Batch]]:
        """The micro-batches of a validation set that this replica takes, with their numbers."""
        rounds = whole_rounds(self.valid[name].batches(self.blueprint.micro_batch_size), self.world.data_size)
        return islice(enumerate(rounds), self.world.data_rank, None, self.world.data_size)

    def _stage_report(
        self,
        plan: StagePlan,
        *,
        loss_sum: float | None,
        grad_norm: float | None,
        skipped: bool,
        learning_rate: float,
        seconds: float,
        idle_seconds: float,
    ) -> StageReport:
        """The report of the update that was just made."""
        fraction = self.blueprint.head_fractions.get(plan.index, 1.0)
        return StageReport(
            update=self.update,
            stage=plan.index,
            data_rank=self.world.data_rank,
            loss_sum=loss_sum if plan.has_head else None,
            label_tokens=self.label_tokens(self.update - 1, fraction, self.world.data_rank),
            grad_norm=grad_norm,
            skipped=skipped,
            learning_rate=learning_rate,
            seconds=seconds,
            idle_seconds=idle_seconds,
            peak_memory_bytes=peak_memory_bytes(self.world.device),
        )

    def _evaluation_report(self, name: str, plan: StagePlan, nll_sum: float, label_tokens: int) -> EvaluationReport:
        return EvaluationReport(
            update=self.update,
            evaluation=name,
            stage=plan.index,
            data_rank=self.world.data_rank,
            nll_sum=nll_sum if plan.has_head else None,
            label_tokens=label_tokens,
        )


def gather_reports(world: World, reports: list[Report]) -> list[Report]:
    """Reports go to global rank 0 through the store: no collective, nobody waits.

    There: these and all that have arrived since the last call. Elsewhere: these.
    """
    if world.global_rank != 0:
        world.store.queue_push("reports", json.dumps([report.to_dict() for report in reports]))
        return reports
    while world.store.queue_len("reports"):
        reports = reports + [report_from_dict(r) for r in json.loads(world.store.queue_pop("reports", True))]
    return reports
