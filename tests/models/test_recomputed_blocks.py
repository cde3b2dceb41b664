"""Blocks that compute their activations again: the same bits in every family, from fewer kept bytes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from families import BLOCKS, TRAINED
from small_blueprint import small_blueprint
from tiers import full
from torch import Tensor

from lptransformer.methods.gradient_flow import Duty
from lptransformer.models import hf_config
from lptransformer.models.head import LossBatch
from lptransformer.models.stage import Stage, backward_loss, block_lists, for_training, make_stage

# Blocks that give tuples, state spaces, mixtures of experts with a router loss, layers of several kinds.
QUICK = ["Bloom", "Gemma 2", "GPT-2", "GPT-OSS", "Jamba", "Mixtral", "Qwen3-Next"]
NEW = [name for name in TRAINED if name != "GPT (the first)"]  # which the library fills in as a whole model alone


class Passes:
    """How often each block of a stage ran forward: its first part did."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def count(self, stage: Stage, lists: list[torch.nn.Module]) -> None:
        for blocks in lists:
            for block in blocks.children():
                if any(True for _ in block.parameters()):
                    part = next(one for one in block.children() if any(True for _ in one.parameters()))
                    part.register_forward_pre_hook(self._counter(len(self.counts)))
                    self.counts.append(0)

    def _counter(self, place: int):  # type: ignore[no-untyped-def]
        def add(*_: object) -> None:
            self.counts[place] += 1

        return add


def gradients(name: str, how: str) -> tuple[dict[str, Tensor], list[int]]:
    """Of two stages with a head and an extra block, the upper one split off its head and pulled through twice: losses,
    what pulls give and all gradients by name; forward passes by block."""
    config = hf_config.for_training(copy.deepcopy(TRAINED[name]))
    config.tie_word_embeddings = False
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True
    blueprint = replace(small_blueprint(config, head={"blocks": 1}), activation_checkpointing=how)
    passes, stages = Passes(), []
    for plan in blueprint.stages:
        stages.append(for_training(make_stage(plan, blueprint, seed=0), blueprint))
        passes.count(stages[-1], block_lists(stages[-1], blueprint.parts))
    lower, upper = stages
    ids = torch.randint(0, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    below = lower(ids, LossBatch(labels, 0.5))
    hidden_states = below.hidden_states.detach().requires_grad_()
    output = upper(hidden_states, LossBatch(labels, 0.5), True)
    above = torch.full_like(hidden_states, 0.01)
    pulled = [output.pull(one) for one in (output.loss_gradient, above)]
    backward_loss(output, Duty(0.5, None, (), (), 0), [(above, 0.3)]).backward()
    backward_loss(below, Duty(1.0, None, (), (), 0), [(hidden_states.grad, 1.0)]).backward()
    found = {"lower": below.loss.detach(), "upper": output.loss.detach(), "own": pulled[0], "above": pulled[1]}
    for stage in stages:
        found |= {f"{stage.plan.index}.{n}": one.grad for n, one in stage.named_parameters() if one.grad is not None}
    return found, passes.counts


@pytest.mark.parametrize("name", [*QUICK, *(full(name) for name in NEW if name not in QUICK)])
def test_the_bits_and_names_are_those_of_what_is_kept(name: str) -> None:
    wanted, once = gradients(name, "none")
    assert set(once) == {1}
    for how, again in (("blocks", range(BLOCKS)), ("selective", range(BLOCKS)), ("every 2", (1, 3))):
        found, passes = gradients(name, how)
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
        # Blocks 0 and 1 and the extra block like block 2; then 2 and 3, which are pulled through twice.
        expected = [1 + (block in again) for block in (0, 1, 2)] + [1 + 3 * (block in again) for block in (2, 3)]
        assert passes == expected


def test_nothing_is_computed_again_where_nothing_is_kept() -> None:
    """In an evaluation a block is the library's own."""
    config = hf_config.for_training(copy.deepcopy(TRAINED["Llama"]))
    blueprint = replace(small_blueprint(config), activation_checkpointing="selective")
    stage = for_training(make_stage(blueprint.stages[0], blueprint, seed=0), blueprint)
    plain = make_stage(blueprint.stages[0], blueprint, seed=0)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(stage.hidden_states(ids), plain.hidden_states(ids))
