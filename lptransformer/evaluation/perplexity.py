"""Perplexity of every exit of a run, by the `blocks` convention (docs/design.md), in one process or several.

Disjoint windows of the length that the run was trained with, no prefix; the negative log-likelihoods of all label
tokens are added up in float64 over windows and processes, and divided once
(the formula: run_folder/metrics.perplexity).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lptransformer.console import bar, print_table
from lptransformer.data.prepare import prepare
from lptransformer.data.readers import MANIFEST, Source, parse_sources
from lptransformer.data.token_set import TokenSet
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import DataError, RunError, TrainingError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.processes import launched_rank, launched_size, use_fair_share_of_cores
from lptransformer.run_folder import checkpoint, layout
from lptransformer.run_folder.metrics import perplexity, text_counts
from lptransformer.store import meet

Sums = list[list[float]]
"""For every set: the label tokens, then the summed negative log-likelihood (nats) of every exit."""


def evaluate_run(
    run: Path, data: Sequence[str] | None = None, *, step: int | None = None, batch_size: int = 8, processes: int = 1
) -> dict[str, Any] | None:
    """Evaluate the checkpoint after `step` updates (the newest one by default) on the run's validation sets.

    Or on `data`: every item is a glob of text, jsonl or parquet files (tokenised with the run's own tokenizer), or the
    folder of a prepared set, and a set by itself. `batch_size` windows go through all stages at once. The windows are
    shared by `processes` processes on this machine, or by those that a launcher (torchrun) has started.

    Returns {"run", "step", "convention", "window", "stride", "prefix", "set", "exits"}; `exits` is a list of
    {"stage", "last_block", "nll_per_token", "perplexity", "bits_per_byte", "word_perplexity", "tokens"} for the first
    set, and {"sets": {name: {"exits"}}} has all sets where there are several. On other processes of a launcher than
    the first: None. Raises RunError or DataError for what is missing or damaged.
    """
    for flag, number in (("--batch-size", batch_size), ("--processes", processes)):
        if number < 1:
            raise UserError(f"{flag} {number}: it must be 1 or more")
    if launched_size() > 1 and processes not in (1, launched_size()):
        raise UserError(
            f"--processes {processes}, but a launcher has started {launched_size()} processes: leave it out"
        )
    update = trained_model.find_update(run, step)
    with tempfile.TemporaryDirectory(prefix="lptransformer-") as scratch:
        sets = open_sets(run, data, Path(scratch))
        folders = [token_set.folder.absolute() for token_set in sets.values()]
        job = partial(_sums, run.absolute(), update, folders, batch_size)
        if launched_size() > 1:
            sums = _share_with_launched(job, run)
        else:
            sums = _share_with_children(job, processes) if processes > 1 else job(0, 1)
    return _results(run, update, sets, sums) if launched_rank() == 0 else None


# ---- which text


def open_sets(run: Path, data: Sequence[str] | None, scratch: Path) -> dict[str, TokenSet]:
    """The sets to evaluate on, by name; what has to be tokenised is written below `scratch`."""
    section = layout.read_config(run).data
    folder = run / layout.TOKENIZER
    if not folder.is_dir():
        raise RunError(f"{run} has no folder {layout.TOKENIZER}: a run keeps its tokenizer there")
    tokenizer, length = load_tokenizer(folder), section.sequence_length
    if not data:
        return _sets_of_run(run, tokenizer, scratch)
    sets: dict[str, TokenSet] = {}
    for one in data:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(one).stem).strip(".-") or "data"
        (source,) = parse_sources(one, name, where="--data")
        token_set = prepare(source, tokenizer, length, scratch, launched_rank() == 0)
        name = str(token_set.manifest.get("name", name))
        names = [name, *(f"{name}-{number}" for number in range(2, len(data) + 1))]
        sets[next(name for name in names if name not in sets)] = token_set
    return sets


def _sets_of_run(run: Path, tokenizer: Tokenizer, scratch: Path) -> dict[str, TokenSet]:
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


# ---- the sums


def _sums(run: Path, update: int, folders: Sequence[Path], batch_size: int, rank: int, size: int) -> Sums:
    """The sums over the batches of windows that process `rank` of `size` takes: every size-th one of every set."""
    use_fair_share_of_cores(None if launched_size() > 1 else size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    model = trained_model.load(run, update, device)
    sets = [TokenSet.open(folder) for folder in folders]
    total = sum(len(range(rank, one.num_batches(batch_size), size)) for one in sets)
    sums = torch.zeros(len(sets), 1 + len(model.exits), dtype=torch.float64)
    with bar("evaluating", total, shown=rank == 0) as advance:
        for number, one in enumerate(sets):
            for batch in islice(one.batches(batch_size), rank, None, size):
                sums[number] += torch.tensor([batch.label_tokens, *model.loss_sums(batch)], dtype=torch.float64)
                advance(1)
    return sums.tolist()


def _share_with_launched(job: Callable[[int, int], Sums], run: Path) -> Sums:
    """With the processes that a launcher has started: an all-reduce over gloo at the end."""
    timeout = timedelta(seconds=layout.read_config(run).parallel.timeout_seconds)
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


def _results(run: Path, update: int, sets: dict[str, TokenSet], sums: Sums) -> dict[str, Any]:
    plans = [checkpoint.plan_of(folder) for folder in checkpoint.stage_folders(run, update)]
    places = [{"stage": plan.index, "last_block": plan.last_block} for plan in plans if plan.has_head]
    exits = {}
    for (name, token_set), (label_tokens, *nll_sums) in zip(sets.items(), sums, strict=True):
        if label_tokens == 0:
            raise DataError(f"{name}: {token_set.manifest['tokens']} tokens are too few: nothing follows the first one")
        counts = text_counts(token_set.manifest)
        numbers = [asdict(perplexity(nll_sum, int(label_tokens), counts)) for nll_sum in nll_sums]
        exits[name] = [place | number for place, number in zip(places, numbers, strict=True)]
    first = next(iter(sets))
    length = sets[first].sequence_length
    results = {"run": str(run), "step": update, "convention": "blocks", "window": length, "stride": length}
    results |= {"prefix": None, "set": first, "exits": exits[first]}
    if len(sets) > 1:
        results["sets"] = {name: {"exits": of_set} for name, of_set in exits.items()}
    return results


def to_json(results: dict[str, Any]) -> str:
    """One line of strict JSON; numbers that are not finite are the strings "NaN" and "Infinity"."""
    return json.dumps(json.loads(json.dumps(results), parse_constant=str), allow_nan=False)


def print_evaluations(results: dict[str, Any]) -> None:
    """A table for every set of what `evaluate_run` returned."""
    sets = results.get("sets", {results["set"]: results})
    how = f"{results['convention']}: window {results['window']}, stride {results['stride']}, prefix none"
    columns = ("stage", "exit after block", "tokens", "nll per token", "perplexity", "bits per byte", "word perplexity")
    keys = ("stage", "last_block", "tokens", "nll_per_token", "perplexity", "bits_per_byte", "word_perplexity")
    for name, one in sets.items():
        title = f"{name}, {results['run']} after {results['step']} updates ({how})"
        print_table(title, columns, [[numbers[key] for key in keys] for numbers in one["exits"]])
