"""Conversations and completions: which tokens carry a label, what a window holds, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_chat import CHATML, FORMS, KINDS, SAID, conversation, save_tokenizer, taught

from lptransformer.data.prepare import Prepared, prepare_all
from lptransformer.data.token_set import TokenSet
from lptransformer.data.train_stream import TrainStream
from lptransformer.data.windows import WindowOptions
from lptransformer.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("tokenizers")
    return {kind: save_tokenizer(place / kind, kind) for kind in KINDS}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(folder: Path, name: Path | str, file: str, length: int = 200, valid: Any = None, **keys: Any) -> Prepared:
    return prepare_all(file, valid, str(name), 300, length, folder / "cache", False, **keys)


def made(*arguments: Any, **keys: Any) -> TokenSet:
    return prepared(*arguments, **keys).train[0].tokens


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_on_every_answer_and_the_token_that_ends_it(
    tmp_path: Path, folders: dict[str, Path], kind: str
) -> None:
    messages = conversation(system=None if kind == "mistral" else "Be brief.")
    file = write(tmp_path / "a.jsonl", {"messages": messages})
    done = prepared(tmp_path, folders[kind], file)
    ours, token_set = done.tokenizer, done.train[0].tokens
    (batch,) = token_set.batches(1)
    end = KINDS[kind][2]
    space = " " if kind == "mistral" else ""
    assert taught(batch, 0, ours) == [f"{space}{answer}{end}" for answer in SAID]
    expected = ours.backend.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert token_set.row(0).tolist() == expected  # the library's own ids, in one piece
    # What stands before the first label is what a model is given that is asked for that answer.
    first = int((batch.labels[0] >= 0).nonzero()[0])
    asked = ours.backend.apply_chat_template(
        messages[: messages.index({"role": "assistant", "content": SAID[0]})],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert batch.input_ids[0, : first + 1].tolist() == asked
    whole = made(tmp_path, folders[kind], file, loss_on="all")
    (every,) = whole.batches(1)
    assert every.label_tokens == len(expected) - 1 and token_set.folder != whole.folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_is_the_same(tmp_path: Path, folders: dict[str, Path], form: str) -> None:
    file = write(tmp_path / "a.jsonl", FORMS[form])
    wanted = made(tmp_path, folders["llama"], write(tmp_path / "b.jsonl", FORMS["messages"]))
    token_set = made(tmp_path, folders["llama"], file)
    assert token_set.row(0).tolist() == wanted.row(0).tolist()
    assert token_set.window(0).labelled.tolist() == wanted.window(0).labelled.tolist()  # type: ignore[union-attr]
    named = {
        {"messages": "talk", "completion": "a", "prompt": "q"}.get(key, key): value
        for key, value in FORMS[form].items()
    }
    if form in ("messages", "prompt"):
        fields = {"messages": "talk"} if form == "messages" else {"prompt": "q", "completion": "a"}
        other = write(tmp_path / "c.jsonl", {**named, "text": "something else"})
        assert made(tmp_path, folders["llama"], other, fields=fields).row(0).tolist() == wanted.row(0).tolist()


def test_an_end_that_takes_in_the_white_space_behind_it_carries_a_label(tmp_path: Path) -> None:
    """As some tokenizers declare theirs: a model that never learns its end goes on for ever."""
    folder = save_tokenizer(tmp_path / "strips", "chatml")
    content = json.loads((folder / "tokenizer.json").read_text())
    next(one for one in content["added_tokens"] if one["content"] == "<|im_end|>")["rstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    done = prepared(tmp_path, folder, write(tmp_path / "a.jsonl", {"messages": conversation()}))
    assert taught(next(done.train[0].tokens.batches(1)), 0, done.tokenizer) == [f"{one}<|im_end|>" for one in SAID]


def test_an_instruction_may_have_no_input(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [{"instruction": "A"}, {"instruction": "B", "input": "b"}, {"instruction": "C", "input": None}]
    rows = [{**row, "output": "x"} for row in rows]
    plain = [{"prompt": prompt, "completion": "x"} for prompt in ("A", "B\n\nb", "C")]
    for some in (rows, rows[1:], rows[::-1][:2]):
        same = [one for row in some for one in plain if one["prompt"][0] == row["instruction"]]
        found = [made(tmp_path, folders["llama"], write(tmp_path / "a.jsonl", *one)).chunks[0] for one in (some, same)]
        assert found[0].tolist() == found[1].tolist()


def test_completions_without_a_template_end_with_the_end_of_text(tmp_path: Path, folders: dict[str, Path]) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "1 =", "completion": " 1"})
    done = prepared(tmp_path, folders["llama"], file, format="completion")
    (batch,) = done.train[0].tokens.batches(1)
    assert taught(batch, 0, done.tokenizer) == [" 4<|end|>", " 1<|end|>"]
    of_bytes = prepared(tmp_path, "bytes", file)  # no template: completions by themselves
    (batch,) = of_bytes.train[0].tokens.batches(1)
    assert taught(batch, 0, of_bytes.tokenizer) == [" 4</s>", " 1</s>"]
    assert batch.position_ids is not None and batch.position_ids[0].tolist() == [*range(10), *range(6), *range(184)]


def numbered(words: int) -> dict[str, str]:
    return {"prompt": "q" * words, "completion": "a" * 3}


def test_what_fits_a_window_is_never_cut(tmp_path: Path) -> None:
    """Tokens (bytes): 4 + an end for each prompt of n are n + 4."""
    file = write(tmp_path / "a.jsonl", *(numbered(words) for words in (4, 8, 12, 2, 1)))
    token_set = made(tmp_path, "bytes", file, 20)
    # next fit: 8 + 12 | 16 | 6 + 5
    assert [len(token_set.row(i)) for i in range(len(token_set))] == [20, 16, 11]
    windows = [token_set.window(i) for i in range(3)]
    assert [w.starts.tolist() for w in windows] == [[0, 8], [0], [0, 6]]  # type: ignore[union-attr]
    (batch,) = token_set.batches(3)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [
        [*range(8), *range(12)],
        [*range(16), *range(4)],
        [*range(6), *range(5), *range(9)],
    ]
    assert batch.input_ids[1, 16:].tolist() == [0] * 4 and (batch.labels[1, 15:] == -100).all()
    assert (batch.labels >= 0).sum(1).tolist() == [8, 4, 8] == token_set.label_counts(range(3)).tolist()
    joined = made(tmp_path, "bytes", file, 20, isolate_documents=False)
    assert next(joined.batches(3)).position_ids is None
    assert token_set.manifest["isolate_documents"] and not joined.manifest["isolate_documents"]


@pytest.mark.parametrize(
    ("long_rows", "lengths", "says"),
    [
        (
            "truncate",
            [5, 12],
            "train: 2 of 3 rows are longer than the window of 12 tokens: truncated (data.long_rows); 1 ",
        ),
        ("split", [5, 12, 9], "train: 2 of 3 rows are longer than the window of 12 tokens: split (data.long_rows); 2 "),
    ],
)
def test_longer_rows_are_truncated_or_split_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], long_rows: str, lengths: list[int], says: str
) -> None:
    rows = [{"prompt": "q", "completion": "aaa"}, {"prompt": "qqq", "completion": "b" * 12}, numbered(25)]
    file = write(tmp_path / "a.jsonl", *rows)
    done = prepare_all(file, None, "bytes", 300, 12, tmp_path / "cache", True, long_rows=long_rows)
    token_set = done.train[0].tokens
    assert [len(token_set.row(i)) for i in range(len(token_set))] == lengths
    assert capsys.readouterr().out.startswith(says)
    kept = b"".join(bytes(byte - 3 for byte in token_set.row(i) if byte > 3) for i in range(len(token_set)))
    ends = sum(token_set.row(i).tolist().count(1) for i in range(len(token_set)))
    assert token_set.manifest["tokens"] == len(kept) + ends
    assert token_set.manifest["bytes"] == pytest.approx(len(kept), abs=4 * len("</s>"))  # of what is left out, its text
    # The first token of a piece is not predicted: nothing is before it.
    assert token_set.label_counts([0, 1]).tolist() == [4, 9]


def test_label_counts_are_those_of_the_batches(tmp_path: Path) -> None:
    chat = write(tmp_path / "a.jsonl", *(numbered(words) for words in (4, 8, 2, 1, 3)))
    (tmp_path / "b.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 4)
    sources = {"chat": chat, "text": str(tmp_path / "b.txt")}
    done = prepared(tmp_path, "bytes", sources, 16)  # type: ignore[arg-type]
    for source in done.train:
        (batch,) = source.tokens.batches(len(source.tokens))
        counts = source.tokens.label_counts(range(len(source.tokens)))
        assert counts.tolist() == (batch.labels >= 0).sum(1).tolist()
    stream = TrainStream([one.tokens for one in done.train], None, seed=0, micro_batch_size=3)
    for index in range(6):
        batch = stream.batch(index)
        assert stream.label_counts(index) == (batch.labels >= 0).sum(1).tolist()
        assert batch.position_ids is not None or not any(counts < 15 for counts in stream.label_counts(index))


def test_isolated_text_has_positions_and_no_label_across(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *({"text": text} for text in ("abcde", "fg", "hijklm")))
    plain, isolated = made(tmp_path, "bytes", file, 8), made(tmp_path, "bytes", file, 8, isolate_documents=True)
    assert np.concatenate(plain.chunks).tolist() == np.concatenate(isolated.chunks).tolist()
    for one, other in ((plain, True), (isolated, False)):
        assert made(tmp_path, "bytes", str(one.folder), 8).folder == one.folder
        with pytest.raises(DataError, match=r"documents kept apart, but data\.isolate_documents asks for the other"):
            made(tmp_path, "bytes", str(one.folder), 8, isolate_documents=other)
    (batch,) = isolated.batches(2)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 0, 1, 2, 3, 4, 5, 0]]
    assert (batch.labels >= 0).tolist() == [[True] * 5 + [False, True, False], [False] + [True] * 5 + [False] * 2]
    assert plain.manifest["format"] == 1 and isolated.manifest["format"] == 2


def test_the_begin_of_text_is_as_the_tokenizer_has_it(tmp_path: Path, folders: dict[str, Path]) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    backend: Any = AutoTokenizer.from_pretrained(folders["llama"])
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.bos_token_id)]
    )
    backend.save_pretrained(tmp_path / "begins")
    text = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    chat = write(tmp_path / "b.jsonl", FORMS["messages"])
    begin = backend.bos_token_id

    def begins(name: Path | str, file: str, bos: str) -> int:
        return (
            np.concatenate(made(tmp_path, name, file, 4 if file == text else 90, bos=bos).chunks).tolist().count(begin)
        )

    assert [begins(tmp_path / "begins", text, bos) for bos in ("auto", "always", "never")] == [2, 2, 0]
    assert [begins(folders["llama"], text, bos) for bos in ("auto", "always", "never")] == [0, 2, 0]
    assert [begins(tmp_path / "begins", chat, bos) for bos in ("auto", "always", "never")] == [1, 1, 0]
    backend.bos_token = backend.eos_token
    backend.save_pretrained(tmp_path / "another")
    sets = [made(tmp_path, name, text, 4, bos="always").folder for name in (folders["llama"], tmp_path / "another")]
    assert sets[0] != sets[1], "another token stands there"
    with pytest.raises(DataError, match=r"prepared with begin-of-text tokens, but data\.bos asks for the other"):
        made(tmp_path, folders["llama"], str(sets[0]), 4, bos="never")
    with pytest.raises(ConfigError, match="data.bos is always, and the tokenizer has no token for the begin of a text"):
        made(tmp_path, "bytes", text, 4, bos="always")


def test_documents_need_an_end_between_them(tmp_path: Path) -> None:
    endless = save_tokenizer(tmp_path / "endless", "chatml", eos_token=None)
    file = write(tmp_path / "a.jsonl", {"text": "one document"}, {"text": "another one"})
    with pytest.raises(DataError, match="need an end-of-text token between them, and the tokenizer has none: name one"):
        made(tmp_path, endless, file, 4)
    assert not list((tmp_path / "cache").glob("train-*"))
    assert len(made(tmp_path, endless, write(tmp_path / "b.jsonl", {"text": "one document alone"}), 4)) > 1


USER, BOT = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
FORGETS = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '...')")


@pytest.mark.parametrize(
    ("row", "kind", "says"),
    [
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "chatml", "message 2 is an empty answer"),
        ({"messages": [USER, {"role": "assistant"}]}, "chatml", "message 2 is .*must have a role and a content, both"),
        ({"messages": [USER, "an answer"]}, "chatml", 'message 2 is "an answer": it must have a role and a content'),
        ({"messages": []}, "chatml", r"'messages' is \[\]: it must be a list of messages"),
        ({"message": [USER, BOT]}, "chatml", "'messages' is null: it must be a list of messages"),
        ({"messages": [USER]}, "chatml", "holds no answer of an assistant"),
        ({"messages": [BOT, USER, BOT]}, "chatml", "begins with an answer, and there is nothing that it answers"),
        (
            {"messages": [{"from": ["gpt"], "value": "x"}]},
            "chatml",
            "message 1 is .*must have a role and a content",
        ),
        ({"messages": [USER, USER, BOT]}, "mistral", "does not take the roles user, user, assistant: roles must alter"),
        ({"messages": [USER, BOT, USER, BOT]}, "forgets", "what is before message 2 differently when more follows"),
    ],
)
def test_a_broken_conversation_is_named(
    tmp_path: Path, folders: dict[str, Path], row: dict[str, Any], kind: str, says: str
) -> None:
    name = folders.get(kind) or save_tokenizer(tmp_path / "forgets", "chatml", chat_template=FORGETS)
    file = write(tmp_path / "a.jsonl", {"messages": [USER, BOT]}, row)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: ?.*({says})") as caught:
        made(tmp_path, name, file)
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").glob("train-*"))


@pytest.mark.parametrize(
    ("row", "keys", "says"),
    [
        ({"question": "a"}, {}, "has the fields 'question', not what data.format: auto needs: say in data.fields"),
        ({"text": "a"}, {"format": "chat"}, "has the fields 'text', not what data.format: chat needs"),
        ({"text": "a"}, {"fields": {"text": "body"}}, "has the fields 'text', not 'body'"),
        ({"prompt": "a", "completion": ""}, {}, "line 1: 'completion' is empty: there is no answer to learn from"),
        ({"prompt": "a", "completion": 3}, {}, "line 1: 'completion' is 3: it must be a string"),
        (
            {"messages": [USER, BOT]},
            {},
            "conversations need a tokenizer with a chat template, and data.tokenizer has none",
        ),
        ({"prompt": "a" * 300, "completion": "b"}, {}, "no example has an answer within a window of data.sequence_len"),
    ],
)
def test_a_data_set_without_what_is_asked_for_is_refused(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        made(tmp_path, "bytes", write(tmp_path / "a.jsonl", row), **keys)
    assert not list((tmp_path / "cache").glob("train-*"))


def test_text_and_examples_are_two_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    write(tmp_path / "b.jsonl", numbered(3))
    with pytest.raises(DataError, match=r"a\.txt is text and .*b\.jsonl holds examples with answers: make them two"):
        made(tmp_path, "bytes", f"{tmp_path}/*.*")
    with pytest.raises(DataError, match=r"a\.txt: is read as plain text, and data\.format is chat"):
        made(tmp_path, "bytes", f"{tmp_path}/a.txt", format="chat")
    assert WindowOptions().isolates(text=False) and not WindowOptions().isolates(text=True)
