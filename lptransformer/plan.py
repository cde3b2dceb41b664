"""What a configuration would take on a cluster, before anything is started: every method at its best split.

The sizes come from the library's own configuration of the model; no weights are allocated and no data is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from glob import glob
from typing import TYPE_CHECKING, Any

from lptransformer import config as configuration
from lptransformer import cost, objective, rank_memory
from lptransformer.advice import advise
from lptransformer.config import Config
from lptransformer.config_checks import head_in_words, micro_batch_size
from lptransformer.devices import HOST_MEMORY, Cluster, table
from lptransformer.errors import ConfigError, UserError
from lptransformer.predict_local import of_objective
from lptransformer.predict_rivals import RIVALS, data_parallel, of_rival
from lptransformer.workload import CPUS, Candidate, Prediction, Work, balanced_sizes, best, splits

if TYPE_CHECKING:
    from lptransformer.family import Anatomy
    from lptransformer.stage_memory import EmptyStages

# Shares of the blocks whose activations others may make again, where all of them do not fit.
AGAIN = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_WINDOWS = 65_536  # of an update: schedules are replayed pass by pass, and nobody trains with larger batches
LONGEST = 2**20  # tokens of a window: torch can still say how large the attention mask of MOST_WINDOWS of them is
PIPELINE_ENGINE = "backprop, DeepSpeed's PipelineEngine"
AS_CONFIGURED = ", as configured"  # ends the name of the configuration's own method among the others


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `gpu` and `link` are names in devices.yaml."""

    nodes: int = 1
    gpus_per_node: int | None = None
    gpu: str = "cpu"
    link: str | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Plan:
    """`configured` is the run as the configuration has it (None: it has another number of processes than the cluster),
    `methods` are all, each at its best, in ascending order of time; those that do not fit come last."""

    cluster: Cluster
    work: Work
    configured: Prediction | None
    methods: list[Prediction]
    advice: list[str]

    @property
    def ratio(self) -> float:
        """R: FLOPs of the body over those of one head."""
        return self.work.num_blocks * self.work.costs.block_flops / self.work.costs.head_flops


def make(config: Config, request: Request) -> Plan:
    """The plan of a configuration. Raises UserError for a cluster that cannot be, ConfigError where no split fits."""
    per_node = _devices_per_node(config, request)
    processes, size = config.parallel.pipeline * config.parallel.data, request.nodes * per_node
    device = table().device(request.gpu)
    if config.train.dtype not in device.flops:
        raise UserError(f"--gpu={request.gpu} has no number for {config.at('train.dtype')}")
    link = None if request.link is None else table().link(request.link)
    batch = f"{config.at('train.micro_batches_per_update')} x {config.at('train.micro_batch_size')} windows"
    windows = config.train.micro_batches_per_update * micro_batch_size(config)
    if windows > MOST_WINDOWS:
        raise UserError(f"{batch}: updates of up to {MOST_WINDOWS:,} windows can be planned")
    if config.data.sequence_length > LONGEST:
        raise UserError(f"{config.at('data.sequence_length')}: windows of up to {LONGEST:,} tokens can be planned")

    hf_config, parts = _model(config, _vocab_size(config, request.vocab_size))
    no_split = (
        f"no split of {size} processes: at most {hf_config.num_hidden_layers} pipeline ranks (blocks), and replicas "
        f"must divide {batch}: give fewer devices or more micro-batches"
    )
    if size > hf_config.num_hidden_layers * windows:  # the search over splits goes through all of them
        raise ConfigError(no_split)
    empty = _empty(config, hf_config, parts)
    work = _work(config, hf_config, parts, empty)
    cluster = Cluster(device, request.nodes, per_node, link or device.intra_link)
    if device.key in CPUS or config.parallel.channel == "nccl":
        work = replace(work, channel=None)
    configured = _configured(config, work, cluster, empty).evaluate() if processes == size else None
    methods = list(_methods(config, work, cluster, empty))
    if not methods:
        raise ConfigError(no_split)
    methods.sort(key=lambda one: (not one.fits, one.step_seconds))
    left_out = len(_objective(config, work).trained) < work.num_blocks
    compared = [one for one in methods if not (left_out and one.method.endswith(AS_CONFIGURED))]
    advice = [*advise(compared, work, cluster), *_remarks(config, work, cluster)]
    return Plan(cluster, work, configured, methods, advice)


def _devices_per_node(config: Config, request: Request) -> int:
    """Raises UserError for flags that contradict each other, or the configuration."""
    per_node = request.gpus_per_node
    for flag, number in (("--nodes", request.nodes), ("--gpus-per-node", per_node)):
        if number is not None and number < 1:
            raise UserError(f"{flag}={number}: give a whole number, 1 or more")
    if per_node is None:
        processes = config.parallel.pipeline * config.parallel.data
        if processes % request.nodes:
            raise UserError(
                f"--nodes={request.nodes}: the {processes} processes of the configuration (parallel.pipeline x "
                "parallel.data) cannot be shared equally; give --gpus-per-node"
            )
        per_node = processes // request.nodes
    if request.nodes > 1 and request.link is None:
        raise UserError(f"--nodes={request.nodes} needs --link: what is between the nodes (one of {_links()})")
    if request.nodes == 1 and request.link is not None:
        raise UserError(
            f"--link={request.link} is what is between nodes, and --nodes is 1: give both, or neither (what is within "
            "a node comes with the device)"
        )
    return per_node


def _links() -> str:
    return ", ".join(table().links)


def _remarks(config: Config, work: Work, cluster: Cluster) -> list[str]:
    """What has to be said of the run as it is configured."""
    lines, pipeline, data = [], config.parallel.pipeline, config.parallel.data
    trained = len(_objective(config, work).trained)
    if trained < work.num_blocks:
        lines.append(
            f"{config.at('objective.name')} trains {trained} of {work.num_blocks} blocks: it is in the table, and not "
            "among what is compared and recommended."
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


def _vocab_size(config: Config, given: int | None) -> int | None:
    """Entries of the vocabulary, as training would have it; None: the model's own. Text need not be there."""
    from lptransformer.prepare import vocabulary

    if given is not None:
        if not 2 <= given < 2**31:
            raise UserError(f"--vocab-size={given}: give a whole number from 2 to {2**31 - 1}")
        return given
    if config.model.pretrained is not None:
        return None
    data = config.data.model_dump(include={"train", "valid", "tokenizer", "vocab_size"})
    try:
        return vocabulary(**{**data, "train": _there(data["train"]), "valid": _there(data["valid"])})
    except UserError as error:
        raise UserError(f"{error}; or give --vocab-size N") from None


def _there(sources: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sources without what their globs do not find."""
    found = {
        name: {**source, "files": [files for files in source["files"] if glob(files, recursive=True)]}
        for name, source in sources.items()
    }
    return {name: source for name, source in found.items() if source["files"]}


def _model(config: Config, vocab_size: int | None) -> tuple[Any, Anatomy]:
    """The library's configuration of the model, and its parts."""
    from lptransformer import family

    model = config.model
    if model.pretrained is not None:
        hf_config = family.read_config(model.pretrained)
        if vocab_size is not None:
            hf_config.vocab_size = vocab_size
    else:
        sizes = model.model_dump(exclude={"family", "pretrained", "max_position_embeddings"})
        longest = model.max_position_embeddings or config.data.sequence_length
        hf_config = family.new_config(
            model.family, **sizes, vocab_size=vocab_size, max_position_embeddings=longest, end_of_text_id=None
        )
    return hf_config, family.anatomy(hf_config)


def _empty(config: Config, hf_config: Any, parts: Anatomy) -> EmptyStages:
    """The model's stages on whatever split, without memory."""
    from lptransformer.stage_memory import EmptyStages

    dtype, length = config.train.dtype, config.data.sequence_length
    return EmptyStages(hf_config, parts, config.head, dtype=dtype, sequence_length=length, alike=True)


def _work(config: Config, hf_config: Any, parts: Anatomy, empty: EmptyStages) -> Work:
    train, head = config.train, config.head
    windows, length = micro_batch_size(config), config.data.sequence_length
    costs = cost.model_costs(
        parts.block_parameters,
        parts.hidden_size,
        parts.vocab_size,
        length,
        embedding_parameters=parts.embedding_parameters,
        norm_parameters=parts.norm_parameters,
        **head.cost_options(),
    )
    kept = empty.of_others(windows)
    states = rank_memory.precision(train.dtype, config.optimizer, config.deepspeed)
    size = rank_memory.BYTES[train.dtype]
    per_token = {None: parts.hidden_size * size, "bf16": parts.hidden_size * 2, "int8": parts.hidden_size + 4}
    rows = min(head.chunk_tokens, windows * length)
    return Work(
        costs=costs,
        num_blocks=hf_config.num_hidden_layers,
        hidden_size=parts.hidden_size,
        vocab_size=parts.vocab_size,
        sequence_length=length,
        micro_batch_size=windows,
        micro_batches=train.micro_batches_per_update,
        dtype=train.dtype,
        activations=kept,
        logit_bytes=kept.logits / rows,
        token_bytes=per_token[train.border_dtype],
        chunk_tokens=head.chunk_tokens,
        states=states,
        # The gradient twice (norm, step), weights and moments read and written; bf16 weights written.
        update_bytes=2 * states.gradients + 2 * states.optimizer + states.weights * (1 if size == 2 else 2),
        in_flight=config.parallel.in_flight,
        head_blocks=head.blocks,
        token_fraction=head.token_fraction,
        channel=table().links[HOST_MEMORY],
    )


def _objective(config: Config, work: Work) -> objective.Objective:
    return objective.build(work.num_blocks, **config.objective.model_dump())


def _configured(config: Config, work: Work, cluster: Cluster, empty: EmptyStages) -> Candidate:
    """The run on its own split; DeepSpeed's pipelines have no channel of this program between their ranks."""
    goal = _objective(config, work)
    partition, ours = config.parallel.partition, config.engine == "local"
    return of_objective(
        config.objective.name if ours else PIPELINE_ENGINE,
        goal,
        work if ours else replace(work, channel=None),
        cluster,
        config.parallel.pipeline,
        config.parallel.data,
        zero_stage=configuration.zero_stage(config),
        sizes=None if isinstance(partition, str) else partition,
        head=head_in_words(config),
        steps=config.train.steps,
        empty=empty,
    )


def _methods(config: Config, work: Work, cluster: Cluster, empty: EmptyStages) -> Sequence[Prediction]:
    """Every method at its best split, size of micro-batch and ZeRO stage."""
    ways = splits(cluster, work, work.num_blocks)
    base = configuration.zero_stage(config)
    head, steps = head_in_words(config), config.train.steps
    of: dict[str, list[Candidate]] = {}

    def add(method: str, options: Iterable[Candidate | None]) -> None:
        """The first of some options, from the plainest on, that fits; all of them where none does."""
        tried = [one for one in options if one is not None]
        plainest = next((one for one in tried if one.fits), None)
        of.setdefault(method, []).extend(tried if plainest is None else [plainest])

    def zero_stages(data: int, most: int) -> list[int]:
        return [min(base, most)] if data == 1 else sorted({min(base, most), *range(max(1, base), most + 1)})

    name, chunks = config.objective.name, config.objective.chunks
    numbers = f"({chunks if isinstance(chunks, int) else len(chunks)})" if name in ("chunked", "overlapping") else ""
    own = _objective(config, work)
    local_only = name in ("chunked", "greedy") and len(own.phases) == 1
    for pipeline, data, smaller in ways:
        place = {"pipeline": pipeline, "data": data, "head": head, "steps": steps, "empty": empty}

        def here(
            method: str,
            goal: objective.Objective,
            most: int,
            sizes: list[int] | None = None,
            work: Work = smaller,
            place: dict[str, Any] = place,
        ) -> None:
            """A method of this program on this split, where training would take it."""
            if work.dtype == "fp64" and place["data"] > 1:
                return  # config_checks.py
            stages = zero_stages(place["data"], most)
            add(method, (of_objective(method, goal, work, cluster, **place, zero_stage=z, sizes=sizes) for z in stages))

        if name != "backprop":
            most = 3 if local_only and pipeline <= len(own.usual.spans) else 0 if name == "delayed" else 2
            here(f"{name}{numbers}{AS_CONFIGURED}", own, most)
        if pipeline > 1:
            sizes = _chunks(smaller, pipeline)
            overlap: dict[str, Any] = {"overlap": 1, "own_weight": 0.5, "first_head": False}
            here("chunked, one per rank", objective.build(work.num_blocks, "chunked", chunks=sizes), 3, sizes)
            here(
                "overlapping, one per rank",
                objective.build(work.num_blocks, "overlapping", chunks=sizes, **overlap),
                2,
                sizes,
            )
        for rival in RIVALS:
            zero = min(base if data == 1 else max(1, base), 2)
            options = [of_rival(rival, smaller, cluster, pipeline, data, zero_stage=zero, recompute=r) for r in AGAIN]
            add(rival.family, options)
        if pipeline == 1:
            title = "data parallel" if data > 1 else "one process"
            zeros = [base] if data == 1 else [1, 3]
            for zero in zeros:
                options = [data_parallel(smaller, cluster, data, zero_stage=zero, recompute=r) for r in AGAIN]
                add(title, options)
                if options[0] is not None and options[0].fits:
                    break  # ZeRO 3 is for what does not fit otherwise
    found = [best(candidates) for candidates in of.values()]
    return [one for one in found if one is not None]


def _chunks(work: Work, parts: int) -> list[int]:
    """Blocks of every chunk, a chunk per pipeline rank, with the heads counted."""
    costs = work.costs
    return balanced_sizes(
        work.num_blocks,
        parts,
        3 * costs.block_flops,
        costs.head_training_flops(True),
        costs.head_training_flops(False),
    )
