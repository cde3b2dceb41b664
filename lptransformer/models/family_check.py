"""Whether the pieces of a model folder's family train as the library's own model does: tried on a small one.

Before anything is loaded, the folder's own configuration is cut to two blocks of every kind and a small vocabulary, and
where that is still large to a smaller width. The library's model of it and the pieces that it is cut into
(models/split.py) must have the same logits, bit for bit, and the same loss and gradients; no token may see a later one;
and what is taken for the final norm must take what the last block gives.
"""

from __future__ import annotations

import copy
import json
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lptransformer.errors import ModelError
from lptransformer.models import hf_config, hf_parts, split
from lptransformer.models.cross_entropy import IGNORE_INDEX
from lptransformer.models.head import Head, LossBatch, Readout
from lptransformer.models.hf_parts import Anatomy

VOCABULARY, LEAST_IDS, TOKENS, OF_A_KIND = 256, 50, 12, 2
MOST_PARAMETERS = 20_000_000
LARGEST = 500_000_000  # weights of what is tried where a smaller one cannot be built: every process builds it
TOLERANCE = 1e-5  # of the largest number compared: loss and gradients are summed in another order
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
COUNTS = ("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts")


_passed: set[str] = set()  # configurations, as text


def check(config: Any) -> None:
    """Raises ModelError where the model that a configuration describes would not be trained as it is."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if text not in _passed:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _compare(hf_config.model_class(config).__name__, *_small_model(config))
        _passed.add(text)


def _small_model(config: Any) -> tuple[Any, Any, Anatomy]:
    """The smallest of it that can be built and cut: the library's model, its configuration, its parts."""
    problem: Exception | None = None
    for small in (shrunk(config), shrunk(config, narrow=False), config):
        try:
            parts = hf_parts.anatomy(small)
            if _parameters(small) > LARGEST:
                raise ModelError(
                    f"a small model of it cannot be built, and {_parameters(small):,} weights are too many"
                )
            whole = hf_config.model_class(small)(small).eval()
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


def _compare(name: str, whole: Any, small: Any, parts: Anatomy) -> None:
    def refuse(why: str) -> NoReturn:
        raise ModelError(f"{name} cannot be trained in pieces: {why}")

    ids = _tokens()
    with torch.no_grad():
        for weight in whole.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)  # no bias of 0 and no norm of 1 hides a mistake
    normed: list[Tensor] = []
    given: list[Tensor] = []
    blocks = whole.get_submodule(parts.blocks)
    hooks = [
        whole.get_submodule(parts.norm).register_forward_pre_hook(lambda _, args: normed.append(args[0])),
        blocks[-1].register_forward_hook(lambda _, args, out: given.append(out if isinstance(out, Tensor) else out[0])),
    ]
    with torch.no_grad():
        logits = whole(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        later = ids.clone()
        later[:, -1] = (later[:, -1] + 1) % LEAST_IDS
        changed = whole(input_ids=later, use_cache=False).logits
    off = _off(changed[:, :-1], logits[:, :-1])
    if off > TOLERANCE:
        refuse(f"it is not causal: the last token changes the logits before it (by {off:.2g} of the largest)")
    if len(normed) != 1 or not torch.equal(normed[0], given[-1]):
        refuse("what is taken for its final norm does not take what its last block gives")
    middle = max(1, small.num_hidden_layers // 2)
    pieces = [_piece(whole, small, parts, *place) for place in _places(middle, small.num_hidden_layers)]
    hidden: Tensor = ids
    for number, piece in enumerate(pieces):
        hidden = piece.base(**{"inputs_embeds" if number else "input_ids": hidden}, use_cache=False).last_hidden_state
    norm, readout = pieces[-1].norm, pieces[-1].readout
    assert norm is not None and readout is not None
    head = Head(norm, Readout(readout.weight, TOKENS, parts.logit_rule))
    if not torch.equal(head.logits(hidden), logits):
        refuse(f"its pieces give other logits (off by {_off(head.logits(hidden), logits):.2g} of the largest)")
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = ids[:, 1:]
    loss = next(iter(head(hidden, LossBatch(labels, scale=1.0 / (2 * (TOKENS - 1)))).values())).loss
    own_loss = whole(input_ids=ids, labels=ids, use_cache=False).loss
    if (off := _off(loss.detach(), own_loss.detach())) > TOLERANCE:
        refuse(f"its pieces have another loss (off by {off:.2g})")
    own_loss.backward()
    loss.backward()
    _compare_gradients(whole, parts, pieces, readout, small.tie_word_embeddings, refuse)


def _places(middle: int, depth: int) -> list[tuple[range, bool, bool]]:
    return [(range(middle), True, False), (range(middle, depth), False, True)]


def _piece(whole: nn.Module, config: Any, parts: Anatomy, blocks: range, embedding: bool, final: bool) -> split.Piece:
    """A piece with the weights of the whole model."""
    piece = split.new_piece(config, parts, blocks, embedding, final, None)
    weights = {name.removeprefix(f"{parts.base}."): one for name, one in whole.state_dict().items()}
    held = piece.base.state_dict()
    piece.base.load_state_dict({name: weights[name] for name in held})
    if final:
        assert piece.norm is not None and piece.readout is not None
        piece.norm.load_state_dict(whole.get_submodule(parts.norm).state_dict())
        piece.readout.load_state_dict(whole.get_submodule(parts.lm_head).state_dict())
    piece.base.eval()
    return piece


def _compare_gradients(
    whole: Any, parts: Anatomy, pieces: list[split.Piece], readout: nn.Linear, tied: bool, refuse: Any
) -> None:
    """Of all weights; where embedding and readout are one matrix there, its gradient is the sum of both here."""
    found: dict[str, Tensor] = {}
    for piece in pieces:
        for name, weight in piece.base.named_parameters():
            found[f"{parts.base}.{name}"] = weight.grad if weight.grad is not None else torch.zeros_like(weight)
    norm = pieces[-1].norm
    assert norm is not None
    for name, weight in norm.named_parameters():
        assert weight.grad is not None
        found[f"{parts.norm}.{name}"] = weight.grad
    assert readout.weight.grad is not None
    found[f"{parts.lm_head}.weight"] = readout.weight.grad
    for name, weight in whole.named_parameters():
        own = torch.zeros_like(weight) if weight.grad is None else weight.grad
        ours = found[name]
        if tied and name == f"{parts.token_embedding}.weight":
            ours = ours + readout.weight.grad
        if (off := _off(ours, own)) > 10 * TOLERANCE:
            refuse(f"its pieces have another gradient of {name} (off by {off:.2g} of the largest)")


def _off(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def shrunk(config: Any, *, narrow: bool = True) -> Any:
    """The configuration of a small model: two blocks of every kind, a small vocabulary, and where it takes more than
    MOST_PARAMETERS so, `narrow` ones: widths, heads and experts divided alike, as far as they can be."""
    depth, small = config.num_hidden_layers, copy.deepcopy(config)
    per_block = {
        name: value for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == depth
    }
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
