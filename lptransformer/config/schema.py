"""The sections of the configuration: every key with its type, its default and what it means.

The options of an objective and of a head stand beside its row (methods/objectives.py, methods/heads.py).
Nothing here looks at more than one key; that is config/checks.py. Reading, overrides and printing are config/load.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from lptransformer.config import deepspeed_keys
from lptransformer.methods import recomputing
from lptransformer.methods.heads import HEADS, HeadOptions
from lptransformer.methods.objectives import METHODS, ChunkedOptions, ObjectiveOptions
from lptransformer.section import (
    Count,
    Fraction,
    Globs,
    MaybeCount,
    MaybeFraction,
    MaybeText,
    NotNegative,
    Positive,
    Section,
    Text,
    Whole,
)

# Where a value came from, beside files.
COMMAND_LINE, BY_PROGRAM, BY_DEFAULT = "on the command line", "given to initialize", "by default"
# Code that needs the number takes it from config/checks.micro_batch_size.
Attention = Literal[
    "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"
]
BatchSize = Annotated[Count | Literal["auto"], "a whole number, 1 or more, or auto"]
MaybeSteps = Annotated[Count | None, "a whole number, 1 or more"]
MaybeEpochs = Annotated[Annotated[float, Field(gt=0)] | None, "a number above 0, or null"]
MaybeUpdates = Annotated[
    Annotated[list[int], Field(min_length=2, max_length=2)] | None,
    "two numbers of updates, the first and the last, counted from 1, or null",
]
_SOURCES = "a glob, a list of globs, or a mapping of names to globs or to {files, weight, format, fields, valid}"
Format = Literal["auto", "text", "chat", "completion"]
_FIELDS = "{text: COLUMN}, {messages: COLUMN} or {prompt: COLUMN, completion: COLUMN}"


def _fields(value: dict[str, str]) -> dict[str, str]:
    if set(value) not in (set(), {"text"}, {"messages"}, {"prompt", "completion"}):
        raise ValueError(_FIELDS)
    return value


Fields = Annotated[dict[str, str], AfterValidator(_fields)]
HeldOut = Annotated[float, Field(gt=0, lt=1)]


class Source(Section):
    """Files of one kind, and their share in a mixture (null: every window once per epoch); what they hold, and the
    share that is held out, where that is not what the section says."""

    files: Globs
    weight: Annotated[Annotated[float, Field(gt=0)] | None, "a number above 0"] = None
    format: Annotated[Format | None, "auto, text, chat or completion"] = None
    fields: Annotated[Fields | None, _FIELDS] = None
    valid: Annotated[HeldOut | None, "a share between 0 and 1"] = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if value is not None or key in ("files", "weight")}


def _sources(value: Any, info: Any) -> Any:
    """{name: {files, weight, ...}} from a glob, a list of globs, or a mapping of either by name."""
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
_SHARE = f"a share between 0 and 1 of the training text, which is held out, or {_SOURCES}"
SourcesOrShare = Annotated[dict[str, Source] | HeldOut, BeforeValidator(_sources), _SHARE]


class ModelSection(Section):
    family: Text = Field(default="gpt2", description="architecture of a new model: gpt2 or llama")
    pretrained: MaybeText = Field(
        default=None, description="Hugging Face model to start from, folder or OWNER/NAME on the hub (it has the sizes)"
    )
    tie: Literal["separate", "keep"] = Field(
        default="separate",
        description="a pretrained model whose embedding and readout are one matrix: separate (two, trained apart) or "
        "keep (one; one stage must hold both)",
    )
    attention: Attention = Field(
        default="auto",
        description="how attention is computed: auto (the library's choice), or one of its names; all but eager and "
        "sdpa need a GPU",
    )
    hidden_size: Count = Field(default=256, description="width of the hidden states")
    num_layers: Count = Field(default=4, description="number of blocks")
    num_heads: MaybeCount = Field(default=None, description="attention heads (null: 4)")
    intermediate_size: MaybeCount = Field(default=None, description="width of the MLP (null: the family's usual one)")
    num_key_value_heads: MaybeCount = Field(
        default=None, description="key and value heads, llama only (null: num_heads)"
    )
    max_position_embeddings: MaybeCount = Field(
        default=None, description="longest sequence (null: data.sequence_length)"
    )


class DataSection(Section):
    train: Sources = Field(description=f"training text: {_SOURCES}")
    valid: SourcesOrShare = Field(
        default={},
        description="validation text, every name a set of its own; or the share of every training source that is held "
        "out, by document (of one document its last part)",
    )
    format: Format = Field(
        default="auto",
        description="what files of rows hold: text, conversations, or prompts and completions (auto: by their fields; "
        "prompt and completion are a conversation where the tokenizer has a chat template)",
    )
    fields: Annotated[Fields, _FIELDS] = Field(
        default={}, description="the columns that hold it, where they have no usual name"
    )
    loss_on: Literal["answers", "all"] = Field(
        default="answers", description="of conversations and completions: which tokens carry a label"
    )
    long_rows: Literal["truncate", "split"] = Field(
        default="truncate", description="conversations and completions that are longer than a window"
    )
    bos: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="begin-of-text token before every document (auto: as the tokenizer, or its template)",
    )
    isolate_documents: Annotated[bool | None, "true, false or null"] = Field(
        default=None,
        description="no document of a window sees another one (null: true but for text)",
    )
    tokenizer: Text = Field(
        default="sentencepiece", description="sentencepiece (trained), bytes, folder, OWNER/NAME or tokenizer.model"
    )
    vocab_size: Annotated[int, Field(ge=260), "a whole number, 260 or more (256 bytes, specials and pieces)"] = Field(
        default=4096, description="entries of a tokenizer that is trained here"
    )
    sequence_length: Annotated[int, Field(ge=2), "a whole number, 2 or more"] = Field(
        default=256, description="window, tokens"
    )
    cache: Text = Field(default="prepared", description="folder for tokenizers and token sets")

    @property
    def valid_names(self) -> list[str]:
        """The names of the validation sets; one that is held out has that of its source, "valid" of the only one."""
        given = list(self.valid) if isinstance(self.valid, dict) else []
        held_out = [name for name, one in self.train.items() if one.valid or not isinstance(self.valid, dict)]
        return given + ["valid" if name == "train" else name for name in held_out]


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


class LossSection(Section):
    """How the loss of every head is taken, the model's own included."""

    chunk_tokens: Count = Field(default=1024, description="rows of logits that exist at once")
    fused: Literal["auto", "chunked", "torch", "liger"] = Field(
        default="auto",
        description="what takes loss and gradients of a chunk in training: torch's own operations (chunked), its "
        "linear_cross_entropy (torch; not in bf16), Liger-Kernel (liger; on GPUs, with chunks of its own), or by the "
        "device (auto: torch on a GPU in fp32, else chunked)",
    )


class BorderSection(Section):
    codec: str = Field(
        default="none",
        description="hidden states from chunk to chunk: as they are (none), bf16, or int8 with a scale per token",
    )


class LoraSection(Section):
    """Adapters of rank `rank` beside linear maps of a pretrained model's blocks, trained in place of its weights."""

    rank: MaybeCount = Field(default=None, description="rank of the adapters (null: none)")
    alpha: Annotated[Annotated[float, Field(gt=0)] | None, "a number above 0, or null"] = Field(
        default=None, description="what an adapter adds is scaled by alpha / rank (null: twice the rank)"
    )
    targets: Annotated[Annotated[list[Text], Field(min_length=1)] | None, "a list of names, or null"] = Field(
        default=None, description="linear maps of the blocks with an adapter, by the end of their names (null: all)"
    )


class OptimizerSection(Section):
    name: Literal["adamw", "adamw_8bit", "muon", "sgd"] = Field(
        default="adamw",
        description="adamw, its moments in 8 bits (by bitsandbytes, on GPUs), sgd, or muon: the matrices of blocks by "
        "Muon, all else by AdamW; one for every stage",
    )
    beta1: Fraction = Field(default=0.9, description="AdamW: decay of the mean")
    beta2: Fraction = Field(default=0.95, description="AdamW: decay of the squares")
    eps: Positive = Field(default=1e-8, description="AdamW: added to the root of the squares")
    weight_decay: NotNegative = Field(default=0.1, description="decay of weights")
    momentum: MaybeFraction = Field(default=None, description="momentum (null: 0.9 of SGD, 0.95 of Muon)")


class TrainSection(Section):
    # Code that needs the number takes it from config/epochs.steps: where `epochs` is given there is none yet.
    steps: MaybeSteps = Field(default=1000, description="updates of every stage")
    epochs: MaybeEpochs = Field(
        default=None,
        description="in place of steps: how often all training windows are seen, a number such as 3 or 1.5; the "
        "updates are counted when the run starts",
    )
    micro_batch_size: BatchSize = Field(
        default=8, description="windows per micro-batch; auto: the largest power of two that fits into memory"
    )
    micro_batches_per_update: Count = Field(
        default=4, description="micro-batches per update, over all replicas together"
    )
    learning_rate: Positive = Field(default=1e-3, description="peak learning rate")
    lr_scheduler: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay"
    ] = Field(
        default="cosine",
        description="linear, cosine, constant, constant_with_warmup, cosine_with_min_lr or warmup_stable_decay, as "
        "transformers has them",
    )
    warmup_steps: Whole = Field(default=0, description="updates until the learning rate is at its peak")
    min_learning_rate: NotNegative = Field(
        default=0.0, description="learning rate at the end of the run; of warmup_stable_decay at its start too"
    )
    decay_steps: MaybeCount = Field(
        default=None,
        description="how many of the last updates of warmup_stable_decay decay, as a cosine (null: a tenth)",
    )
    grad_clip: NotNegative = Field(
        default=1.0,
        description="greatest gradient norm of what clips together, usually a chunk (0: off); with Muon it bounds what "
        "an update adds to the momentum, not the step",
    )
    dtype: Literal["fp32", "bf16", "fp64"] = Field(
        default="fp32", description="fp32, bf16 with fp32 master weights, or fp64 (to check algebra)"
    )
    tf32: bool = Field(
        default=False,
        description="matrix products and convolutions of fp32 in TF32, on GPUs that have it; no effect on a CPU",
    )
    activation_checkpointing: Annotated[str, AfterValidator(recomputing.right), recomputing.VALUES] = Field(
        default="none",
        description="blocks whose activations are computed again in the backward pass instead of being kept: none, all "
        "(blocks), all but for what products and attention give (selective), or each N-th (every N)",
    )
    compile: Annotated[bool, "true or false"] = Field(
        default=False, description="every block goes through torch.compile, at ZeRO 0 to 2; needs a C++ compiler"
    )
    freeze: Annotated[list[Text], "a list of patterns"] = Field(
        default=[],
        description="weights that do not train: patterns of their Hugging Face names, of auxiliary heads `head.*`",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), "a whole number from 0 to 4294967295"] = Field(
        default=0, description="seed of the weights and of the data order"
    )
    eval_every: Whole = Field(default=0, description="updates between evaluations (0: only at the end)")
    patience: MaybeCount = Field(
        default=None,
        description="evaluations in a row no better than the best before them, after which the next one is the last "
        "(null: never); of checkpoint.keep_best, else of the first validation set",
    )
    max_skipped_updates: Count = Field(default=10, description="skipped updates of a stage in a row that end the run")


class CheckpointSection(Section):
    every: Whole = Field(default=0, description="updates between checkpoints (0: only at the end)")
    keep_last: MaybeCount = Field(default=None, description="how many of the newest checkpoints are kept (null: all)")
    keep_every: MaybeCount = Field(
        default=None, description="beside keep_last: those after every so many updates (null: none)"
    )
    keep_best: MaybeText = Field(
        default=None, description="beside keep_last: the best one on this validation set (null: none)"
    )
    on_error: Literal["go_on", "stop"] = Field(
        default="go_on", description="what a run does whose checkpoint cannot be written: go_on or stop"
    )


class RunSection(Section):
    dir: MaybeText = Field(default=None, description="run folder (null: runs/ and the name of the file)")
    trace: MaybeUpdates = Field(
        default=None, description="[first, last] updates to trace, for `report --trace` (null: none)"
    )
    profile: MaybeUpdates = Field(
        default=None, description="[first, last] updates that torch's profiler records, a file per process (null: none)"
    )
    export: MaybeText = Field(
        default=None, description="folder for the finished run's model, as `export` writes it (null: none)"
    )
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], "a list of tensorboard and wandb"] = Field(
        default=[], description="where the metrics go beside the run folder: tensorboard, wandb"
    )


def origin_of(key: str, origins: dict[str, str]) -> str:
    """Where the value of a dotted key came from: the origin of the longest part of the key that has one."""
    names = key.split(".")
    parts = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((origins[part] for part in parts if part in origins), BY_DEFAULT)


def is_typed(key: str, origins: dict[str, str]) -> bool:
    return origin_of(key, origins).endswith((COMMAND_LINE, BY_PROGRAM))


class Config(Section):
    """All sections, and keys that stand beside them.

    `deepspeed` holds the options for every stage's DeepSpeed engine, checked in config/deepspeed_keys.py.
    """

    engine: Literal["local", "deepspeed_pipeline"] = Field(
        default="local", description="local, or deepspeed_pipeline: backprop by DeepSpeed's own PipelineEngine"
    )
    model: ModelSection = ModelSection()
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    objective: SerializeAsAny[ObjectiveOptions] = ChunkedOptions()
    head: SerializeAsAny[HeadOptions] = HeadOptions()
    loss: LossSection = LossSection()
    border: BorderSection = BorderSection()
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    run: RunSection = RunSection()
    deepspeed: dict[str, Any] = {}
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """A line for every key of the file that typed ones have changed or left without meaning."""
        return self._notes

    def value(self, key: str) -> Any:
        """The value of a dotted key; None when it is not there."""
        section, *names = key.split(".")
        value: Any = getattr(self, section)
        for name in names:
            value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        return value

    def is_typed(self, key: str) -> bool:
        """Whether it came from the command line or a program's arguments, or follows from what did."""
        return is_typed(key, self._origins)

    def at(self, key: str) -> str:
        """ "key = value (origin)", for messages."""
        return f"{key} = {self.value(key)!r} ({origin_of(key, self._origins)})"


PLAIN = ("engine",)  # keys that are in no section
SECTIONS = [name for name in Config.model_fields if name not in PLAIN]
# Sections whose options are those of a row: the key that names the row, and the rows.
ROWS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "objective": ("name", METHODS),
    "head": ("kind", HEADS),
}
MOMENTUM = {"muon": 0.95, "sgd": 0.9}  # optimizer.momentum, where it is not given
# Keys that have a meaning beside some values of another only; given explicitly elsewhere they are refused, and they are
# not printed.
ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "data.vocab_size": ("data.tokenizer", ("sentencepiece",)),
    **{f"optimizer.{key}": ("optimizer.name", ("adamw", "adamw_8bit", "muon")) for key in ("beta1", "beta2", "eps")},
    "optimizer.momentum": ("optimizer.name", tuple(MOMENTUM)),
    "train.min_learning_rate": ("train.lr_scheduler", ("cosine_with_min_lr", "warmup_stable_decay")),
    "train.decay_steps": ("train.lr_scheduler", ("warmup_stable_decay",)),
}
# Keys that were renamed. Typed or written by a person, an old one is refused with the new name; in a run folder or a
# record it is translated.
RENAMED = {
    "train.border_dtype": "border.codec",
    "train.save_every": "checkpoint.every",
    "head.chunk_tokens": "loss.chunk_tokens",
}

# Names that other programs have for keys.
ALSO_CALLED = {
    **dict.fromkeys(("lr", "max_lr", "learning_rate"), "train.learning_rate"),
    **dict.fromkeys(("min_lr", "lr_min"), "train.min_learning_rate"),
    **dict.fromkeys(("max_steps", "num_steps", "updates", "iterations", "train_iters"), "train.steps"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs", "max_epochs"), "train.epochs"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "bs"), "train.micro_batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), "train.micro_batches_per_update"),
    **dict.fromkeys(("seq_len", "seq_length", "block_size", "context_length", "max_length"), "data.sequence_length"),
    **dict.fromkeys(("model_name_or_path", "checkpoint_path"), "model.pretrained"),
    **dict.fromkeys(("output_dir", "out_dir"), "run.dir"),
    **dict.fromkeys(("bf16", "fp16", "precision"), "train.dtype"),
    **dict.fromkeys(("gradient_checkpointing", "recompute"), "train.activation_checkpointing"),
    "torch_compile": "train.compile",
    **dict.fromkeys(("use_liger_kernel", "use_liger"), "loss.fused"),
    **dict.fromkeys(("attn_implementation", "attention_implementation"), "model.attention"),
}


def section_type(section: str, row: str | None = None) -> type[Section]:
    """The class of a section's options; of those that take the options of a row, with the default one unless `row`."""
    of_section = Config.model_fields[section].annotation
    assert isinstance(of_section, type) and issubclass(of_section, Section)
    if section not in ROWS:
        return of_section
    key, rows = ROWS[section]
    return rows[row or of_section.model_fields[key].default].options


def fields_of(section: str) -> dict[str, Any]:
    """The fields of a section by key; of those that take the options of a row, of all rows together."""
    if section == "deepspeed":
        return {}
    types = [row.options for row in ROWS[section][1].values()] if section in ROWS else [section_type(section)]
    return {key: field for one in types for key, field in one.model_fields.items()}


def known_keys() -> list[str]:
    """Every dotted key that a configuration may have."""
    keys = [*PLAIN, *(f"{section}.{key}" for section in SECTIONS for key in fields_of(section))]
    return keys + [f"deepspeed.{table}{key}" for table, names in deepspeed_keys.TABLES.items() for key in names]


def renamed(key: str, value: Any) -> tuple[str, Any]:
    """Today's name of a saved dotted key, and its value; null is the default of what takes no null any more."""
    if key not in RENAMED:
        return key, value
    section, name = RENAMED[key].split(".")
    return RENAMED[key], section_type(section).model_fields[name].default if value is None else value


def translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with today's names for keys that had another one when it was written."""
    found = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in values.items()}
    if isinstance(found.get("data"), dict):
        found["data"].setdefault("bos", "never")  # before there was the key
    for old in RENAMED:
        section, key = old.split(".")
        if isinstance(found.get(section), dict) and key in found[section]:
            new, value = renamed(old, found[section].pop(key))
            new_section, new_key = new.split(".")
            found.setdefault(new_section, {})[new_key] = value
    return found
