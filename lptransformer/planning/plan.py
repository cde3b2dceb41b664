"""What a configuration would take on a cluster, before anything is started: every method at its best split.

The sizes come from the library's own configuration of the model; no weights are allocated and no data is read.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from glob import glob
from typing import TYPE_CHECKING, Any

from lptransformer.config.checks import micro_batch_size, needs_whole_weights, product_dtype
from lptransformer.config.epochs import steps
from lptransformer.config.schema import Config
from lptransformer.errors import ConfigError, UserError
from lptransformer.methods import recomputing
from lptransformer.methods.codecs import CODECS
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.heads import blocks_like, followed, label
from lptransformer.methods.objectives import METHODS, Objective
from lptransformer.planning import candidates
from lptransformer.planning.candidates import Candidate, Prediction
from lptransformer.planning.devices import HOST_MEMORY, Cluster, load_devices
from lptransformer.planning.stage_state import precision
from lptransformer.planning.step_time import Bound, Work

if TYPE_CHECKING:
    from lptransformer.models.blueprint import Blueprint

MOST_WINDOWS = 65_536  # of an update: nobody trains with larger batches
LONGEST = 2**20  # tokens of a window: torch can still say how large the attention mask of MOST_WINDOWS of them is
COPYING = 0.1  # of an update: copies of weights that take longer are worth a word
PIPELINE_ENGINE = "backprop, DeepSpeed's PipelineEngine"


@dataclass(frozen=True)
class Plan:
    """`configured` is the run as the configuration has it (None: it has another number of processes than the cluster),
    `methods` are all that are compared, each at its best, in ascending order of time; those that do not fit come last.
    `bounds` are of schedules that are not replayed, `remarks` are on the run as configured.
    """

    cluster: Cluster
    work: Work
    configured: Prediction | None
    methods: list[Prediction]
    bounds: list[Bound]
    remarks: list[str]

    @property
    def ratio(self) -> float:
        """R: FLOPs of the body over those of one head."""
        return self.work.num_blocks * self.work.costs.block_flops / self.work.costs.head_flops


def make(
    config: Config,
    *,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    gpu: str = "laptop-core",
    link: str | None = None,
    vocab_size: int | None = None,
) -> Plan:
    """The plan of a configuration. Raises UserError for a cluster that cannot be, ConfigError where no split fits."""
    from lptransformer.models.blueprint import make_blueprint

    cluster = _cluster(config, nodes, gpus_per_node, gpu, link)
    size = cluster.size
    batch = f"{config.at('train.micro_batches_per_update')} x {config.at('train.micro_batch_size')} windows"
    windows = config.train.micro_batches_per_update * micro_batch_size(config)
    if windows > MOST_WINDOWS:
        raise UserError(f"{batch}: updates of up to {MOST_WINDOWS:,} windows can be planned")
    if config.data.sequence_length > LONGEST:
        raise UserError(f"{config.at('data.sequence_length')}: windows of up to {LONGEST:,} tokens can be planned")

    blueprint = make_blueprint(config, _vocab_size(config, vocab_size), None)
    objective = blueprint.objective
    no_split = (
        f"no split of {size} processes: at most {objective.num_blocks} pipeline ranks (blocks), and replicas must "
        f"divide {batch}: give fewer devices or more micro-batches"
    )
    if size > objective.num_blocks * windows:  # the search over splits goes through all of them
        raise ConfigError(no_split)
    work = _work(config, blueprint)
    if cluster.device.is_cpu or config.parallel.channel == "nccl":
        work = replace(work, channel=None)
    compared = not objective.is_backprop and len(objective.trained) == objective.num_blocks
    own = f"{_method(config)}, as configured" if compared else None
    options: dict[str, Any] = {"zero_stage": blueprint.zero_stage}
    options |= {"head": label(blueprint.head), "steps": steps(config)}
    methods, bounds = candidates.methods(work, cluster, own, objective, **options)
    if not methods:
        raise ConfigError(no_split)
    processes = config.parallel.pipeline * config.parallel.data
    configured = _configured(config, blueprint, work, cluster, options) if processes == size else None
    remarks = _remarks(config, objective, cluster)
    if configured is not None and (said := copies_remark(config, blueprint, cluster, configured.step_seconds)):
        remarks.append(said)
    if there := max((rank.memory.host for rank in configured.ranks), default=0) if configured else 0:
        at = config.at("deepspeed.zero_optimization.offload_optimizer")
        remarks.append(
            f"{at}: a process takes up to {there / 2**30:.3g} GiB of its host's memory; the time of steps there is not "
            "predicted."
        )
    return Plan(cluster, work, configured, methods, bounds, remarks)


def _method(config: Config) -> str:
    """The objective with the number of its chunks."""
    options = config.objective
    chunks = getattr(options, "chunks", None)
    numbers = "" if chunks is None else f"({chunks if isinstance(chunks, int) else len(chunks)})"
    return METHODS[options.name].label + numbers


def _cluster(config: Config, nodes: int, per_node: int | None, gpu: str, link: str | None) -> Cluster:
    """Raises UserError for flags that contradict each other, or the configuration."""
    for flag, number in (("--nodes", nodes), ("--gpus-per-node", per_node)):
        if number is not None and number < 1:
            raise UserError(f"{flag}={number}: give a whole number, 1 or more")
    processes = config.parallel.pipeline * config.parallel.data
    if per_node is None and processes % nodes:
        raise UserError(
            f"--nodes={nodes}: the {processes} processes of the configuration (parallel.pipeline x parallel.data) "
            "cannot be shared equally; give --gpus-per-node"
        )
    if nodes > 1 and link is None:
        raise UserError(
            f"--nodes={nodes} needs --link: what is between the nodes (one of {', '.join(load_devices().links)})"
        )
    if nodes == 1 and link is not None:
        raise UserError(
            f"--link={link} is what is between nodes, and --nodes is 1: give both, or neither (what is within a node "
            "comes with the device)"
        )
    device = load_devices().device(gpu)
    if product_dtype(config) not in device.flops:
        raise UserError(f"--gpu={gpu} has no number for {config.at('train.dtype')}")
    between = device.intra_link if link is None else load_devices().link(link)
    return Cluster(device, nodes, per_node or processes // nodes, between)


def _remarks(config: Config, objective: Objective, cluster: Cluster) -> list[str]:
    """Remarks on the run as configured."""
    lines, pipeline, data = [], config.parallel.pipeline, config.parallel.data
    if len(objective.trained) < objective.num_blocks:
        lines.append(
            f"{config.at('objective.name')} trains {len(objective.trained)} of {objective.num_blocks} blocks: it is "
            "not among what is compared and recommended."
        )
    if pipeline * data != cluster.size:
        lines.append(
            f"The configuration is of {pipeline} x {data} processes (pipeline x data) and these machines have "
            f"{cluster.size}: its own split is not among the above."
        )
    elif config.engine == "deepspeed_pipeline":
        lines.append(
            f"The run as configured ({config.at('engine')}) is 1F1B on its own partition, its gradients summed over "
            "replicas after the last backward pass. Its memory is that of the same schedule in this program: what "
            "DeepSpeed's PipelineEngine takes for buffers of its own is not counted. Local updates need engine: local."
        )
    return lines


def copies_remark(config: Config, blueprint: Blueprint, cluster: Cluster, step_seconds: float) -> str | None:
    """What the copies of weights that auxiliary heads follow take, and what to set; None where that is little of an
    update of `step_seconds`.

    They cross from host to host, or through the memory of one, beside the computation, and are late where that has no
    time for them. The process counts that sends most.
    """
    stages, costs, head = blueprint.stages, blueprint.costs, blueprint.head
    sent = Counter[int]()  # by pipeline rank, in weights
    for index in blueprint.copy_lags:
        target, depth = stages[index], blueprint.objective.num_blocks
        blocks = [] if head.trains_blocks else list(blocks_like(head, target.last_block, depth))
        readout = costs.after(target.last_block).auxiliary_copied - len(blocks) * costs.block_parameters
        for block, weights in (*((block, costs.block_parameters) for block in blocks), (depth - 1, readout)):
            source = next(stage for stage in stages if stage.first_block <= block <= stage.last_block)
            if source.pipeline_rank != target.pipeline_rank:
                sent[source.pipeline_rank] += weights
    size = max(sent.values(), default=0) * DTYPES[blueprint.dtype].bytes
    links = [load_devices().links[HOST_MEMORY], cluster.device.intra_link]
    if cluster.nodes > 1:
        links.append(cluster.link.shared(min(blueprint.replicas, cluster.devices_per_node)))
    link = min(links, key=lambda one: one.bytes_per_second)
    seconds = size / link.bytes_per_second
    if seconds <= COPYING * step_seconds * head.refresh_every:
        return None
    from_last = followed(head) == "last"
    instead = f"head.kind={'fitted' if config.model.pretrained else 'low_rank'}" if from_last else "head.ema_decay=null"
    share = seconds / step_seconds
    return (
        f"Heads hold copies of other ranks' weights ({config.at('head.kind' if from_last else 'head.ema_decay')}): a "
        f"refresh takes {seconds:.3g} s ({size / 1e6:,.1f} MB over {link.name}), which with "
        f"{config.at('head.refresh_every')} is {share / head.refresh_every:.2g} of an update ({step_seconds:.3g} s): "
        f"set head.refresh_every={math.ceil(share / COPYING)} to make it {COPYING:.0%} at most, or {instead}, without "
        "copies."
    )


def _vocab_size(config: Config, given: int | None) -> int | None:
    """Entries of the vocabulary, as training would have it; None: the model's own. Text need not be there."""
    from lptransformer.data.prepare import vocabulary

    if config.model.pretrained is not None and given is not None:
        raise UserError(f"--vocab-size={given}: the model of {config.at('model.pretrained')} has its own")
    if given is not None and not 2 <= given < 2**31:
        raise UserError(f"--vocab-size={given}: give a whole number from 2 to {2**31 - 1}")
    if given is not None or config.model.pretrained is not None:
        return given
    data = config.data.model_dump(include={"train", "valid", "tokenizer", "vocab_size"})
    try:
        return vocabulary(**{**data, "train": _there(data["train"]), "valid": {}})
    except UserError as error:
        raise UserError(f"{error}; or give --vocab-size N") from None


def _there(sources: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sources without what their globs do not find."""
    found = {
        name: {**source, "files": [files for files in source["files"] if glob(files, recursive=True)]}
        for name, source in sources.items()
    }
    return {name: source for name, source in found.items() if source["files"]}


def _work(config: Config, blueprint: Blueprint) -> Work:
    from lptransformer.planning.stage_memory import EmptyStages

    empty, parts, dtype = EmptyStages(blueprint, alike=True), blueprint.parts, DTYPES[blueprint.dtype]
    whole = EmptyStages(replace(blueprint, activation_checkpointing=recomputing.KEPT))
    kept = whole.of_others(blueprint.micro_batch_size)
    states = precision(blueprint.dtype, config.optimizer, config.deepspeed)
    rows = min(blueprint.chunk_tokens, blueprint.micro_batch_size * blueprint.sequence_length)
    return Work(
        costs=blueprint.costs,
        num_blocks=blueprint.objective.num_blocks,
        hidden_size=parts.hidden_size,
        vocab_size=parts.vocab_size,
        sequence_length=blueprint.sequence_length,
        micro_batch_size=blueprint.micro_batch_size,
        micro_batches=blueprint.micro_batches,
        dtype=product_dtype(config),
        activations=kept,
        logit_bytes=kept.logits / rows,
        token_bytes=CODECS[config.border.codec].token_bytes(parts.hidden_size, dtype.bytes),
        chunk_tokens=blueprint.chunk_tokens,
        states=states,
        update_bytes=states.update_bytes,
        empty=empty,
        in_flight=blueprint.in_flight,
        head=blueprint.head,
        whole_weights=needs_whole_weights(config),
        activation_checkpointing=blueprint.activation_checkpointing,
        channel=load_devices().links[HOST_MEMORY],
    )


def _configured(
    config: Config, blueprint: Blueprint, work: Work, cluster: Cluster, options: dict[str, Any]
) -> Prediction:
    """The run on its own split; DeepSpeed's pipelines have no channel of this program between their ranks."""
    ours = config.engine == "local"
    method, work = (config.objective.name, work) if ours else (PIPELINE_ENGINE, replace(work, channel=None))
    objective, stages = blueprint.objective, blueprint.stages
    return Candidate(method, objective, stages, work, cluster, blueprint.replicas, **options).evaluate()
