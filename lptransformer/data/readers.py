"""From the globs of a configuration to files, and from their rows to documents: texts, and examples with answers.

An example is a conversation, or a prompt with its completion. `data/rows` reads the files.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as remember
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lptransformer.data import rows as reading
from lptransformer.data.rows import HUB, Advance, Row
from lptransformer.errors import ConfigError, DataError

MANIFEST = "manifest.json"  # what makes a folder a prepared token set
FORMATS = ("auto", "text", "chat", "completion")
FIELDS = ("text", "messages", "prompt", "completion")
ALPACA = ("instruction", "input", "output")  # a row may have no input
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # ShareGPT's
_SPACE = re.compile(r"\s")

Format = Literal["text", "chat", "completion"]
Message = dict[str, Any]  # at least "role" and "content", as chat templates take them


@dataclass(frozen=True)
class Source:
    """One named part of data.train or data.valid: its files in order, or the folder of a prepared token set.

    `format` is one of FORMATS; `fields` are the columns by what they hold (FIELDS), where the usual names are not
    meant. Of a source with `held_out` that share of the documents is one `part`, "valid", and the rest the other one,
    "train".
    """

    name: str
    files: tuple[Path, ...] = ()
    prepared: Path | None = None
    weight: float | None = None
    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    held_out: float | None = None
    part: Literal["train", "valid"] | None = None


class Layout(NamedTuple):
    """What the rows of a file are, and the columns that say it: one of text, one of messages, those of prompt and
    completion, or "instruction", "input" and "output"."""

    format: Format
    columns: tuple[str, ...]


# ---- globs -> files


def parse_all(
    train: Any, valid: Any, format: str = "auto", fields: Mapping[str, str] | None = None
) -> tuple[list[Source], list[Source]]:
    """The sources of training and of validation; `valid` may be a number, the share of every training source that is
    held out. A validation set of that kind has the name of its source ("valid" where that has none)."""
    share = valid if isinstance(valid, int | float) else None
    training = parse_sources(train, "train", format=format, fields=fields, held_out=share)
    validation = parse_sources(None if share is not None else valid, "valid", format=format, fields=fields)
    for source in training:
        if source.held_out is None:
            continue
        if source.prepared is not None:
            raise ConfigError(
                f"data.train: {source.prepared} is a prepared set, of which nothing can be held out: give its text, or "
                "data.valid a text of its own"
            )
        name = "valid" if source.name == "train" else source.name
        if name in [one.name for one in validation]:
            raise ConfigError(f"data.valid.{name}: data.train holds out a set of that name already")
        validation.append(replace(source, name=name, part="valid", weight=None))
    return training, validation


def parse_sources(
    spec: Any,
    key: str,
    where: str | None = None,
    *,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    held_out: float | None = None,
) -> list[Source]:
    """The sources that `data.train` or `data.valid` (`key` is "train" or "valid") names.

    spec: a glob, a list of globs, or a mapping of names to globs or to {files: globs, weight: number, format, fields,
    valid: share}; None or an empty mapping names none. What has no name is called `key`. Instead of a glob: the folder
    of one prepared set, a folder that `save_to_disk` of `datasets` wrote, or hub:OWNER/NAME.
    where: what messages call the place that `spec` comes from, data.<key> unless it is given.
    format, fields, held_out: of sources that do not say it themselves.
    """
    named = spec if isinstance(spec, Mapping) else {} if spec is None else {key: spec}
    origin = where or f"data.{key}"
    sources = []
    for name, value in named.items():
        where = f"{origin}.{name}" if isinstance(spec, Mapping) else origin
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", str(name)):
            raise ConfigError(f"{where}: a name is made of letters, digits, '.', '_' and '-'")
        given = value if isinstance(value, Mapping) else {"files": value}
        if "files" not in given or set(given) - {"files", "weight", "format", "fields", "valid"}:
            raise ConfigError(
                f"{where}: has the keys {sorted(given)}; right are: files, and weight, format, fields, valid if wanted"
            )
        globs, weight = given["files"], given.get("weight")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (number and 0 < weight < math.inf):
            raise ConfigError(f"{where}.weight: {weight!r} is not a number above 0")
        globs = [globs] if isinstance(globs, str | Path) else globs
        if not isinstance(globs, Sequence) or not globs or not all(isinstance(one, str | Path) for one in globs):
            raise ConfigError(f"{where}: {globs!r} is neither a glob nor a list of globs")
        found = _find(str(name), [str(one) for one in globs], key, where)
        share = given["valid"] if given.get("valid") is not None else held_out
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"data.valid = {share!r} is not a share between 0 and 1")
        sources.append(
            replace(
                found,
                weight=weight,
                format=given.get("format") or format,
                fields=given.get("fields") or fields or {},
                held_out=share,
                part=None if share is None else "train",
            )
        )
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError(f"{origin}: some sources have a weight and some have none; give one to all or to none")
    return sources


def _find(name: str, globs: list[str], key: str, where: str) -> Source:
    """Each glob's files in alphabetical order; a file that several globs match is taken once."""
    if len(globs) == 1 and (Path(globs[0]) / MANIFEST).is_file():
        return Source(name, prepared=Path(globs[0]))
    files: dict[Path, None] = {}
    for pattern in globs:
        if pattern.startswith(HUB):
            files.update(dict.fromkeys(reading.hub_files(pattern, "train" if key == "train" else None, where)))
            continue
        if Path(pattern).is_dir():
            if saved := reading.saved_files(Path(pattern), where):
                files.update(dict.fromkeys(saved))
                continue
            raise DataError(
                f"{where}: {pattern} is a folder without a complete token set; for the files in it give {pattern}/*.txt"
            )
        found = [pattern] if Path(pattern).is_file() else sorted(glob(pattern, recursive=True))
        paths = [Path(one) for one in found if Path(one).is_file()]
        if not paths:
            raise DataError(f"{where}: no file matches {pattern}")
        files.update(dict.fromkeys(paths))
    for path in files:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
    return Source(name, tuple(files))


# ---- what the rows of a file are


def layout(path: Path, source: Source, has_template: bool) -> Layout:
    """What a file of a source holds. Prompt and completion are a conversation where the tokenizer `has_template`.

    Raises DataError where the columns, or the template, for what is asked are missing.
    """
    if reading.kind(path) == "text":
        if source.format in ("chat", "completion"):
            raise DataError(f"{path}: is read as plain text, and data.format is {source.format}: that needs rows")
        return Layout("text", ())
    names = reading.column_names(path)
    found = _columns(source, names)
    if found is None:
        wanted = " and ".join(map(repr, source.fields.values())) or f"what data.format: {source.format} needs"
        raise DataError(
            f"{path}: has the fields {', '.join(map(repr, names))}, not {wanted}: say in data.fields which hold text, "
            "messages, or prompt and completion"
        )
    kind, columns = found
    if kind == "text":
        return Layout("text", columns)
    if kind == "pair" and (source.format == "completion" or (source.format == "auto" and not has_template)):
        return Layout("completion", columns)
    if not has_template:
        raise DataError(
            f"{path}: conversations need a tokenizer with a chat template, and data.tokenizer has none: give that of a "
            "chat model, or prompt and completion with data.format: completion"
        )
    return Layout("chat", columns)


def _columns(source: Source, names: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """The format, "pair" for prompt and completion, and the columns; None where there is nothing that fits."""
    given = dict(source.fields)
    choices: list[tuple[str, tuple[str, ...]]] = [
        ("text", (given.get("text", "text"),)),
        *(
            ("chat", (name,))
            for name in ([given["messages"]] if "messages" in given else ["messages", "conversations"])
        ),
        ("pair", (given.get("prompt", "prompt"), given.get("completion", "completion"))),
        ("pair", ALPACA),
    ]
    if given:  # those that are said
        choices = [choice for choice in choices if set(choice[1]) == set(given.values())]
    fitting = {"auto": ("text", "chat", "pair"), "text": ("text",), "chat": ("chat", "pair"), "completion": ("pair",)}
    there = {*names, "input"} if "instruction" in names else set(names)
    return next((one for one in choices if one[0] in fitting[source.format] and set(one[1]) <= there), None)


def is_text(source: Source, has_template: bool) -> bool:
    """Whether a source is text alone, and not examples alone. Raises DataError for one that is both."""
    formats = {path: layout(path, source, has_template).format for path in source.files}
    texts = [path for path, format in formats.items() if format == "text"]
    if 0 < len(texts) < len(formats):
        other = next(path for path in formats if path not in texts)
        raise DataError(f"{texts[0]} is text and {other} holds examples with answers: make them two sources")
    return bool(texts)


# ---- files -> documents


def documents(source: Source, advance: Advance = lambda read: None) -> Iterator[Iterable[str]]:
    """The documents of a source of text, each as consecutive blocks, in order; of a source with a part those of it.

    A text file is one document, and so is the text of a row; rows with an empty one are skipped. Raises DataError,
    naming the file.
    """
    length = None if source.part is None else _length_of_the_only(source)
    for number, blocks in enumerate(_texts(source, advance)):
        if length is not None:
            assert source.held_out is not None
            yield _side(blocks, length - max(1, round(source.held_out * length)), source.part == "valid")
        elif _belongs(number, source):
            yield blocks
        else:
            deque(blocks, maxlen=0)  # read, so that a file without text is found


def _texts(source: Source, advance: Advance) -> Iterator[Iterable[str]]:
    for path in source.files:
        found = False

        def noted(blocks: Iterable[str]) -> Iterator[str]:
            nonlocal found
            for block in blocks:
                found = found or not (block == "" or block.isspace())
                yield block

        if reading.kind(path) == "text":
            yield noted(reading.text_blocks(path, advance))
        else:
            (column,) = layout(path, source, has_template=True).columns
            for row in reading.rows(path, advance, [column]):
                if text := _string(row, column):
                    yield noted([text])
        if not found:
            raise DataError(f"{path}: holds no text")


def examples(source: Source, has_template: bool, advance: Advance) -> Iterator[tuple[str, list[Message] | str, str]]:
    """The examples of a source that is no text, of its part: the place of the row, messages or the prompt, and the
    completion ("" for messages)."""

    def every() -> Iterator[tuple[str, list[Message] | str, str]]:
        for path in source.files:
            format, columns = layout(path, source, has_template)
            found = False
            for row in reading.rows(path, advance, columns):
                found = True
                if len(columns) == 1:
                    yield row.place, _messages(row, columns[0]), ""
                    continue
                if columns == ALPACA and row.values.get("input") is None:
                    row.values["input"] = ""
                *prompts, completion = (_string(row, column) for column in columns)
                prompt = "\n\n".join(text for text in prompts if text)
                if not completion.strip():
                    raise DataError(f"{row.place}: {columns[-1]!r} is empty: there is no answer to learn from")
                if format == "completion":
                    yield row.place, prompt, completion
                else:
                    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                    yield row.place, messages, ""
            if not found:
                raise DataError(f"{path}: holds no row")

    if source.part is not None and len(list(islice(every(), 2))) == 1:
        raise DataError(f"{source.files[0]}: holds one row, of which data.valid = {source.held_out} cannot be held out")
    yield from (one for number, one in enumerate(every()) if _belongs(number, source))


def _string(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        is_what = "is missing" if column not in row.values else f"is {reading.short(value)}"
        raise DataError(f"{row.place}: {column!r} {is_what}: it must be a string")
    return value


def _messages(row: Row, column: str) -> list[Message]:
    """The messages of a row, also in ShareGPT's form ("from" and "value")."""
    value = row.values.get(column)
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.place}: {column!r} is {reading.short(value)}: it must be a list of messages")
    messages = []
    for number, one in enumerate(value, 1):
        place = f"{row.place}: message {number}"
        if not isinstance(one, dict):
            raise DataError(f"{place} is {reading.short(one)}: it must have a role and a content")
        if isinstance(one.get("from"), str) and "value" in one:
            one = {"role": ROLES.get(one["from"], one["from"]), "content": one["value"]}
        role, content = one.get("role"), one.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{place} is {reading.short(one)}: it must have a role and a content, both strings")
        if role == "assistant" and not content.strip():
            raise DataError(f"{place} is an empty answer")
        messages.append({key: value for key, value in one.items() if value is not None})
    return messages


def _length_of_the_only(source: Source) -> int | None:
    """The characters of a source's document; None where there are several."""
    if len(source.files) > 1:
        return None
    lengths = [sum(map(len, blocks)) for blocks in islice(_texts(source, lambda read: None), 2)]
    return lengths[0] if len(lengths) == 1 else None


def _side(blocks: Iterable[str], cut: int, after: bool) -> Iterator[str]:
    """A document up to the first white space from the character `cut` on, or from there on. Blocks begin with it."""
    passed, before = False, 0
    for block in blocks:
        place = len(block)
        if passed:
            place = 0
        elif before + len(block) > cut and (space := _SPACE.search(block, max(cut - before, 0))):
            place, passed = space.start(), True
        before += len(block)
        if part := block[place:] if after else block[:place]:
            yield part


def _belongs(number: int, source: Source) -> bool:
    """Whether a document is of the source's part: the first one is held out, and from then on the share of all."""
    if source.held_out is None:
        return True
    held = math.ceil((number + 1) * source.held_out) > math.ceil(number * source.held_out)
    return held == (source.part == "valid")


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its name, its size in bytes, its sha256."""
    status = path.stat()
    return {"path": path.name, "bytes": status.st_size, "sha256": _sha256(path, status.st_size, status.st_mtime_ns)}


@remember
def _sha256(path: Path, _size: int, _changed: int) -> str:
    """The size and the time of the last change are part of the key under which the hash is remembered."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
