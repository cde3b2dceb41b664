"""The method in one process: the plain loop of local updates that every parity test compares with.

Laskin et al., "Parallel Training of Deep Networks with Local Updates" (arXiv 2012.03837). A whole, ordinary Hugging
Face model has heads behind some of its blocks. The loss of each head trains a span of blocks: the gradient stops at the
input of the first. Nothing here knows processes, DeepSpeed or the package under test: torch and transformers only,
short enough to be checked by eye. The terms (phases, kinds of heads) are in reference_objectives.py.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Any

import torch
from reference_objectives import ROUNDINGS, AuxiliaryHead, HeadOptions, Phase, Span
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, AdamW, Muon, Optimizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

Config = GPT2Config | LlamaConfig
Targets = tuple[Tensor, Tensor | None]  # labels, and their positions where they are not all
FAULTS = (None, "no_detach", "loss_scale", "stale_weights")
CLIP_FORMULAS = ("torch", "zero12", "zero3")
AVERAGING = ("accumulate_then_average", "average_then_accumulate")


@dataclass
class Result:
    """What training gave. Heads and clip groups are in the order of their blocks."""

    losses: list[list[float]]  # [update][head] nats per label token that counts, before the update
    grad_norms: list[list[float]]  # [update][clip group] before clipping; the groups are those of the update's phase
    # Hugging Face names. Of the head after block e: head.{e}.blocks.{i}.*, head.{e}.norm.*, and head.{e}.readout.weight
    # or head.{e}.down.weight, head.{e}.up.weight or head.{e}.temperature. No copies of the last head's readout.
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the update that was asked for, before clipping


class Net(nn.Module):
    """The whole model and an auxiliary head after every span but the one that ends with the last block."""

    def __init__(
        self, config: Config, spans: Sequence[Span], options: HeadOptions | None = None, border: str | None = None
    ) -> None:
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
        self.options = options or HeadOptions()
        self.last_block = len(self.blocks) - 1
        ends = sorted(last for _, last in spans if last != self.last_block)
        self.border, self.rounded_after = border, ends if border else []
        self.head = nn.ModuleDict({str(block): self.new_head(block) for block in ends})

    def new_head(self, block: int) -> AuxiliaryHead:
        indices = range(block + 1, block + 1 + self.options.blocks)  # those of the model's own next blocks
        assert self.options.ema_decay is None or indices[-1] <= self.last_block, "no such blocks to follow"
        blocks = [type(self.blocks[0])(self.base.config, layer_idx=index) for index in indices]
        head = AuxiliaryHead(blocks, self.norm, self.readout, self.options)
        head.blocks.requires_grad_(self.options.ema_decay is None)
        return head

    def embed(self, ids: Tensor) -> Tensor:  # [b, T] -> [b, T, H]
        if isinstance(self.model, GPT2LMHeadModel):
            return self.base.wte(ids) + self.base.wpe(torch.arange(ids.shape[1])[None])
        return self.base.embed_tokens(ids)

    def run(self, hidden: Tensor, blocks: Iterable[nn.Module]) -> Tensor:  # [b, T, H] -> [b, T, H]
        """Blocks, called as the library's own forward calls them."""
        positions = torch.arange(hidden.shape[1])[None]
        mask = create_causal_mask(self.base.config, hidden, None, None, position_ids=positions)
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": None, "use_cache": False}
        if isinstance(self.model, LlamaForCausalLM):
            options["position_embeddings"] = self.base.rotary_emb(hidden, position_ids=positions)
        for block in blocks:
            hidden = block(hidden, **options)
        return hidden

    def run_blocks(self, hidden: Tensor, span: Span) -> Tensor:  # [b, T, H] -> [b, T, H]
        return self.run(hidden, self.blocks[span[0] : span[1] + 1])

    def hidden_states(self, ids: Tensor) -> list[Tensor]:  # [b, T] -> [b, T, H] each
        """The input of every block and the output of the last one, without a graph; rounded behind auxiliary heads."""
        states = [self.embed(ids).detach()]
        for block in range(len(self.blocks)):
            states.append(self.run_blocks(states[-1], (block, block)).detach())
            if block in self.rounded_after:
                states[-1] = ROUNDINGS[self.border](states[-1])
        return states

    def targets(self, labels: Tensor, block: int, micro_batch: int) -> Targets:
        """Of the head after a block: the labels that count, [b, k], and their positions, [b, k] (None: all, [b, T])."""
        if block == self.last_block or self.options.positions is None:
            return labels, None
        positions = self.options.positions(block, micro_batch)
        return labels.gather(1, positions), positions

    def loss(
        self, hidden: Tensor, labels: Tensor, block: int, chunk_tokens: int, positions: Tensor | None = None
    ) -> Tensor:
        """The sum of the negative log-likelihoods at the head after a block; labels of -100 do not count.

        hidden [b, T, H], and a head's targets: labels [b, T] at all positions, or [b, k] at positions [b, k].
        """
        features, logits = self.norm, self.readout
        if block != self.last_block:
            head = self.head[str(block)]
            hidden, features, logits = self.run(hidden, head.blocks), head.features, head.logits
        if positions is not None:
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))  # [b, k, H]
        rows = features(hidden).flatten(0, 1).split(chunk_tokens)  # [chunk_tokens, H] each
        total = hidden.new_zeros(())
        for chunk, wanted in zip(rows, labels.flatten().split(chunk_tokens), strict=True):
            total = total + F.cross_entropy(logits(chunk), wanted, ignore_index=-100, reduction="sum")
        return total

    def block_parameters(self, block: int) -> list[nn.Parameter]:
        """Of a block; the embedding belongs to the first."""
        modules = [*(self.embedding if block == 0 else []), self.blocks[block]]
        return [parameter for module in modules for parameter in module.parameters()]

    def head_parameters(self, block: int) -> list[nn.Parameter]:
        """What is trained of the head after a block, if there is one: extra blocks, norm, readout or temperature."""
        if block == self.last_block:
            return [*self.norm.parameters(), *self.readout.parameters()]
        if str(block) not in self.head:
            return []
        head = self.head[str(block)]
        ordered = [parameter for child in head.children() for parameter in child.parameters()]
        return [parameter for parameter in [*ordered, *head.parameters(recurse=False)] if parameter.requires_grad]

    def initialise(self, seed: int) -> None:
        """The library's own initial weights, with a seed for each unit, so that no unit depends on another."""
        units = {"embedding": self.embedding, "final": [self.norm, self.readout]}
        units |= {f"block {index}": [block] for index, block in enumerate(self.blocks)}
        for block, head in self.head.items():
            units[f"head {block}"] = [child for name, child in head.named_children() if name != "blocks"]
            units |= {f"head {block} block {index}": [module] for index, module in enumerate(head.blocks)}
        flagged = [name for name, p in self.named_parameters() if hasattr(p, "_is_hf_initialized")]
        assert not flagged, flagged  # the library would leave these as they are
        for unit, modules in units.items():
            torch.manual_seed(int.from_bytes(sha256(f"{seed}/{unit}".encode()).digest()[:8], "big") >> 1)
            for module in modules:
                module.apply(self.model._init_weights)  # children first
        if self.options.ema_decay is not None:
            for block, head in self.head.items():
                for own, followed in zip(head.blocks, self.blocks[int(block) + 1 :], strict=False):
                    own.load_state_dict(followed.state_dict())

    @torch.no_grad()
    def refresh(self, update: int, history: Sequence[Net]) -> None:
        """Before an update: bring the heads' copies to their version. `history[v]` is as after v updates."""
        decay = self.options.ema_decay
        for key, head in self.head.items():
            if self.options.readout != "shared" and decay is None:
                continue
            block = int(key)
            version = self.options.version(update, block)
            if self.options.readout == "shared":
                head.copied_readout = history[version].readout.weight.detach()
            if decay is not None and update > 0 and version > self.options.version(update - 1, block):
                for own, followed in zip(head.blocks, history[version].blocks[block + 1 :], strict=False):
                    for ema, weight in zip(own.parameters(), followed.parameters(), strict=True):
                        ema.copy_(decay * ema + (1 - decay) * weight)

    def named(self) -> dict[str, nn.Parameter]:
        names = dict(self.model.named_parameters())
        return names | {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}


def by_dimension(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Matrices, and the rest: the parameter groups of the optimizer. Only matrices decay."""
    return [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]


def make_optimizer(parameters: list[nn.Parameter], options: dict) -> Optimizer:
    """`options`: {"name": "adamw" or "sgd", "weight_decay": ..., arguments of torch's class}."""
    options = dict(options)
    name, decay = options.pop("name"), options.pop("weight_decay", 0.0)
    matrices, rest = by_dimension(parameters)
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    return {"adamw": AdamW, "sgd": SGD}[name](groups, lr=0.0, **options)


def make_optimizers(named: dict[str, nn.Parameter], options: dict) -> list[Optimizer]:
    """One, or with the name "muon" two: Muon for the matrices of blocks, AdamW for the rest (`options` are its, with
    the "momentum" of Muon beside them)."""
    if options["name"] != "muon":
        return [make_optimizer(list(named.values()), options)]
    options = {**options, "name": "adamw"}
    how = {"momentum": options.pop("momentum"), "weight_decay": options["weight_decay"]}
    matrices = [p for key, p in named.items() if p.dim() == 2 and re.search(r"\.(h|layers|blocks)\.\d+\.", key)]
    rest = [p for p in named.values() if p not in set(matrices)]
    return [Muon(matrices, 0.0, adjust_lr_fn="match_rms_adamw", **how), make_optimizer(rest, options)]


def clip_gradients(parameters: list[nn.Parameter], clip: float, formula: str) -> float:
    """Clip in place where clip > 0; returns the global norm before that.

    torch: torch.nn.utils.clip_grad_norm_. zero12, zero3: what DeepSpeed does at these ZeRO stages, which differs by
    rounding: norms in double for each parameter group, rounded to single at ZeRO 1 and 2, then combined.
    """
    gradients = [parameter.grad for parameter in parameters]
    if formula == "torch":
        norm = get_total_norm(gradients)
        if clip > 0:
            clip_grads_with_norm_(parameters, clip, norm)
        return norm.item()
    norms = []
    for group in filter(None, by_dimension(parameters)):
        square = torch.stack([torch.linalg.vector_norm(p.grad.double()) for p in group]).pow(2).sum()
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


def micro_batch_gradients(
    net: Net, below: Net, phase: Phase, ids: Tensor, targets: dict[int, Targets], scales: dict[int, float], chunk: int
) -> tuple[dict[int, float], dict[str, Tensor]]:
    """The sum of the losses of every head, and the gradients of scale * loss, weighted and added up, by name.

    `targets`, `scales`: by the head's block. `below`: where hidden states come from; always `net`, but for a fault.
    """
    names = {parameter: name for name, parameter in net.named().items()}
    hidden_states = below.hidden_states(ids)
    losses: dict[int, float] = {}
    total: dict[str, Tensor] = {}
    for span in sorted(phase.spans, key=lambda span: span[1]):
        first, last = span
        hidden = net.run_blocks(net.embed(ids) if first == 0 else hidden_states[first], span)
        labels, positions = targets[last]
        loss = net.loss(hidden, labels, last, chunk, positions)
        losses[last] = loss.item()
        weights = {
            p: phase.weight(span, block) for block in range(first, last + 1) for p in net.block_parameters(block)
        }
        weights |= dict.fromkeys(net.head_parameters(last), 1.0)
        gradients = torch.autograd.grad(loss * scales[last], list(weights))
        for (parameter, weight), gradient in zip(weights.items(), gradients, strict=True):
            name, part = names[parameter], weight * gradient
            total[name] = total[name] + part if name in total else part
    return losses, total


def train(
    config: Config,
    objective: Sequence[Span] | Sequence[Phase],
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    micro_batches_per_update: int,
    optimizer: dict,
    learning_rates: Sequence[float],
    clip: float,
    seed: int,
    chunk_tokens: int,
    *,
    phase_of_update: Sequence[int] | None = None,
    delayed: bool = False,
    heads: HeadOptions | None = None,
    border: str | None = None,
    dtype: torch.dtype = torch.float32,
    frozen: Sequence[str] = (),
    gradients_of: int | None = None,
    clip_formula: str = "torch",
    replicas: int = 1,
    averaging: str = "accumulate_then_average",
    fault: str | None = None,
) -> Result:
    """Train from the seed, one update for each learning rate, on the CPU, with the caller's thread count.

    `objective`: the phases, or the spans of the only one. `phase_of_update`: the number of each update's phase. Every
    phase has a span for every head. Blocks (with the first, the embedding) that are in no span of any phase are never
    trained; those in no span of an update's phase stay as they are in that update.

    `micro_batches` holds (input_ids, labels), int64 [b, T] each, of all updates in order; labels[t] belongs to the
    prediction at position t. `delayed`: the gradient of update u is taken at the weights after max(0, u - 1) updates
    (PipeDream-2BW, arXiv 2006.09503, section 3.1). `dtype`: weights are made in fp32, then cast; Llama's norms and
    rotary embeddings compute in fp32 all the same. `border`: how hidden states are rounded where a span begins (a key
    of ROUNDINGS). `gradients_of`: the update whose gradients the result holds.

    `frozen`: patterns of the names of weights that do not train; auxiliary heads without the number of their block.

    `fault` plants an error that a parity test has to find: gradients that stop nowhere, a loss divided by the label
    tokens of its micro-batch, hidden states from the weights of one update before. With one span, "no_detach" and
    "stale_weights" have no border to act on.
    """
    phases = list(objective) if isinstance(objective[0], Phase) else [Phase(objective)]
    ends = sorted(last for _, last in phases[0].spans)
    assert all(sorted(last for _, last in phase.spans) == ends for phase in phases), "every head has one span"
    assert len(set(ends)) == len(ends) and ends[-1] == config.num_hidden_layers - 1 and ends[0] >= 0
    assert all(0 <= first <= last + 1 for phase in phases for first, last in phase.spans)
    assert len(micro_batches) == micro_batches_per_update * len(learning_rates)
    assert micro_batches_per_update % replicas == 0
    assert not delayed or len(ends) == 1
    assert fault in FAULTS and clip_formula in CLIP_FORMULAS and averaging in AVERAGING
    torch.set_flush_denormal(True)  # a condition of bit equality, as the thread count is

    net = Net(config, phases[0].spans, heads, border).train()
    net.initialise(seed)
    net.to(dtype)
    reached = {block for phase in phases for first, last in phase.spans for block in range(first, last + 1)}
    wanted = {parameter for block in reached for parameter in net.block_parameters(block)}
    wanted |= {parameter for block in ends for parameter in net.head_parameters(block)}
    trained = {
        name: parameter
        for name, parameter in net.named().items()
        if parameter in wanted and not any(fnmatchcase(re.sub(r"^head\.\d+", "head", name), one) for one in frozen)
    }
    optimizers = make_optimizers(trained, optimizer)
    result = Result([], [], {})
    history: list[Net] = []  # history[v]: as after v updates

    for update, learning_rate in enumerate(learning_rates):
        history.append(copy.deepcopy(net))
        net.refresh(update, history)
        before = history[max(0, update - 1)]
        at = before if delayed else net  # where gradients are taken
        below = before if fault == "stale_weights" else at
        phase = phases[phase_of_update[update] if phase_of_update else 0]
        through = Phase([(0, last) for _, last in phase.spans], phase.own_weight) if fault == "no_detach" else phase

        batch = range(update * micro_batches_per_update, (update + 1) * micro_batches_per_update)
        targets = [{block: net.targets(micro_batches[i][1], block, i) for block in ends} for i in batch]
        counts = [{block: int((labels != -100).sum()) for block, (labels, _) in one.items()} for one in targets]
        tokens = {block: sum(one[block] for one in counts) for block in ends}
        sums = dict.fromkeys(ends, 0.0)
        gradients: dict[str, list[Tensor]] = {name: [] for name in trained}
        for i, own_targets, own_counts in zip(batch, targets, counts, strict=True):
            divisors = own_counts if fault == "loss_scale" else tokens
            scales = {block: replicas / divisors[block] for block in ends}
            losses, found = micro_batch_gradients(
                at, below, through, micro_batches[i][0], own_targets, scales, chunk_tokens
            )
            for block in ends:
                sums[block] += losses[block]
            for name, kept in gradients.items():
                if name in found:
                    kept.append(found[name])
        result.losses.append([sums[block] / tokens[block] for block in ends])

        for name, parameter in trained.items():
            parameter.grad = combine(gradients[name], replicas, averaging) if gradients[name] else None
        if update == gradients_of:
            result.gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        norms = []
        for run in phase.runs(config.num_hidden_layers):
            members = [p for block in run for p in [*net.block_parameters(block), *net.head_parameters(block)]]
            members = [parameter for parameter in members if parameter.grad is not None]
            if not members:  # blocks that are not trained
                continue
            norms.append(clip_gradients(members, clip, clip_formula))
            if not math.isfinite(norms[-1]):  # then these, and no others, skip the update
                for parameter in members:
                    parameter.grad = None
        result.grad_norms.append(norms)
        for step in optimizers:
            for group in step.param_groups:
                group["lr"] = learning_rate
            step.step()
            step.zero_grad()

    result.weights = {name: parameter.detach().clone() for name, parameter in net.named().items()}
    return result
