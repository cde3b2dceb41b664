"""Floating-point operations of an update, all of them and those that have to follow one another. No torch.

**Total.** Per token and block a forward pass costs `block_flops`, the gradient of its weights as much, the gradient at
its input as much. A block that is trained in the phase has all three, also where no gradient goes on below it (only the
first products of a block would be saved); any other block has the forward pass alone. Where weights are frozen, the
gradient of weights counts by the share that trains, the one at the input down to the lowest that trains. A pull
(methods/gradient_flow.py) is the gradient at the input once more: that is what an overlapping border costs, in the
blocks of its upper run. Heads have their forward and backward pass as methods/cost.py counts them, also where a head
trains no block: its norm needs the gradient at the readout's input. Embeddings, norms and the optimizer are left out.
The stages are those of the objective: a pipeline rank that ends inside of a run of an overlapping objective adds a pull
there, which is not counted.

**Serial** (2012.03837, section 4, compares methods by it): what an update takes when only dependences limit it, in
steady state. Every chunk has workers of its own, micro-batches run beside each other, so the work is that of one
micro-batch; embeddings and frozen blocks take no time, because nothing that training changes comes before them. An
update of a stage depends on the one before through its weights alone: its forward pass needs them, hidden states go up
to a head, the gradient comes down and gives the next weights. So the rate is that of the costliest cycle

    forward of the stages r..t, the head of t (forward and backward), the gradient from t down to r + 1, backward of r

over all heads t and the stages r that they train. On its way down the gradient takes a pull where the stage pulls,
else the stage's ordinary backward. A longer cycle that changes from one head to another in the next update is no
costlier per update: cut where the ways cross, it falls apart into cycles of this form.

For n equal blocks of forward cost c and heads of cost h (forward and backward) that gives: backprop 3nc + h; chunked,
with m blocks in the longest chunk, 3mc + h, and greedy 3c + h; overlapping runs of m blocks at most 6mc + h at the last
border, where the upper run has no other loss and needs no pull, and 5mc + h at the others; deep supervision 3nc + h;
last(k) 3kc + h. With `delayed` gradients two updates are under way at once, so each takes half as long. What is hybrid
is the mean over the updates of its phases.
"""

from __future__ import annotations

from dataclasses import dataclass

from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.gradient_flow import duties, flows
from lptransformer.methods.objectives import Objective
from lptransformer.methods.spans import Phase, Span
from lptransformer.methods.stages import cut


@dataclass(frozen=True)
class UpdateFlops:
    """`total` is per token of the update, `serial` per token of one of its micro-batches."""

    total: float
    serial: float


def of_phase(objective: Objective, phase: Phase, costs: ModelCosts) -> UpdateFlops:
    """The FLOPs of an update in a phase of the objective, per token."""
    stages = cut(objective, 1, costs)
    stage_flops = [stage.num_blocks * costs.block_flops for stage in stages]
    of_stage = duties(phase, stages)
    flow_of = {span: flow.number for flow in flows(phase, stages) for span in flow.spans}
    total, cycles = sum(stage_flops), []
    for stage, duty, forward in zip(stages, of_stage, stage_flops, strict=True):
        if stage.trained and any(phase.weight(span, stage.first_block) > 0 for span in phase.spans):
            total += costs.backward_flops(stage.first_block, stage.last_block, duty.down is not None)
        total += forward * len(duty.pulls)
    for span in phase.spans:
        head = _head(span, objective, costs)
        total += head
        cycles.append(head)  # of a head that trains no block
        way = head
        for stage in reversed([stage for stage in stages if stage.first_block in span]):
            forward, down = stage_flops[stage.index], of_stage[stage.index].down is not None
            backward = costs.backward_flops(stage.first_block, stage.last_block, down)
            if stage.trained and phase.weight(span, stage.first_block) > 0:
                cycles.append(way + forward + backward)
            pulled = flow_of.get(span) in of_stage[stage.index].pulls
            way += forward + (forward if pulled else backward)
    return UpdateFlops(total, max(cycles) / (2 if objective.delayed else 1))


def spent(objective: Objective, costs: ModelCosts, updates: int, steps: int) -> UpdateFlops:
    """The FLOPs of the first `updates` updates of a run of `steps`, per token of an update."""
    phases = [of_phase(objective, phase, costs) for phase in objective.phases]
    if len(phases) == 1:
        return UpdateFlops(phases[0].total * updates, phases[0].serial * updates)
    of_update = [phases[objective.phase_at(update, steps)] for update in range(updates)]
    return UpdateFlops(sum(one.total for one in of_update), sum(one.serial for one in of_update))


def _head(span: Span, objective: Objective, costs: ModelCosts) -> float:
    """Forward and backward of the head of a span; forward alone where neither it nor anything in the span trains."""
    is_last, costs = span.last == objective.num_blocks - 1, costs.after(span.last)
    if costs.trained and not costs.trains(span.first, span.last) and not costs.trained_in_head(span.last, is_last):
        return costs.head_flops if is_last else costs.auxiliary_flops
    return costs.head_training_flops(is_last)
