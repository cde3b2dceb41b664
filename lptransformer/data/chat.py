"""Examples to ids, and which of them carry a label: conversations by the tokenizer's own chat template, and prompts
with their completions.

A label is on every answer and on the token that ends it, so that a model learns to answer and to stop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lptransformer.data.readers import Message
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.errors import DataError


class Rendered(NamedTuple):
    """The text of an example, and the spans (first character, last + 1) that carry labels, in order."""

    text: str
    spans: list[tuple[int, int]]


class Encoded(NamedTuple):
    """ids: int32 [tokens]. labelled: uint8 [tokens], 1 where a token is to be predicted."""

    ids: np.ndarray
    labelled: np.ndarray


def template_address(tokenizer: Tokenizer) -> str:
    """Of the template that renders, for content addresses."""
    try:
        template = tokenizer.backend.get_chat_template()
    except ValueError as error:  # several by name, and none of them the default
        raise DataError(f"the tokenizer's chat template: {str(error).strip().splitlines()[0]}") from None
    return hashlib.sha256(str(template).encode()).hexdigest()


def rendered(messages: Sequence[Message], tokenizer: Tokenizer, place: str, everything: bool) -> Rendered:
    """A conversation as text, by the template. With `everything` all of it carries labels.

    What the template puts before an answer is what it gives when an answer is asked for there (add_generation_prompt).
    Raises DataError, naming the `place`, where the template fails or renders another beginning then: what is trained
    would not be what the model is given when it answers.
    """

    def render(many: int, ask: bool) -> str:
        try:
            text = tokenizer.backend.apply_chat_template(
                list(messages[:many]), tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # a template is a program
            roles = ", ".join(one["role"] for one in messages)
            what = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{place}: the tokenizer's chat template does not take the roles {roles}: {what}"
            ) from error
        return str(text)

    whole = render(len(messages), False)
    if everything:
        return Rendered(whole, [(0, len(whole))])
    if messages[0]["role"] == "assistant":
        raise DataError(f"{place}: begins with an answer, and there is nothing that it answers: leave that message out")
    spans = []
    for number, one in enumerate(messages):
        if one["role"] != "assistant":
            continue
        before, after = render(number, True), render(number + 1, False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"{place}: the tokenizer's chat template renders what is before message {number + 1} differently when "
                "more follows: give conversations with one answer, or a tokenizer with another template"
            )
        spans.append((len(before), len(before) + _with_end(after[len(before) :], tokenizer)))
    if not spans:
        raise DataError(f"{place}: holds no answer of an assistant: there is nothing to learn from")
    return Rendered(whole, spans)


def _with_end(answer: str, tokenizer: Tokenizer) -> int:
    """The length of a rendered answer up to its end-of-turn token: white space after that is none of it."""
    trimmed = answer.rstrip()
    ends = any(trimmed.endswith(token) for token in tokenizer.special_tokens)
    return len(trimmed) if ends else len(answer)


def _end(text: str, first: int, last: int) -> int:
    """Where the text of a token ends: an added token can swallow white space behind it (rstrip), which is not its."""
    own = text[first:last].rstrip()
    return first + len(own) if own else last


def encoded(examples: Sequence[Rendered], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """The ids of each text, and those of the tokens whose text ends in a span carry a label."""
    if tokenizer.backend.is_fast and not tokenizer.is_bytes:
        texts = [one.text for one in examples]
        encodings = tokenizer.backend.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        for one, encoding in zip(examples, encodings, strict=True):
            ends = np.array([_end(one.text, first, last) for first, last in encoding.offsets], np.int64)
            labelled = np.zeros(len(ends), np.uint8)
            for first, last in one.spans:
                labelled[(first < ends) & (ends <= last)] = 1
            yield Encoded(np.asarray(encoding.ids, np.int32), labelled)
        return
    for one in examples:  # it does not say where its tokens are: piece by piece
        borders = [0, *(border for span in one.spans for border in span), len(one.text)]
        pieces = [one.text[first:last] for first, last in zip(borders[:-1], borders[1:], strict=True)]
        ids = tokenizer.encode_many(pieces)
        marks = [np.full(len(piece), number % 2, np.uint8) for number, piece in enumerate(ids)]
        yield Encoded(np.concatenate(ids), np.concatenate(marks))
