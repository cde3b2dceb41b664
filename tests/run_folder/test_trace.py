"""Traces of runs: what is traced, what becomes of it, and that tracing changes nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Pool
from fake_runs import make_run

from lptransformer.__main__ import COMPARISON, parser
from lptransformer.config.load import load, to_dict
from lptransformer.config.resume import resume_differences
from lptransformer.engine.transfers import Clock, clock_of
from lptransformer.errors import ConfigError, RunError
from lptransformer.methods import objectives, schedule
from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.schedule import Action
from lptransformer.methods.stages import cut
from lptransformer.run_folder import trace
from lptransformer.run_folder.metrics import TraceReport, report_from_dict
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.run_folder.trace import Slice, Trace, Tracer, TraceWriter, chrome, rank_times, read_traces, slices
from lptransformer.study import trace_report
from lptransformer.study.trace_report import idle_share, medians, simulated_1f1b
from lptransformer.training.launcher import run

TWO_STAGES = [[0, 0, 1], [1, 2, 3]]


def reported(update: int, rank: int, actions: Sequence[Sequence[Any]], **changes: Any) -> TraceReport:
    """Of one of two pipeline ranks of two blocks, one replica, two micro-batches: an update of 12 s."""
    values: dict[str, Any] = {"data_rank": 0, "device": "cpu", "stages": [TWO_STAGES[rank]], "micro_batches": 2}
    values |= {"start": 1000.0 + 12 * update + rank, "seconds": 12.0, "actions": [list(action) for action in actions]}
    return TraceReport(update=update, pipeline_rank=rank, **(values | changes))


def update_of(update: int, rank: int, **changes: Any) -> TraceReport:
    """Forward 1 s and 0.5 s in the head, backward 2 s, update 0.5 s; the upper rank waits 1 s for each message."""
    number, waited = str(rank), float(rank)
    actions: list[tuple[Any, ...]] = []
    clock = 0.0
    for i in range(2):
        message = (f"1RECV_F{i}", 1.25, 1.0, 0.0) if rank else (f"0SEND_F{i}", 0.25, 0.0, 0.0)
        forward, backward = (f"{number}F{i}", 1.5, 0.0, 0.5), (f"{number}B{i}", 2.0, 0.0, 0.0)
        for text, seconds, waits, head in (message, forward, backward) if rank else (forward, message, backward):
            actions.append((text, clock, clock + seconds, waits, head))
            clock += seconds
    actions.append((f"{number}U", clock, clock + 0.5 + 0.25 * waited, 0.25 * waited, 0.0))
    return reported(update, rank, actions, **changes)


def whole(updates: Sequence[int] = (3, 4), session: int = 1) -> Trace:
    return Trace(session, tuple(update_of(update, rank) for update in updates for rank in range(2)))


def write(folder: Path, *sessions: Sequence[TraceReport]) -> None:
    for reports in sessions:
        writer = TraceWriter(folder)
        for report in reports:
            writer.write(report)


# --- tracing


def test_a_tracer_separates_waiting_and_the_head_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lptransformer.run_folder.trace.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("lptransformer.run_folder.trace.time.time", lambda: now[0] + 5000.0)
    clock = Clock()
    tracer = Tracer(2, 3, clock)
    assert [update for update in range(6) if tracer.wants(update)] == [2, 3]
    with clock.waiting():  # for an evaluation
        now[0] = 100.5
    clock.begin()
    tracer.begin(100.0)
    now[0] = 101.0
    with tracer.action("1F0"):
        with clock.waiting():
            now[0] = 101.5
        now[0] = 102.0
        tracer._head_begins()
        now[0] = 103.5
        tracer._head_ends()
        now[0] = 104.0
    with tracer.action("1B0"):
        now[0] = 106.0
    tracer.end()
    assert tracer.actions == [["1F0", 1.0, 4.0, 0.5, 1.5], ["1B0", 4.0, 6.0, 0.0, 0.0]]
    assert tracer.started == 5100.0 and (clock.end(), clock.waited_seconds) == (0.5, 0.5)
    tracer.begin(106.0)
    tracer.end()
    assert tracer.actions == [] and tracer.started == 5106.0


class Gpu:
    """The host's time, and when a GPU is done with what it was given; in place of torch's stream and its events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.done = 0.0
        self.synchronised = 0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self if enable_timing else None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)

    def record_event(self, timed: Gpu) -> GpuEvent:
        assert timed is self
        return GpuEvent(self, max(self.now, self.done))


class GpuEvent:
    def __init__(self, gpu: Gpu, comes: float) -> None:
        self.gpu, self.comes = gpu, comes

    def query(self) -> bool:
        return self.gpu.now >= self.comes

    def synchronize(self) -> None:
        self.gpu.now, self.gpu.synchronised = max(self.gpu.now, self.comes), self.gpu.synchronised + 1

    def elapsed_time(self, other: GpuEvent) -> float:
        assert self.query() and other.query(), "CUDA raises where an event has not come"
        return 1e3 * (other.comes - self.comes)


def test_a_gpu_waits_only_when_it_has_nothing_left_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, clock = Gpu(monkeypatch), clock_of(torch.device("cuda", 0))
    clock.begin()
    gpu.done = 3.0
    with clock.waiting():
        gpu.now = 2.0  # the host waits 2 s, the GPU is at work
    with clock.waiting():
        gpu.now = 4.5  # it is done in the middle
    gpu.done = 6.0
    with clock.waiting():
        gpu.done = 8.0  # for a message over NCCL, for which the host does not wait
    assert clock.end() == 1.5
    with clock.waiting():  # for an evaluation
        gpu.now = 10.0
    clock.begin()
    assert clock.end() == 2.0, "what the update before could not know"
    assert clock.waited_seconds == 3.5 and gpu.synchronised == 0


def test_a_gpu_is_traced_by_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update before is at work until 2 s. The host gives two actions at once, which take 3 s, 1 s in the head, and
    4 s; the second one needs a message, which comes at 6 s."""
    gpu, clock = Gpu(monkeypatch), clock_of(torch.device("cuda", 0))
    tracer = Tracer(1, 1, clock)
    gpu.now, gpu.done = 1.0, 2.0
    clock.begin()
    tracer.begin(1.0)
    with tracer.action("1F0"):
        gpu.done = 4.0
        tracer._head_begins()
        gpu.done = 5.0
        tracer._head_ends()
    with tracer.action("1RECV_F1"):
        with clock.waiting():
            gpu.now = 6.0
        gpu.done = 6.25
    with tracer.action("1B0"):
        gpu.done = 10.0
    assert gpu.synchronised == 0
    tracer.end()
    assert gpu.synchronised == 1 and clock.end() == 1.0
    assert tracer.actions == [
        ["1F0", 1.0, 4.0, 0.0, 1.0],
        ["1RECV_F1", 4.0, 5.25, 1.0, 0.0],
        ["1B0", 5.25, 9.0, 0.0, 0.0],
    ]


def test_a_report_survives_the_store() -> None:
    report = update_of(3, 1)
    assert report_from_dict(json.loads(json.dumps(report.to_dict()))) == report


NO_UPDATES = [
    ("[0,2]", ("[0, 2] (on the command line)", "give [1, 2]")),
    ("[3]", ("[3]", "two numbers of updates")),
    ("[1,2,3]", ("[1, 2, 3]", "two numbers of updates")),
    ("3", ("3", "two numbers of updates")),
    ("[3,2]", ("[3, 2] (on the command line)", "give [2, 3]")),
    ("[1,41]", ("[1, 41]", "train.steps = 40")),
]
PIPELINE = "[1,2] engine=deepspeed_pipeline objective.name=backprop"


@pytest.mark.parametrize(
    ("key", "override", "parts"),
    [
        *((key, *case) for key in ("run.trace", "run.profile") for case in NO_UPDATES),
        ("run.trace", PIPELINE, ("[1, 2]", "deepspeed_pipeline")),
    ],
)
def test_updates_that_cannot_be_traced_or_profiled_are_refused(key: str, override: str, parts: tuple[str, ...]) -> None:
    source = {"data": {"train": "a.txt"}, "train": {"steps": 40}}
    with pytest.raises(ConfigError) as raised:
        load(source, f"{key}={override}".split())
    assert f"{key} = {parts[0]}" in str(raised.value)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_what_is_traced_may_change_on_resume() -> None:
    source = {"data": {"train": "a.txt"}}
    traced, plain = (load(source, more) for more in (["run.trace=[1,1000]"], []))
    assert traced.run.trace == [1, 1000] and plain.run.trace is None
    assert resume_differences(to_dict(traced), to_dict(plain)) == []


# --- on disk


def test_what_was_written_is_read(tmp_path: Path) -> None:
    expected = whole()
    write(tmp_path, [*reversed(expected.reports)])
    assert read_traces(tmp_path, 2, 1) == [expected]


def test_updates_that_are_traced_again_count_as_they_were_last(tmp_path: Path) -> None:
    again = [update_of(update, rank, start=5000.0 + rank) for update in (4, 5) for rank in range(2)]
    write(tmp_path, whole((2, 3, 4)).reports, again)
    first, second = read_traces(tmp_path, 2, 1)
    assert (first.session, first.updates) == (1, [2, 3]) and (second.session, second.updates) == (2, [4, 5])
    assert list(second.reports) == again


def test_the_letters_of_older_traces_are_read(tmp_path: Path) -> None:
    """Also in a file that another start of the run has written on, in the letters of today."""
    texts = "1RECV_F0 1F0 1SEND_F0 1I0.0 1SEND_B0.0 1RECV_B0.1 1B0 1RECV_F12 1SEND_B12.10 copies 1U"
    before = "1R0 1F0 1S0 1P0.0 1SG0.0 1RG0.1 1B0 1R12 1SG12.10 copies 1U"

    def told(update: int, words: str) -> list[TraceReport]:
        actions = [(word, float(i), i + 1.0, 0.0, 0.0) for i, word in enumerate(words.split())]
        return [reported(update, rank, actions) for rank in range(2)]

    write(tmp_path, told(1, before), told(2, texts))
    old, new = read_traces(tmp_path, 2, 1)
    assert old == Trace(1, tuple(told(1, texts))) and new == Trace(2, tuple(told(2, texts)))
    assert [one.kind for one in slices(old)] == [one.kind for one in slices(new)]


def test_an_update_that_not_all_have_told_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, whole((2, 3)).reports[:-1])
    assert [one.updates for one in read_traces(tmp_path, 2, 1)] == [[2]]


def test_a_line_that_was_cut_off_is_forgotten(tmp_path: Path) -> None:
    write(tmp_path, whole().reports)
    path = tmp_path / trace.TRACE
    with path.open("a") as file:
        file.write('{"session":1,"upd')
    assert read_traces(tmp_path, 2, 1) == [whole()]
    write(tmp_path, whole((5,)).reports)
    assert [one.updates for one in read_traces(tmp_path, 2, 1)] == [[3, 4], [5]]


def with_first(path: Path, **changes: Any) -> str:
    """The file with other values in its first line."""
    first, *others = path.read_text().splitlines()
    return "\n".join([json.dumps(json.loads(first) | changes), *others, ""])


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: path.unlink(), "run.trace"),
        (lambda path: path.write_text("{}\n" + path.read_text()), "line 1"),
        (lambda path: path.write_text(path.read_text() + "[]\n"), "line 5"),
        (lambda path: path.write_text(with_first(path, start="abc")), "line 1"),
        (lambda path: path.write_text(with_first(path, actions=[])), "line 1"),
        (lambda path: path.write_text(with_first(path, actions=[["zz", 0.0, 1.0, 0.0, 0.0]])), "line 1"),
        (lambda path: path.write_text(with_first(path, actions=[["0F0", 0.0, 1.0, 0.0, 0.0, 0.0]])), "line 1"),
        (lambda path: path.write_text(""), "no update that all 2 processes"),
        (lambda path: path.write_text(path.read_text().splitlines()[0] + "\n"), "no update that all 2 processes"),
    ],
)
def test_a_trace_that_cannot_be_read_says_why(tmp_path: Path, damage: Any, word: str) -> None:
    write(tmp_path, whole().reports)
    damage(tmp_path / trace.TRACE)
    with pytest.raises(RunError, match=word):
        read_traces(tmp_path, 2, 1)


# --- slices and sums


def test_an_action_becomes_what_it_waited_and_what_it_did() -> None:
    (report,) = [one for one in whole((3,)).reports if one.pipeline_rank == 1]
    found = slices(Trace(1, (report,)))
    assert [(one.kind, str(one.action), one.start, one.end) for one in found[:5]] == [
        ("wait", "1RECV_F0", 0.0, 1.0),
        ("receive", "1RECV_F0", 1.0, 1.25),
        ("forward", "1F0", 1.25, 2.25),
        ("head", "1F0", 2.25, 2.75),
        ("backward", "1B0", 2.75, 4.75),
    ]
    assert [(one.kind, one.seconds) for one in found[-2:]] == [("wait", 0.25), ("update", 0.5)]


def test_processes_share_one_clock() -> None:
    found = slices(whole())
    assert min(one.start for one in found if one.pipeline_rank == 0) == 0.0
    assert min(one.start for one in found if one.pipeline_rank == 1) == 1.0
    assert {one.update for one in found if one.start < 12} == {3}


def test_what_belongs_to_the_next_update_says_so() -> None:
    """Delayed gradients: forward passes of the next update are made in the one before, and numbered on."""
    report = reported(
        3, 0, [("0F3", 0.0, 1.0, 0.0, 0.0), ("0I1.2", 1.0, 2.0, 0.0, 0.0), ("copies", 2.0, 3.0, 0.5, 0.0)]
    )
    forward, pull, wait, copies = slices(Trace(1, (report,)))
    assert (forward.update, forward.action) == (4, Action(0, "F", 1))
    assert (pull.update, pull.kind, pull.action) == (3, "pull", Action(0, "I", 1, 2))
    assert (wait.kind, wait.seconds, copies.kind, copies.action) == ("wait", 0.5, "copies", None)


def test_waiting_is_never_longer_than_its_action() -> None:
    """Times are rounded."""
    (one,) = slices(Trace(1, (reported(1, 0, [("0SEND_F0", 0.0, 0.1, 0.1000001, 0.0)]),)))
    assert (one.kind, one.end) == ("wait", 0.1)


def test_the_sums_of_a_rank() -> None:
    below, above = rank_times(whole())
    # Two updates of 12 s. Below: 2 (1.5 + 0.25 + 2) + 0.5; above 1 s of waiting for a message, 0.25 s for the norm.
    assert (below.total, below.busy, below.head, below.waiting) == (24.0, 16.0, 2.0, 0.0)
    assert (above.busy, above.waiting, above.other) == (16.0, 4.5, 3.5)
    assert above.idle_share == pytest.approx(0.1875)


def test_sums_are_means_over_replicas() -> None:
    one = whole()
    other = [update_of(r.update, r.pipeline_rank, data_rank=1, seconds=24.0) for r in one.reports]
    below = rank_times(Trace(1, (*one.reports, *other)))[0]
    assert (below.total, below.busy) == (36.0, 16.0)


# --- for trace viewers


def check_format(timeline: Any) -> list[dict[str, Any]]:
    """What the Trace Event Format says of complete events and metadata; returns the former."""
    assert timeline["displayTimeUnit"] in ("ms", "ns")
    events = timeline["traceEvents"]
    named = {"process_name": str, "thread_name": str, "process_sort_index": int, "thread_sort_index": int}
    for event in events:
        assert isinstance(event["name"], str) and event["ph"] in ("X", "M")
        assert type(event["pid"]) is int and type(event["tid"]) is int and event["pid"] > 0 and event["tid"] > 0
        if event["ph"] == "M":
            (value,) = event["args"].values()
            assert isinstance(value, named[event["name"]])
            assert list(event["args"]) == [event["name"].removeprefix("process_").removeprefix("thread_")]
        else:
            assert {"ts", "dur", "cat", "args"} <= set(event) and event["ts"] >= 0 and event["dur"] >= 0
    complete = [event for event in events if event["ph"] == "X"]
    threads = {(event["pid"], event["tid"]) for event in complete}
    assert threads == {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    for thread in threads:
        own = sorted((e["ts"], e["dur"]) for e in complete if (e["pid"], e["tid"]) == thread)
        assert all(a + dur <= b + 1e-3 for (a, dur), (b, _) in zip(own, own[1:], strict=False)), "slices overlap"
    return complete


def test_the_timeline_is_in_the_trace_event_format() -> None:
    timeline = json.loads(json.dumps(chrome([whole()], "a run"), allow_nan=False))
    events = check_format(timeline)
    assert len(events) == len(slices(whole()))
    names = {e["pid"]: e["args"]["name"] for e in timeline["traceEvents"] if e["name"] == "process_name"}
    assert names == {1: "pipeline rank 0 (blocks 0-1)", 2: "pipeline rank 1 (blocks 2-3)"}
    wait = next(event for event in events if event["cat"] == "wait")
    assert (wait["name"], wait["pid"], wait["tid"], wait["ts"], wait["dur"]) == ("wait 1RECV_F0", 2, 1, 1e6, 1e6)
    assert wait["args"] == {"update": 3, "stage": 1, "micro_batch": 0, "action": "1RECV_F0"}


def test_the_starts_of_a_run_follow_each_other_in_the_timeline() -> None:
    later = Trace(2, tuple(update_of(5, rank, start=2000.0) for rank in range(2)))
    events = check_format(chrome([whole(), later], "a run"))
    assert max(event["ts"] for event in events) > (2000 - 1036) * 1e6


# --- 1F1B beside it


def test_1f1b_of_the_same_blocks_by_hand() -> None:
    """Two ranks, two micro-batches: forward 1, backward 2, and a head of 0.5 on the last rank alone. Of an update:
    F0 below, three passes of 3.5 s in a row on the last rank's side, B1 below."""
    found = simulated_1f1b(whole(), in_flight=2)
    per_update = 1 + 3.5 + 3.5 + 2 + 0.5
    assert max(one.end for one in found) == pytest.approx(2 * per_update)
    assert {one.update for one in found} == {3, 4}
    for rank, busy in ((0, 6.5), (1, 7.5)):
        own = sorted((one for one in found if one.pipeline_rank == rank), key=lambda one: one.start)
        assert own[0].start == 0.0 and own[-1].end == pytest.approx(2 * per_update), "waiting is drawn too"
        assert all(a.end == pytest.approx(b.start) for a, b in zip(own, own[1:], strict=False))
        assert idle_share(found, rank) == pytest.approx(1 - busy / per_update)
    assert sum(one.seconds for one in found if one.kind == "head") == pytest.approx(4 * 0.5), "of the last rank"


def test_medians_are_without_waiting() -> None:
    found = medians(whole())
    assert [(one.forward, one.head, one.backward, one.update) for one in found.values()] == [(1.0, 0.5, 2.0, 0.5)] * 2


def test_extra_blocks_of_heads_are_taken_off_the_backward() -> None:
    """A head of two blocks behind the two of rank 0: half of its backward. One of the last rank is no auxiliary one."""
    found = simulated_1f1b(whole((3,)), in_flight=2, extra_blocks={1: 2, 3: 9}.__getitem__)
    backward = {(one.pipeline_rank, round(one.seconds, 9)) for one in found if one.kind == "backward"}
    assert backward == {(0, 1.0), (1, 2.0)}


def test_stages_that_are_not_trained_get_what_others_take() -> None:
    below = reported(3, 0, [("0F0", 0.0, 3.0, 0.0, 0.0), ("0F1", 3.0, 6.0, 0.0, 0.0)])
    found = simulated_1f1b(Trace(1, (below, update_of(3, 1))), in_flight=2)
    seconds = {one.kind: one.seconds for one in found if one.pipeline_rank == 0}
    assert (seconds["forward"], seconds["backward"], seconds["update"]) == pytest.approx((3.0, 6.0, 1.5))


# --- the report


def traced_run(folder: Path, *overrides: str, **changes: Any) -> Path:
    made = make_run(folder, ["--parallel.pipeline=2", "--objective.chunks=2", *overrides])
    write(made, [update_of(update, rank, **changes) for update in (3, 4) for rank in range(2)])
    return made


def test_the_report_of_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = traced_run(tmp_path / "run")
    run(parser(), ["report", "--trace", str(made)])
    assert not list(made.glob("*.svg")) and "svg" not in capsys.readouterr().out, "PNG alone"
    run(parser(), ["report", "--trace", "--svg", str(made)])
    out = capsys.readouterr().out
    assert "picture (and .svg): " in out
    assert "chunked-2, updates 3-4, measured" in out and "1F1B of the same blocks, simulated" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("0 ", "1 "))]
    assert rows == [
        ["0", "16.000", "2.000", "0.000", "8.000", "0.0%", "38.1%"],
        ["1", "16.000", "2.000", "4.500", "3.500", "18.8%", "28.6%"],
    ]
    check_format(json.loads((made / "trace.json").read_text()))
    svg = (made / "trace.svg").read_text()
    texts = ["Measured: chunked-2, updates 3-4: 12.00 s per update", "backprop by 1F1B over the same blocks"]
    texts += [
        "forward",
        "backward",
        "head and loss",
        "update",
        "wait",
        "not traced",
        "rank 1",
        "time (s); every second update",
    ]
    assert all(f"<!-- {text}" in svg for text in ["Simulated: ", *texts[:1], *texts[2:]]) and texts[1] in svg
    assert (made / "trace.png").stat().st_size > 10_000
    before = (made / "trace.svg").read_bytes()
    run(parser(), ["report", str(made), "--trace", "--svg", "--out", str(tmp_path / "drawn")])
    assert (tmp_path / "drawn" / "trace.svg").read_bytes() == before, "the same trace gives the same bytes"


def test_the_document_s_picture_is_drawn_from_what_lies_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(__file__).parents[2] / "docs/benchmarks"
    before = sorted((folder / "trace").iterdir())
    run(parser(), ["report", "--trace", str(folder / "trace"), "--out", str(tmp_path)])
    assert (tmp_path / "trace.png").exists() and sorted((folder / "trace").iterdir()) == before
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" +[01] ", line)]
    assert [(row[0], *row[-2:]) for row in printed] == [("0", "0.3%", "25.5%"), ("1", "0.0%", "18.4%")]
    document = (folder / "trace.md").read_text()
    assert all(f"| {row[0]} | {row[-2]} | {row[-1]} |" in document for row in printed)


def test_a_run_by_backprop_is_compared_with_itself(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", ["--parallel.pipeline=2", "--objective.name=backprop"])
    write(made, whole().reports)
    run(parser(), ["report", "--trace", "--svg", str(made)])
    svg = (made / "trace.svg").read_text()
    assert "Measured: backprop by 1F1B, " in svg and "Simulated: the same run, " in svg


def test_the_times_of_a_gpu_say_so(tmp_path: Path) -> None:
    made = traced_run(tmp_path / "run", device="cuda")
    run(parser(), ["report", "--trace", "--svg", str(made)])
    svg = (made / "trace.svg").read_text()
    assert "updates 3-4 on cuda: 12.00 s" in svg and "Simulated" in svg
    clock = json.loads((made / "trace.json").read_text())["otherData"]["clock"]
    assert clock == "wall clock of every process, by events of its GPU"


def test_a_picture_has_the_first_updates_that_fit(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", ["--parallel.pipeline=2", "--objective.chunks=2"])
    write(made, whole(range(1, 61)).reports)
    run(parser(), ["report", "--trace", "--svg", str(made)])
    assert "updates 1-42:" in (made / "trace.svg").read_text(), "7 actions each, 300 in all"


def test_numbers_are_in_the_boxes_that_have_room(tmp_path: Path) -> None:
    def drawn(seconds: float) -> str:
        wide = Slice(0, 0, 1, "forward", 0.0, 10.0, Action(0, "F", 77))
        narrow = Slice(0, 0, 1, "backward", 10.0, 10.0 + seconds, Action(0, "B", 88))
        trace_report.draw([trace_report.Panel("a", [wide, narrow])], tmp_path / "t", svg=True)
        return (tmp_path / "t.svg").read_text()

    assert "<!-- 77 -->" in drawn(5.0) and "<!-- 88 -->" in drawn(5.0)
    assert "<!-- 77 -->" in drawn(0.01) and "<!-- 88 -->" not in drawn(0.01)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "--trace"], "--run.trace=[first,last]"),
        (["nowhere", "--trace"], "no run folder"),
        (["run", "run", "--trace"], "about one run"),
        (["run", "--trace", "--baselines"], "--trace with --baselines"),
        *((["run", "--trace", f"--{name}=x"], f"--trace with --{name}") for name in COMPARISON),
        (["run", "--trace", "--deep=a", "--shallow=b"], "--trace with --deep, --shallow"),
    ],
)
def test_reports_of_traces_that_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"))
    with pytest.raises(SystemExit) as end:
        run(parser(), ["report", *arguments])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and word in message and "\n" not in message


# --- a run


def train_run(source: dict[str, Any], overrides: Sequence[str], resume: bool = False, until: int | None = None) -> None:
    """The training of a whole run, in every process of it."""
    from lptransformer.processes import use_fair_share_of_cores
    from lptransformer.training.train import train

    use_fair_share_of_cores()
    train(load(source, overrides), resume=resume, until=until)


@pytest.mark.slow
def test_a_traced_run_is_the_schedule_and_the_same_run(pool: Pool, tmp_path: Path) -> None:
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune.\n" * 40
    (tmp_path / "text.txt").write_text(text)
    source = {
        "model": {"hidden_size": 32, "num_layers": 4, "num_heads": 2},
        "data": {"train": str(tmp_path / "text.txt"), "tokenizer": "bytes", "sequence_length": 32},
        "objective": {"name": "overlapping", "chunks": 4, "overlap": 1},
        "head": {"kind": "shared"},
        "parallel": {"pipeline": 2, "timeout_seconds": 60},
        "train": {"steps": 5, "micro_batch_size": 2, "micro_batches_per_update": 3, "lr_scheduler": "constant"},
    }
    source["data"]["cache"] = str(tmp_path / "cache")
    plain, traced = tmp_path / "plain", tmp_path / "traced"
    pool.run(2, train_run, source, [f"run.dir={plain}"])
    pool.run(2, train_run, source, [f"run.dir={traced}", "run.trace=[2,4]"], False, 3)
    pool.run(2, train_run, source, [f"run.dir={traced}", "run.trace=[4,5]"], True)

    def losses(folder: Path) -> list[list[float | None]]:
        return [[stage["loss"] for stage in r["stages"]] for r in read_metrics(folder) if "stages" in r]

    assert losses(traced) == losses(plain) and len(losses(plain)) == 5
    traces = read_traces(traced, 2, 1)
    assert [(one.session, one.updates) for one in traces] == [(1, [2, 3]), (2, [4, 5])]
    objective = objectives.build(4, "overlapping", chunks=4, overlap=1, own_weight=0.5, first_head=False)
    stages = cut(objective, 2, ModelCosts(1.0, 1.0, 1.0))
    idle = {r["update"]: [stage["idle_share"] for stage in r["stages"]] for r in read_metrics(traced) if "stages" in r}
    for one in traces:
        for report in one.reports:
            texts = [action[0] for action in report.actions if action[0] != "copies"]
            pattern = schedule.one_update(stages, objective.usual, report.pipeline_rank, 3)
            assert texts == [str(action) for action in pattern.alone]
            assert [action[0] for action in report.actions].count("copies") == 2
            times = [time for action in report.actions for time in action[1:3]]
            assert times == sorted(times) and times[0] >= 0 and times[-1] <= report.seconds
            assert any(action[4] > 0 for action in report.actions if action[0][1] == "F"), "the head is seen"
            waited = sum(action[3] for action in report.actions)
            shown = idle[report.update][report.stages[0][0]]
            assert waited / report.seconds == pytest.approx(shown, abs=1e-4), "the idle share of the metrics"
        spans: dict[tuple[str, int], tuple[float, float]] = {}
        for report in one.reports:
            for text, start, end, *_ in report.actions:
                spans[text, report.update] = (report.start + start, report.start + end)
        received = [key for key in spans if "RECV_" in key[0]]
        assert len(received) == len(one.updates) * 3 * 2, "hidden states and a gradient, of every micro-batch"
        for text, update in received:
            (action,) = schedule.parse(text)
            place, sent = (-1, "SEND_F") if action.op == "RECV_F" else (1, "SEND_B")
            sender = Action(action.stage + place, sent, action.micro_batch, action.flow)
            assert spans[text, update][1] > spans[str(sender), update][0], f"{text} before {sender}"
    shutil.rmtree(traced / "checkpoints")
    run(parser(), ["report", "--trace", str(traced)])
    check_format(json.loads((traced / "trace.json").read_text()))
