"""Text from any exit of a run or of a Hugging Face folder, by the library's own `generate`; an earlier exit may draft.

An exit becomes an ordinary causal LM (models/whole_model.py), so the cache, sampling, the end of a text and assisted
generation are the library's. A draft is such a model too, on the same blocks in memory: it proposes a few tokens, and
the exit after it sees them all in one pass and keeps those that it would have given itself (2211.17192).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lptransformer import hub
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import ModelError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.texts import tokenizer_folder
from lptransformer.evaluation.trained_model import DTYPES, KEPT, LENS, RunModel, Target
from lptransformer.models.hf_config import one_line, quiet_transformers
from lptransformer.models.whole_model import check_logits, exit_model, tried_ids
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.run_folder import layout

MAX_TOKENS, DRAFT_TOKENS = 128, 4
CONTEXT_TOKENS = 8  # of the prompt, before which new ones are decoded: a tokenizer may drop the first blank of a text
Show = Callable[[str], None]
Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: logits over `temperature`, then of all tokens the `top_k` likeliest (0: all), then the
    fewest that have the share `top_p`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Source:
    """A model that generates, and what it takes. Ids: `begin` stand before a prompt, `ends` end a text. `longest` is
    the model's length; `notes` are lines for the person who asked."""

    model: Any
    draft: Any | None
    tokenizer: Tokenizer
    begin: tuple[int, ...]
    ends: tuple[int, ...]
    longest: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generated:
    """New ids (the end token too), their text, why they `ended`, seconds with the pass over the prompt, passes of the
    model, and tokens that were drafted."""

    ids: list[int]
    text: str
    ended: str
    seconds: float
    passes: int
    drafted: int

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept: each pass of the model gives one token of its own beside them."""
        return len(self.ids) - self.passes

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


# ---- the models


def open_source(
    folder: Path,
    *,
    step: int | None = None,
    exit_block: int | None = None,
    draft_block: int | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    dtype: str = "fp32",
) -> Source:
    """The model of a run or of a model folder up to an exit, the last one by default, and the draft of an earlier one.

    Both are compared with the stages that `evaluate` measures, in fp32, before weights are rounded to `dtype`. Raises
    UserError for what is not there, ModelError where an exit is no model of its family or the family cannot draft.
    """
    target = trained_model.find(folder, step, exit_block)
    verifier = target.exits[-1]
    exits = [verifier]
    if draft_block is not None:
        drafter = trained_model.find(folder, step, draft_block, flag="--draft").exits[-1]
        if drafter[0] >= verifier[0]:
            raise UserError(f"--draft {draft_block}: an exit before the one that generates, after block {verifier[0]}")
        exits = [drafter, verifier]
    tokenizer = load_tokenizer(tokenizer_folder(target))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = trained_model.load_target(replace(target, exits=tuple(exits)), device)
    if all(kind != KEPT for _, kind, _ in exits) and target.update is None:
        for stage in loaded.exits:
            stage.head = loaded.stages[-1].head  # the folder's own norm and readout, once
    model = _built(loaded, verifier[0], "--exit")
    draft = None if draft_block is None else _built(loaded, draft_block, "--draft")
    if draft is not None and model._is_stateful:
        raise ModelError(
            f"--draft {draft_block}: {type(model).__name__} keeps a state in which no token can be taken back, so none "
            "can be drafted"
        )
    _round([model] if draft is None else [model, draft], DTYPES[dtype])
    ends = _end_tokens(target, tokenizer, model.config)
    for one in (model, draft):
        if one is not None:
            one.generation_config.eos_token_id = list(ends) or None
    if draft is not None:
        draft.generation_config.num_assistant_tokens = draft_tokens
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0  # else the library ends drafts of its own accord
    begin = (tokenizer.backend.bos_token_id,) if trained_model.windowing(target).begins(tokenizer) else ()
    where = f"{folder} has no head of its own there, so its norm and readout stand behind that block (logit lens)"
    notes = [f"exit after block {block}: {where}" for block, kind, _ in exits if kind == LENS]
    return Source(model, draft, tokenizer, begin, ends, target.longest, tuple(notes))


@torch.no_grad()
def _built(loaded: RunModel, block: int, flag: str) -> Any:
    """The model up to the exit after a block, which has the logits of its stages."""
    stages = [stage for stage in loaded.stages if stage.plan.last_block <= block]
    ids = tried_ids(loaded.blueprint).to(loaded.device)
    try:
        model: Any = exit_model(loaded.blueprint, stages).to(loaded.device)
        logits = model(ids).logits
    except Exception as error:  # whatever the library raises for blocks that it never put together like this
        why = str(error) if isinstance(error, ModelError) else one_line(error)
        raise ModelError(f"{flag} {block}: it cannot generate: {why}") from None
    check_logits(logits, replace(loaded, stages=stages).logits(ids), f"{flag} {block}: what generates")
    return model


def _round(models: Sequence[Any], dtype: torch.dtype) -> None:
    """Weights in a dtype, each tensor once, so that what the models share stays shared. Buffers (rotary frequencies)
    stay precise, as they do when the library opens a folder in that dtype."""
    rounded: dict[int, Tensor] = {}
    for model in models:
        for weight in model.parameters():
            if weight.data_ptr() not in rounded:
                rounded[weight.data_ptr()] = weight.data.to(dtype)
            weight.data = rounded[weight.data_ptr()]


def _end_tokens(target: Target, tokenizer: Tokenizer, config: Any) -> tuple[int, ...]:
    """Those of generation_config.json, else of the model's configuration, else of the tokenizer."""
    folder = target.folder if target.update is None else target.folder / layout.PRETRAINED
    path, said = folder / "generation_config.json", None
    if path.is_file():
        try:
            said = json.loads(path.read_text())["eos_token_id"]
        except KeyError:
            pass
        except (ValueError, TypeError, OSError) as error:
            raise ModelError(f"{path} is damaged: {error}") from None
    for ends in (said, config.eos_token_id, tokenizer.end_of_text_id):
        if ends is not None:
            return tuple(ends) if isinstance(ends, list) else (ends,)
    return ()


# ---- the text


def prompt_ids(source: Source, text: str) -> list[int]:
    """The ids of a prompt: of a run as it was trained, of a folder behind what its tokenizer puts before a text."""
    return [*source.begin, *source.tokenizer.encode(text).tolist()]


def chat_ids(source: Source, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation up to the reply that is to come, by the tokenizer's chat template."""
    template = source.tokenizer.backend.apply_chat_template
    try:
        ids = template(list(messages), add_generation_prompt=True, return_dict=False)
    except Exception as error:  # whatever a template that anyone may have written raises
        raise UserError(f"--chat: the tokenizer's chat template fails: {error}") from None
    return list(ids)


def generate(
    source: Source,
    ids: Sequence[int],
    max_tokens: int = MAX_TOKENS,
    sampling: Sampling | None = None,
    show: Show = lambda text: None,
) -> Generated:
    """What follows the tokens `ids`: the likeliest token each time, or drawn; up to `max_tokens`, and never more than
    the model takes. `show` gets the text as it comes. Raises UserError for ids that the model does not take."""
    if not ids:
        raise UserError("--prompt: there is no token to go on from")
    if max(ids) >= source.model.config.vocab_size:
        raise UserError(f"--prompt: it has token {max(ids)}, and the model {source.model.config.vocab_size} of them")
    room = math.inf if source.longest is None else source.longest - len(ids)
    if room < 1:
        raise UserError(f"the text so far has {len(ids)} tokens: the model takes {source.longest} with those that come")
    stream = _Stream(source.tokenizer, ids, show)
    options: dict[str, Any] = {"do_sample": sampling is not None, "max_new_tokens": int(min(max_tokens, room))}
    if sampling is not None:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    if source.draft is not None:
        options["assistant_model"] = source.draft
    inputs = torch.tensor([list(ids)], device=source.model.device)
    padding = source.ends[0] if source.ends else 0  # the library wants one; a single text has none
    with quiet_transformers(), _passes(source) as passes:
        started = time.perf_counter()
        source.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), pad_token_id=padding, streamer=stream, **options
        )
        seconds = time.perf_counter() - started
    by_token, full = stream.ids[-1] in source.ends, len(stream.ids) == max_tokens
    ended = "end token" if by_token else "max tokens" if full else "length of the model"
    return Generated(stream.ids, stream.text(), ended, seconds, passes["model"], passes["draft"])


@contextlib.contextmanager
def _passes(source: Source) -> Iterator[Counter[str]]:
    """Counts the passes of model and draft; each of the draft gives a token."""
    passes: Counter[str] = Counter()
    models = {"model": source.model, "draft": source.draft}
    hooks = [
        model.register_forward_hook(partial(lambda name, *_: passes.update([name]), name))
        for name, model in models.items()
        if model is not None
    ]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


class _Stream:
    """What the library hands new ids to: shows their text as soon as it is whole, a character of several tokens at
    once."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], show: Show) -> None:
        self.ids: list[int] = []
        self._decode = partial(tokenizer.backend.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._context, self._show = list(prompt[-CONTEXT_TOKENS:]), show
        self._before = self._decode(self._context)
        self._shown, self._prompt_came = 0, False

    def put(self, ids: Tensor) -> None:
        """The prompt first, then new ids, one or several."""
        if self._prompt_came:
            self.ids += ids.flatten().tolist()
            self._show_up_to(self.text().rstrip("\ufffd"))
        self._prompt_came = True

    def end(self) -> None:
        self._show_up_to(self.text())

    def text(self) -> str:
        whole = self._decode([*self._context, *self.ids])
        return whole[len(self._before) :] if whole.startswith(self._before) else self._decode(self.ids)

    def _show_up_to(self, text: str) -> None:
        if len(text) > self._shown:
            self._show(text[self._shown :])
            self._shown = len(text)


# ---- the command


def generate_run(
    folder: Path,
    prompt: str | None,
    *,
    chat: bool = False,
    as_json: bool = False,
    max_tokens: int = MAX_TOKENS,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    draft_block: int | None = None,
    draft_tokens: int | None = None,
    **chosen: Any,
) -> None:
    """Print what follows a prompt (`-`: standard input), or with `chat` the replies to it or to each line of standard
    input; a line about each on stderr, or everything as JSON. `chosen` goes to `open_source`. Raises UserError."""
    if prompt is None and not chat:
        raise UserError("there is nothing to go on from: give --prompt TEXT (- is standard input), or --chat")
    sampling = _sampling(temperature, top_p, top_k, seed)
    for flag, number in (("--max-tokens", max_tokens), ("--draft-tokens", draft_tokens)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number}: it must be 1 or more")
    if draft_tokens is not None and draft_block is None:
        raise UserError(f"--draft-tokens {draft_tokens} has no meaning without --draft K, the exit that drafts")
    text = None if prompt is None else _given(prompt)
    use_fair_share_of_cores()
    folder = hub.folder(folder, f"MODEL is {folder}", weights=True)
    source = open_source(folder, draft_block=draft_block, draft_tokens=draft_tokens or DRAFT_TOKENS, **chosen)
    for note in source.notes:
        print(f"lptransformer: {note}", file=sys.stderr, flush=True)
    if sampling is not None:
        seed = secrets.randbelow(2**32) if seed is None else seed
        torch.manual_seed(seed)

    def reply(ids: Sequence[int]) -> Generated:
        show = (lambda part: None) if as_json else partial(print, end="", flush=True)
        generated = generate(source, ids, max_tokens, sampling, show)
        print(json.dumps(_as_dict(generated, seed)) if as_json else "", flush=True)
        if not as_json:
            print(_in_words(generated, seed), file=sys.stderr, flush=True)
        return generated

    if not chat:
        assert text is not None
        reply(prompt_ids(source, text))
        return
    if source.tokenizer.backend.chat_template is None:
        raise UserError("--chat: the tokenizer has no chat template; give a text to go on from: --prompt TEXT")
    messages: list[Message] = []
    for said in _lines() if text is None else [text]:
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": reply(chat_ids(source, messages)).text})


def _sampling(temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None) -> Sampling | None:
    """None where nothing asks for it: greedy."""
    if temperature is not None and not 0 < temperature < math.inf:
        raise UserError(f"--temperature {temperature}: it must be above 0; leave it out for the likeliest token")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: a share, above 0 and at most 1")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k {top_k}: it must be 1 or more")
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: it must be 0 or more, and below 2 to the power of 64")
    if (temperature, top_p, top_k) == (None, None, None):
        if seed is not None:
            raise UserError(
                f"--seed {seed} has no meaning for the likeliest token: add --temperature, --top-p or --top-k"
            )
        return None
    return Sampling(temperature or 1.0, top_p or 1.0, top_k or 0)


def _given(prompt: str) -> str:
    """The text of --prompt; standard input without the end of its last line."""
    if prompt == "-":
        return _decoded(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    return _decoded(os.fsencode(prompt), "--prompt")


def _lines() -> Iterator[str]:
    """The lines of standard input that say something; asked for on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        if text := _decoded(line, "standard input").strip():
            yield text


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: it is no UTF-8: {error}") from None


def _as_dict(generated: Generated, seed: int | None) -> dict[str, Any]:
    return {
        "text": generated.text,
        "tokens": len(generated.ids),
        "ended": generated.ended,
        "seconds": generated.seconds,
        "tokens_per_second": generated.tokens_per_second,
        "passes": generated.passes,
        "drafted": generated.drafted,
        "accepted": generated.accepted,
        "acceptance": generated.acceptance,
        "seed": seed,
    }


def _in_words(generated: Generated, seed: int | None) -> str:
    tokens = len(generated.ids)
    parts = [
        f"{tokens} tokens in {generated.seconds:.2f} s, {generated.tokens_per_second:.1f} per second; "
        f"ended by {generated.ended}"
    ]
    if generated.acceptance is not None:
        parts.append(
            f"{generated.accepted} of {generated.drafted} drafted tokens accepted ({generated.acceptance:.0%}), "
            f"{tokens / generated.passes:.2f} tokens per pass"
        )
    return "; ".join(parts + ([] if seed is None else [f"seed {seed}"]))
