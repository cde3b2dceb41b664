"""The blueprint of a run: everything that is known about it before anything is allocated, as plain data.

Both engines, planning, the dry run, evaluation, export and records read it, so that each of these things is worked out
in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lptransformer import hub
from lptransformer.config.checks import micro_batch_size, zero_stage
from lptransformer.config.load import load
from lptransformer.config.schema import Config
from lptransformer.errors import ConfigError, OptionError
from lptransformer.methods import flops, objectives
from lptransformer.methods.codecs import CODECS
from lptransformer.methods.cost import ModelCosts, TrainedWeights, model_costs
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.gradient_flow import (
    Duty,
    Flow,
    borders_carry_gradients,
    clip_groups,
    copy_lags,
    crossing,
    duties,
    flows,
)
from lptransformer.methods.heads import HEADS, HeadOptions, followed
from lptransformer.methods.objectives import Objective
from lptransformer.methods.spans import Phase
from lptransformer.methods.stages import StagePlan, balanced_chunks, cut
from lptransformer.models import adapters, family_check, hf_config, hf_parts, router_loss
from lptransformer.models.adapters import Adapters
from lptransformer.models.cross_entropy import check_kernel
from lptransformer.models.hf_parts import Anatomy
from lptransformer.models.stage import trained_weights


@dataclass(frozen=True)
class PhasePlan:
    """A phase over the stages: gradients across borders, what each stage does with them, what clips together."""

    phase: Phase
    flows: tuple[Flow, ...]
    duties: tuple[Duty, ...]
    clip_groups: tuple[tuple[int, ...], ...]

    def crossing(self, stage: int) -> list[int]:
        """The flows that cross the border below a stage."""
        return crossing(self.flows, stage)


@dataclass(frozen=True)
class Blueprint:
    """A run before it is built.

    `model_config` is that of the Hugging Face model. By the index of a stage: `head_fractions`, the share of the
    labels that its head sees, of those with a head,
    `copy_lags` in updates of those whose head holds read-only copies, `codecs` of those whose output is encoded for the
    next one. Sizes: windows in a micro-batch, tokens in a window, micro-batches in an update (over all replicas). With
    `tied` embedding and readout are one matrix in training; weights that a pattern of `freeze` names do not train.
    `steps` is 0 where the updates of `train.epochs` are not counted yet.
    Where there are `adapters` they train in place of the model's own weights. `activation_checkpointing` says which
    blocks compute their activations again in the backward pass (methods/recomputing.py), `attention` how a run that is
    to be started computes it: who reads a run takes the library's choice.
    """

    model_config: Any
    parts: Anatomy
    costs: ModelCosts
    objective: Objective
    stages: tuple[StagePlan, ...]
    phases: tuple[PhasePlan, ...]
    head: HeadOptions
    head_fractions: Mapping[int, float]
    copy_lags: Mapping[int, int]
    codecs: Mapping[int, str]
    chunk_tokens: int
    dtype: str
    zero_stage: int
    seed: int
    steps: int
    replicas: int
    micro_batch_size: int
    sequence_length: int
    micro_batches: int
    in_flight: int
    tied: bool = False
    freeze: tuple[str, ...] = ()
    adapters: Adapters | None = None
    activation_checkpointing: str = "none"
    attention: str = "auto"

    @property
    def label_tokens(self) -> int:
        """Label tokens of an update of full windows, whose last position has no label."""
        return self.micro_batches * self.micro_batch_size * (self.sequence_length - 1)

    @property
    def tokens(self) -> int:
        """Positions of an update of full windows, which its FLOPs count."""
        return self.micro_batches * self.micro_batch_size * self.sequence_length

    def process_flops(self, update: int) -> float:
        """The FLOPs of update `update` (from 1), as methods/flops.py counts them, in the mean over the processes."""
        return self._phase_flops[self.objective.phase_at(update - 1, self.steps)]

    @cached_property
    def _phase_flops(self) -> list[float]:
        processes = (self.stages[-1].pipeline_rank + 1) * self.replicas
        totals = (flops.of_phase(self.objective, phase, self.costs).total for phase in self.objective.phases)
        return [total * self.tokens / processes for total in totals]

    @property
    def rounds(self) -> int:
        """Micro-batches of a replica in an update."""
        return self.micro_batches // self.replicas

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """Of the hidden states of a micro-batch."""
        return self.micro_batch_size, self.sequence_length, self.parts.hidden_size

    def token_bytes(self, stage: int) -> int:
        """Bytes in which a stage hands over the hidden states of a token."""
        number_bytes = DTYPES[self.dtype].bytes
        return CODECS[self.codecs.get(stage, "none")].token_bytes(self.parts.hidden_size, number_bytes)


def make_blueprint(config: Config, vocab_size: int | None, end_of_text_id: int | None) -> Blueprint:
    """The blueprint of a run to be started; a pretrained model has its own vocabulary, whatever the tokenizer's size.

    Raises ConfigError where model and cuts do not fit.
    """
    model = config.model
    if model.pretrained is not None:
        model_config = hf_config.read_config(hub.folder(model.pretrained, config.at("model.pretrained")))
        hf_config.check_no_noise(model_config)
        family_check.check(model_config)
    else:
        assert vocab_size is not None
        sizes = model.model_dump(exclude={"family", "pretrained", "max_position_embeddings"})
        model_config = hf_config.new_config(
            model.family,
            **sizes,
            vocab_size=vocab_size,
            max_position_embeddings=model.max_position_embeddings or config.data.sequence_length,
            end_of_text_id=end_of_text_id,
        )
    blueprint = replace(of_model(config, model_config), attention=model.attention)
    try:
        hf_config.check_attention(model_config, model.attention)
        check_kernel(config.loss.fused, blueprint.parts.logit_rule)
    except OptionError as error:
        raise ConfigError(f"{config.at(error.key)}: {error.problem}") from None
    return blueprint


def embedded(config: Config) -> int | None:
    """The ids that a pretrained model embeds; None for a new one, which embeds what the tokenizer has."""
    if config.model.pretrained is None:
        return None
    size: int = hf_config.read_config(hub.folder(config.model.pretrained, config.at("model.pretrained"))).vocab_size
    return size


def of_folder(folder: Path, sequence_length: int) -> Blueprint:
    """The blueprint of a model folder that nobody trains: one stage. Raises ModelError, as `of_model`."""
    data = {"train": "none", "sequence_length": sequence_length}
    config = load({"model": {"pretrained": str(folder)}, "data": data, "objective": {"name": "backprop"}})
    model_config = hf_config.read_config(folder)
    family_check.check(model_config)
    return of_model(config, model_config)


def of_model(config: Config, model_config: Any) -> Blueprint:
    """The blueprint of a run with this model. Raises ModelError where it cannot be cut, ConfigError where not so."""
    if config.model.tie == "keep" and not model_config.tie_word_embeddings:
        raise ConfigError(
            f"{config.at('model.tie')}: the model has two matrices for embedding and readout "
            "(tie_word_embeddings in its config.json): give separate"
        )
    parts, lora = hf_parts.anatomy(model_config), config.lora
    try:
        found = adapters.find(model_config, parts, lora.rank, lora.alpha, lora.targets) if lora.rank else None
        blueprint = _laid_out(config, model_config, parts, found, None)
        if not blueprint.freeze and found is None:
            return blueprint
        return _laid_out(config, model_config, parts, found, trained_weights(blueprint))
    except OptionError as error:
        raise ConfigError(f"{config.at(error.key)}: {error.problem}") from None


def _laid_out(
    config: Config, model_config: Any, parts: Anatomy, found: Adapters | None, trained: TrainedWeights | None
) -> Blueprint:
    """`trained` are the weights that do, None for all: where stages with nothing to train are, gradients end."""
    train, windows = config.train, micro_batch_size(config)
    length, head = config.data.sequence_length, config.head
    if config.engine == "deepspeed_pipeline" and router_loss.wanted(model_config):
        raise ConfigError(
            f"engine=deepspeed_pipeline trains no router losses, and the model's config.json has {router_loss.WANTED}: "
            "true: use engine=local, or set it to false"
        )
    tied = config.model.tie == "keep"
    of_adapters = found.size // model_config.num_hidden_layers if found else 0
    costs = model_costs(
        parts.block_parameters + of_adapters,
        parts.hidden_size,
        parts.vocab_size,
        length,
        head,
        readout_width=parts.readout_width,
        embedding_parameters=parts.embedding_parameters,
        norm_parameters=parts.norm_parameters,
        tied=tied,
        trained=trained,
        num_blocks=model_config.num_hidden_layers,
    )
    config = _with_balanced_chunks(config, model_config.num_hidden_layers, costs)
    objective = objectives.build(model_config.num_hidden_layers, **config.objective.model_dump())
    stages = tuple(cut(objective, config.parallel.pipeline, costs, config.parallel.partition))
    if zero_stage(config) == 3 and borders_carry_gradients(objective, stages):  # of chunks that were balanced here
        sizes = [span.last - span.first + 1 for span in objective.usual.spans]
        raise ConfigError(
            f"{config.at('deepspeed.zero_optimization.stage')} with {config.at('parallel.partition')}: chunks of "
            f"{sizes} blocks, balanced with fitted heads counted, would cross from one pipeline rank to the next; "
            "remove the partition, or give objective.chunks the same lengths"
        )
    rounds = train.micro_batches_per_update // config.parallel.data
    between = [stage.index for stage in stages if stage.has_head and not stage.is_last]
    return Blueprint(
        model_config=model_config,
        parts=parts,
        costs=costs,
        objective=objective,
        stages=stages,
        phases=tuple(_phase_plan(phase, stages) for phase in objective.phases),
        head=head,
        head_fractions={one.index: 1.0 if one.is_last else head.token_fraction for one in stages if one.has_head},
        copy_lags=copy_lags(stages, followed(head), config.parallel.in_flight, rounds),
        codecs=dict.fromkeys(between, config.border.codec) if config.border.codec != "none" else {},
        chunk_tokens=config.loss.chunk_tokens,
        dtype=train.dtype,
        zero_stage=zero_stage(config),
        seed=train.seed,
        steps=train.steps or 0,
        replicas=config.parallel.data,
        micro_batch_size=windows,
        sequence_length=length,
        micro_batches=train.micro_batches_per_update,
        in_flight=config.parallel.in_flight,
        tied=tied,
        freeze=tuple(train.freeze),
        adapters=found,
        activation_checkpointing=train.activation_checkpointing,
    )


def _with_balanced_chunks(config: Config, num_blocks: int, costs: ModelCosts) -> Config:
    """With fitted heads, which cost much, a number of chunks becomes their lengths: balanced, heads counted.

    Where they end lies with the model and the head alone, never with the placement, nor with what is frozen.
    """
    usual = objectives.build(num_blocks, **config.objective.model_dump()).usual.spans
    if not HEADS[config.head.kind].fitted or not isinstance(config.value("objective.chunks"), int):
        return config
    if any(after.first <= span.last for span, after in zip(usual, usual[1:], strict=False)):
        return config  # runs that other losses train too are as equal as they can be
    sizes = balanced_chunks(num_blocks, len(usual), replace(costs, trained=None))
    options = config.objective.model_copy(update={"chunks": sizes})
    return config.model_copy(update={"objective": options})


def _phase_plan(phase: Phase, stages: tuple[StagePlan, ...]) -> PhasePlan:
    return PhasePlan(
        phase, tuple(flows(phase, stages)), tuple(duties(phase, stages)), tuple(clip_groups(phase, stages))
    )
