"""Whether the pieces of a model folder's family train as the library's own model does: tried on a small one.

Before anything is loaded, the folder's own configuration is cut to two blocks of every kind and a small vocabulary, and
where that is still large to a smaller width. The library's model of it and the pieces that it is cut into
(models/split.py) must have the same logits, bit for bit, and the same loss and gradients; no token may see a later one;
and what is taken for the final norm must take what the last block gives.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor

from lptransformer import files
from lptransformer.errors import ModelError
from lptransformer.models import hf_config, hf_parts, router_loss, split
from lptransformer.models.cross_entropy import IGNORE_INDEX
from lptransformer.models.head import CROSS_ENTROPY, LossBatch
from lptransformer.models.hf_parts import Anatomy
from lptransformer.models.split import Piece

VOCABULARY, LEAST_IDS, TOKENS, OF_A_KIND = 256, 50, 12, 2
MOST_PARAMETERS = 20_000_000
LARGEST = 500_000_000  # weights of what is tried where a smaller one cannot be built: every process builds it
TOLERANCE = 1e-5  # of the largest number compared: loss and gradients are summed in another order
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
COUNTS = ("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts")


_passed: set[str] = set()  # configurations, as keys


def check(config: Any, apart: bool = False) -> None:
    """Raises ModelError where the model that a configuration describes would not be trained as it is; with `apart` also
    where positions that begin again do not keep the documents of a window apart.

    Of the processes of a host one tries it and the others wait for it; what passes is noted in the user's cache, by the
    configuration, the code of this package and the versions of torch and transformers.
    """
    key = _key(config) + ("-apart" if apart else "")
    if key in _passed:
        return
    with files.noted_once(f"families/{key}") as known:
        if not known:
            _try(config, apart)
    _passed.add(key)


def _key(config: Any) -> str:
    content = json.dumps(config.to_dict(), sort_keys=True, default=str)
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    versions = f"{torch.__version__} {transformers.__version__}"
    return hashlib.sha256(b"\0".join([content.encode(), versions.encode(), *code])).hexdigest()[:32]


def _try(config: Any, apart: bool) -> None:
    config = copy.deepcopy(config)
    setattr(config, router_loss.WANTED, False)  # every stage has a router loss of its own, the library's model one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole, small, parts = _small_model(config)
        middle = max(1, small.num_hidden_layers // 2)
        compare(whole, small, parts, [range(middle), range(middle, small.num_hidden_layers)])
        if apart and (off := leak(whole.eval())) > TOLERANCE:
            raise ModelError(
                f"{type(whole).__name__} does not keep the documents of a window apart (data.isolate_documents): those "
                f"before it change a document's logits (by {off:.2g} of the largest): give data.isolate_documents=false"
            )


def _small_model(config: Any) -> tuple[Any, Any, Anatomy]:
    """The smallest of it that can be built and cut: the library's model, its configuration, its parts."""
    problem: Exception | None = None
    for smaller in (shrunk, partial(shrunk, narrow=False), copy.deepcopy):
        try:
            small = smaller(config)
            parts = hf_parts.anatomy(small)
            if _parameters(small) > LARGEST:
                raise ModelError(
                    f"a small model of it cannot be built, and {_parameters(small):,} weights are too many"
                )
            whole = hf_config.model_class(small)(small)
            with torch.no_grad():
                whole(input_ids=_tokens(), use_cache=False)
            return whole, small, parts
        except Exception as error:  # whatever the library raises for sizes that do not go together
            problem = problem or error  # of the smallest
    assert problem is not None
    if isinstance(problem, ModelError):
        raise problem
    name = hf_config.model_class(config).__name__
    raise ModelError(f"{name} cannot be cut: it cannot be run: {hf_config.one_line(problem)}")


def _tokens() -> Tensor:
    return torch.randint(0, LEAST_IDS, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def compare(whole: Any, config: Any, parts: Anatomy, cut: Sequence[range], tolerance: float = TOLERANCE) -> None:
    """Raises ModelError unless the library's model `whole`, which gets other weights, is these pieces."""

    def refuse(why: str) -> NoReturn:
        raise ModelError(f"{type(whole).__name__} cannot be trained in pieces: {why}")

    ids = _tokens()
    with torch.no_grad():
        for weight in whole.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)  # no bias of 0 and no norm of 1 hides a mistake
    whole.eval()
    logits, ended, normed = _watched(whole, parts, ids)
    later = ids.clone()
    later[:, -1] = (later[:, -1] + 1) % LEAST_IDS
    off = _off(_watched(whole, parts, later)[0][:, :-1], logits[:, :-1])
    if off > tolerance:
        refuse(f"it is not causal: the last token changes the logits before it (by {off:.2g} of the largest)")
    if len(normed) != 1 or not torch.equal(normed[0], ended[-1]):
        refuse("what is taken for its final norm does not take what its last block gives")
    joined = pieces(whole, config, parts, cut)
    head = joined[-1].head(TOKENS, parts.logit_rule)
    with torch.no_grad():
        ours = head.logits(hidden_states(joined, ids))
    if not torch.equal(ours, logits):
        refuse(f"its pieces give other logits (off by {_off(ours, logits):.2g} of the largest)")
    whole.train()
    for piece in joined:
        piece.base.train()
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = ids[:, 1:]
    batch = LossBatch(labels, scale=1.0 / (2 * (TOKENS - 1)))
    own_loss = whole(input_ids=ids, labels=ids, use_cache=False).loss
    loss = head(hidden_states(joined, ids), batch)[CROSS_ENTROPY].loss
    if (off := _off(loss.detach(), own_loss.detach())) > tolerance:
        refuse(f"its pieces have another loss (off by {off:.2g})")
    own_loss.backward()
    loss.backward()
    found = _gradients(parts, joined)
    if config.tie_word_embeddings:  # there embedding and readout are one matrix
        found[f"{parts.token_embedding}.weight"] += found[f"{parts.lm_head}.weight"]
    for name, weight in whole.named_parameters():
        own = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if (off := _off(found[name], own)) > tolerance:
            refuse(f"its pieces have another gradient of {name} (off by {off:.2g} of the largest)")


@torch.no_grad()
def leak(whole: Any) -> float:
    """How far a document's logits depend on the one before it in a window, where positions begin again with it: their
    difference to those of the document alone, as a share of the largest."""
    ids, half = _tokens(), TOKENS // 2
    positions = (torch.arange(TOKENS) % half).expand_as(ids)
    together = whole(input_ids=ids, position_ids=positions, use_cache=False).logits[:, half:]
    return _off(together, whole(input_ids=ids[:, half:], use_cache=False).logits)


@torch.no_grad()
def _watched(whole: Any, parts: Anatomy, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The logits, what the last block gives, and what stands behind the blocks takes."""
    ended: list[Tensor] = []
    normed: list[Tensor] = []
    last = whole.get_submodule(parts.blocks)[-1]
    hooks = [
        last.register_forward_hook(lambda _, args, out: ended.append(out if isinstance(out, Tensor) else out[0])),
        whole.get_submodule(parts.final[0]).register_forward_pre_hook(lambda _, args: normed.append(args[0])),
    ]
    logits = whole(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, ended, normed


def pieces(whole: Any, config: Any, parts: Anatomy, cut: Sequence[range]) -> list[Piece]:
    """The pieces of a model with these blocks, with its weights, in evaluation mode."""
    state = whole.state_dict()
    made = []
    for blocks in cut:
        final = blocks.stop == config.num_hidden_layers
        piece = split.copied_piece(state, config, parts, blocks, blocks.start == 0, final)
        piece.base.eval()
        made.append(piece)
    return made


def hidden_states(joined: Sequence[Piece], ids: Tensor, **named: Any) -> Tensor:
    """ids [b, T] through the pieces to hidden states [b, T, H]; `named` is handed to each."""
    hidden = ids
    for number, piece in enumerate(joined):
        given = {"inputs_embeds" if number else "input_ids": hidden}
        hidden = piece.base(**given, use_cache=False, **named).last_hidden_state
    return hidden


def _gradients(parts: Anatomy, joined: Sequence[Piece]) -> dict[str, Tensor]:
    """Of all weights, under their names in the whole model."""
    return {
        f"{below}.{name}": torch.zeros_like(weight) if weight.grad is None else weight.grad
        for piece in joined
        for below, module in split.named_modules(piece, parts).items()
        for name, weight in module.named_parameters()
    }


def _off(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def shrunk(config: Any, *, narrow: bool = True) -> Any:
    """The configuration of a small model: two blocks of every kind, a small vocabulary, and where it takes more than
    MOST_PARAMETERS so, `narrow` ones: widths, heads and experts divided alike, as far as they can be."""
    depth, small = config.num_hidden_layers, copy.deepcopy(config)
    per_block = hf_config.per_block(config)
    kinds: dict[str, list[int]] = {}
    for index in range(depth):
        kinds.setdefault(repr([value[index] for value in per_block.values()]), []).append(index)
    kept = sorted(index for of_kind in kinds.values() for index in of_kind[:OF_A_KIND])
    for name, value in per_block.items():
        setattr(small, name, [value[index] for index in kept])
    small.num_hidden_layers = len(kept)
    small.vocab_size = min(VOCABULARY, config.vocab_size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, None)
    for names, divisors in (((*WIDTHS, *COUNTS), range(2, 65)), (WIDTHS[1:], (2, 4, 8, 16))):
        sizes = {name: getattr(small, name, None) for name in names}  # then what is within blocks alone
        numbers = {name: size for name, size in sizes.items() if isinstance(size, int) and size > 1}
        for divisor in divisors if narrow else ():
            if _parameters(small) > MOST_PARAMETERS and not any(number % divisor for number in numbers.values()):
                for name, number in numbers.items():
                    setattr(small, name, number // divisor)
    return small


def _parameters(config: Any) -> int:
    model = hf_config.empty_model(hf_config.model_class(config), config)
    return sum(weight.numel() for weight in model.parameters())
