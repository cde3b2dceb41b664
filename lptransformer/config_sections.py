"""The sections of the configuration: every key with its type, its default and what it means.

Nothing here looks at more than one key; that is config_checks.py. Reading, overrides and printing are config.py.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from lptransformer import deepspeed_keys

# The text in each type says what would be right; it goes into the message about a wrong value.
Count = Annotated[int, Field(ge=1), "a whole number, 1 or more"]
Whole = Annotated[int, Field(ge=0), "a whole number, 0 or more"]
Positive = Annotated[float, Field(gt=0), "a number above 0"]
NotNegative = Annotated[float, Field(ge=0), "a number, 0 or more"]
Fraction = Annotated[float, Field(ge=0, lt=1), "a number, 0 or more and below 1"]
Share = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
Text = Annotated[str, Field(min_length=1), "text (in quotes when it looks like a number)"]
MaybeCount = Annotated[Count | None, "a whole number, 1 or more, or null"]
MaybeText = Annotated[Text | None, "text (in quotes when it looks like a number) or null"]
Globs = Annotated[list[Text], Field(min_length=1), "a glob or a list of globs"]
# Who needs the number takes it from config_checks.micro_batch_size.
BatchSize = Annotated[Count | Literal["auto"], "a whole number, 1 or more, or auto"]
_SOURCES = "a glob, a list of globs, or a mapping of names to globs or to {files, weight}"


class Section(BaseModel):
    """Base of all sections: unknown keys, wrong types, nan and inf are refused; a whole number is a fine float."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Source(Section):
    """Text files of one kind, and their share in a mixture (null: every window once per epoch)."""

    files: Globs
    weight: Annotated[Annotated[float, Field(gt=0)] | None, "a number above 0"] = None


def _sources(value: Any, info: Any) -> Any:
    """{name: {files, weight}} from a glob, a list of globs, or a mapping of either by name."""
    if isinstance(value, str | list) or (isinstance(value, dict) and "files" in value):
        value = {info.field_name: value}
    if not isinstance(value, dict):
        return value
    for name in value:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(name)) or not isinstance(name, str):
            raise ValueError(f"a mapping whose names are letters, digits, - and _ (in quotes if digits); not {name!r}")
    if not value and info.field_name == "train":
        raise ValueError(f"{_SOURCES}, not empty")
    as_list = {name: {"files": files} if isinstance(files, str | list) else files for name, files in value.items()}
    for source in as_list.values():
        if isinstance(source, dict) and isinstance(source.get("files"), str):
            source["files"] = [source["files"]]
    return as_list


Sources = Annotated[dict[str, Source], BeforeValidator(_sources), _SOURCES]


class ModelSection(Section):
    family: Text = Field(default="gpt2", description="architecture of a new model: gpt2 or llama")
    pretrained: MaybeText = Field(
        default=None, description="folder of a Hugging Face model to start from (it has the sizes)"
    )
    hidden_size: Count = Field(default=256, description="width of the hidden states")
    num_layers: Count = Field(default=4, description="number of blocks")
    num_heads: Count = Field(default=4, description="attention heads")
    intermediate_size: MaybeCount = Field(default=None, description="width of the MLP (null: the family's usual one)")
    num_key_value_heads: MaybeCount = Field(
        default=None, description="key and value heads, llama only (null: num_heads)"
    )
    max_position_embeddings: MaybeCount = Field(
        default=None, description="longest sequence (null: data.sequence_length)"
    )


class DataSection(Section):
    train: Sources = Field(description=f"training text: {_SOURCES}")
    valid: Sources = Field(default={}, description="validation text, in the same form; every name is a set of its own")
    tokenizer: Text = Field(
        default="sentencepiece", description="sentencepiece (trained), bytes, folder or tokenizer.model"
    )
    vocab_size: Annotated[int, Field(ge=260), "a whole number, 260 or more (256 bytes, specials and pieces)"] = Field(
        default=4096, description="entries of a tokenizer that is trained here"
    )
    sequence_length: Annotated[int, Field(ge=2), "a whole number, 2 or more"] = Field(
        default=256, description="window, tokens"
    )
    cache: Text = Field(default="prepared", description="folder for tokenizers and token sets")


class ParallelSection(Section):
    pipeline: Count = Field(default=1, description="pipeline ranks; pipeline x data = number of processes")
    data: Count = Field(default=1, description="replicas of every pipeline rank")
    partition: Annotated[Literal["balanced"] | list[Count], '"balanced" or a list of block counts, each 1 or more'] = (
        Field(default="balanced", description="blocks per pipeline rank: balanced (by cost, heads counted) or a list")
    )
    in_flight: Count = Field(default=2, description="micro-batches that may wait between two pipeline ranks")
    channel: Literal["gloo", "nccl"] = Field(
        default="gloo", description="between pipeline ranks: gloo (host memory) or nccl (experimental, needs GPUs)"
    )
    timeout_seconds: Positive = Field(default=1800.0, description="how long a process waits for another")


class ObjectiveSection(Section):
    name: Literal["backprop", "chunked", "greedy", "overlapping", "last", "deep_supervision", "delayed"] = Field(
        default="chunked", description="which loss reaches which blocks: the rows of OBJECTIVES in objective.py"
    )
    chunks: Annotated[Count | list[Count], "a whole number or a list of block counts, each 1 or more"] = Field(
        default=2, description="runs of blocks with a head behind each: how many, or the length of each"
    )
    overlap: Whole = Field(default=1, description="overlapping: runs below its own that a head's loss trains too")
    own_weight: Share = Field(
        default=0.5, description="overlapping: weight of the nearer losses of a block (0: the furthest alone)"
    )
    first_head: bool = Field(default=False, description="overlapping: a head behind the first run too")
    trained_blocks: Count = Field(default=1, description="last: blocks that are trained, counted from the last one")
    backprop_every: MaybeCount = Field(default=None, description="hybrid: every so many updates a global one")
    backprop_share: Share = Field(default=0.0, description="hybrid: share of the updates, the last, that are global")


class HeadSection(Section):
    """The heads between stages; the last one is always the model's own. `chunk_tokens` is for all."""

    kind: Literal["private", "shared", "low_rank"] = Field(
        default="private",
        description="own norm and readout (private), a read-only copy of the last readout (shared), or low_rank",
    )
    rank: Count = Field(default=64, description="low_rank: width between norm and readout")
    blocks: Whole = Field(default=0, description="extra Transformer blocks in the head, before its norm")
    ema_decay: Annotated[Fraction | None, "a number, 0 or more and below 1, or null"] = Field(
        default=None, description="extra blocks follow a moving average of the next blocks (null: they are trained)"
    )
    refresh_every: Count = Field(default=1, description="shared, ema_decay: updates between two refreshes of copies")
    token_fraction: Annotated[float, Field(gt=0, le=1), "a number above 0, up to 1"] = Field(
        default=1.0, description="share of a window's positions, drawn anew every time, whose loss the head sees"
    )
    init: Annotated[Literal["scratch", "model"] | None, "scratch, model or null"] = Field(
        default=None, description="new weights, or copies of the model's own (null: model with model.pretrained)"
    )
    chunk_tokens: Count = Field(default=1024, description="rows of logits that exist at once")

    @property
    def followed(self) -> Literal["last", "next"] | None:
        """The stage whose weights auxiliary heads hold read-only copies of; the further one where it is two."""
        return "last" if self.kind == "shared" else None if self.ema_decay is None else "next"

    def cost_options(self) -> dict[str, Any]:
        """What cost.model_costs wants to know of an auxiliary head."""
        same = self.model_dump(include={"kind", "rank", "blocks", "token_fraction"})
        return {**same, "averaged_blocks": self.ema_decay is not None}


class OptimizerSection(Section):
    name: Literal["adamw", "sgd"] = Field(default="adamw", description="adamw or sgd; one for every stage")
    beta1: Fraction = Field(default=0.9, description="AdamW: decay of the mean")
    beta2: Fraction = Field(default=0.95, description="AdamW: decay of the squares")
    eps: Positive = Field(default=1e-8, description="AdamW: added to the root of the squares")
    weight_decay: NotNegative = Field(default=0.1, description="decay of weights")
    momentum: Fraction = Field(default=0.9, description="SGD: momentum")


class TrainSection(Section):
    steps: Count = Field(default=1000, description="updates of every stage")
    micro_batch_size: BatchSize = Field(
        default=8, description="windows per micro-batch; auto: the largest power of two that fits into memory"
    )
    micro_batches_per_update: Count = Field(
        default=4, description="micro-batches per update, over all replicas together"
    )
    learning_rate: Positive = Field(default=1e-3, description="peak learning rate")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="cosine", description="linear, cosine, constant or constant_with_warmup"
    )
    warmup_steps: Whole = Field(default=0, description="updates until the learning rate is at its peak")
    grad_clip: NotNegative = Field(
        default=1.0, description="greatest gradient norm of what clips together, usually a chunk (0: off)"
    )
    dtype: Literal["fp32", "bf16", "fp64"] = Field(
        default="fp32", description="fp32, bf16 with fp32 master weights, or fp64 (to check algebra)"
    )
    border_dtype: Annotated[Literal["bf16", "int8"] | None, "bf16, int8 or null"] = Field(
        default=None,
        description="chunked, greedy: hidden states from chunk to chunk in bf16, or int8 with a scale per token",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), "a whole number from 0 to 4294967295"] = Field(
        default=0, description="seed of the weights and of the data order"
    )
    save_every: Whole = Field(default=0, description="updates between checkpoints (0: only at the end)")
    eval_every: Whole = Field(default=0, description="updates between evaluations (0: only at the end)")
    max_skipped_updates: Count = Field(default=10, description="skipped updates of a stage in a row that end the run")


class RunSection(Section):
    dir: MaybeText = Field(default=None, description="run folder (null: runs/ and the name of the file)")
    trace: Annotated[
        Annotated[list[int], Field(min_length=2, max_length=2)] | None,
        "two numbers of updates, the first and the last, counted from 1, or null",
    ] = Field(default=None, description="[first, last] updates to record, for `report --trace` (null: none)")


def origin_of(key: str, origins: dict[str, str]) -> str:
    """Where the value of a dotted key came from: the origin of the longest part of the key that has one."""
    names = key.split(".")
    parts = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((origins[part] for part in parts if part in origins), "by default")


class Config(Section):
    """All sections, and keys that stand beside them.

    `deepspeed` holds the options for every stage's DeepSpeed engine, checked in deepspeed_keys.py.
    """

    engine: Literal["local", "deepspeed_pipeline"] = Field(
        default="local", description="local, or deepspeed_pipeline: backprop by DeepSpeed's own PipelineEngine"
    )
    model: ModelSection = ModelSection()
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    objective: ObjectiveSection = ObjectiveSection()
    head: HeadSection = HeadSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()
    deepspeed: dict[str, Any] = {}
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def value(self, key: str) -> Any:
        """The value of a dotted key; None when it is not there."""
        section, *names = key.split(".")
        value: Any = getattr(self, section)
        for name in names:
            value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        return value

    def at(self, key: str) -> str:
        """ "key = value (origin)", for messages."""
        return f"{key} = {self.value(key)!r} ({origin_of(key, self._origins)})"


PLAIN = ("engine",)  # keys that are in no section
SECTIONS: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items() if name not in PLAIN}
TYPED: dict[str, type[Section]] = {name: kind for name, kind in SECTIONS.items() if name != "deepspeed"}
KEYS = [*PLAIN, *(f"{name}.{key}" for name, section in TYPED.items() for key in section.model_fields)]
KEYS += [f"deepspeed.{table}{key}" for table, keys in deepspeed_keys.TABLES.items() for key in keys]
_RUNS = ("chunked", "overlapping", "deep_supervision")
# Keys that have a meaning beside some values of another only; given explicitly elsewhere they are refused, and they are
# not printed.
ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "data.vocab_size": ("data.tokenizer", ("sentencepiece",)),
    "objective.chunks": ("objective.name", (*_RUNS, "delayed")),
    **{f"objective.{key}": ("objective.name", ("overlapping",)) for key in ("overlap", "own_weight", "first_head")},
    "objective.trained_blocks": ("objective.name", ("last",)),
    **{f"objective.backprop_{key}": ("objective.name", (*_RUNS, "greedy")) for key in ("every", "share")},
    "train.border_dtype": ("objective.name", ("chunked", "greedy")),
    **{f"optimizer.{key}": ("optimizer.name", ("adamw",)) for key in ("beta1", "beta2", "eps")},
    "optimizer.momentum": ("optimizer.name", ("sgd",)),
    "head.rank": ("head.kind", ("low_rank",)),
}
