"""Read-only copies of other stages' weights, refreshed with a fixed lag so that they are deterministic.

A head may follow weights above it: the last stage's readout, or the next stage's blocks (models/head.py, `Copy`). Their
stage sends them after every `refresh_every`-th update; in update u (counted from 0) a head uses them as of update
floor((u - lag) / refresh_every) * refresh_every, whatever the timing. With the lag of `copy_lags` they are there in
steady state and nobody waits.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lptransformer.engine.deepspeed_stage import FrozenStage, TrainedStage
from lptransformer.engine.p2p import Waitable, translate_broken_channel
from lptransformer.engine.process_groups import World
from lptransformer.engine.transfers import HelperThread, SideStream
from lptransformer.methods.stages import StagePlan


class CopyRoute:
    """From the weights of one stage to the copies in one head: their versions on the way, for one replica.

    `names` are (source, target): the names of the tensors in the two stages.
    """

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        source: TrainedStage | FrozenStage | None,
        target: TrainedStage | FrozenStage | None,
        group: dist.ProcessGroup | None,
        lag: int,
        refresh_every: int,
        name: str,
        world: World,
    ) -> None:
        self.name, self._clock = name, world.clock
        self.names = list(names)
        self.source, self.target, self.group = source, target, group
        self.lag, self.refresh_every = lag, refresh_every
        self.applied = 0  # the version in use
        held = target.tensors([name for _, name in self.names]) if target is not None else {}
        self._shapes = [(held[name].shape, held[name].dtype) for _, name in self.names] if held else []
        self.arrived: deque[Tensor] = deque()  # the versions after it that are here, each one flat
        self._posted: deque[tuple[Tensor, dist.Work]] = deque()
        self._sending: tuple[Tensor, Waitable] | None = None
        self._side = SideStream(world.device)
        self._on_gpu = world.device.type == "cuda"
        self._thread = HelperThread() if self._on_gpu and source is not None and group is not None else None
        self._buffer: Tensor | None = None  # on a GPU: pinned memory for what is sent
        if target is not None and group is not None:
            # All versions that can be on the way: their sender never waits.
            for _ in range(math.ceil(lag / refresh_every) + 1):
                self._post()

    def version(self, update: int) -> int:
        """The version in use in an update (counted from 0)."""
        return max(0, (update - self.lag) // self.refresh_every * self.refresh_every)

    def publish(self, flat: Tensor) -> None:
        """Send the source's weights, as they are now."""
        if self.group is None:
            self.arrived.append(flat)
            return
        self.flush()
        group = self.group
        if self._thread is None:
            with translate_broken_channel(self.name):
                self._sending = (flat, group.send([flat], 1, 0))
            return
        if self._buffer is None:
            self._buffer = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        sent = self._buffer
        with self._side:
            self._side.copy(sent, flat)
        copied = self._side.event()

        def send() -> None:
            copied.wait()
            group.send([sent], 1, 0).wait()

        self._sending = (sent, self._thread.begin(send))

    def use(self, update: int) -> None:
        """Before an update of the target: bring the version that it is to use, waiting if it is not there."""
        if self.target is None:
            return
        while self.applied < self.version(update):
            if not self.arrived:
                self._receive()
            self.target.refresh(self._by_target(self.arrived.popleft()))
            self.applied += self.refresh_every

    def catch_up(self, updates: int) -> None:
        """After `updates` updates of the target: wait for all versions up to there, to save them or to leave."""
        if self.target is not None and self.group is not None:
            newest = updates // self.refresh_every * self.refresh_every
            while self.applied + len(self.arrived) * self.refresh_every < newest:
                self._receive()

    def waiting(self) -> Iterator[tuple[int, str, Tensor]]:
        """The versions that are here and not in use: number, target, tensor."""
        for number, flat in enumerate(self.arrived, start=1):
            for name, one in self._by_target(flat).items():
                yield self.applied + number * self.refresh_every, name, one

    def flat(self, version: int, pending: Mapping[str, Tensor]) -> Tensor:
        """A version as `publish` takes it, from what `waiting` gave."""
        return torch.cat([pending[f"{version}/{target}"].flatten() for _, target in self.names])

    def _by_target(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape, _ in self._shapes])
        named = zip(self.names, parts, self._shapes, strict=True)
        return {target: part.view(shape) for (_, target), part, (shape, _) in named}

    def flush(self) -> None:
        """Wait until the version on the way has left."""
        if self._sending is not None:
            with self._clock.waiting(), translate_broken_channel(self.name):
                self._sending[1].wait()
            self._sending = None

    def _post(self) -> None:
        assert self.group is not None
        (dtype,) = {dtype for _, dtype in self._shapes}
        buffer = torch.empty(sum(shape.numel() for shape, _ in self._shapes), dtype=dtype, pin_memory=self._on_gpu)
        with translate_broken_channel(self.name):
            self._posted.append((buffer, self.group.recv([buffer], 0, 0)))

    def _receive(self) -> None:
        assert self._posted, "a version that nobody sends"
        buffer, work = self._posted.popleft()
        with self._clock.waiting(), translate_broken_channel(self.name):
            work.wait()
        self.arrived.append(buffer)
        self._post()


class WeightCopies:
    """All routes of one process."""

    def __init__(
        self,
        world: World,
        plans: Sequence[StagePlan],
        local: Mapping[int, TrainedStage | FrozenStage],
        lags: Mapping[int, int],
        refresh_every: int,
    ) -> None:
        """`lags` has the stages whose heads hold copies, with their lag in updates; all processes give the same."""
        self.routes: dict[tuple[int, int], CopyRoute] = {}  # (target stage, source stage)
        for index in sorted(lags):
            for source, names in sorted(_names_of(world, plans, local, index).items()):
                here, there = plans[index].pipeline_rank, plans[source].pipeline_rank
                if world.pipeline_rank not in (here, there):
                    continue
                group = None
                if here != there:
                    group = world.group(f"copy/{source}-{index}", int(world.pipeline_rank == here), 2)
                self.routes[index, source] = CopyRoute(
                    names,
                    local.get(source),
                    local.get(index),
                    group,
                    lags[index],
                    refresh_every,
                    f"of copies from stage {source} to stage {index}",
                    world,
                )

    def before(self, update: int) -> None:
        """Before an update (counted from 0): every local head gets the copies that it is to use."""
        for route in self.routes.values():
            route.use(update)

    def after(self, updates: int) -> None:
        """After `updates` updates: local weights that others follow are sent. Heads that follow the same share them."""
        made: dict[tuple[int, tuple[str, ...]], Tensor] = {}
        for (_, source), route in self.routes.items():
            if route.source is None or updates % route.refresh_every:
                continue
            names = tuple(name for name, _ in route.names)
            if (source, names) not in made:
                weights = route.source.tensors(names)
                made[source, names] = torch.cat([weights[name].flatten() for name in names])
            route.publish(made[source, names])

    def pending(self, stage: int, updates: int) -> dict[str, Tensor]:
        """The versions that a stage holds and does not use yet, as "version/target"; waits for those of the updates
        made."""
        held = [route for (target, _), route in self.routes.items() if target == stage]
        for route in held:
            route.catch_up(updates)
        return {f"{version}/{name}": one for route in held for version, name, one in route.waiting()}

    def in_use(self, stage: int) -> int:
        """The version that a stage uses: after so many updates. 0 where its head holds no copies."""
        return max((route.applied for (target, _), route in self.routes.items() if target == stage), default=0)

    def resume(self, stage: int, updates: int, in_use: int, pending: Mapping[str, Tensor]) -> None:
        """Continue after `updates` updates from what `in_use` and `pending` gave, maybe with another lag.

        Where a lag has become longer, the version in use stays until it is its turn again.
        """
        for (target, _), route in self.routes.items():
            if target == stage:
                versions = sorted({int(name.partition("/")[0]) for name in pending})
                route.applied = in_use
                route.arrived = deque(route.flat(version, pending) for version in versions)
                route.use(max(0, updates - 1))

    def begin(self, stage: int, updates: int) -> None:
        """Go on after `updates` updates with a head that has just got the newest version."""
        for (target, _), route in self.routes.items():
            if target == stage:
                route.applied, route.arrived = updates // route.refresh_every * route.refresh_every, deque()

    def resume_older(self, stage: int, updates: int, pending: Mapping[str, Tensor]) -> None:
        """As `resume`, from a checkpoint of format 1."""
        for (target, source), route in self.routes.items():
            if target == stage:
                route.applied = route.version(updates - 1) if updates else 0
                number = sum(name.startswith(f"copy.{source}.") for name in pending)
                route.arrived = deque(pending[f"copy.{source}.{i}"] for i in range(number))

    def close(self, updates: int) -> None:
        """Take and send all that is on the way, so that nobody waits for this process."""
        for route in self.routes.values():
            route.catch_up(updates)
        for route in self.routes.values():
            route.flush()


def _names_of(
    world: World, plans: Sequence[StagePlan], local: Mapping[int, TrainedStage | FrozenStage], target: int
) -> dict[int, list[tuple[str, str]]]:
    """The (source, target) names of a head's copies by source stage, from the target's process through the store."""
    key = f"copies/{target}"
    if target in local:
        names: dict[int, list[Any]] = {}
        for copy in local[target].copies:
            source = next(p.index for p in plans if p.first_block <= copy.source_block <= p.last_block)
            names.setdefault(source, []).append((copy.source, copy.target))
        world.store.set(key, json.dumps(names))
    return {int(source): [(a, b) for a, b in pairs] for source, pairs in json.loads(world.store.get(key)).items()}
