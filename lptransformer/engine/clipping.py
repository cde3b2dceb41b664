"""What clips and skips together: the stages of a clip group, here and on other pipeline ranks.

Only the common gradient norm is found here; who belongs together says methods/gradient_flow.clip_groups, and
TrainedStage.update (engine/deepspeed_stage.py) clips or skips by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lptransformer.engine.deepspeed_stage import TrainedStage, combine_norms
from lptransformer.engine.process_groups import World, gather
from lptransformer.engine.transfers import Clock
from lptransformer.methods.stages import StagePlan


class ClipGroup:
    """The local stages of a clip group; `group` joins the processes that hold the others, for one replica."""

    def __init__(
        self, stages: Sequence[TrainedStage], group: dist.ProcessGroup | None, size: int, clock: Clock
    ) -> None:
        self.stages = list(stages)
        self.group, self.clock = group, clock
        self.zero_stage = stages[0].zero_stage
        self._sizes: list[int] = []  # how many norms every member has
        if group is not None:
            own = sum(len(stage.parameters) for stage in stages)
            counts = gather(group, torch.tensor([own if self.zero_stage == 0 else len(stages)]), [1] * size)
            self._sizes = [int(count) for count in counts]

    def own_norms(self) -> Tensor | None:
        """The norms of the local stages' gradients, where those are; None at ZeRO 3, where every stage is a group by
        itself and its step finds the norm."""
        if self.zero_stage == 3:
            assert len(self.stages) == 1 and self.group is None
            return None
        return torch.cat([stage.gradient_norms() for stage in self.stages])

    def norm(self, norms: Tensor) -> Tensor:
        """The norm of the whole group's gradients, from `own_norms` on the host.

        Every member calls this at the end of an update; it returns when all have. The wait counts as idle time.
        """
        if self.group is not None:
            with self.clock.waiting():
                norms = torch.cat(gather(self.group, norms, self._sizes))
        return combine_norms(norms, self.zero_stage)


def local_clip_groups(
    world: World,
    plans: Sequence[StagePlan],
    groups: Sequence[Sequence[int]],
    local: Mapping[int, TrainedStage],
    name: str,
) -> dict[int, ClipGroup]:
    """The clip group of every local trained stage. `name` is the same on all processes and not used twice."""
    found: dict[int, ClipGroup] = {}
    for number, members in enumerate(groups):
        here = [index for index in members if index in local]
        ranks = sorted({plans[index].pipeline_rank for index in members})
        if here:
            group = None
            if len(ranks) > 1:
                group = world.group(f"clip/{name}/{number}", ranks.index(world.pipeline_rank), len(ranks))
            clip_group = ClipGroup([local[index] for index in here], group, len(ranks), world.clock)
            found |= dict.fromkeys(here, clip_group)
    return found
