"""What a run did when: trace.jsonl to slices of time, their sums, and a timeline for trace viewers.

trace.jsonl has one line for every process and traced update: a metrics.TraceReport, and the `session`, which
counts the starts of the run. When an update is traced again, after a resume, the last line counts.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from lptransformer.errors import RunError
from lptransformer.methods.schedule import RECEIVES, SENDS, Action, parse
from lptransformer.run_folder.metrics import TraceReport

TRACE = "trace.jsonl"
KINDS = {"F": "forward", "B": "backward", "I": "pull", "U": "update"}
KINDS |= dict.fromkeys(SENDS, "send") | dict.fromkeys(RECEIVES, "receive")
HEAD, WAIT = "head", "wait"
# Older traces have other letters: of the same operations.
OLD_OPS = {"R": "RECV_F", "S": "SEND_F", "P": "I", "RG": "RECV_B", "SG": "SEND_B"}
_OLD_ACTION = re.compile(rf"(\d+)({'|'.join(OLD_OPS)})(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Slice:
    """A stretch of time in which one process did one thing, in seconds since the beginning of the trace.

    `kind` is one of KINDS, `head` (the last part of a forward action: head, loss and the gradient of the loss), `wait`
    or `copies`. `action` is the one of the schedule that it belongs to, with micro-batches numbered within `update`.
    """

    pipeline_rank: int
    data_rank: int
    update: int
    kind: str
    start: float
    end: float
    action: Action | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """The traced updates of one session, every process of the run in each; reports are in order of update, process.

    `beginning` is what slices count from, in seconds of the wall clock.
    """

    session: int
    reports: tuple[TraceReport, ...]

    @property
    def updates(self) -> list[int]:
        return sorted({report.update for report in self.reports})

    @property
    def beginning(self) -> float:
        return min(report.start for report in self.reports)

    @property
    def device(self) -> str:
        return self.reports[0].device

    def only(self, updates: Sequence[int]) -> Trace:
        return Trace(self.session, tuple(report for report in self.reports if report.update in updates))


class TraceWriter:
    """Appends reports to the trace.jsonl of a run folder. A report is in the file when `write` returns."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / TRACE
        before = self.path.read_bytes() if self.path.exists() else b""
        whole = before[: before.rfind(b"\n") + 1]
        if whole != before:  # the process was killed in the middle of a line
            self.path.write_bytes(whole)
        lines = _lines(self.path) if whole else []
        self.session = max((line["session"] for line in lines), default=0) + 1

    def write(self, report: TraceReport) -> None:
        line = {"session": self.session, **report.to_dict()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def read_traces(run: Path, pipeline: int, data: int) -> list[Trace]:
    """The traces of a run over `pipeline` x `data` processes, by session, without updates that not all of them traced.

    Raises RunError where the run has traced none, or the file is damaged.
    """
    path = run / TRACE
    if not path.is_file():
        raise RunError(
            f"{run} has no trace (no {TRACE}): write one with --run.trace=[first,last], in a new run or on --resume"
        )
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    for line in _lines(path):
        found[line["update"], line["pipeline_rank"], line["data_rank"]] = line
    reported = Counter((line["session"], line["update"]) for line in found.values())
    sessions: dict[int, list[TraceReport]] = {}
    for _, line in sorted(found.items()):
        session = line.pop("session")
        if reported[session, line["update"]] == pipeline * data:
            sessions.setdefault(session, []).append(TraceReport(**line))
    if not sessions:
        raise RunError(f"{path} has no update that all {pipeline * data} processes have traced: train on, or again")
    return [Trace(session, tuple(reports)) for session, reports in sorted(sessions.items())]


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines(keepends=True)
    found = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            line["actions"] = [[_as_today(action), *numbers] for action, *numbers in line["actions"]]
            _check(TraceReport(**{key: value for key, value in line.items() if key != "session"}))
            found.append({**line, "session": int(line["session"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            if number == len(lines) and not text.endswith(b"\n"):
                break  # a line that is being written
            raise RunError(f"{path}, line {number}, does not hold a traced update: the file was damaged") from None
    return found


def _as_today(text: str) -> str:
    """The text of a traced action, which may be in the letters of older traces."""
    old = _OLD_ACTION.fullmatch(text)
    return f"{old[1]}{OLD_OPS[old[2]]}{old[3]}" if old else text


def _check(report: TraceReport) -> None:
    """Raises ValueError or TypeError where a line has the keys of a report and other contents."""
    times = [report.start, report.seconds]
    for text, *numbers in report.actions:
        if text != COPIES:
            parse(text)
        if len(numbers) != 4:
            raise ValueError(f"{text}: {len(numbers)} numbers")
        times += numbers
    if not report.actions or not all(isinstance(time, int | float) for time in times):
        raise ValueError("no actions, or times that are no numbers")


def slices(trace: Trace) -> list[Slice]:
    """Every action as what it waited and what it did, in order of every process.

    Messages wait first. An update waits for its clip group after it has taken its own norm: that moment is not
    traced, and the wait is shown first as well.
    """
    return [one for report in trace.reports for one in _of_report(report, report.start - trace.beginning)]


def _of_report(report: TraceReport, offset: float) -> list[Slice]:
    found = []
    for text, start, end, waited, in_head in report.actions:
        update, action = report.update, None
        kind = COPIES
        if text != COPIES:
            (action,) = parse(text)
            kind = KINDS[action.op]
            if action.micro_batch is not None and action.micro_batch >= report.micro_batches:  # of the next update
                update += 1
                action = Action(action.stage, action.op, action.micro_batch - report.micro_batches, action.flow)
        begins = min(start + waited, end)
        head = max(end - in_head, begins)
        for part, a, b in ((WAIT, start, begins), (kind, begins, head), (HEAD, head, end)):
            if b > a:
                place = (report.pipeline_rank, report.data_rank, update)
                found.append(Slice(*place, part, offset + a, offset + b, action))
    return found


@dataclass(frozen=True)
class RankTimes:
    """Where the time of the traced updates went on a pipeline rank, in seconds, the mean over its replicas.

    `busy` is in actions and not waiting, `head` the part of it in heads and losses; `other` is between actions.
    """

    pipeline_rank: int
    total: float
    busy: float
    head: float
    waiting: float

    @property
    def other(self) -> float:
        return self.total - self.busy - self.waiting

    @property
    def idle_share(self) -> float:
        return self.waiting / self.total


def rank_times(trace: Trace) -> list[RankTimes]:
    """The sums of every pipeline rank. The idle share is that of the metrics: waiting over the updates' wall time."""
    done = slices(trace)
    found = []
    for rank in sorted({report.pipeline_rank for report in trace.reports}):
        reports = [report for report in trace.reports if report.pipeline_rank == rank]
        replicas = len({report.data_rank for report in reports})
        own = [one for one in done if one.pipeline_rank == rank]
        of_kind = {kind: sum(one.seconds for one in own if one.kind == kind) / replicas for kind in (HEAD, WAIT)}
        acting = sum(one.seconds for one in own) / replicas
        total = sum(report.seconds for report in reports) / replicas
        found.append(RankTimes(rank, total, acting - of_kind[WAIT], of_kind[HEAD], of_kind[WAIT]))
    return found


def chrome(traces: Sequence[Trace], name: str) -> dict[str, Any]:
    """A timeline in the Trace Event Format, which Perfetto and chrome://tracing read: times in microseconds.

    A pipeline rank is a process and a replica a thread there; both are numbered from 1, because 0 is the idle process
    in Perfetto. Sessions follow each other at their own times of the wall clock.
    """
    events: list[dict[str, Any]] = []
    first = min(trace.beginning for trace in traces)
    places = sorted({(report.pipeline_rank, report.data_rank) for trace in traces for report in trace.reports})
    blocks = {r.pipeline_rank: (r.stages[0][1], r.stages[-1][2]) for trace in traces for r in trace.reports}
    for rank, (begin, end) in sorted(blocks.items()):
        label = f"pipeline rank {rank} (blocks {begin}-{end})"
        events.append(_metadata("process_name", rank, 0, {"name": label}))
        events.append(_metadata("process_sort_index", rank, 0, {"sort_index": rank}))
    for rank, replica in places:
        events.append(_metadata("thread_name", rank, replica, {"name": f"replica {replica}"}))
        events.append(_metadata("thread_sort_index", rank, replica, {"sort_index": replica}))
    for trace in traces:
        offset = trace.beginning - first
        events += [_complete(one, offset) for one in slices(trace)]
    clock = "wall clock of every process" + (", by events of its GPU" if traces[0].device == "cuda" else "")
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"run": name, "clock": clock, "beginning": first},
    }


def _metadata(what: str, rank: int, replica: int, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank + 1, "tid": replica + 1, "ts": 0, "args": dict(args)}


def _complete(one: Slice, offset: float) -> dict[str, Any]:
    start, end = round((offset + one.start) * 1e6, 3), round((offset + one.end) * 1e6, 3)
    args: dict[str, Any] = {"update": one.update}
    if one.action is not None:
        args |= {key: value for key, value in asdict(one.action).items() if value is not None and key != "op"}
        args["action"] = str(one.action)
    return {
        "ph": "X",
        "name": f"{one.kind} {one.action}" if one.action else one.kind,
        "cat": one.kind,
        "pid": one.pipeline_rank + 1,
        "tid": one.data_rank + 1,
        "ts": start,
        "dur": round(end - start, 3),
        "args": args,
    }


COPIES = "copies"  # taking and sending read-only copies of weights: around the actions of an update
DIGITS = 7  # of seconds: a tenth of a microsecond


Span = tuple[Any, Any]
"""From one moment of a clock to another."""


class Clock(Protocol):
    """What times a process (engine/transfers.Clock); `waits` are those for others."""

    waits: list[Span]

    def now(self) -> Any: ...

    def settle(self) -> Callable[[Any], float]: ...


class Tracer:
    """The actions of the updates `first` to `last` (counted from 1) on this process, by its clock."""

    def __init__(self, first: int, last: int, clock: Clock) -> None:
        self.first, self.last = first, last
        self.actions: list[list[Any]] = []  # of the update that has ended: [text, start, end, waited, in the head]
        self._clock = clock
        self._to_wall_clock = _seconds_to_wall_clock()
        self._started = 0.0
        self._made: list[tuple[str, Span, list[Span], list[Span]]] = []  # under way: text, itself, waits, in the head
        self._head_started: Any = None
        self._heads: list[Span] = []

    def wants(self, update: int) -> bool:
        return self.first <= update <= self.last

    def begin(self, started: float) -> None:
        """An update begins, at this time of perf_counter."""
        self._made, self._heads, self._started = [], [], started

    @property
    def started(self) -> float:
        """When the update under way began, by the wall clock. Processes on one machine agree on it."""
        return self._started + self._to_wall_clock

    @contextlib.contextmanager
    def action(self, text: str) -> Iterator[None]:
        """Around an action."""
        waits, heads, start = len(self._clock.waits), len(self._heads), self._clock.now()
        yield
        end = self._clock.now()
        self._made.append((text, (start, end), self._clock.waits[waits:], self._heads[heads:]))

    def end(self) -> None:
        """The update has ended. On a GPU this waits for it."""
        time_of, self.actions = self._clock.settle(), []
        for text, span, *parts in self._made:
            start, end = (time_of(moment) - self._started for moment in span)
            waited, head = (sum((time_of(b) - time_of(a) for a, b in part), 0.0) for part in parts)
            self.actions.append([text, *(round(number, DIGITS) for number in (start, end, waited, head))])

    def watch_head(self, head: Any) -> None:
        """Separate the time in a head (forward pass, loss, gradient of the loss) from that in the blocks."""
        head.register_forward_pre_hook(self._head_begins)
        head.register_forward_hook(self._head_ends)

    def _head_begins(self, *_: Any) -> None:
        self._head_started = self._clock.now()

    def _head_ends(self, *_: Any) -> None:
        self._heads.append((self._head_started, self._clock.now()))


def _seconds_to_wall_clock() -> float:
    """The offset from perf_counter to the wall clock: of several readings the one that took least."""
    readings = []
    for _ in range(10):
        before, wall, after = time.perf_counter(), time.time(), time.perf_counter()
        readings.append((after - before, wall - (before + after) / 2))
    return min(readings)[1]
