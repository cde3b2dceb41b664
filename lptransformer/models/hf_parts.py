"""Where the parts of a Hugging Face causal language model are, and what can be taken out of it.

Any family is taken that passes `anatomy`: the pieces it is cut into (models/split.py), run one after another by the
library's own forward, are then the whole model. Blocks keep their global indices, so checkpoint keys and
`config.layer_types` stay right.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from lptransformer.errors import ModelError
from lptransformer.models import router_loss
from lptransformer.models.cross_entropy import PLAIN, LogitRule
from lptransformer.models.hf_config import empty_model, model_class, one_line


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a causal LM are, as module names below the causal LM's class.

    `before` are the modules that only the first stage needs: token embedding, additive position embeddings, and norms
    and dropouts that stand before the blocks, and a map to the width of the blocks. What else is beside the blocks has
    no weights (rotary embeddings) and stays with every stage. `base` is the base model, `norm` the final norm (None:
    the family has none), `projection` a map behind it to the width of the readout. `logit_rule` is what the family
    does to what the readout gives. With `tuples` the blocks give tuples, hidden states first. The numbers of parameters
    are those of `before`, of one block, and of what stands beside the readout's matrix (norm, projection, bias).
    """

    base: str
    blocks: str
    token_embedding: str
    before: tuple[str, ...]
    norm: str | None
    projection: str | None
    lm_head: str
    hidden_size: int
    readout_width: int
    vocab_size: int
    embedding_parameters: int
    block_parameters: int
    norm_parameters: int
    head_bias: bool = False
    logit_rule: LogitRule = PLAIN
    tuples: bool = False

    @property
    def blocks_in_base(self) -> str:
        """The name of the blocks below the base model."""
        return self.blocks.removeprefix(f"{self.base}.")

    @property
    def final(self) -> list[str]:
        """What stands behind the blocks: the norm and the projection where there are some, and the readout."""
        return [name for name in (self.norm, self.projection, self.lm_head) if name is not None]

    def whole_name(self, name: str, is_last: bool) -> str:
        """The name in the Hugging Face model of a stage's weight; of an auxiliary head its own, `head.*`."""
        own = {"head.norm": self.norm, "head.down": self.projection, "head.readout": self.lm_head}
        module, _, weight = name.rpartition(".")
        if is_last and module in own:
            return f"{own[module]}.{weight}"
        return name if name.startswith("head.") else f"{self.base}.{name.removeprefix('body.')}"


def anatomy(config: Any) -> Anatomy:
    """Find the parts of the model that `config` describes, from an empty model (no weights are allocated).

    Raises ModelError when the model cannot be cut: it needs one list of blocks, a head that is one linear map, and
    nothing that would be missing, or done twice, when its blocks run in several pieces.
    """
    whole, config = model_class(config), copy.copy(config)
    setattr(config, router_loss.WANTED, False)  # a model without blocks has none
    try:
        model = empty_model(whole, config)
        depth, hidden_size, vocab_size = config.num_hidden_layers, config.hidden_size, config.vocab_size
    except Exception as error:  # whatever the library raises for a configuration that anyone may have written
        raise ModelError(f"{whole.__name__} cannot be built: {one_line(error)}") from None
    names = {module: name for name, module in model.named_modules()}
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise ModelError(f"{whole.__name__} cannot be cut: {len(lists)} lists of {depth} blocks instead of one")
    blocks = lists[0]
    parent = model.get_submodule(names[blocks].rpartition(".")[0])
    children = list(parent.children())
    is_norm = [("norm" in type(child).__name__.lower()) for child in children]
    norm = next((child for child, norm in reversed([*zip(children, is_norm, strict=True)]) if norm), None)
    token_embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear) or token_embedding not in names or model.base_model is model:
        raise ModelError(
            f"{whole.__name__} cannot be cut: it needs a token embedding and a head that is one linear map"
        )
    maps = [child for child in children if isinstance(child, nn.Linear)]
    projection = next((one for one in maps if one.in_features == hidden_size != one.out_features), None)
    before = [
        child
        for child, norm_like in zip(children, is_norm, strict=True)
        if isinstance(child, nn.Embedding | nn.Dropout)
        or (norm_like and child is not norm)
        or (child in maps and child is not projection)
    ]
    parts = Anatomy(
        base=names[model.base_model],
        blocks=names[blocks],
        token_embedding=names[token_embedding],
        before=tuple(names[child] for child in before),
        norm=None if norm is None else names[norm],
        projection=None if projection is None else names[projection],
        lm_head=names[lm_head],
        hidden_size=hidden_size,
        readout_width=lm_head.in_features,
        vocab_size=vocab_size,
        embedding_parameters=_count(*before),
        block_parameters=_count(blocks[0]),
        norm_parameters=_count(*(one for one in (norm, projection) if one is not None))
        + (0 if lm_head.bias is None else vocab_size),
        head_bias=lm_head.bias is not None,
    )
    try:
        return replace(parts, logit_rule=_check_cut(model, parts))
    except ModelError:
        parts = replace(parts, tuples=True)
        try:
            return replace(parts, logit_rule=_check_cut(empty_model(whole, config), parts))
        except ModelError:
            pass
        raise


def _count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _check_cut(model: PreTrainedModel, parts: Anatomy) -> LogitRule:
    """Raise ModelError unless the pieces of this empty model, joined, are the model; what it does to its logits.

    A piece that owns nothing must hand its input on bit for bit: a family that scales the hidden states it is given,
    or takes something else out of its blocks, would do so in every piece. Blocks must take the hidden states of the
    block before and no others. The logits must be the readout of the final norm, but for a scale or a soft cap that
    the configuration names.
    """

    def refuse(why: str) -> NoReturn:
        raise ModelError(f"{type(model).__name__} cannot be cut: {why}") from None

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for buffer in sorted(set(model.state_dict()) - parameters):
        refuse(f"{buffer} is kept with the weights, but is no weight that is trained")
    model.tie_weights()
    of_blocks = [p for block in model.get_submodule(parts.blocks).children() for p in set(block.parameters())]
    if len(set(of_blocks)) < len(of_blocks):
        refuse("its blocks share weights")
    strip(model, parts, range(0), embedding=False, final=False)
    for weight, _ in model.named_parameters():
        refuse(f"{weight} is no part of its embedding, its blocks, or its head")

    hidden_states = torch.linspace(-3, 3, 2 * 2 * parts.hidden_size).view(2, 2, parts.hidden_size)
    handed: list[Any] = []
    for block in model.get_submodule(parts.blocks).children():
        block.register_forward_pre_hook(
            lambda _, args, named: handed.extend((*args, *named.values())), with_kwargs=True
        )
    normed: list[Any] = []
    if parts.norm is not None:
        model.get_submodule(parts.norm).register_forward_pre_hook(lambda _, args: normed.append(args))
    readout = nn.Linear(parts.hidden_size, 5, bias=False)
    with torch.no_grad():
        # Logits of up to 100: below and above every cap.
        weight = torch.linspace(-40, 40, readout.weight.numel()) / parts.hidden_size
        readout.weight.copy_(weight.view_as(readout.weight))
        try:
            fill(model)
            model.set_submodule(parts.lm_head, readout)
            logits = model.eval()(inputs_embeds=hidden_states, use_cache=False).logits
        except Exception as error:  # whatever the library's code runs into without its blocks
            refuse(f"it fails where blocks are left out ({one_line(error)})")
        rule = _find_logit_rule(model.config, readout(hidden_states), logits)
        if rule is None:
            refuse("it does more than run its blocks, its final norm and its head one after another")
    alike = [one for one in handed if isinstance(one, Tensor) and one.shape == hidden_states.shape]
    if sum(torch.equal(one, hidden_states) for one in alike) != len(model.get_submodule(parts.blocks)):
        refuse("its blocks take more hidden states than those of the block before")
    if parts.norm is not None and len(normed) != 1:
        refuse(f"it uses its final norm {len(normed)} times")
    return rule


def _find_logit_rule(config: Any, plain: Tensor, logits: Tensor) -> LogitRule | None:
    """The rule that makes `logits` of `plain`, bit for bit, out of the numbers that the configuration has for logits.

    Every number whose name speaks of logits or of the head is tried as factor, divisor and cap: the families' names
    for the same thing differ, and so does what they mean by one name.
    """
    named = {name: value for name, value in config.to_dict().items() if "logit" in name or "lm_head" in name}
    numbers = sorted({float(v) for v in named.values() if isinstance(v, int | float) and not isinstance(v, bool) and v})
    scales = [PLAIN, *(LogitRule(factor=number) for number in numbers), *(LogitRule(divisor=n) for n in numbers)]
    caps = [None, *(number for number in numbers if number > 0)]
    rules = [replace(scale, cap=cap) for cap in caps for scale in scales]
    return next((rule for rule in rules if torch.equal(rule(plain), logits)), None)


def strip(model: PreTrainedModel, parts: Anatomy, blocks: range, embedding: bool, final: bool) -> None:
    """Replace what a piece does not own by modules without weights."""
    block_list = model.get_submodule(parts.blocks)
    assert isinstance(block_list, nn.ModuleList)
    for index in range(len(block_list)):
        if index not in blocks:
            block_list[index] = Passing(parts.tuples)
    if not embedding:
        drop_embedding(model, parts)
    if not final:
        for name in parts.final:
            model.set_submodule(name, nn.Identity())


def drop_embedding(model: PreTrainedModel, parts: Anatomy) -> None:
    """Take out what only the first stage needs, and what the family multiplies embeddings by: these are none."""
    if hasattr(model.base_model, "embedding_multiplier"):
        model.base_model.embedding_multiplier = 1.0
    for name in parts.before:
        additive = isinstance(model.get_submodule(name), nn.Embedding) and name != parts.token_embedding
        model.set_submodule(name, _Zero() if additive else nn.Identity())


class _Zero(nn.Module):
    """Stands for an additive position embedding after the first stage."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # A scalar takes the dtype of what it is added to. One of the host would be copied to a GPU in every forward.
        return torch.zeros((), device=next(one.device for one in (*args, *kwargs.values()) if isinstance(one, Tensor)))


class Passing(nn.Module):
    """Stands for a block of another stage: hands the hidden states on, whatever else blocks are called with."""

    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.tuples = tuples

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        return (hidden_states, None) if self.tuples else hidden_states


def fill(model: PreTrainedModel) -> None:
    """Allocate an empty model on the CPU: its buffers get the library's values, its weights stay uninitialised.

    Raises ModelError where the library does not say what a buffer begins with.
    """
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # the library then leaves it alone
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    for buffer in buffers.values():
        buffer.fill_(math.nan)
    model.apply(model._init_weights)
    for parameter in model.parameters():
        del parameter._is_hf_initialized
    for name, buffer in buffers.items():
        if buffer.isnan().any():
            raise ModelError(f"{type(model).__name__} cannot be cut: nothing says what {name} begins with")


@contextlib.contextmanager
def known_documents(document_ids: Tensor | None) -> Iterator[None]:
    """What the library would find out of the positions in every forward pass, and wait for a GPU to do so: to which
    document of its window a token belongs, int64 [b, T], counted from 0; None where every window is one document."""
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: document_ids
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
