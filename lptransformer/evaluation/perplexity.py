"""Perplexity of the exits of a run or of a Hugging Face folder, by a named convention, in one process or several.

Which windows there are is evaluation/protocols.py. The negative log-likelihoods of all scored tokens are added up in
float64 over windows and processes, and divided once (the formula: run_folder/metrics.perplexity).
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
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from lptransformer import hub
from lptransformer.console import bar, print_table
from lptransformer.data.prepare import check_ids, prepare
from lptransformer.data.readers import MANIFEST, Source, parse_sources
from lptransformer.data.token_set import TokenSet
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import DataError, RunError, TrainingError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.protocols import PROTOCOLS, Options, Scoring, of_token_set
from lptransformer.evaluation.trained_model import Target
from lptransformer.processes import launched_rank, launched_size, use_fair_share_of_cores
from lptransformer.run_folder import layout
from lptransformer.run_folder.metrics import TextCounts, perplexity
from lptransformer.store import meet

TIMEOUT_SECONDS = 1800.0  # processes of a launcher wait so long for each other
Bos = Literal["auto", "always", "never"]
Sums = list[list[float]]
"""For every set: the label tokens, then the summed negative log-likelihood (nats) of every exit."""


def evaluate_run(
    model: str | Path,
    data: Sequence[str] | None = None,
    *,
    step: int | None = None,
    exit_block: int | None = None,
    protocol: str = "blocks",
    window: int | None = None,
    stride: int | None = None,
    bos: Bos = "auto",
    dtype: str = "fp32",
    batch_size: int = 8,
    processes: int = 1,
) -> dict[str, Any] | None:
    """Evaluate a run's checkpoint after `step` updates (the newest one by default), or a Hugging Face model, by its
    folder or OWNER/NAME.

    On the run's validation sets, or on `data`: every item is a glob of text, jsonl or parquet files, or the folder of a
    prepared set, and a set by itself. `protocol` is a row of PROTOCOLS. `window` is by default that of the run, else
    the model's length, `stride` half of it. `bos`: whether every document of `blocks` begins with the tokenizer's
    token for that (auto: of a model folder as its tokenizer does by itself, of a run as it was trained, without).
    `batch_size` windows go through all stages at once. The windows are shared by `processes` processes on this machine,
    or by those that a launcher (torchrun) has started.

    Returns {"run", "step", "convention", "window", "stride", "prefix", "dtype", "set", "exits"}; `exits` is a list of
    {"stage", "last_block", "head", "nll_per_token", "perplexity", "bits_per_byte", "byte_perplexity",
    "word_perplexity", "tokens"} for the first set; {"sets": {name: {"exits"}}} has all sets where there are several.
    On other processes of a launcher than the first: None. Raises UserError for what is missing, damaged, or does not
    go together.
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
    target = trained_model.find(folder, step, exit_block, dtype)
    with tempfile.TemporaryDirectory(prefix="lptransformer-") as scratch:
        tokenizer = load_tokenizer(tokenizer_folder(target))
        options = _options(target, tokenizer, protocol, window, stride, bos)
        sets = scorings(target, tokenizer, data, protocol, options, Path(scratch))
        for name, one in sets.items():
            if one.tokens == 0:
                raise DataError(f"{name}: {one.counts.tokens} tokens are too few: nothing follows the first one")
        paths = [_keep(one, Path(scratch) / f"set-{number}") for number, one in enumerate(sets.values())]
        absolute = replace(target, folder=folder.absolute(), window=options.window)
        job = partial(_sums, absolute, paths, batch_size)
        if launched_size() > 1:
            sums = _share_with_launched(job)
        else:
            sums = _share_with_children(job, processes) if processes > 1 else job(0, 1)
    return {"run": str(model), **_results(target, protocol, options, sets, sums)} if launched_rank() == 0 else None


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
    begins = row.bos and (bos == "always" or (bos == "auto" and target.update is None and tokenizer.adds_begin))
    if begins and backend.bos_token_id is None:
        raise UserError("--bos always: the tokenizer has no token for the begin of a text")
    return Options(window, stride, begins)


def tokenizer_folder(target: Target) -> Path:
    """Raises RunError where a run has lost its tokenizer."""
    if target.update is None:
        return target.folder
    if not (target.folder / layout.TOKENIZER).is_dir():
        raise RunError(f"{target.folder} has no folder {layout.TOKENIZER}: a run keeps its tokenizer there")
    return target.folder / layout.TOKENIZER


def scorings(
    target: Target, tokenizer: Tokenizer, data: Sequence[str] | None, protocol: str, options: Options, scratch: Path
) -> dict[str, Scoring]:
    """What is scored, by the name of the set."""
    trained = target.update is not None and options == Options(target.window, target.window, False)
    if not data and trained and protocol == "blocks":
        return {name: of_token_set(one) for name, one in valid_sets(target.folder, tokenizer, scratch).items()}
    sets: dict[str, Scoring] = {}
    embedded = trained_model.vocabulary(target)
    for name, source in _sources(target, data):
        if source.prepared is not None:
            if protocol != "blocks" or options.bos:
                raise UserError(f"{source.prepared} is a prepared set: that is for --protocol blocks, without --bos")
            one = of_token_set(prepare(source, tokenizer, options.window, scratch, launched_rank() == 0))
        else:
            one = PROTOCOLS[protocol].score(source.files, tokenizer, options)
        check_ids([one.ids], source.files, name, tokenizer, embedded)
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
        yield name, source
    if data:
        return
    if target.update is None:
        raise UserError(f"{target.folder} is a model folder, which has no validation text: give one with --data FILES")
    valid = layout.read_config(target.folder).data.valid
    if not valid:
        raise RunError(f"{target.folder} was trained without validation sets (data.valid): give a text with --data")
    for name, of_run in valid.items():
        (source,) = parse_sources({name: of_run.files}, "valid")
        yield name, source


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
                (source,) = parse_sources({name: section.valid[name].files}, "valid")
            except (UserError, KeyError) as error:
                raise DataError(
                    f"validation set {name} of {run}: it is not in {folder} any more, and its text is not there to "
                    f"prepare it again ({error}): give a text with --data"
                ) from None
        sets[name] = prepare(source, tokenizer, section.sequence_length, cache, launched_rank() == 0)
        if source.files and sets[name].folder.name != Path(folder).name:  # folders are named after their contents
            raise DataError(
                f"validation set {name} of {run}: it is not in {folder} any more, and its text "
                f"({', '.join(map(str, source.files))}) has changed since: give a text with --data"
            )
    return sets


def _keep(scoring: Scoring, path: Path) -> Path:
    """Write ids and windows where other processes find them."""
    np.save(f"{path}-ids.npy", scoring.ids)
    np.save(f"{path}-windows.npy", scoring.windows)
    return path


def _kept(path: Path) -> Scoring:
    ids, windows = (np.load(f"{path}-{name}.npy", mmap_mode="r") for name in ("ids", "windows"))
    return Scoring(ids, windows, TextCounts(0, 0, 0))


# ---- the sums


def _sums(target: Target, paths: Sequence[Path], batch_size: int, rank: int, size: int) -> Sums:
    """The sums over the batches of windows that process `rank` of `size` takes: every size-th one of every set."""
    use_fair_share_of_cores(None if launched_size() > 1 else size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    model = trained_model.load_target(target, device)
    sets = [_kept(path) for path in paths]
    total = sum(len(range(rank, one.num_batches(batch_size), size)) for one in sets)
    sums = torch.zeros(len(sets), 1 + len(model.exits), dtype=torch.float64)
    with bar("evaluating", total, shown=rank == 0) as advance:
        for number, one in enumerate(sets):
            for batch in islice(one.batches(batch_size), rank, None, size):
                sums[number] += torch.tensor([batch.label_tokens, *model.loss_sums(batch)], dtype=torch.float64)
                advance(1)
    return sums.tolist()


def _share_with_launched(job: Callable[[int, int], Sums]) -> Sums:
    """With the processes that a launcher has started: an all-reduce over gloo at the end."""
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    met = meet(timeout)
    group: Any = dist.ProcessGroupGloo(dist.PrefixStore("evaluate", met.store), met.rank, met.size, timeout)
    sums = torch.tensor(job(met.rank, met.size), dtype=torch.float64)
    group.allreduce([sums]).wait()
    return sums.tolist()


def _share_with_children(job: Callable[[int, int], Sums], processes: int) -> Sums:
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
            shares = [job(0, processes), *(other.result() for other in others)]
    except BrokenProcessPool:
        raise TrainingError(
            f"one of the {processes} processes (--processes) died, perhaps for lack of memory: each one holds the "
            "whole model; give fewer"
        ) from None
    return torch.tensor(shares, dtype=torch.float64).sum(dim=0).tolist()


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


def _results(target: Target, protocol: str, options: Options, sets: dict[str, Scoring], sums: Sums) -> dict[str, Any]:
    places = [{"stage": stage, "last_block": block, "head": head} for block, head, stage in target.exits]
    exits = {}
    for (name, scoring), (label_tokens, *nll_sums) in zip(sets.items(), sums, strict=True):
        numbers = [asdict(perplexity(nll_sum, int(label_tokens), scoring.counts)) for nll_sum in nll_sums]
        exits[name] = [place | number for place, number in zip(places, numbers, strict=True)]
    first = next(iter(sets))
    results: dict[str, Any] = {"step": target.update, "convention": protocol}
    results |= {
        "window": options.window,
        "stride": options.stride,
        "prefix": sets[first].prefix,
        "dtype": target.dtype,
        "set": first,
    }
    results["exits"] = exits[first]
    if len(sets) > 1:
        results["sets"] = {name: {"exits": of_set} for name, of_set in exits.items()}
    return results


def to_json(results: dict[str, Any]) -> str:
    """One line of strict JSON; numbers that are not finite are the strings "NaN" and "Infinity"."""
    return json.dumps(json.loads(json.dumps(results), parse_constant=str), allow_nan=False)


def print_evaluations(results: dict[str, Any]) -> None:
    """A table for every set of what `evaluate_run` returned."""
    sets = results.get("sets", {results["set"]: results})
    how = f"{results['convention']}: window {results['window']}, stride {results['stride']}, "
    how += f"prefix {results['prefix'] or 'none'}, {results['dtype']}"
    names = ("exit after block", "head", "tokens", "nll per token", "perplexity", "bits per byte", "byte perplexity")
    keys = ("last_block", "head", "tokens", "nll_per_token", "perplexity", "bits_per_byte", "byte_perplexity")
    after = "" if results["step"] is None else f" after {results['step']} updates"
    for name, one in sets.items():
        lines = [[numbers[key] for key in (*keys, "word_perplexity")] for numbers in one["exits"]]
        print_table(f"{name}, {results['run']}{after} ({how})", (*names, "word perplexity"), lines)
