"""Small tokenizers with the three usual kinds of chat template, and conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lptransformer.data import tokenizer
from lptransformer.data.token_set import Batch

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# By kind: the template, its special tokens (the first one begins a text, the second one ends it), what ends an answer.
KINDS: dict[str, tuple[str, list[str], str]] = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"], "<|im_end|>"),
    "llama": (
        LLAMA,
        ["<|begin|>", "<|end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, ["<s>", "</s>"], "</s>"),
}
TEXT = "What is the answer to this question? The answer is that there are many answers, and this one is right. " * 3
ASKED, SAID = ("What is it?", "And the other one?"), ("This is the answer.", "That one is right, too.")


def conversation(*, system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in zip(ASKED, SAID, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


# One conversation, in every form that it may have in a row.
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": conversation()[:2]},
    "conversations": {
        "conversations": [{"from": "human", "value": ASKED[0]}, {"from": "gpt", "value": SAID[0]}],
        "id": 3,
    },
    "alpaca": {"instruction": ASKED[0], "input": "", "output": SAID[0]},
    "prompt": {"prompt": ASKED[0], "completion": SAID[0]},
}


def save_tokenizer(folder: Path, kind: str, *, text: str = TEXT, vocab_size: int = 340, **changed: Any) -> Path:
    """A byte-level BPE of a few merges. `changed`: arguments of the library's class, None for what it has not."""
    template, special, _ = KINDS[kind]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text], trainer)
    options = {"bos_token": special[0], "eos_token": special[1], "additional_special_tokens": special[2:]}
    options |= {"chat_template": template, **changed}
    options = {key: value for key, value in options.items() if value is not None}
    PreTrainedTokenizerFast(tokenizer_object=made, **options).save_pretrained(folder)
    return folder


def taught(batch: Batch, row: int, ours: tokenizer.Tokenizer) -> list[str]:
    """The text of every stretch of labels in a row."""
    labels, found = batch.labels[row].tolist(), [[]]
    for label in labels:
        if label >= 0:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [ours.decode(ids) for ids in found if ids]
