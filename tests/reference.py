"""The method in one process: the plain loop of local updates that every parity test compares with.

Laskin et al., "Parallel Training of Deep Networks with Local Updates" (arXiv 2012.03837). The blocks of a whole,
ordinary Hugging Face model are cut into spans. Each span has its own head, loss and optimizer; the gradient stops at
its input, only hidden states go on to the next. Nothing here knows processes, DeepSpeed or the package under test:
torch and transformers only, short enough to be checked by eye.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, AdamW, Optimizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

Config = GPT2Config | LlamaConfig
Span = tuple[int, int]  # the blocks first..last, both included
FAULTS = (None, "no_detach", "loss_scale", "stale_weights")
CLIP_FORMULAS = ("torch", "zero12", "zero3")
AVERAGING = ("accumulate_then_average", "average_then_accumulate")


@dataclass
class Result:
    """What training gave. Lists are indexed [update][span]."""

    losses: list[list[float]]  # nats per label token, before the update
    grad_norms: list[list[float]]  # before clipping
    weights: dict[str, Tensor]  # Hugging Face names; head.{e}.norm.*, head.{e}.readout.weight: the head after block e


class Net(nn.Module):
    """The whole model and, after every span but the last, an auxiliary head: norm and readout."""

    def __init__(self, config: Config, spans: Sequence[Span]) -> None:
        super().__init__()
        assert config.tie_word_embeddings is False
        dropouts = ("embd_pdrop", "resid_pdrop", "attn_pdrop", "attention_dropout")
        assert not any(getattr(config, key, 0) for key in dropouts)
        config = copy.deepcopy(config)  # the library writes into it
        self.model: GPT2LMHeadModel | LlamaForCausalLM
        base: Any
        if isinstance(config, GPT2Config):
            self.model = GPT2LMHeadModel(config).float()
            base = self.model.transformer
            self.embedding, self.blocks, self.norm = [base.wte, base.wpe], list(base.h), base.ln_f
        else:
            self.model = LlamaForCausalLM(config).float()
            base = self.model.model
            self.embedding, self.blocks, self.norm = [base.embed_tokens], list(base.layers), base.norm
        self.base: Any = base
        self.readout: nn.Linear = self.model.lm_head
        self.head = nn.ModuleDict({str(last): self.new_head() for _, last in spans if last != len(self.blocks) - 1})

    def new_head(self) -> nn.ModuleDict:
        readout = nn.Linear(self.readout.in_features, self.readout.out_features, bias=False)
        return nn.ModuleDict({"norm": copy.deepcopy(self.norm), "readout": readout})

    def head_after(self, block: int) -> tuple[nn.Module, nn.Linear]:
        if block == len(self.blocks) - 1:
            return self.norm, self.readout
        norm, readout = self.head[str(block)].children()
        assert isinstance(readout, nn.Linear)
        return norm, readout

    def embed(self, ids: Tensor) -> Tensor:  # [b, T] -> [b, T, H]
        if isinstance(self.model, GPT2LMHeadModel):
            return self.base.wte(ids) + self.base.wpe(torch.arange(ids.shape[1])[None])
        return self.base.embed_tokens(ids)

    def run_blocks(self, hidden: Tensor, span: Span) -> Tensor:  # [b, T, H] -> [b, T, H]
        """The blocks of a span, called as the library's own forward calls them."""
        positions = torch.arange(hidden.shape[1])[None]
        mask = create_causal_mask(self.base.config, hidden, None, None, position_ids=positions)
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": None, "use_cache": False}
        if isinstance(self.model, LlamaForCausalLM):
            options["position_embeddings"] = self.base.rotary_emb(hidden, position_ids=positions)
        for block in self.blocks[span[0] : span[1] + 1]:
            hidden = block(hidden, **options)
        return hidden

    def loss(self, hidden: Tensor, labels: Tensor, block: int, chunk_tokens: int) -> Tensor:  # [b, T, H], [b, T] -> []
        """The sum of the negative log-likelihoods at the head after a block; labels of -100 do not count."""
        norm, readout = self.head_after(block)
        rows = norm(hidden).reshape(-1, hidden.shape[-1]).split(chunk_tokens)  # [chunk_tokens, H] each
        total = hidden.new_zeros(())
        for chunk, targets in zip(rows, labels.reshape(-1).split(chunk_tokens), strict=True):
            logits = F.linear(chunk, readout.weight).float()  # [chunk_tokens, V]
            total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return total

    def span_parameters(self, span: Span) -> list[nn.Parameter]:
        """Embedding (first span), blocks, norm of the head, readout: the order of clipping and of the optimizer."""
        modules = self.embedding if span[0] == 0 else []
        modules = [*modules, *self.blocks[span[0] : span[1] + 1], *self.head_after(span[1])]
        return [parameter for module in modules for parameter in module.parameters()]

    def initialise(self, seed: int) -> None:
        """The library's own initial weights, with a seed for each unit, so that no unit depends on another."""
        units = {"embedding": self.embedding, "final": [self.norm, self.readout]}
        units |= {f"block {index}": [block] for index, block in enumerate(self.blocks)}
        units |= {f"head {block}": list(self.head_after(int(block))) for block in self.head}
        flagged = [name for name, p in self.named_parameters() if hasattr(p, "_is_hf_initialized")]
        assert not flagged, flagged  # the library would leave these as they are
        for unit, modules in units.items():
            torch.manual_seed(int.from_bytes(sha256(f"{seed}/{unit}".encode()).digest()[:8], "big") >> 1)
            for module in modules:
                module.apply(self.model._init_weights)  # children first

    def named_weights(self) -> dict[str, Tensor]:
        weights = dict(self.model.named_parameters())
        weights |= {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return {name: parameter.detach().clone() for name, parameter in weights.items()}


def make_optimizer(parameters: list[nn.Parameter], options: dict) -> Optimizer:
    """`options`: {"name": "adamw" or "sgd", "weight_decay": ..., arguments of torch's class}. Only matrices decay."""
    options = dict(options)
    name, decay = options.pop("name"), options.pop("weight_decay", 0.0)
    matrices = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay}
    vectors = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    return {"adamw": AdamW, "sgd": SGD}[name]([matrices, vectors], lr=0.0, **options)


def clip_gradients(parameters: list[nn.Parameter], optimizer: Optimizer, clip: float, formula: str) -> float:
    """Clip in place where clip > 0; returns the global norm before that.

    torch: torch.nn.utils.clip_grad_norm_. zero12, zero3: what DeepSpeed does at these ZeRO stages, which differs by
    rounding: norms in double for each parameter group, rounded to single at ZeRO 1 and 2, then combined.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if formula == "torch":
        norm = get_total_norm(gradients)
        if clip > 0:
            clip_grads_with_norm_(parameters, clip, norm)
        return norm.item()
    norms = []
    for group in optimizer.param_groups:
        square = torch.stack([torch.linalg.vector_norm(p.grad.double()) for p in group["params"]]).pow(2).sum()
        norms.append((square.float() if formula == "zero12" else square).pow(0.5))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if clip > 0:
        for gradient in gradients:
            gradient.mul_(1.0 / torch.clamp((norm + 1e-6) / clip, min=1.0))
    return norm.item()


def combine(gradients: list[Tensor], replicas: int, averaging: str) -> Tensor:
    """One parameter's gradients, one for each micro-batch -> its gradient for the update.

    Micro-batch i runs on replica i % replicas. Replicas add up their own and then average (ZeRO 0, 1), or average at
    every micro-batch and add up the averages (ZeRO 2, 3). With one replica both are the plain sum in order.
    """
    if averaging == "accumulate_then_average":
        own = [sum(gradients[r + replicas :: replicas], gradients[r]) for r in range(replicas)]
        return sum(own[1:], own[0]) / replicas
    rounds = [gradients[i : i + replicas] for i in range(0, len(gradients), replicas)]
    means = [sum(one[1:], one[0]) / replicas for one in rounds]
    return sum(means[1:], means[0])


def train(
    config: Config,
    spans: Sequence[Span],
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    micro_batches_per_update: int,
    optimizer: dict,
    learning_rates: Sequence[float],
    clip: float,
    seed: int,
    chunk_tokens: int,
    *,
    clip_formula: str = "torch",
    replicas: int = 1,
    averaging: str = "accumulate_then_average",
    fault: str | None = None,
) -> Result:
    """Train from the seed, one update for each learning rate, in fp32 on the CPU, with the caller's thread count.

    `spans` cover all blocks in order. `micro_batches` holds (input_ids, labels), int64 [b, T] each, of all updates in
    order; labels[t] belongs to the prediction at position t. `fault` plants an error that a parity test has to find.
    With one span, "no_detach" and "stale_weights" have no border to act on.
    """
    assert [span[0] for span in spans] == [0, *(last + 1 for _, last in spans[:-1])], spans
    assert spans[-1][1] == config.num_hidden_layers - 1, spans
    assert len(micro_batches) == micro_batches_per_update * len(learning_rates)
    assert micro_batches_per_update % replicas == 0
    assert fault in FAULTS and clip_formula in CLIP_FORMULAS and averaging in AVERAGING
    torch.set_flush_denormal(True)  # a condition of bit equality, as the thread count is

    net = Net(config, spans).train()
    net.initialise(seed)
    span_parameters = [net.span_parameters(span) for span in spans]
    optimizers = [make_optimizer(parameters, optimizer) for parameters in span_parameters]
    everything = [parameter for parameters in span_parameters for parameter in parameters]
    assert {id(parameter) for parameter in everything} == {id(parameter) for parameter in net.parameters()}
    result = Result([], [], {})
    stale = net

    for update, learning_rate in enumerate(learning_rates):
        batch = micro_batches[update * micro_batches_per_update :][:micro_batches_per_update]
        label_tokens = sum(int((labels != -100).sum()) for _, labels in batch)
        sums = [0.0 for _ in spans]
        gradients: list[list[Tensor]] = [[] for _ in everything]

        for ids, labels in batch:
            hidden = net.embed(ids)
            for index, span in enumerate(spans):
                if index > 0 and fault != "no_detach":
                    hidden = hidden.detach()
                given, hidden = hidden, net.run_blocks(hidden, span)
                loss = net.loss(hidden, labels, span[1], chunk_tokens)
                sums[index] += loss.item()
                tokens = int((labels != -100).sum()) if fault == "loss_scale" else label_tokens
                (loss * (replicas / tokens)).backward(retain_graph=fault == "no_detach")
                if fault == "stale_weights":
                    hidden = stale.run_blocks(given, span)
            for parameter, kept in zip(everything, gradients, strict=True):
                assert parameter.grad is not None
                kept.append(parameter.grad)
                parameter.grad = None

        for parameter, kept in zip(everything, gradients, strict=True):
            parameter.grad = combine(kept, replicas, averaging)
        if fault == "stale_weights":
            stale = copy.deepcopy(net)
        norms = []
        for parameters, step in zip(span_parameters, optimizers, strict=True):
            norms.append(clip_gradients(parameters, step, clip, clip_formula))
            for group in step.param_groups:
                group["lr"] = learning_rate
            if math.isfinite(norms[-1]):  # otherwise this span, and no other, skips the update
                step.step()
            step.zero_grad()
        result.losses.append([total / label_tokens for total in sums])
        result.grad_norms.append(norms)

    result.weights = net.named_weights()
    return result
