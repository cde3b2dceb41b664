"""Runs that start from a pretrained model: what their keys are where they are not given, and what is warned of."""

from __future__ import annotations

from typing import Any

from lptransformer.config.schema import BY_DEFAULT, Config
from lptransformer.errors import OptionError
from lptransformer.methods import objectives
from lptransformer.methods.heads import HEADS

LEARNING_RATE, WARMUP_STEPS = 1e-4, 5
GENTLE_LEARNING_RATE = 3e-4  # above it a pretrained model forgets more than it learns


def fill_in(given: dict[str, Any], origins: dict[str, str], num_layers: int) -> None:
    """The defaults over a model of so many blocks, into the sections `given`: each key by itself, where it is not
    there."""

    def fill(section: str, key: str, value: Any) -> None:
        if key not in given[section]:
            given[section][key], origins[f"{section}.{key}"] = value, f"{BY_DEFAULT} with model.pretrained"

    train, head = given["train"], given["head"]
    fill("train", "learning_rate", LEARNING_RATE)
    if train.get("lr_scheduler") != "constant":  # which has no warm-up
        steps = train.get("steps")
        fill("train", "warmup_steps", min(WARMUP_STEPS, steps) if type(steps) is int else WARMUP_STEPS)
    fill("optimizer", "weight_decay", 0.0)
    try:
        auxiliary = objectives.build(num_layers, **given["objective"].model_dump()).heads[:-1]
    except OptionError:  # the checks refuse it
        return
    if auxiliary:
        fill("head", "kind", "fitted")
    if auxiliary and head["kind"] == "fitted":
        fill("head", "blocks", max(1, round(num_layers / 3)))
        if head["blocks"] != 0:  # with LoRA adapters and maps alone train, for memory
            fill("head", "train_blocks", given["lora"].get("rank") is None)


def warning(config: Config) -> str | None:
    """One line on what this start does to a pretrained model, and what to set; None where nothing speaks against it.

    Auxiliary heads that are copies of the model's own, or new, pull earlier blocks away from what later ones expect.
    """
    if config.model.pretrained is None:
        return None
    why, instead, at = [], [], config.at
    auxiliary = objectives.build(config.model.num_layers, **config.objective.model_dump()).heads[:-1]
    if auxiliary and not HEADS[config.head.kind].fitted:
        how = "begin from scratch" if config.head.init == "scratch" else "are copied from it"
        why.append(f"auxiliary heads {how} ({at('head.kind')}, {at('head.init')})")
        instead.append("head.kind=fitted (or objective.name=backprop)")
    if config.train.learning_rate > GENTLE_LEARNING_RATE:
        why.append(f"{at('train.learning_rate')} is above {GENTLE_LEARNING_RATE:g}")
    if not why:
        return None
    return (
        f"warning: {at('model.pretrained')}: this start can make the model worse: {' and '.join(why)}. Measured with "
        "SmolLM2-135M, 40 updates, perplexity of new and of old text: before 46 and 36, backprop 30 and 38, local "
        "updates with fitted heads 31 and 37, copied ones 42 and 46, new ones 72 and 69, and copied ones at a learning "
        "rate of 1e-3 57 and 327. Set "
        f"{' and '.join([*instead, 'train.learning_rate=1e-4'])}"
    )
