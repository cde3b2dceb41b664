"""The schedules of others, as lists of tasks with costs, and their replay. Plain data, no torch.

    1F1B              Narayanan et al., PipeDream-Flush in 2006.09503; Megatron-LM, 2104.04473
    interleaved 1F1B  Narayanan et al., 2104.04473, section 2.2: v chunks of blocks per rank
    ZB-H1             Qi et al., 2401.10241, section 3: the backward pass in two halves, memory as in 1F1B
    ZB-V              Qi et al., 2405.15362: two chunks per rank in the shape of a V, memory as in 1F1B

A task is (op, chunk, micro-batch); chunks are numbered from the embedding to the head. F is a forward pass, B a whole
backward pass, I the half of it that gives the gradient at the input, W the half that gives the gradient of the weights.
All ranks begin an update together, after the one before. Sends never wait for their receiver: the best case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lptransformer.planning.simulate import LinkSeconds

Task = tuple[str, int, int]
Schedule = list[list[Task]]  # of every pipeline rank


@dataclass(frozen=True)
class ChunkSeconds:
    """What the passes of a chunk take: forward, and the two halves of the backward pass."""

    forward: float
    of_inputs: float
    of_weights: float

    def of(self, op: str) -> float:
        if op == "B":
            return self.of_inputs + self.of_weights
        return {"F": self.forward, "I": self.of_inputs, "W": self.of_weights}[op]


@dataclass(frozen=True)
class ReplayTimes:
    """One update: how long it takes until the last rank is done, and how long every rank computes in it."""

    seconds: float
    busy: list[float]


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B: as many forward passes first as there are ranks above, then one backward for every forward."""
    schedule = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        tasks: list[Task] = [("F", rank, i) for i in range(ahead)]
        for i in range(micro_batches):
            if i + ahead < micro_batches:
                tasks.append(("F", rank, i + ahead))
            tasks.append(("B", rank, i))
        schedule.append(tasks)
    return schedule


def interleaved(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Interleaved 1F1B: rank r has the chunks r, r + ranks, ... Micro-batches go through in groups of `ranks`.

    `micro_batches` must be a multiple of `ranks`.
    """
    assert micro_batches % ranks == 0, f"{micro_batches} micro-batches on {ranks} ranks"
    total = micro_batches * chunks

    def place(number: int, turned: bool) -> tuple[int, int]:
        """The chunk of the rank, and the micro-batch, of its number-th pass in one direction."""
        chunk = number // ranks % chunks
        return chunks - 1 - chunk if turned else chunk, number // (ranks * chunks) * ranks + number % ranks

    schedule = []
    for rank in range(ranks):
        ahead = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, total)
        order = [("F", number) for number in range(ahead)]
        for number in range(total):
            if number + ahead < total:
                order.append(("F", number + ahead))
            order.append(("B", number))
        placed = [(op, *place(number, op == "B")) for op, number in order]
        schedule.append([(op, chunk * ranks + rank, i) for op, chunk, i in placed])
    return schedule


def zero_bubble_h1(ranks: int, micro_batches: int) -> Schedule:
    """1F1B with halved backward passes; rank r takes the gradients of weights r micro-batches later.

    So every rank keeps the activations of `ranks` micro-batches at most, and fills the end with what it put off.
    """
    schedule = []
    for rank, tasks in enumerate(one_f_one_b(ranks, micro_batches)):
        split: list[Task] = []
        for op, chunk, i in tasks:
            split.append(("I" if op == "B" else op, chunk, i))
            if op == "B" and i >= rank:
                split.append(("W", chunk, i - rank))
        split += [("W", rank, i) for i in range(max(0, micro_batches - rank), micro_batches)]
        schedule.append(split)
    return schedule


def zero_bubble_v(ranks: int, micro_batches: int) -> Schedule:
    """ZB-V: rank r has the chunks r and 2 x ranks - 1 - r, so that the last chunk ends where the first began.

    Made for at least 2 x ranks - 1 micro-batches; of fewer the missing ones are left out.
    """
    made = max(2 * ranks - 1, micro_batches)
    schedule = []
    for rank in range(ranks):
        low, high = rank, 2 * ranks - 1 - rank
        tasks: list[Task] = []
        count = {(op, chunk): 0 for op in "FIW" for chunk in (low, high)}

        def do(*ops: tuple[str, int], tasks: list[Task] = tasks, count: dict[tuple[str, int], int] = count) -> None:
            for op, chunk in ops:
                tasks.append((op, chunk, count[op, chunk]))
                count[op, chunk] += 1

        for _ in range(2 * (ranks - rank) - 1):
            do(("F", low))
        for _ in range(rank):
            do(("F", high), ("F", low))
        for _ in range(ranks - rank):
            do(("F", high), ("I", high), ("W", high))
        while count["F", high] < count["F", low] or count["F", low] < made:
            if count["F", low] < made:
                do(("F", low))
            do(("I", low), ("W", low), ("F", high), ("I", high), ("W", high))
        for _ in range(rank):
            do(("I", low), ("I", high))
        for _ in range(ranks - rank):
            do(("I", low), ("W", low))
        while count["W", high] < count["I", high]:
            do(("W", high))
        while count["W", low] < count["I", low]:
            do(("W", low))
        schedule.append([task for task in tasks if task[2] < micro_batches])
    return schedule


def replay(schedule: Schedule, seconds: Sequence[ChunkSeconds], links: Sequence[LinkSeconds] = ()) -> ReplayTimes:
    """Run the tasks of all ranks in their order; `seconds` are by chunk, `links` by border (none: they cost nothing).

    Every border has one wire in each direction, on which messages follow one another; from the last rank to the first
    goes another, like the slowest of them. Raises AssertionError when no rank can go on.
    """
    ranks, last = len(schedule), len(seconds) - 1
    rank_of = {chunk: rank for rank, tasks in enumerate(schedule) for _, chunk, _ in tasks}
    slowest = max(links, key=lambda link: link.message_seconds, default=LinkSeconds())
    clock, position = [0.0] * ranks, [0] * ranks
    free: dict[tuple[int, int], float] = {}
    done: dict[Task, float] = {}  # when the result of a task is where it is needed

    def hand_on(task: Task, rank: int, to_chunk: int, end: float) -> None:
        to = rank_of[to_chunk]
        if to == rank:
            done[task] = end
            return
        link = slowest if abs(to - rank) > 1 else links[min(rank, to)] if links else LinkSeconds()
        leaves = max(end, free.get((rank, to), 0.0))
        free[rank, to] = leaves + link.message_seconds
        done[task] = free[rank, to] + link.latency_seconds

    def ready(op: str, chunk: int, i: int) -> float | None:
        """When what a task needs from another rank or chunk is there; None while that is not known."""
        if op == "F":
            return 0.0 if chunk == 0 else done.get(("F", chunk - 1, i))
        if op in "BI":
            return 0.0 if chunk == last else done.get(("B", chunk + 1, i))
        return 0.0

    while any(position[rank] < len(schedule[rank]) for rank in range(ranks)):
        moved = False
        for rank, tasks in enumerate(schedule):
            while position[rank] < len(tasks):
                op, chunk, i = tasks[position[rank]]
                there = ready(op, chunk, i)
                if there is None:
                    break
                clock[rank] = max(clock[rank], there) + seconds[chunk].of(op)
                if op == "F" and chunk < last:
                    hand_on(("F", chunk, i), rank, chunk + 1, clock[rank])
                elif op in "BI" and chunk > 0:
                    hand_on(("B", chunk, i), rank, chunk - 1, clock[rank])
                position[rank] += 1
                moved = True
        left = [tasks[at:][:1] for tasks, at in zip(schedule, position, strict=True)]
        assert moved, f"no rank can go on: {left}"
    busy = [sum(seconds[chunk].of(op) for op, chunk, _ in tasks) for tasks in schedule]
    return ReplayTimes(max(clock), busy)


def replay_many(
    make: Callable[[int], Schedule],
    micro_batches: int,
    ranks: int,
    seconds: Sequence[ChunkSeconds],
    links: Sequence[LinkSeconds] = (),
) -> ReplayTimes:
    """`replay(make(micro_batches), ...)` without running all of it: once the pipeline is full, the time
    grows linearly with the micro-batches. What 4 x `ranks` more of them take is measured after the first 4 x `ranks`.

    Exact where ranks and links are alike; within 2 percent elsewhere (where the pattern of waiting has another period).
    """
    window = 4 * ranks
    if micro_batches <= 3 * window:
        return replay(make(micro_batches), seconds, links)
    start = window + micro_batches % window
    short, long = (replay(make(start + more), seconds, links) for more in (0, window))
    times = (micro_batches - start) // window

    def on(before: float, after: float) -> float:
        return before + times * (after - before)

    return ReplayTimes(on(short.seconds, long.seconds), [on(a, b) for a, b in zip(short.busy, long.busy, strict=True)])
