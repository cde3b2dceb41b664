"""What an ideal execution of a contender takes: the simulator with the seconds of its stages by themselves.

Processes of one machine share its memory, so a stage is slower while other ranks compute. A schedule in which ranks
wait computes part of its time alone. `sharing` counts that: every stage takes a mean of its seconds alone and beside
the others, weighted by how much of its rank's work the simulation finds beside the work of others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from contenders.face import Spec, Work

from lptransformer.models.blueprint import make_blueprint
from lptransformer.planning.simulate import StageSeconds, Timeline, simulate
from side_by_side import rivals

UPDATES = 32
ROUNDS = 4  # of simulation and weighting; two are usually enough


def update_seconds(
    spec: Spec, work: Work, more: Sequence[str], beside: Mapping[int, StageSeconds], alone: Mapping[int, StageSeconds]
) -> dict[str, float]:
    """Seconds per update in steady state, with links that cost nothing: `plain` with the seconds of stages that compute
    beside each other, and `sharing`. Seconds are by stage, `more` is what the kind changes in the configuration."""
    config = spec.config_of(work, f"parallel.pipeline={work.ranks}", *more)
    blueprint = make_blueprint(config, work.vocab_size, None)

    def run(seconds: Mapping[int, StageSeconds]) -> Timeline:
        return simulate(
            blueprint.objective,
            blueprint.stages,
            [seconds[stage.index] for stage in blueprint.stages],
            micro_batches=work.micro_batches,
            updates=UPDATES,
            in_flight=config.parallel.in_flight,
        )

    timeline = run(beside)
    found = {"plain": timeline.steady_update_seconds()}
    for _ in range(ROUNDS):
        shares = shared_work(timeline, work.ranks)
        ranks = {stage.index: stage.pipeline_rank for stage in blueprint.stages}
        timeline = run({i: mixed(alone[i], beside[i], shares[rank]) for i, rank in ranks.items()})
    return {**found, "sharing": timeline.steady_update_seconds()}


def of_sleeps(spec: Spec, work: Work, more: Sequence[str], stage_seconds: float) -> float | None:
    """Seconds per update in steady state of emulated stages: the same sleeps replayed. None where no schedule of
    rivals.py is the contender's."""
    if spec.kind == "torch_pipelining":
        schedule = _RIVALS.get(spec.schedule or "")
        if schedule is None:
            return None
        tasks = schedule(work.ranks, work.micro_batches)
        chunks = 1 + max(chunk for of_rank in tasks for _, chunk, _ in of_rank)
        part = stage_seconds * work.ranks / chunks / 3
        return rivals.replay(tasks, [rivals.ChunkSeconds(part, part, part)] * chunks).seconds
    config = spec.config_of(work, f"parallel.pipeline={work.ranks}", *more)
    blueprint = make_blueprint(config, work.vocab_size, None)
    block = stage_seconds * work.ranks / blueprint.objective.num_blocks / 3
    sleeps = {s.index: StageSeconds(*(block * s.num_blocks * passes for passes in (1, 2, 1))) for s in blueprint.stages}
    return update_seconds(spec, work, more, sleeps, sleeps)["plain"]


_RIVALS: dict[str, Callable[[int, int], rivals.Schedule]] = {
    "1F1B": rivals.one_f_one_b,
    "Interleaved1F1B": lambda ranks, micro_batches: rivals.interleaved(ranks, micro_batches, 2),
    "ZBVZeroBubble": rivals.zero_bubble_v,
}


def mixed(alone: StageSeconds, beside: StageSeconds, share: float) -> StageSeconds:
    """Seconds of a stage of which a share is computed beside others."""
    names = [field.name for field in fields(StageSeconds)]
    return StageSeconds(**{n: getattr(alone, n) * (1 - share) + getattr(beside, n) * share for n in names})


def shared_work(timeline: Timeline, ranks: int) -> list[float]:
    """Of every rank, the share of its work in the second half of the updates during which another rank works too."""
    half = len(timeline.ended[0]) // 2
    busy = [[(e.start, e.end) for e in timeline.events if e.pipeline_rank == rank] for rank in range(ranks)]
    shares = []
    for rank in range(ranks):
        others = _union([span for other in range(ranks) if other != rank for span in busy[other]])
        own = [(e.start, e.end) for e in timeline.events if e.pipeline_rank == rank and e.update >= half]
        total, shared, position = 0.0, 0.0, 0
        for start, end in own:
            total += end - start
            while position < len(others) and others[position][1] <= start:
                position += 1
            for other_start, other_end in others[position:]:
                if other_start >= end:
                    break
                shared += min(end, other_end) - max(start, other_start)
        shares.append(shared / total if total else 0.0)
    return shares


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans of time without overlaps, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
