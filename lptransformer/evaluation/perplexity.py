"""Perplexity of the exits of a run or of a Hugging Face folder, by a named convention, in one process or several.

Which windows there are is evaluation/protocols.py. Every process computes the negative log-likelihoods of the tokens
of its windows; those of all are put together, added up in float64, and divided once (the formula:
run_folder/metrics.perplexity). So the numbers do not depend on how many processes there are.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from lptransformer import hub
from lptransformer.console import bar, print_table
from lptransformer.data.prepare import check_ids, prepare
from lptransformer.data.readers import MANIFEST, Source, is_text, parse_all, parse_sources
from lptransformer.data.rows import column_names, kind
from lptransformer.data.token_set import TokenSet
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.data.windows import WindowOptions
from lptransformer.errors import DataError, RunError, TrainingError, UserError
from lptransformer.evaluation import paired, protocols, trained_model
from lptransformer.evaluation.protocols import PROTOCOLS, Options, Scoring, of_token_set
from lptransformer.evaluation.trained_model import DTYPES, ByStage, Target, token_nlls
from lptransformer.models import family_check
from lptransformer.processes import (
    host_memory,
    launched_rank,
    launched_size,
    local_processes,
    use_fair_share_of_cores,
)
from lptransformer.run_folder import layout
from lptransformer.run_folder.metrics import TextCounts, perplexity
from lptransformer.store import meet

TIMEOUT_SECONDS = 1800.0  # processes of a launcher wait so long for each other
Bos = Literal["auto", "always", "never"]
WAITING_SHARE = 0.5  # of the host's free memory is what waits where a group of blocks is in memory at a time


class _Job(NamedTuple):
    """A model, the sets that it is evaluated on (as `_keep` wrote them), and whether it is read a group at a time."""

    target: Target
    sets: list[Path]
    by_stage: bool


def evaluate_run(
    model: str | Path,
    data: Sequence[str] | None = None,
    *,
    step: int | None = None,
    exit_block: int | None = None,
    compare: str | Path | None = None,
    protocol: str = "blocks",
    window: int | None = None,
    stride: int | None = None,
    bos: Bos = "auto",
    dtype: str = "fp32",
    batch_size: int = 8,
    processes: int = 1,
    by_stage: ByStage = "auto",
) -> dict[str, Any] | None:
    """Evaluate a run's checkpoint after `step` updates (the newest one by default), or a Hugging Face model, by its
    folder or OWNER/NAME.

    On the run's validation sets, or on `data`: every item is what a source of data.train may be, and a set by itself.
    `protocol` is a row of PROTOCOLS. `window` is by default that of the run, else the model's length, `stride` half of
    it. `bos`: whether every document of `blocks` begins with the tokenizer's token for that (auto: of a model folder as
    its tokenizer does by itself, of a run as it was trained). `compare` is another run or model folder, of any
    tokenizer: its last exit is evaluated on the same text by the same protocol (by default in the smaller of the two
    windows), and every exit compared with it (evaluation/paired.py).
    `batch_size` windows go through all stages at once. The windows are shared by `processes` processes on this machine,
    or by those that a launcher (torchrun) has started. `by_stage`: whether a process holds one group of blocks at a
    time (auto: where the whole model does not fit), with the same bits.

    Returns {"run", "step", "convention", "window", "stride", "prefix", "dtype", "set", "exits"}; `exits` is a list of
    {"stage", "last_block", "head", "nll_per_token", "perplexity", "bits_per_byte", "byte_perplexity",
    "word_perplexity", "tokens", "words", "bytes"} for the first set, with `compare` there is also {"comparison": {
    "base": {"run", "step", "prefix", "exits"}, "pieces", "piece_bytes", "resamples", "seed", "differences": [
    {"last_block", "bits_per_byte", "low", "high"}]}}; {"sets": {name: {"exits", "comparison"}}} has all sets where
    there are several. On other processes of a launcher than the first: None. Raises UserError for what is missing,
    damaged, or does not go together.
    """
    given = (("--batch-size", batch_size), ("--processes", processes), ("--window", window), ("--stride", stride))
    for flag, number in given:
        if number is not None and number < (2 if flag == "--window" else 1):
            raise UserError(f"{flag} {number}: it must be {2 if flag == '--window' else 1} or more")
    if launched_size() > 1 and processes not in (1, launched_size()):
        raise UserError(
            f"--processes {processes}, but a launcher has started {launched_size()} processes: leave it out"
        )
    folder = hub.folder(model, f"MODEL is {model}", weights=True)
    targets = [trained_model.find(folder, step, exit_block, dtype)]
    if compare is not None:
        base = trained_model.find(hub.folder(compare, f"--compare {compare}", weights=True), dtype=dtype)
        targets.append(replace(base, exits=base.exits[-1:]))
        window = window or min(target.window for target in targets)
    with tempfile.TemporaryDirectory(prefix="lptransformer-") as scratch:
        tokenizers = [load_tokenizer(tokenizer_folder(target)) for target in targets]
        options = [
            _options(target, tokenizer, protocol, window, stride, bos)._replace(pieces=compare is not None)
            for target, tokenizer in zip(targets, tokenizers, strict=True)
        ]
        of_models = scorings(targets, tokenizers, data, protocol, options, Path(scratch))
        local = local_processes() if launched_size() > 1 else processes
        jobs = []
        for number, (target, sets, own) in enumerate(zip(targets, of_models, options, strict=True)):
            paths = [_keep(one, Path(scratch) / f"set-{number}-{at}") for at, one in enumerate(sets.values())]
            absolute = replace(target, folder=target.folder.absolute(), window=own.window)
            jobs.append(_Job(absolute, paths, trained_model.goes_by_stage(absolute, by_stage, local)))
        job = partial(_nlls, jobs, batch_size)
        if launched_size() > 1:
            flat = _share_with_launched(job)
        else:
            flat = _share_with_children(job, processes) if processes > 1 else job(0, 1)
    if launched_rank() != 0:
        return None
    found: list[dict[str, np.ndarray]] = []
    for target, sets in zip(targets, of_models, strict=True):
        found.append({})
        for name, one in sets.items():
            here, flat = np.split(flat, [len(target.exits) * one.tokens])
            found[-1][name] = here.reshape(len(target.exits), one.tokens)
    return {"run": str(model), **_results(targets, protocol, options[0], of_models, found)}


# ---- which text


def _options(
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
    as_trained = _options(first, tokenizers[0], "blocks", None, None, "auto")
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


_KEPT = ("ids", "windows", "labelled", "starts")


def _keep(scoring: Scoring, path: Path) -> Path:
    """Write ids and windows, and what says which are scored, where other processes find them."""
    for name in _KEPT:
        if (array := getattr(scoring, name)) is not None:
            np.save(f"{path}-{name}.npy", array)
    return path


def _kept(path: Path) -> Scoring:
    files = {name: Path(f"{path}-{name}.npy") for name in _KEPT}
    arrays = {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in files.items() if file.is_file()}
    return Scoring(counts=TextCounts(0, 0, 0), **arrays)


# ---- the negative log-likelihoods


def _nlls(jobs: Sequence[_Job], batch_size: int, rank: int, size: int) -> np.ndarray:
    """For every model, every set and every exit the negative log-likelihood of every scored token in nats, fp32, one
    behind the other; 0 where another process than `rank` of `size` has the batch: each takes every size-th of a set.
    """
    use_fair_share_of_cores(None if launched_size() > 1 else size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    kept = [[_kept(path) for path in job.sets] for job in jobs]
    total = sum(len(range(rank, one.num_batches(batch_size), size)) for sets in kept for one in sets)
    found = []
    with bar("evaluating", total, shown=rank == 0) as advance:
        for job, sets in zip(jobs, kept, strict=True):
            if job.by_stage:
                blueprint = trained_model.blueprint_of_target(job.target)
                groups = trained_model.groups_on_disk(job.target, blueprint, device)
                together = _waiting(job.target, blueprint.parts.hidden_size, batch_size, size)
            else:
                groups, together = trained_model.load_target(job.target, device).groups, 1
            for one in sets:
                table = np.zeros((len(job.target.exits), one.tokens), np.float32)
                ends = np.cumsum([0, *(one.of_windows)])  # scored tokens before a window
                batches = islice(enumerate(one.batches(batch_size)), rank, None, size)
                while some := list(islice(batches, together)):
                    nlls = token_nlls(groups, [batch for _, batch in some], device).numpy()
                    for number, batch in some:
                        begin = ends[number * batch_size]
                        table[:, begin : begin + batch.label_tokens] = nlls[:, : batch.label_tokens]
                        nlls = nlls[:, batch.label_tokens :]
                        advance(1)
                found.append(table.ravel())
            del groups  # before the next model comes
    return np.concatenate(found)


def _waiting(target: Target, hidden_size: int, batch_size: int, processes: int) -> int:
    """How many batches may wait between two groups of blocks: hidden states, ids and labels."""
    token_bytes = hidden_size * DTYPES[target.dtype].itemsize + 2 * torch.int64.itemsize
    room = WAITING_SHARE * host_memory() / (local_processes() if launched_size() > 1 else processes)
    return max(1, int(room / (batch_size * target.window * token_bytes)))


def _share_with_launched(job: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """With the processes that a launcher has started: an all-reduce over gloo at the end."""
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    met = meet(timeout)
    group: Any = dist.ProcessGroupGloo(dist.PrefixStore("evaluate", met.store), met.rank, met.size, timeout)
    shares = torch.from_numpy(job(met.rank, met.size))
    group.allreduce([shares]).wait()
    return shares.numpy()


def _share_with_children(job: Callable[[int, int], np.ndarray], processes: int) -> np.ndarray:
    """With new processes of this one, which takes a share itself."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes - 1, context, initializer=_end_with_parent) as pool:
            # Children begin with Ctrl-C held back, until they have imported what they need and can end in silence.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                others = [pool.submit(job, rank, processes) for rank in range(1, processes)]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            shares = job(0, processes)
            for other in others:
                shares += other.result()
    except BrokenProcessPool:
        raise TrainingError(
            f"one of the {processes} processes (--processes) died, perhaps for lack of memory: each one holds the "
            "whole model; give fewer, or --by-stage always"
        ) from None
    return shares


def _end_with_parent() -> None:
    """In a child: Ctrl-C ends it without a traceback, and it does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# ---- the results


def _results(
    targets: Sequence[Target],
    protocol: str,
    options: Options,
    of_models: Sequence[dict[str, Scoring]],
    found: Sequence[dict[str, np.ndarray]],
) -> dict[str, Any]:
    """`found` are for every model and set the negative log-likelihoods, fp32 [exits, scored tokens]."""
    target, first = targets[0], next(iter(of_models[0]))
    sets: dict[str, dict[str, Any]] = {}
    for name, scoring in of_models[0].items():
        nlls = found[0][name]
        sets[name] = {"exits": _exits(target, scoring, nlls)}
        if len(targets) > 1:
            sets[name]["comparison"] = _comparison(targets, [s[name] for s in of_models], [f[name] for f in found])
    results: dict[str, Any] = {"step": target.update, "convention": protocol}
    results |= {
        "window": options.window,
        "stride": options.stride,
        "prefix": of_models[0][first].prefix,
        "dtype": target.dtype,
        "set": first,
    }
    results |= sets[first]
    return results | ({"sets": sets} if len(sets) > 1 else {})


def _exits(target: Target, scoring: Scoring, nlls: np.ndarray) -> list[dict[str, Any]]:
    counts = {"words": scoring.counts.words, "bytes": scoring.counts.bytes}
    return [
        {"stage": stage, "last_block": block, "head": head}
        | asdict(perplexity(float(of_exit.sum(dtype=np.float64)), scoring.tokens, scoring.counts))
        | counts
        for (block, head, stage), of_exit in zip(target.exits, nlls, strict=True)
    ]


def _comparison(targets: Sequence[Target], scorings: Sequence[Scoring], found: Sequence[np.ndarray]) -> dict[str, Any]:
    """Every exit of the first model against the only one of the second."""
    base, pieces = targets[1], scorings[0].pieces
    assert pieces is not None
    of_base = paired.piece_nats(scorings[1], found[1][0])
    differences = [
        {"last_block": block} | asdict(paired.difference(paired.piece_nats(scorings[0], nlls), of_base, pieces.bytes))
        for (block, _, _), nlls in zip(targets[0].exits, found[0], strict=True)
    ]
    exits = _exits(base, scorings[1], found[1])
    about = {"run": str(base.folder), "step": base.update, "prefix": scorings[1].prefix, "exits": exits}
    how = {"pieces": len(pieces.bytes), "piece_bytes": protocols.PIECE_BYTES}
    how |= {"resamples": paired.RESAMPLES, "seed": paired.SEED}
    return {"base": about, **how, "differences": differences}


def to_json(results: dict[str, Any]) -> str:
    """One line of strict JSON; numbers that are not finite are the strings "NaN" and "Infinity"."""
    return json.dumps(json.loads(json.dumps(results), parse_constant=str), allow_nan=False)


def print_evaluations(results: dict[str, Any]) -> None:
    """A table for every set of what `evaluate_run` returned; of a comparison one for the other model, and one for the
    differences."""
    for name, one in results.get("sets", {results["set"]: results}).items():
        _print_exits(name, results, results, one["exits"])
        if (compared := one.get("comparison")) is None:
            continue
        base = compared["base"]
        print()
        _print_exits(name, results, base, base["exits"])
        print()
        rows = [
            (row["last_block"], *(None if row[key] is None else f"{row[key]:+.5f}" for key in _DIFFERENCE))
            for row in compared["differences"]
        ]
        print_table(
            f"{name}, difference to {base['run']} in bits per byte (below 0: fewer), paired over {compared['pieces']} "
            f"pieces of the text (documents, of longer ones each {compared['piece_bytes']} bytes; "
            f"{compared['resamples']} resamples, seed {compared['seed']})",
            ("exit after block", "difference", "95 % from", "to"),
            rows,
        )


_DIFFERENCE = ("bits_per_byte", "low", "high")
_COLUMNS = {
    "last_block": "exit after block",
    "head": "head",
    "tokens": "tokens",
    "words": "words",
    "nll_per_token": "nll per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "byte_perplexity": "byte perplexity",
    "word_perplexity": "word perplexity",
}


def _print_exits(name: str, results: dict[str, Any], model: dict[str, Any], exits: list[dict[str, Any]]) -> None:
    how = f"{results['convention']}: window {results['window']}, stride {results['stride']}, "
    how += f"prefix {model['prefix'] or 'none'}, {results['dtype']}"
    after = "" if model["step"] is None else f" after {model['step']} updates"
    rows = [[numbers[key] for key in _COLUMNS] for numbers in exits]
    print_table(f"{name}, {model['run']}{after} ({how})", tuple(_COLUMNS.values()), rows)
