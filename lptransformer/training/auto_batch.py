"""`train.micro_batch_size: auto`: the largest power of two whose predicted memory fits, found before a run starts.

A process that starts all processes of a run on its own host finds the number for them (`for_this_host`). Else every
process reports how much memory it has, the smallest counts, and global rank 0 alone predicts and sends it, through the
launcher's store and before the worlds are joined (`agreed`). From then on the configuration has a number, which
config.yaml of the run keeps; a run that is resumed takes that one (`size_of_run_folder`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from lptransformer.config.checks import zero_stage
from lptransformer.config.schema import Config
from lptransformer.data.prepare import Prepared, prepare_all
from lptransformer.data.train_stream import TrainStream
from lptransformer.engine.process_groups import translate_lost_processes
from lptransformer.errors import ConfigError, UserError
from lptransformer.models import blueprint as blueprints
from lptransformer.models.blueprint import Blueprint
from lptransformer.planning.dry_run import predicted
from lptransformer.processes import launched_rank, launched_size
from lptransformer.run_folder import layout

GIB = 2**30


def size_of_run_folder(config: Config) -> Config:
    """The configuration with the number that the run folder run.dir has for `auto`; as it is where there is no run.

    Raises RunError where the folder cannot be read.
    """
    assert config.run.dir is not None
    folder = Path(config.run.dir)
    if config.train.micro_batch_size != "auto" or not (folder / layout.CONFIG).is_file():
        return config
    return with_size(config, layout.read_config(folder).train.micro_batch_size)


def for_this_host(config: Config, blueprint: Blueprint, rows: int | None = None) -> Config:
    """The configuration with a number for `auto`, where all processes of the run are on this host (see `largest`)."""
    if config.train.micro_batch_size != "auto":
        return config
    processes = config.parallel.pipeline * config.parallel.data
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        # In a process of its own: querying a GPU makes a CUDA context, which takes memory and keeps it.
        ask = f"from lptransformer.training import auto_batch; print(auto_batch.free_memory_of_all({processes}))"
        answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
        if answer.returncode != 0:
            why = (answer.stderr.strip() or "no message").splitlines()[-1]
            raise ConfigError(f"train.micro_batch_size is auto, and the GPUs do not say how much memory is free: {why}")
        memory = int(answer.stdout.splitlines()[-1])  # libraries may have printed before
    else:
        memory = free_memory(processes)
    return with_size(config, largest(config, blueprint, memory, rows))


def of_prepared(config: Config, data: Prepared) -> tuple[Blueprint, int]:
    """What is built, and the windows of an epoch."""
    stream = TrainStream([one.tokens for one in data.train], [one.weight for one in data.train], 0, 1)
    tokenizer = data.tokenizer
    blueprint = blueprints.make_blueprint(with_size(config, 1), tokenizer.vocab_size, tokenizer.end_of_text_id)
    return blueprint, stream.rows_per_epoch


@contextlib.contextmanager
def agreed(config: Config, resume: bool) -> Iterator[Config]:
    """The configuration with a number for `auto`, the same in every process; all processes of the run call this.

    They join their worlds inside of it: until then global rank 0 keeps the store that they agreed in.
    Raises ConfigError where one window does not fit, DataError for the training text, TrainingError when a process
    has gone.
    """
    if config.train.micro_batch_size != "auto":
        yield config
        return
    timeout = timedelta(seconds=config.parallel.timeout_seconds)
    with translate_lost_processes():
        alone = launched_size() == 1
        store = dist.HashStore() if alone else next(dist.rendezvous("env://", timeout=timeout))[0]
        store.set_timeout(timeout)
        sized = _agreed(config, resume, dist.PrefixStore("auto_batch", store))
    yield sized


def _agreed(config: Config, resume: bool, store: dist.Store) -> Config:
    rank, others = launched_rank(), range(1, launched_size())
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or launched_size()
    store.set(f"memory/{rank}", str(free_memory(int(local))))
    if rank != 0:
        store.wait(["number"], timedelta(days=2))  # global rank 0 may have to prepare the text
        if (number := int(store.get("number"))) == 0:
            store.set(f"left/{rank}", "")
            raise SystemExit(UserError.exit_code)  # global rank 0 has printed why
        return with_size(config, number)
    try:
        sized = size_of_run_folder(config) if resume else config
        if sized.train.micro_batch_size == "auto":
            memory = min(int(store.get(f"memory/{rank}")) for rank in range(launched_size()))
            blueprint, rows = of_prepared(config, prepare_all(**config.data.model_dump()))
            sized = with_size(config, largest(config, blueprint, memory, rows))
    except UserError:
        store.set("number", "0")
        for other in others:  # global rank 0 keeps the store: it goes last
            store.wait([f"left/{other}"])
        raise
    store.set("number", str(sized.train.micro_batch_size))
    return sized


def largest(config: Config, blueprint: Blueprint, memory: int, rows: int | None) -> int:
    """The largest power of two that fits into `memory` bytes of a process; prints it.

    What is predicted may take 0.9 of them; at ZeRO 3, where the prediction is too low, 0.8. An update takes no more
    than the `rows` of an epoch (None: not known). Raises ConfigError where 1 does not fit.
    """
    share, size, many = 0.8 if zero_stage(config) == 3 else 0.9, 1, config.train.micro_batches_per_update
    has = f"{memory / GIB:.3g} GiB that a process has free; predictions may take {share:.0%} of that"

    def peak(size: int) -> int:
        return max(rank.peak for rank in predicted(config, replace(blueprint, micro_batch_size=size)))

    needed = peak(size)
    if needed > share * memory:
        raise ConfigError(
            f"train.micro_batch_size is auto, and not even 1 fits: a process needs {needed / GIB:.3g} GiB of the {has}."
            " Give more pipeline ranks, a higher ZeRO stage (with replicas), or a smaller data.sequence_length or model"
        )
    while True:
        if rows is not None and 2 * size * many > rows:
            why = f"an update of {2 * size * many} would be more than an epoch, {rows} windows"
            break
        if (more := peak(2 * size)) > share * memory:
            why = f"{2 * size} would need {more / GIB:.3g} GiB"
            break
        size, needed = 2 * size, more
    print(
        f"train.micro_batch_size: auto is {size}. A process needs up to {needed / GIB:.3g} GiB (predicted) of the "
        f"{has}; {why}. An update is {size} x {many} = {size * many} windows: choose the learning rate for that.",
        flush=True,
    )
    return size


def with_size(config: Config, size: int | str) -> Config:
    """The configuration with another size of micro-batches, which `auto` has found."""
    sized = config.model_copy(deep=True)
    sized.train.micro_batch_size = size  # type: ignore[assignment]
    sized._origins["train.micro_batch_size"] = "by auto"
    return sized


def free_memory_of_all(local: int) -> int:
    """Free bytes for each of `local` processes on this machine: for the one that has the least."""
    return min(free_memory(local, rank) for rank in range(local))


def free_memory(local: int, local_rank: int | None = None) -> int:
    """Free bytes for one of `local` processes on this machine: of its GPU where there are GPUs, else of the host.

    `local_rank` None is this process, as its launcher counts.
    """
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        gpus = torch.cuda.device_count()
        gpu = int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank
        free, _ = torch.cuda.mem_get_info(gpu % gpus)
        return free // -(-local // gpus)  # pipeline ranks may share a GPU
    room = min([psutil.virtual_memory().available, *cgroup_rooms()])
    return max(room, 0) // local


def cgroup_rooms(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes that each control group of this process (versions 1 and 2) may still take; caches of files give way."""
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)
        base, names = root, ("memory.max", "memory.current", "inactive_file")
        if "memory" in kinds.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif kinds:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no such group here, or no limit: "max"
                limit, used = (int((group / name).read_text()) for name in names[:2])
                stat = dict(one.split() for one in (group / "memory.stat").read_text().splitlines())
                yield limit - used + int(stat.get(names[2], 0))
            if group == base:
                break
