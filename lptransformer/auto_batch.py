"""`train.micro_batch_size: auto`: the largest power of two whose memory fits, found once, before a run starts.

Every process says how much memory it has, and the smallest counts. Global rank 0 alone predicts what sizes take
(empty_model.py) and tells the others, through the launcher's store, before the worlds are joined. From then on the
configuration has a number, which config.yaml of the run keeps; a run that is resumed takes that one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from lptransformer import free_memory, run_folder
from lptransformer.blueprint import Blueprint as ModelPlan
from lptransformer.blueprint import draw as plan_model
from lptransformer.config import Config, zero_stage
from lptransformer.data import TrainStream
from lptransformer.empty_model import EmptyModel
from lptransformer.errors import ConfigError, UserError
from lptransformer.prepare import prepare_all, vocabulary
from lptransformer.processes import launched_rank, launched_size
from lptransformer.world import lost_processes_in_our_words

GIB = 2**30


def recorded(config: Config) -> Config:
    """`auto` is the number of the run in run.dir, where one is there. Raises RunError where it cannot be read."""
    assert config.run.dir is not None
    folder = Path(config.run.dir)
    if not config.train.auto_batch or not (folder / run_folder.CONFIG).is_file():
        return config
    return _with_size(config, run_folder.read_config(folder).train.micro_batch_size)


@contextlib.contextmanager
def settled(config: Config, resume: bool) -> Iterator[Config]:
    """The configuration with a number for `auto`, the same in every process; all processes of the run call this.

    They join their worlds inside of it: until then global rank 0 keeps the store that they agreed in.
    Raises ConfigError where one window does not fit, DataError for the training text, TrainingError when a process
    has gone.
    """
    if not config.train.auto_batch:
        yield config
        return
    timeout = timedelta(seconds=config.parallel.timeout_seconds)
    with lost_processes_in_our_words():
        alone = launched_size() == 1
        store = dist.HashStore() if alone else next(dist.rendezvous("env://", timeout=timeout))[0]
        store.set_timeout(timeout)
        number = _agreed(config, resume, dist.PrefixStore("auto_batch", store))
    yield _with_size(config, number)


def _agreed(config: Config, resume: bool, store: dist.Store) -> int:
    rank, others = launched_rank(), range(1, launched_size())
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or launched_size()
    store.set(f"memory/{rank}", str(free_memory.of_a_process(int(local))))
    if rank != 0:
        store.wait(["number"], timedelta(days=2))  # global rank 0 may have to prepare the text
        if (number := int(store.get("number"))) == 0:
            store.set(f"left/{rank}", "")
            raise SystemExit(UserError.exit_code)  # global rank 0 has said why
        return number
    try:
        number = recorded(config).train.micro_batch_size if resume else _found(config, store)
    except UserError:
        store.set("number", "0")
        for other in others:  # global rank 0 keeps the store: it goes last
            store.wait([f"left/{other}"])
        raise
    store.set("number", str(number))
    return number


def _found(config: Config, store: dist.Store) -> int:
    """On global rank 0: what fits into the smallest memory, and in one epoch of the training text."""
    memory = min(int(store.get(f"memory/{rank}")) for rank in range(launched_size()))
    data = prepare_all(**config.data.model_dump())
    stream = TrainStream([one.tokens for one in data.train], [one.weight for one in data.train], 0, 1)
    plan = plan_model(config, data.tokenizer.vocab_size, data.tokenizer.end_of_text_id)
    return largest(config, plan, memory, stream.rows_per_epoch)


def previewed(config: Config) -> Config:
    """For a dry run: the number that this machine would give, if all processes ran here and text were plenty."""
    if not config.train.auto_batch:
        return config
    data = config.data.model_dump(include={"train", "valid", "tokenizer", "vocab_size"})
    plan = plan_model(config, vocabulary(**data), None)
    memory = free_memory.of_a_process(config.parallel.pipeline * config.parallel.data)
    return _with_size(config, largest(config, plan, memory, None))


def largest(config: Config, plan: ModelPlan, memory: int, rows: int | None) -> int:
    """The largest power of two that fits into `memory` bytes of a process, and says so.

    What is predicted may take 0.9 of them; at ZeRO 3, of which too little is predicted, 0.8. An update takes no more
    than the `rows` of an epoch (None: not known). Raises ConfigError where 1 does not fit.
    """
    share, size, many = 0.8 if zero_stage(config) == 3 else 0.9, 1, config.train.micro_batches_per_update
    has = f"{memory / GIB:.3g} GiB that a process has free; predictions may take {share:.0%} of that"
    needed = _peak(config, plan, size)
    if needed > share * memory:
        raise ConfigError(
            f"train.micro_batch_size is auto, and not even 1 fits: a process needs {needed / GIB:.3g} GiB of the {has}."
            " Give more pipeline ranks, a higher ZeRO stage (with replicas), or a smaller data.sequence_length or model"
        )
    while True:
        if rows is not None and 2 * size * many > rows:
            why = f"an update of {2 * size * many} would be more than an epoch, {rows} windows"
            break
        if (more := _peak(config, plan, 2 * size)) > share * memory:
            why = f"{2 * size} would need {more / GIB:.3g} GiB"
            break
        size, needed = 2 * size, more
    print(
        f"train.micro_batch_size: auto is {size}. A process needs up to {needed / GIB:.3g} GiB (predicted) of the "
        f"{has}; {why}. An update is {size} x {many} = {size * many} windows: choose the learning rate for that.",
        flush=True,
    )
    return size


def _peak(config: Config, plan: ModelPlan, size: int) -> int:
    """The predicted bytes of a process, of the pipeline rank that needs most."""
    sized = _with_size(config, size)
    model = EmptyModel(sized, plan)
    return max(model.predict(sized, rank).peak for rank in range(config.parallel.pipeline))


def _with_size(config: Config, size: int) -> Config:
    sized = config.model_copy(deep=True)
    sized.train.micro_batch_size = size
    sized._origins["train.micro_batch_size"] = "by auto"
    return sized
