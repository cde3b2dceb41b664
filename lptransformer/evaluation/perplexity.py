"""Perplexity of the exits of a run or of a Hugging Face folder, by a named convention, in one process or several.

Which windows there are is evaluation/protocols.py. Every process computes the negative log-likelihoods of the tokens
of its windows; those of all are put together, added up in float64, and divided once (the formula:
run_folder/metrics.perplexity). So the numbers do not depend on how many processes there are.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from lptransformer import hub
from lptransformer.console import bar, print_table
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import TrainingError, UserError
from lptransformer.evaluation import paired, protocols, trained_model
from lptransformer.evaluation.protocols import Options, Scoring
from lptransformer.evaluation.texts import Bos, options_of, scorings, tokenizer_folder
from lptransformer.evaluation.trained_model import DTYPES, ByStage, Target, token_nlls
from lptransformer.processes import (
    host_memory,
    launched_rank,
    launched_size,
    local_processes,
    use_fair_share_of_cores,
)
from lptransformer.run_folder.metrics import TextCounts, perplexity
from lptransformer.store import meet

TIMEOUT_SECONDS = 1800.0  # processes of a launcher wait so long for each other
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
            options_of(target, tokenizer, protocol, window, stride, bos)._replace(pieces=compare is not None)
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
