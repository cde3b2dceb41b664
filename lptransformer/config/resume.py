"""What a resumed run may change: every key, and what a change of it does to the run."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

from lptransformer.methods import objectives
from lptransformer.methods.heads import HEADS, followed


class Effect(Enum):
    """What a changed key does. All but the last are allowed, and noted in the run folder."""

    NOTHING = "no number of the run depends on it"
    CONTENT = "the token sets are compared in its place, by content"
    LAYOUT = "the same state in other processes: the same run, to rounding where sums have another order"
    ONWARDS = "updates from here on are other ones, of the same weights"
    REFUSED = "it would be another run"


# The longest name that a key begins with counts; `*` is the name of a text. Of what is refused: what the key decides.
RULES: dict[str, tuple[Effect, str]] = {
    **dict.fromkeys(("run", "checkpoint"), (Effect.NOTHING, "")),
    **dict.fromkeys(("train.eval_every", "train.max_skipped_updates", "train.patience"), (Effect.NOTHING, "")),
    **dict.fromkeys(("parallel.timeout_seconds", "parallel.in_flight", "parallel.channel"), (Effect.NOTHING, "")),
    "train.activation_checkpointing": (Effect.NOTHING, ""),
    "data.bos": (Effect.NOTHING, ""),  # what it decides is in the token sets
    **dict.fromkeys(("data.cache", "data.tokenizer", "data.format", "data.fields"), (Effect.CONTENT, "")),
    **{f"data.{kind}.*.{key}": (Effect.CONTENT, "") for kind in ("train", "valid") for key in ("files", "format")},
    **{f"data.{kind}.*.fields": (Effect.CONTENT, "") for kind in ("train", "valid")},
    **dict.fromkeys(("train.learning_rate", "train.lr_scheduler", "train.warmup_steps"), (Effect.ONWARDS, "")),
    **dict.fromkeys(("train.min_learning_rate", "train.decay_steps"), (Effect.ONWARDS, "")),
    **dict.fromkeys(("train.steps", "train.grad_clip"), (Effect.ONWARDS, "")),
    **{f"optimizer.{key}": (Effect.ONWARDS, "") for key in ("beta1", "beta2", "eps", "weight_decay", "momentum")},
    # rounding alone
    **dict.fromkeys(("loss", "model.attention", "train.compile", "train.tf32"), (Effect.ONWARDS, "")),
    "deepspeed.zero_force_ds_cpu_optimizer": (Effect.ONWARDS, ""),
    "engine": (Effect.REFUSED, "what a checkpoint holds"),
    "model": (Effect.REFUSED, "what the weights are"),
    "data": (Effect.REFUSED, "what is trained on and evaluated"),
    "parallel": (Effect.LAYOUT, "which process has which part of the optimizer state"),
    "objective": (Effect.ONWARDS, "which loss trains which blocks"),  # new heads start as configured
    "head": (Effect.REFUSED, "what auxiliary heads are"),
    "border": (Effect.REFUSED, "what a chunk gets from the one below"),
    "lora": (Effect.REFUSED, "what the adapters are"),
    "optimizer.name": (Effect.REFUSED, "what the optimizer state is"),
    "train.micro_batch_size": (Effect.REFUSED, "which windows an update sees"),
    "train.micro_batches_per_update": (Effect.REFUSED, "which windows an update sees"),
    "train.epochs": (Effect.REFUSED, "the number of updates"),
    "train.dtype": (Effect.ONWARDS, "what weights and optimizer state are"),
    "train.freeze": (Effect.REFUSED, "which weights have an optimizer state"),
    "train.seed": (Effect.REFUSED, "the order of the windows, and the weights before training"),
    "deepspeed.zero_optimization": (Effect.LAYOUT, "which process has which part of the optimizer state"),
    "deepspeed": (Effect.REFUSED, "what DeepSpeed's files hold, and how sums are rounded"),
}


class Change(NamedTuple):
    """A dotted key with another value than the run has; None: not set. `decides` is said of what is refused."""

    key: str
    before: Any
    now: Any
    effect: Effect
    decides: str

    @property
    def line(self) -> str:
        before, now = ("not set" if value is None else repr(value) for value in (self.before, self.now))
        decides = f" (it decides {self.decides})" if self.decides else ""
        return f"{self.key}: {before} in the run, {now} now{decides}"


def changes(saved: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """What differs between the configuration of a run and that with which it is to go on (of `config/load.to_dict`)."""
    before, now = dict(_leaves(saved)), dict(_leaves(new))
    keys = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
    return [Change(key, before.get(key), now.get(key), *_rule(key, saved, new)) for key in keys]


def resume_differences(saved: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The lines of the changes that are refused."""
    return [change.line for change in changes(saved, new) if change.effect is Effect.REFUSED]


def _rule(key: str, saved: dict[str, Any], new: dict[str, Any]) -> tuple[Effect, str]:
    """That of RULES, where no other key decides."""
    both = (saved, new)
    if key == "train.steps":
        if any(values["objective"].get("backprop_share") for values in both):
            return Effect.REFUSED, "which updates are global, with objective.backprop_share"
        if all(values["train"]["lr_scheduler"].startswith("constant") for values in both):
            return Effect.NOTHING, ""
    if key == "parallel.in_flight" and any(
        followed(HEADS[values["head"]["kind"]].options(**values["head"])) is not None for values in both
    ):
        return Effect.REFUSED, "how late copies of other stages' weights are"
    names = key.split(".")
    if names[0] == "head" and not all(_has_auxiliary_heads(values) for values in both):
        return Effect.NOTHING, ""  # where there are some now, all of them are new
    if any(values["engine"] == "deepspeed_pipeline" for values in both):
        rule = RULES[_longest(key)]
        if rule[0] is Effect.LAYOUT or key == "train.dtype":
            return Effect.REFUSED, f"{rule[1]}, which DeepSpeed's own pipeline keeps"
    if names[0] == "data" and names[1] in ("train", "valid") and len(names) > 3:
        if not all(isinstance(each := values["data"][names[1]], dict) and names[2] in each for values in both):
            return Effect.REFUSED, "what is trained on and evaluated"
        names[2] = "*"
    return RULES[_longest(".".join(names))]


def _has_auxiliary_heads(values: dict[str, Any]) -> bool:
    return len(objectives.build(values["model"]["num_layers"], **values["objective"]).heads) > 1


def _longest(key: str) -> str:
    return max((rule for rule in RULES if f"{key}.".startswith(f"{rule}.")), key=len)


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value != {}:
            yield f"{prefix}{key}", value
