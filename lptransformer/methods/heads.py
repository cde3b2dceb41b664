"""Kinds of auxiliary heads: their options and what they cost; the readouts themselves are built elsewhere.

A new kind is one row in HEADS, here or by `register` from anywhere. It names its builder as "module:function"
(models/head.py has ours), so that configuration and planning need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from lptransformer.errors import OptionError
from lptransformer.section import Count, Fraction, Section, Whole


class KindOptions(Section):
    kind: str = Field(
        default="private",
        description="own norm and readout (private), a copy of the last readout (shared), low_rank, or fitted",
    )


class HeadOptions(KindOptions):
    """The heads between stages, of every kind; the last one is always the model's own."""

    blocks: Whole = Field(default=0, description="extra Transformer blocks in the head, before its norm")
    ema_decay: Annotated[Fraction | None, "a number, 0 or more and below 1, or null"] = Field(
        default=None, description="extra blocks follow a moving average of the next blocks (null: they are trained)"
    )
    refresh_every: Count = Field(default=1, description="shared, ema_decay: updates between two refreshes of copies")
    token_fraction: Annotated[float, Field(gt=0, le=1), "a number above 0, up to 1"] = Field(
        default=1.0, description="share of a window's positions, drawn for every micro-batch, whose loss the head sees"
    )
    init: Annotated[Literal["scratch", "model"] | None, "scratch, model or null"] = Field(
        default=None, description="new weights, or copies of the model's own (null: model with model.pretrained)"
    )

    @property
    def trains_blocks(self) -> bool:
        """Whether extra blocks are trained, where there are some."""
        return self.ema_decay is None


class RankOptions(KindOptions):
    rank: Count = Field(default=64, description="low_rank: width between norm and readout")


class LowRankOptions(HeadOptions, RankOptions):
    pass


class FittedOptions(HeadOptions):
    train_blocks: bool = Field(
        default=False, description="fitted: the head's copies of the model's last blocks are trained, not frozen"
    )

    @property
    def trains_blocks(self) -> bool:
        return self.train_blocks


@dataclass(frozen=True)
class ReadoutCost:
    """What a readout takes, in numbers of weights.

    `multiplied` are those that every row is multiplied with; `trained` have gradients and optimizer state, `vocabulary`
    of them are in the matrix with a row per token of the vocabulary; `copied` are read-only: copies, or frozen.
    """

    multiplied: int
    trained: int
    vocabulary: int
    copied: int = 0


@dataclass(frozen=True)
class HeadKind:
    """A row: the class of the options; from (options, hidden_size, vocab_size) to the cost; the builder's name.

    `builder` names a function as head.BuildReadout describes it. `label` gives the kind in tables from the options.
    With `follows_readout` the head holds a read-only copy of the model's readout, refreshed as the last stage trains.
    With `fitted` the head is a map fitted to a pretrained model, and the model's own last blocks, norm and readout.
    `check` raises OptionError for (options, hidden_size) that do not fit.
    """

    options: type[HeadOptions]
    cost: Callable[[Any, int, int], ReadoutCost]
    builder: str
    label: Callable[[Any], str]
    follows_readout: bool = False
    fitted: bool = False
    check: Callable[[Any, int], None] = lambda options, hidden_size: None


def _private(options: HeadOptions, hidden_size: int, vocab_size: int) -> ReadoutCost:
    full = hidden_size * vocab_size
    return ReadoutCost(full, full, full)


def _shared(options: HeadOptions, hidden_size: int, vocab_size: int) -> ReadoutCost:
    full = hidden_size * vocab_size
    return ReadoutCost(full, 1, 0, copied=full)  # one weight: the temperature


def _frozen(options: FittedOptions, hidden_size: int, vocab_size: int) -> ReadoutCost:
    full = hidden_size * vocab_size
    return ReadoutCost(full, 0, 0, copied=full)


def _low_rank(options: LowRankOptions, hidden_size: int, vocab_size: int) -> ReadoutCost:
    both = options.rank * (hidden_size + vocab_size)
    return ReadoutCost(both, both, options.rank * vocab_size)


def _check_rank(options: LowRankOptions, hidden_size: int) -> None:
    if options.rank >= hidden_size:
        raise OptionError("head.rank", options.rank, "that is no low rank; give less, or head.kind=private")


HEADS: dict[str, HeadKind] = {
    "private": HeadKind(HeadOptions, _private, "lptransformer.models.head:private", lambda options: "private"),
    "shared": HeadKind(
        HeadOptions, _shared, "lptransformer.models.head:shared", lambda options: "shared", follows_readout=True
    ),
    "low_rank": HeadKind(
        LowRankOptions,
        _low_rank,
        "lptransformer.models.head:low_rank",
        lambda options: f"low rank {options.rank}",
        check=_check_rank,
    ),
    "fitted": HeadKind(
        FittedOptions, _frozen, "lptransformer.models.head:frozen", lambda options: "fitted", fitted=True
    ),
}


def register(name: str, kind: HeadKind) -> None:
    """A kind of head from outside, known from here on in this process under `head.kind`."""
    assert name not in HEADS, f"there is a kind of head {name} already"
    HEADS[name] = kind


def label(options: HeadOptions) -> str:
    """What an auxiliary head is, for tables."""
    words = [HEADS[options.kind].label(options)]
    if options.blocks:
        how = "averaged " if options.ema_decay is not None else "" if options.trains_blocks else "frozen "
        words.append(f"{options.blocks} {how}blocks")
    if options.token_fraction < 1:
        words.append(f"{options.token_fraction:.0%} of the tokens")
    return ", ".join(words)


def followed(options: HeadOptions) -> Literal["last", "next"] | None:
    """The stage whose weights auxiliary heads hold read-only copies of; the further one where it is two."""
    if HEADS[options.kind].follows_readout:
        return "last"
    return None if options.ema_decay is None else "next"


def blocks_like(options: HeadOptions, block: int, num_blocks: int) -> range:
    """The blocks of the model that the extra blocks of the head after `block` are like.

    Those that follow it, because some families have blocks of several kinds; where fewer follow, the model's last:
    beyond its depth the library knows no kind. A fitted head has the model's last ones, at most those above it.
    """
    if HEADS[options.kind].fitted:
        return range(max(block + 1, num_blocks - options.blocks), num_blocks)
    start = min(block + 1, num_blocks - options.blocks)
    return range(start, start + options.blocks)
