"""Which text a model is evaluated on, and in which windows: what is given, or the validation sets of its run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lptransformer.data.prepare import check_ids, prepare
from lptransformer.data.readers import MANIFEST, Source, is_text, parse_all, parse_sources
from lptransformer.data.rows import column_names, kind
from lptransformer.data.token_set import TokenSet
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.data.windows import WindowOptions
from lptransformer.errors import DataError, RunError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.protocols import PROTOCOLS, Options, Scoring, of_token_set
from lptransformer.evaluation.trained_model import Target
from lptransformer.models import family_check
from lptransformer.processes import launched_rank
from lptransformer.run_folder import layout

Bos = Literal["auto", "always", "never"]


def options_of(
    target: Target, tokenizer: Tokenizer, protocol: str, window: int | None, stride: int | None, bos: Bos
) -> Options:
    """Raises UserError for what has no meaning with this protocol, or does not fit the model."""
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol {protocol}: known are {', '.join(PROTOCOLS)}")
    row = PROTOCOLS[protocol]
    if stride is not None and not row.strides:
        raise UserError(f"--stride {stride} has no meaning with --protocol {protocol}: its windows do not overlap")
    if bos != "auto" and not row.bos:
        raise UserError(f"--bos {bos} has no meaning with --protocol {protocol}: it says itself what comes first")
    window = window or target.window
    if target.longest is not None and window > target.longest:
        raise UserError(f"--window {window}: the model takes {target.longest} tokens at most")
    stride = stride or (max(1, window // 2) if row.strides else window)
    if row.strides and stride >= window:
        raise UserError(f"--stride {stride}: with a window of {window} some tokens would have none before them")
    backend = tokenizer.backend
    if bos == "auto":
        bos = "auto" if target.update is None else layout.read_config(target.folder).data.bos
    begins = row.bos and (bos == "always" or (bos == "auto" and tokenizer.adds_begin))
    if begins and backend.bos_token_id is None:
        raise UserError("--bos always: the tokenizer has no token for the begin of a text")
    return Options(window, stride, begins)


def tokenizer_folder(target: Target) -> Path:
    """Raises RunError where a run has lost its tokenizer."""
    if target.update is None:
        return target.folder
    if not (target.folder / layout.TOKENIZER).is_dir():
        raise RunError(f"{target.folder} has no folder {layout.TOKENIZER}: {layout.WITHOUT_TOKENIZER}")
    return target.folder / layout.TOKENIZER


def scorings(
    targets: Sequence[Target],
    tokenizers: Sequence[Tokenizer],
    data: Sequence[str] | None,
    protocol: str,
    options: Sequence[Options],
    scratch: Path,
) -> list[dict[str, Scoring]]:
    """What is scored of the same texts for each of these models, by the name of the set."""
    first = targets[0]
    as_trained = options_of(first, tokenizers[0], "blocks", None, None, "auto")
    if not data and first.update is not None and protocol == "blocks" and options[0] == as_trained:
        valid = valid_sets(first.folder, tokenizers[0], scratch)
        prefix = tokenizers[0].backend.bos_token if options[0].bos else None
        found = [{name: of_token_set(one, prefix) for name, one in valid.items()}]
    else:
        sources = list(_sources(first, data))
        found = [
            _score(sources, target, tokenizer, protocol, own, scratch)
            for target, tokenizer, own in zip(targets, tokenizers, options, strict=True)
        ]
    for sets in found:
        for name, one in sets.items():
            if one.tokens == 0:
                raise DataError(f"{name}: {one.counts.tokens} tokens are too few: nothing follows the first one")
    return found


def _score(
    sources: Sequence[tuple[str, Source]],
    target: Target,
    tokenizer: Tokenizer,
    protocol: str,
    options: Options,
    scratch: Path,
) -> dict[str, Scoring]:
    if options.pieces and not tokenizer.knows_places:
        what = f"{type(tokenizer.backend).__name__} does not say where in a text its tokens are: that takes a"
        raise DataError(f"--compare: the tokenizer of {target.folder}, {what} tokenizer.json")
    sets: dict[str, Scoring] = {}
    embedded, how = trained_model.vocabulary(target), trained_model.windowing(target)
    for name, source in sources:
        text = source.prepared is None and is_text(source, tokenizer.has_template)
        apart = text and protocol == "blocks" and how.isolates(text)
        what = f"{name} holds examples with answers"
        if source.prepared or apart:
            what = (
                f"{source.prepared} is a prepared set" if source.prepared else f"{name}: its documents are kept apart"
            )
        if (not text or apart) and options.pieces:
            why = "models are compared on the bytes of a text, one stream: give a text with --data FILES"
            raise UserError(f"{what}{', as in training' if apart else ''}: {why}")
        if not text or apart:
            if protocol != "blocks" or (source.prepared and options.bos and not how.begins(tokenizer)):
                raise UserError(f"{what}: that is for --protocol blocks, without --bos")
            token_set = prepare(source, tokenizer, options.window, scratch, launched_rank() == 0, how)
            if token_set.isolated:
                family_check.check(trained_model.config_of(target), apart=True)
            one = of_token_set(token_set, tokenizer.backend.bos_token if options.bos else None)
        else:
            one = PROTOCOLS[protocol].score(source, tokenizer, options)
            if options.pieces and one.pieces is None:
                raise UserError(f"--compare: --protocol {protocol} does not say where in a text its tokens are")
        check_ids(int(one.ids.max(initial=-1)), source, name, tokenizer, embedded)
        names = [name, *(f"{name}-{number}" for number in range(2, 2 + len(sets)))]
        sets[next(name for name in names if name not in sets)] = one
    return sets


def _sources(target: Target, data: Sequence[str] | None) -> Iterator[tuple[str, Source]]:
    """The texts to evaluate on: those given, else the run's validation sets."""
    for one in data or ():
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(one).stem).strip(".-") or "data"
        (source,) = parse_sources(one, name, where="--data")
        if source.prepared is not None:
            name = str(TokenSet.open(source.prepared).manifest.get("name", name))
        elif target.update is not None:
            source = _as_rows_of_run(source, layout.read_config(target.folder).data)
        yield name, source
    if data:
        return
    if target.update is None:
        raise UserError(f"{target.folder} is a model folder, which has no validation text: give one with --data FILES")
    section = layout.read_config(target.folder).data
    if not section.valid_names:
        raise RunError(f"{target.folder} was trained without validation sets (data.valid): give a text with --data")
    for name in section.valid_names:
        yield name, _of_run(section, name)


def _as_rows_of_run(source: Source, section: Any) -> Source:
    """A text that is read as the run reads its own, where it has the columns for that."""
    rows = [path for path in source.files if kind(path) != "text"]
    columns = set(section.fields.values())
    if columns and rows and all(columns <= set(column_names(path)) for path in rows):
        return replace(source, format=section.format, fields=section.fields)
    if section.format == "completion" and not is_text(source, has_template=True):
        return replace(source, format="completion")
    return source


def _of_run(section: Any, name: str) -> Source:
    """The text of one of a run's validation sets, which may be a part of its training text."""
    data = section.model_dump()
    train, valid, how = data["train"], data["valid"], {"format": data["format"], "fields": data["fields"]}
    if isinstance(valid, dict) and name in valid:
        return parse_sources({name: valid[name]}, "valid", **how)[0]
    of = name if name in train else "train"
    return parse_all({of: train[of]}, {} if isinstance(valid, dict) else valid, **how)[1][0]


def valid_sets(run: Path, tokenizer: Tokenizer, scratch: Path) -> dict[str, TokenSet]:
    """The run's validation sets; prepared again from their texts where they are gone."""
    section = layout.read_config(run).data
    folders = layout.read_data(run).get("valid", {})
    if not folders:
        raise RunError(f"{run} was trained without validation sets (data.valid): give a text with --data")
    # A cache that moved together with the texts still has them.
    cache = Path(section.cache) if Path(section.cache).is_dir() else scratch
    sets = {}
    for name, folder in folders.items():
        source = Source(name, prepared=Path(folder))
        if not (Path(folder) / MANIFEST).is_file():
            try:
                source = _of_run(section, name)
            except (UserError, KeyError) as error:
                raise DataError(
                    f"validation set {name} of {run}: it is not in {folder} any more, and its text is not there to "
                    f"prepare it again ({error}): give a text with --data"
                ) from None
        sets[name] = prepare(
            source, tokenizer, section.sequence_length, cache, launched_rank() == 0, WindowOptions.of(section)
        )
        if source.files and sets[name].folder.name != Path(folder).name:  # folders are named after their contents
            raise DataError(
                f"validation set {name} of {run}: it is not in {folder} any more, and its text "
                f"({', '.join(map(str, source.files))}) has changed since: give a text with --data"
            )
    return sets
