"""The router loss of a mixture of experts (2101.03961, equations 4 to 6), where its configuration asks for it.

It is the family's own function, over the layers of a stage: where a model is one stage it is the library's loss, where
there are several each balances the load of its own layers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lptransformer.errors import ModelError

WANTED = "output_router_logits"  # the key of config.json; the base model then gives `router_logits`, a tensor per layer
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True)
class RouterLoss:
    balance: Callable[..., Tensor]
    experts: int
    experts_per_token: int
    coefficient: float

    def __call__(self, router_logits: Sequence[Tensor]) -> Tensor:
        """Router logits [b * T, experts] of every layer to the loss of the micro-batch, a scalar."""
        return self.coefficient * self.balance(tuple(router_logits), self.experts, self.experts_per_token, None)


def wanted(config: Any) -> bool:
    return bool(getattr(config, WANTED, False))


def of(model: PreTrainedModel) -> RouterLoss | None:
    """That of a causal LM; None where its configuration asks for none. Raises ModelError where it has no known one."""
    if not wanted(model.config):
        return None
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    coefficient = getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", None))
    experts, per_token = (getattr(model, name, None) for name in ("num_experts", "num_experts_per_tok"))
    known = balance is not None and list(inspect.signature(balance).parameters) == ARGUMENTS
    if not known or coefficient is None or experts is None or per_token is None:
        raise ModelError(
            f"{WANTED} is true in its config.json, and {type(model).__name__} has no router loss that is known here: "
            "with false it trains without"
        )
    assert balance is not None
    return RouterLoss(balance, experts, per_token, coefficient)
