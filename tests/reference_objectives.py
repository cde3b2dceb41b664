"""The terms of reference.py: what an update trains, what is clipped together, what an auxiliary head is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Span = tuple[int, int]  # the blocks first..last, both included; (last + 1, last) is empty
READOUTS = ("private", "shared", "low_rank")


@dataclass(frozen=True)
class Phase:
    """What an update trains: for every head a span, the blocks that its loss trains.

    A block's gradient is the sum of those of the spans it is in. With `own_weight` it is their weighted mean: the
    furthest head's loss counts 1 - own_weight, the nearer ones share own_weight equally, a single one counts 1.
    """

    spans: Sequence[Span]
    own_weight: float | None = None

    def weight(self, span: Span, block: int) -> float:
        """The weight of a span's loss in the gradient of a block in it."""
        assert span[0] <= block <= span[1], (span, block)
        ends = [last for first, last in self.spans if first <= block <= last]
        if self.own_weight is None or len(ends) == 1:
            return 1.0
        return 1.0 - self.own_weight if span[1] == max(ends) else self.own_weight / (len(ends) - 1)

    def runs(self, num_blocks: int) -> list[range]:
        """The blocks that are clipped and skipped together, each with the heads behind them.

        Blocks that share a span, directly or through others; with `own_weight` those between two cuts, where a cut is
        the start or the end of a span.
        """
        if self.own_weight is None:
            inside = {border for first, last in self.spans for border in range(first + 1, last + 1)}
            cuts = set(range(num_blocks)) - inside
        else:
            cuts = {0} | {border for first, last in self.spans for border in (first, last + 1)}
        starts = sorted(cuts | {num_blocks})
        return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


@dataclass(frozen=True)
class HeadOptions:
    """What the auxiliary heads are: extra blocks, norm, readout. The last head is always the model's own.

    readout
        private: a linear map to the vocabulary. low_rank: one to `rank` numbers, then one to the vocabulary. shared: a
        read-only copy of the last head's readout, its logits multiplied by a trained temperature.
    blocks
        How many blocks of the model's kind come before the norm. With `ema_decay` they are not trained but follow the
        model's own next blocks: at every new version, ema = decay * ema + (1 - decay) * those blocks.
    lags, refresh_every
        For shared and ema_decay: copies are as old as `version` says. Lags in updates, by the head's block.
    positions
        (the head's block, number of the micro-batch from the start of training) to int64 [b, k]: the positions of each
        row whose losses count, in this order. None: all.
    """

    readout: str = "private"
    rank: int = 0
    blocks: int = 0
    ema_decay: float | None = None
    lags: Mapping[int, int] = field(default_factory=dict)
    refresh_every: int = 1
    positions: Callable[[int, int], Tensor] | None = None

    def __post_init__(self) -> None:
        assert self.readout in READOUTS and (self.readout == "low_rank") == (self.rank > 0)
        assert self.ema_decay is None or self.blocks > 0

    def version(self, update: int, block: int) -> int:
        """After how many updates the copies were taken that the head after a block has in an update (from 0)."""
        return max(0, (update - self.lags[block]) // self.refresh_every * self.refresh_every)


class AuxiliaryHead(nn.Module):
    """Extra blocks, norm and readout. Its parameters are in the order of clipping."""

    copied_readout: Tensor  # shared: [V, H]

    def __init__(self, blocks: list[nn.Module], norm: nn.Module, readout: nn.Linear, options: HeadOptions) -> None:
        super().__init__()
        hidden_size, vocab_size, self.kind = readout.in_features, readout.out_features, options.readout
        self.blocks = nn.ModuleList(blocks)
        self.norm = copy.deepcopy(norm)
        if self.kind == "private":
            self.readout = nn.Linear(hidden_size, vocab_size, bias=False)
        elif self.kind == "low_rank":
            self.down = nn.Linear(hidden_size, options.rank, bias=False)
            self.up = nn.Linear(options.rank, vocab_size, bias=False)
        else:
            self.temperature = nn.Parameter(torch.ones(()))

    def features(self, hidden: Tensor) -> Tensor:  # [..., H] -> [..., H], low_rank: [..., rank]
        hidden = self.norm(hidden)
        return self.down(hidden) if self.kind == "low_rank" else hidden

    def logits(self, features: Tensor) -> Tensor:  # [rows, H or rank] -> [rows, V]
        if self.kind == "shared":
            return F.linear(features, self.copied_readout) * self.temperature
        return self.up(features) if self.kind == "low_rank" else self.readout(features)


def _int8_per_token(hidden: Tensor) -> Tensor:
    """Every token's values as whole numbers of 127ths of its largest one."""
    unit = hidden.abs().max(dim=-1, keepdim=True).values / 127
    return (hidden / unit).round() * unit


ROUNDINGS = {"bf16": lambda hidden: hidden.bfloat16().to(hidden.dtype), "int8": _int8_per_token}
