"""Numbers about a run: perplexity by its convention, and the sums of all stages and replicas.

Every process reports every stage it holds to global rank 0, with a `StageReport` per update and an `EvaluationReport`
per evaluation; `Aggregator` joins them into rows, run_folder/metrics_log.py writes rows. A row is a plain dictionary:

    {"update", "tokens", "seconds", "tokens_per_second", "tflops_per_process", "mfu", "learning_rate",
     "stages": [{"stage", "last_block", "loss", "grad_norm", "skipped", "idle_share", "memory_bytes"}]}
    {"update", "evaluation": name of the set,
     "exits": [{"stage", "last_block", "nll_per_token", "perplexity", "bits_per_byte", "word_perplexity", "tokens"}]}

`tflops_per_process` are the TFLOP/s that a process has achieved, in the mean over all, in the time by which
`tokens_per_second` goes; `mfu` is their share of the peak of its device, null where that is not known. What is computed
twice is no work. Rows of earlier versions have neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MetricsRow = dict[str, Any]
Stages = Sequence[tuple[int, int, int]]
"""(stage index, first block, last block) of every stage, in order."""


@dataclass(frozen=True)
class TextCounts:
    """A whole text in tokens, UTF-8 bytes and words."""

    tokens: int
    bytes: int
    words: int


def text_counts(manifest: Mapping[str, Any]) -> TextCounts:
    """The counts that a token set's manifest has of its text."""
    return TextCounts(manifest["tokens"], manifest["bytes"], manifest["words"])


@dataclass(frozen=True)
class Perplexity:
    """The numbers of a convention (docs/design.md); `tokens` are those that were scored."""

    nll_per_token: float
    perplexity: float
    bits_per_byte: float
    byte_perplexity: float
    word_perplexity: float
    tokens: int


def perplexity(nll_sum: float, label_tokens: int, text: TextCounts) -> Perplexity:
    """From the summed negative log-likelihood (nats) of `label_tokens` tokens of a text.

    Bits per byte and word perplexity apply the rate per label token to all tokens of the text. What is too large for
    a float is inf; a rate over nothing (no label tokens, bytes or words) is nan.
    """
    nll_per_token = _divide(nll_sum, label_tokens)
    text_nll = nll_per_token * text.tokens
    return Perplexity(
        nll_per_token=nll_per_token,
        perplexity=_exp(nll_per_token),
        bits_per_byte=_divide(text_nll / math.log(2), text.bytes),
        byte_perplexity=_exp(_divide(text_nll, text.bytes)),
        word_perplexity=_exp(_divide(text_nll, text.words)),
        tokens=label_tokens,
    )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _divide(x: float, y: float) -> float:
    return x / y if y else math.nan


@dataclass(frozen=True)
class StageReport:
    """The report of one process on one stage and one update. `seconds` is the wall time from the end of the process's
    previous update to the end of this one, without evaluations and saves; `idle_seconds` the part of it spent waiting.
    `loss_sum` is None where the stage has no head, `grad_norm` is None where it is not known."""

    update: int
    stage: int
    data_rank: int
    loss_sum: float | None
    label_tokens: int
    grad_norm: float | None
    skipped: bool
    learning_rate: float
    seconds: float
    idle_seconds: float
    peak_memory_bytes: int

    @property
    def loss(self) -> float | None:
        """Nats per token, of this replica's tokens; None where the stage has no head."""
        return None if self.loss_sum is None else _divide(self.loss_sum, self.label_tokens)

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else _exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EvaluationReport:
    """The report of one process on one stage, one validation set and the weights after `update` updates. A stage
    without a head reports too, with `nll_sum` None; a replica that had no window of the set reports 0.0 and 0."""

    update: int
    evaluation: str
    stage: int
    data_rank: int
    nll_sum: float | None
    label_tokens: int

    @property
    def loss(self) -> float | None:
        """Nats per token, of this replica's windows; None where the stage has no head."""
        return None if self.nll_sum is None else _divide(self.nll_sum, self.label_tokens)

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else _exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TraceReport:
    """What one process did in one update, where it was to be traced (run_folder/trace.py).

    `stages` are its (stage, first block, last block), `micro_batches` those of this replica in an update. `start` is
    when the update began, in seconds of the wall clock, `seconds` how long it took. `actions` are in order, each
    [text, start, end, seconds that it waited, seconds in the head]; starts and ends count from `start`.
    """

    update: int
    pipeline_rank: int
    data_rank: int
    device: str
    stages: list[list[int]]
    micro_batches: int
    start: float
    seconds: float
    actions: list[list[Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SavedReport:
    """What one process has written of a checkpoint of `run`: bytes and sums of its files, the seconds that it kept the
    process from training, or what went wrong."""

    run: str
    update: int
    global_rank: int
    sums: dict[str, list[int | str]]
    lost_seconds: float
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def report_from_dict(data: Mapping[str, Any]) -> StageReport | EvaluationReport | TraceReport | SavedReport:
    """The inverse of `to_dict` of any report."""
    if "sums" in data:
        return SavedReport(**data)
    if "actions" in data:
        return TraceReport(**data)
    return EvaluationReport(**data) if "evaluation" in data else StageReport(**data)


class Aggregator:
    """Joins the reports of all stages and replicas into rows, whatever order they arrive in.

    `texts` has the counts of every validation set. A resumed run passes the `update` it starts from, and the `tokens`
    and `seconds` of the last row before. `tokens` counts label tokens; `seconds` is training time: the sum of the
    updates' wall times on the process where it is largest. Sums run in the order of the replicas, so that the order
    of arrival changes no bit. `process_flops` are the FLOPs of update u (from 1) in the mean over the processes,
    `peak_flops` the FLOP/s of the device of one; None: not known.
    """

    def __init__(
        self,
        stages: Stages,
        data_replicas: int,
        texts: Mapping[str, TextCounts] | None = None,
        update: int = 0,
        tokens: int = 0,
        seconds: float = 0.0,
        process_flops: Callable[[int], float] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self.last_block = {stage: last for stage, _, last in stages}
        self.data_replicas = data_replicas
        self.texts = dict(texts or {})
        self.update, self.tokens, self.seconds = update, tokens, seconds
        self.process_flops, self.peak_flops = process_flops, peak_flops
        self._process_seconds = {(s, d): seconds for s in self.last_block for d in range(data_replicas)}
        self._updates: dict[int, dict[tuple[int, int], StageReport]] = {}
        self._evaluations: dict[tuple[int, str], dict[tuple[int, int], EvaluationReport]] = {}

    def add(self, report: StageReport | EvaluationReport) -> list[MetricsRow]:
        """Take one report; return the rows that are complete now: updates in order and without gaps, evaluations
        after their update."""
        place = (report.stage, report.data_rank)
        assert place in self._process_seconds, f"report from an unknown stage or replica: {report}"
        if isinstance(report, EvaluationReport):
            assert report.evaluation in self.texts, f"evaluation of an unknown set: {report}"
            reports: dict[tuple[int, int], Any] = self._evaluations.setdefault((report.update, report.evaluation), {})
        else:
            assert report.update > self.update, f"update {self.update} is already complete: {report}"
            reports = self._updates.setdefault(report.update, {})
        assert place not in reports, f"reported twice: {report}"
        reports[place] = report

        rows = self._complete_evaluations()
        while len(self._updates.get(self.update + 1, ())) == len(self._process_seconds):
            rows.append(self._next_update())
            rows += self._complete_evaluations()
        return rows

    def _next_update(self) -> MetricsRow:
        self.update += 1
        reports = self._updates.pop(self.update)
        for place, report in reports.items():
            self._process_seconds[place] += report.seconds
        by_stage = [self._of_stage(reports, stage) for stage in self.last_block]
        # A head may train on a part of the tokens only, so the stage that saw most says how many there were.
        update_tokens = max(sum(r.label_tokens for r in replicas) for replicas in by_stage)
        seconds_before, self.seconds = self.seconds, max(self._process_seconds.values())
        self.tokens += update_tokens
        seconds = self.seconds - seconds_before
        achieved = None if self.process_flops is None else _divide(self.process_flops(self.update), seconds)
        return {
            "update": self.update,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": _divide(update_tokens, seconds),
            "tflops_per_process": None if achieved is None else achieved / 1e12,
            "mfu": None if achieved is None or self.peak_flops is None else achieved / self.peak_flops,
            "learning_rate": by_stage[0][0].learning_rate,
            "stages": [self._stage_entry(replicas) for replicas in by_stage],
        }

    def _stage_entry(self, replicas: list[StageReport]) -> dict[str, Any]:
        losses = [r.loss_sum for r in replicas if r.loss_sum is not None]
        norms = [r.grad_norm for r in replicas if r.grad_norm is not None]
        seconds = sum(r.seconds for r in replicas)
        return {
            "stage": replicas[0].stage,
            "last_block": self.last_block[replicas[0].stage],
            "loss": _divide(sum(losses), sum(r.label_tokens for r in replicas)) if losses else None,
            "grad_norm": norms[0] if norms else None,  # the norm of the whole stage: the replicas agree on it
            "skipped": any(r.skipped for r in replicas),
            "idle_share": sum(r.idle_seconds for r in replicas) / seconds if seconds else 0.0,
            "memory_bytes": max(r.peak_memory_bytes for r in replicas),
        }

    def _complete_evaluations(self) -> list[MetricsRow]:
        complete = [
            key
            for key, reports in self._evaluations.items()
            if key[0] <= self.update and len(reports) == len(self._process_seconds)
        ]
        return [self._evaluation(*key) for key in sorted(complete)]

    def _evaluation(self, update: int, name: str) -> MetricsRow:
        reports = self._evaluations.pop((update, name))
        exits = []
        for stage, last_block in self.last_block.items():
            replicas = self._of_stage(reports, stage)
            sums = [r.nll_sum for r in replicas if r.nll_sum is not None]
            if sums:
                numbers = perplexity(sum(sums), sum(r.label_tokens for r in replicas), self.texts[name])
                exits.append({"stage": stage, "last_block": last_block, **asdict(numbers)})
        return {"update": update, "evaluation": name, "exits": exits}

    def _of_stage(self, reports: Mapping[tuple[int, int], Any], stage: int) -> list[Any]:
        return [reports[stage, data_rank] for data_rank in range(self.data_replicas)]
