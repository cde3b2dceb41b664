"""The three settings and the scan for splits: each runs its cases and gives plain data for the result file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contenders.face import Spec, Work
from contenders.worker import Place, StageTimes

from lptransformer.planning.simulate import StageSeconds
from side_by_side import cases, groups, ideal, ratios, rounds, splits
from side_by_side.namespaces import ADDRESSES, NoNamespaces, Pair, joined_pair

Data = dict[str, Any]
WITH_IDEAL = ("local", "deepspeed_pipeline")
ENOUGH_SLEEP = 20.0  # times the processor time
EMULATED = "emulated: stages sleep instead of computing"


def real(one: cases.Section, logs: Path, wanted: Sequence[str] = ()) -> Data:
    """Real compute, one thread per process, for every number of micro-batches per update."""
    entries = cases.named(one["contenders"], wanted)
    found = []
    for micro_batches in one["micro_batches"]:
        work = cases.work_of(one, one["ranks"], micro_batches)
        _say(f"{work.ranks} pipeline ranks, {micro_batches} micro-batches per update")
        found.append(_real_case(entries, work, one, logs))
    work = cases.work_of(one, one["ranks"], 1)
    return {"setting": "real", "head_ratio": cases.head_ratio(work), "against": one["against"], "cases": found}


def _real_case(entries: Iterable[Mapping[str, Any]], work: Work, one: cases.Section, logs: Path) -> Data:
    specs = cases.specs(entries, work)
    with_ideal = [spec for spec in specs if spec.kind in WITH_IDEAL]
    outcomes = _outcomes(specs, work, one)
    with rounds.started(specs, work, logs) as (running, errors), _bare(with_ideal, work, logs) as measure:
        _note(errors, outcomes)
        rounds.take_turns(running, outcomes, one["repetitions"], measure)
    case = _case(work, outcomes, one["against"])
    together, alone = (ratios.medians(measured) for measured in (measure.together, measure.alone))
    case["stages"] = [
        {"contender": name, "stage": stage, **numbers, "alone": alone[name, stage]}
        for (name, stage), numbers in together.items()
    ]
    case["ideal"] = {
        spec.name: ideal.update_seconds(
            spec,
            work,
            cases.of_kind(spec.kind),
            *(
                {stage: StageSeconds(**numbers) for (name, stage), numbers in measured.items() if name == spec.name}
                for measured in (together, alone)
            ),
        )
        for spec in with_ideal
    }
    return case


class _BareStages:
    """Takes the seconds of stages by themselves before every repetition, one contender after the other."""

    def __init__(self, group: groups.Group, names: Sequence[str], ranks: int) -> None:
        self.group, self.names, self.ranks = group, names, ranks
        self.together: list[dict[tuple[str, int], dict[str, float]]] = []
        self.alone: list[dict[tuple[str, int], dict[str, float]]] = []

    def __call__(self, repetition: int) -> None:
        everybody = [range(self.ranks)]
        if repetition == 0:
            self._turns(everybody)  # warms up
        self.together += [self._turns(everybody) for _ in range(2)]
        self.alone.append(self._turns([[rank] for rank in range(self.ranks)]))

    def _turns(self, sets_of_ranks: Sequence[Iterable[int]]) -> dict[tuple[str, int], dict[str, float]]:
        """Every contender's stages, on one set of ranks at once after the other."""
        found: dict[tuple[str, int], dict[str, float]] = {}
        if self.names:  # the first to compute after a pause is slow: this one does not count
            self.group.turn(self.names[0], rounds.TURN_SECONDS, range(self.ranks))
        for contender in self.names:
            for ranks in sets_of_ranks:
                answers: list[StageTimes] = self.group.turn(contender, rounds.TURN_SECONDS, ranks)
                found |= {(name, stage): dataclasses.asdict(s) for answer in answers for name, stage, s in answer}
        return found


@contextmanager
def _bare(specs: Sequence[Spec], work: Work, logs: Path) -> Iterator[_BareStages]:
    job = ([(spec, cases.of_kind(spec.kind)) for spec in specs], work)
    group = groups.Group("bare stages", job, groups.launched(work.ranks, 1), logs)
    try:
        group.ready()
        yield _BareStages(group, [spec.name for spec in specs], work.ranks)
    finally:
        group.end()


def emulated(one: cases.Section, logs: Path, wanted: Sequence[str] = ()) -> Data:
    """Stages that sleep instead of computing: schedules, channels and idle time, on more ranks than there are cores."""
    found = []
    for ranks, micro_batches in one["cases"]:
        work = cases.work_of(one, ranks, micro_batches)
        _say(f"emulated: {ranks} pipeline ranks, {micro_batches} micro-batches per update")
        specs = cases.specs(cases.named(one["contenders"], wanted), work)
        outcomes = _outcomes(specs, work, one)
        with rounds.started(specs, work, logs) as (running, errors):
            _note(errors, outcomes)
            rounds.take_turns(running, outcomes, one["repetitions"])
        case = _case(work, outcomes, [])
        stage, cores = one["stage_seconds"], groups.cores()
        case |= {"stage_seconds": stage, "cores": cores, "pace_of_stages": micro_batches * stage}
        for result in case["contenders"].values():
            if "error" in result:
                continue
            # All updates of a turn, with one fill of the pipeline by forward passes, and nothing else.
            bound = result["turn_updates"] * micro_batches * stage + (ranks - 1) * stage / 3
            result["turn_to_bound"] = ratios.summary([seconds / bound for seconds in result["turn_seconds"]])
            result |= _sleep(result, stage)
        for spec in specs:
            result = case["contenders"][spec.name]
            if "error" not in result:
                result["simulated_seconds"] = ideal.of_sleeps(spec, work, cases.of_kind(spec.kind), stage)
        found.append(case)
    return {"setting": "emulated", "label": EMULATED, "cases": found}


def _sleep(result: Data, stage_seconds: float) -> Data:
    """The sleep of a stage over the processor time of a micro-batch on all ranks and cores; whether it is enough."""
    ratio = stage_seconds / (result["processor_seconds_per_micro_batch"] / groups.cores())
    return {"sleep_to_processor": ratio, "enough_sleep": ratio >= ENOUGH_SLEEP}


def emulated_links(one: cases.Section, logs: Path, wanted: Sequence[str] = ()) -> Data:
    """The same with stages that sleep instead of computing: what the link costs, without the processor's own spread."""
    return {**links(one, logs, wanted), "setting": "emulated_links", "label": EMULATED}


def links(one: cases.Section, logs: Path, wanted: Sequence[str] = ()) -> Data:
    """Two pipeline ranks in two network namespaces, with a link of limited rate between them."""
    try:
        with joined_pair() as pair:
            found = [_link_case(pair, name, one, logs, wanted) for name in one["sizes"]]
    except NoNamespaces as error:
        why = f"not measured: network namespaces cannot be made here ({error})"
        return {"setting": "links", "not_measured": why, "cases": []}
    return {"setting": "links", "cases": found}


def _link_case(pair: Pair, name: str, one: cases.Section, logs: Path, wanted: Sequence[str]) -> Data:
    one = {**one, **one["sizes"][name]}
    work = cases.work_of(one, one["ranks"], one["micro_batches"])
    _say(f"two network namespaces, {name}")
    specs = cases.specs(cases.named(one["contenders"], wanted), work)
    outcomes = {limit: _outcomes(specs, work, one) for limit in one["limits_mbit"]}
    carried: dict[float | None, list[float]] = {limit: [] for limit in outcomes}

    def placed(ranks: int, port: int) -> list[Place]:
        host = {"MASTER_ADDR": ADDRESSES[0], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        return [
            Place({**place.environment, **host, "GLOO_SOCKET_IFNAME": pair.interfaces[rank]}, pair.files[rank])
            for rank, place in enumerate(groups.launched(ranks, port))
        ]

    with rounds.started(specs, work, logs, placed) as (running, errors):
        for of_limit in outcomes.values():
            _note(errors, of_limit)
        for repetition in range(one["repetitions"]):
            _say(f"  repetition {repetition + 1} of {one['repetitions']}")
            for limit, of_limit in outcomes.items():
                pair.limit(limit)
                carried[limit].append(pair.measured_mbit((limit or 2000) / 100))
                rounds.take_turns(running, of_limit, 1)
        pair.limit(None)
    case = _case(work, next(iter(outcomes.values())), [])
    del case["contenders"]
    shape = (work.base["train"]["micro_batch_size"], work.base["data"]["sequence_length"])
    message = 4 * shape[0] * shape[1] * work.base["model"]["hidden_size"]
    case |= {"size": name, "head_ratio": cases.head_ratio(work), "message_bytes": message, "limits": []}
    for limit, of_limit in outcomes.items():
        results = {contender: outcome.to_dict(work) for contender, outcome in of_limit.items()}
        for contender, result in results.items():
            free = outcomes[None][contender]
            if "error" not in result and "stage_seconds" in one:
                result |= _sleep(result, one["stage_seconds"])
            if "error" not in result and free.ran:
                slower = ratios.speedups(result["seconds"], free.seconds)
                result["to_no_limit"] = ratios.summary(slower)
        wire = {"mbit": limit, "measured_mbit": ratios.summary(carried[limit])}
        wire["transfer_seconds"] = None if limit is None else message * 8 / (limit * 1e6)
        case["limits"].append({**wire, "contenders": results})
    return case


def scan(one: cases.Section, logs: Path, wanted: Sequence[str] = (), count: int = 5) -> dict[str, Any]:
    """Measure promising splits of every contender whose split is `best`; by name and micro-batches, the fastest, and
    all that was measured."""
    entries = [e for e in cases.named(one["contenders"], wanted) if e.get("split") == "best"]
    best: dict[str, dict[int, splits.Split]] = {}
    measured: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in entries:
        for micro_batches in one["micro_batches"]:
            work = cases.work_of(one, one["ranks"], micro_batches)
            _say(f"{entry['name']}, {micro_batches} micro-batches per update")
            looked_at = {str(list(split)): split for split in cases.promising(entry, work, count)}
            specs = [dataclasses.replace(cases.spec_of(entry, split), name=text) for text, split in looked_at.items()]
            outcomes = _outcomes(specs, work, one)
            with rounds.started(specs, work, logs) as (running, errors):
                _note(errors, outcomes)
                rounds.take_turns(running, outcomes, one["repetitions"])
            good = {looked_at[name]: o.seconds for name, o in outcomes.items() if o.ran}
            if good:
                best.setdefault(entry["name"], {})[micro_batches] = splits.fastest(good)
                medians = {str(list(split)): ratios.summary(seconds)["median"] for split, seconds in good.items()}
                measured.setdefault(entry["name"], {})[micro_batches] = {k: round(v, 4) for k, v in medians.items()}
            else:
                _say(f"  did not run: {next(iter(outcomes.values())).error}")
    return {"best": best, "measured": measured}


def _outcomes(specs: Iterable[Spec], work: Work, one: cases.Section) -> dict[str, rounds.Outcome]:
    pace: Callable[[Spec], rounds.Pace] = lambda spec: rounds.pace(spec, work, one["counted_micro_batches"])  # noqa: E731
    return {spec.name: rounds.Outcome(spec, pace(spec)) for spec in specs}


def _note(errors: Mapping[str, str], outcomes: Mapping[str, rounds.Outcome]) -> None:
    for name, error in errors.items():
        outcomes[name].error = error


def _case(work: Work, outcomes: Mapping[str, rounds.Outcome], against: Iterable[str]) -> Data:
    """The results of a case, and how many times as fast as some of them each contender is."""
    speedups = {}
    for other in against:
        if other in outcomes and outcomes[other].ran:
            theirs = outcomes[other].seconds
            speedups[other] = {
                name: ratios.summary(ratios.speedups(theirs, outcome.seconds))
                for name, outcome in outcomes.items()
                if outcome.ran
            }
    return {
        "ranks": work.ranks,
        "micro_batches": work.micro_batches,
        "base": work.base,
        "vocab_size": work.vocab_size,
        "contenders": {name: outcome.to_dict(work) for name, outcome in outcomes.items()},
        "speedups": speedups,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
