"""What fits into memory, before anything is allocated: a refusal of what cannot, and the number for
`train.micro_batch_size: auto`, the largest power of two that does.

Memory that processes share, a host's or a GPU's, is a pool: what is predicted for them together is compared with what
is free in it. `train` asks for its own host before it starts other processes (`for_this_host`). When a run starts,
every process reports its pool through the run's store, and global rank 0 decides for all (`agreed`). From then on the
configuration has a number, which config.yaml of the run keeps; a run that is resumed takes that one
(`size_of_run_folder`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lptransformer.config.checks import check, zero_stage
from lptransformer.config.epochs import with_steps
from lptransformer.config.schema import Config
from lptransformer.data.prepare import Prepared, prepare_all
from lptransformer.errors import ConfigError
from lptransformer.models import blueprint as blueprints
from lptransformer.models.blueprint import Blueprint
from lptransformer.planning.dry_run import predicted, unprepared
from lptransformer.processes import host_memory, on_gpus, own_memory
from lptransformer.run_folder import layout

if TYPE_CHECKING:
    from lptransformer.engine.process_groups import World  # with DeepSpeed, which takes seconds


Draw = Callable[[Config], Blueprint]
SMALLER = "A smaller model, more pipeline ranks or a higher ZeRO stage"


@dataclass(frozen=True)
class Pool:
    """Memory that the processes of these global ranks share; `free` in bytes. `used` is what they take of it, a name of
    RankMemory: their peak, or what they offload to the `host`."""

    name: str
    free: int
    ranks: tuple[int, ...]
    used: Literal["peak", "host"] = "peak"


@dataclass(frozen=True)
class Need:
    """What the processes of a pool are predicted to take together, in bytes."""

    pool: Pool
    needed: int

    @property
    def share(self) -> float:
        return self.needed / max(self.pool.free, 1)

    def __str__(self) -> str:
        many = len(self.pool.ranks)
        what = "a process needs" if many == 1 else f"{many} processes need"
        return f"{what} {_gib(self.needed)} (predicted) of the {_gib(self.pool.free)} that {self.pool.name} has free"


class Given(NamedTuple):
    """Of rows that a program has: what draws a blueprint, and how many there are (None: nobody knows)."""

    draw: Draw
    rows: int | None


def size_of_run_folder(config: Config) -> Config:
    """The configuration with the number that the run folder run.dir has for `auto`; as it is where there is no run.

    Raises RunError where the folder cannot be read.
    """
    assert config.run.dir is not None
    folder = Path(config.run.dir)
    if config.train.micro_batch_size != "auto" or not (folder / layout.CONFIG).is_file():
        return config
    return with_size(config, layout.read_config(folder).train.micro_batch_size)


def counted(config: Config) -> Config:
    """The configuration with train.steps for train.epochs; prepares the text for that where it is missing.

    Raises DataError or ConfigError for the text.
    """
    if config.train.epochs is None:
        return config
    return with_steps(config, prepare_all(**config.data.model_dump()).rows_per_epoch)


def as_resumed(config: Config) -> Config:
    """The configuration of a run to be resumed with the numbers for `auto` and for train.epochs, which is counted anew:
    so another number of epochs is seen as another number of updates. As it is where there is no run.

    Raises RunError where the folder cannot be read, and what `counted` does.
    """
    assert config.run.dir is not None
    there = (Path(config.run.dir) / layout.CONFIG).is_file()
    return counted(size_of_run_folder(config)) if there else config


def agreed(
    config: Config, world: World, resume: bool = False, force: bool = False, given: Given | None = None
) -> Config:
    """The configuration with a number for `auto`, the same in every process; all processes of the run call this.

    `given` is what is known of rows that a program has in place of text.
    Raises ConfigError where the run does not fit (with `force` that is not asked, but for `auto`) and DataError for
    the training text, in global rank 0; the others leave.
    """
    auto = config.train.micro_batch_size == "auto"
    if force and not auto:
        return config
    world.store.set(f"memory/{world.global_rank}", json.dumps([own_memory(), *offloaded_to()]))

    def decide() -> str:
        found = in_all([json.loads(world.store.get(f"memory/{rank}")) for rank in range(world.size)])
        sized = size_of_run_folder(config) if resume else config
        if sized.train.micro_batch_size == "auto":
            blueprint, rows = (
                of_prepared(config, prepare_all(**config.data.model_dump()))
                if given is None
                else (given.draw(with_size(config, 1)), given.rows)
            )
            sized = largest(config, blueprint, found, rows)
        elif not force:
            draw = unprepared if given is None else given.draw
            refuse_what_does_not_fit(sized, draw(sized), found, draw)
        return str(sized.train.micro_batch_size)

    size = world.decided_by_the_first("micro_batch_size", decide)
    return with_size(config, int(size)) if auto else config


def for_this_host(config: Config, blueprint: Blueprint, rows: int | None = None, force: bool = False) -> Config:
    """The configuration with a number for `auto`, where all processes of the run are on this host.

    Raises ConfigError where the run does not fit; on GPUs a number is not checked here but by the processes: who asks
    a GPU makes a context there, which takes memory and keeps it.
    """
    auto, processes = config.train.micro_batch_size == "auto", config.parallel.pipeline * config.parallel.data
    if on_gpus():
        if not auto:
            return config
        # In a process of its own, for that reason.
        ask = f"from lptransformer.training import this_host; print(this_host.of_gpus({processes}))"
        answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
        if answer.returncode != 0:
            why = (answer.stderr.strip() or "no message").splitlines()[-1]
            raise ConfigError(f"train.micro_batch_size is auto, and the GPUs do not say how much memory is free: {why}")
        found = json.loads(answer.stdout.splitlines()[-1])  # libraries may have printed before
    else:
        found = [own_memory()] * processes
    all_pools = in_all([[own, *offloaded_to()] for own in found])
    if auto:
        return largest(config, blueprint, all_pools, rows)
    if not force:
        refuse_what_does_not_fit(config, blueprint, all_pools)
    return config


def of_prepared(config: Config, data: Prepared) -> tuple[Blueprint, int]:
    """What is built, and the windows of an epoch."""
    tokenizer = data.tokenizer
    blueprint = blueprints.make_blueprint(with_size(config, 1), tokenizer.vocab_size, tokenizer.end_of_text_id)
    return blueprint, data.rows_per_epoch


def need(config: Config, blueprint: Blueprint, shared: Sequence[Pool], *, alike: bool = False) -> Need:
    """Of the pool that has least left; with `alike` blocks count as equal, which is faster."""
    ranks, data = predicted(config, blueprint, alike=alike), blueprint.replicas
    needs = [Need(pool, sum(getattr(ranks[rank // data], pool.used) for rank in pool.ranks)) for pool in shared]
    return max(needs, key=lambda one: one.share)


def refuse_what_does_not_fit(
    config: Config, blueprint: Blueprint, shared: Sequence[Pool], draw: Draw = unprepared
) -> None:
    """Raises ConfigError with what is needed, what is there, and what would fit."""
    now = need(config, blueprint, shared, alike=True)
    if now.share > 1.0:
        if now.pool.used == "host":
            raise ConfigError(
                f"{config.at('deepspeed.zero_optimization.offload_optimizer')} does not fit: {now}. More hosts or "
                "replicas would, or none of it; --force starts it anyway (in Python force=True)",
                change={"": "--deepspeed.zero_optimization.offload_optimizer=null"},
            )
        keys = what_would_fit(config, blueprint, shared, draw)
        raise ConfigError(
            f"{config.at('train.micro_batch_size')} with {config.at('data.sequence_length')} does not fit: {now}. "
            f"{' and '.join(keys) or SMALLER} would; --force starts it anyway (in Python force=True)",
            change={"": " ".join(f"--{key}" for key in keys) or "--force"},
        )


def what_would_fit(config: Config, blueprint: Blueprint, shared: Sequence[Pool], draw: Draw = unprepared) -> list[str]:
    """Keys with values: the largest micro-batch, else the longest window, that fits, else on GPUs an offloaded
    optimizer; nothing where none does."""
    size, length = blueprint.micro_batch_size, blueprint.sequence_length

    def fits(size: int, length: int) -> bool:
        smaller = with_size(config, size)
        if smaller.model.max_position_embeddings == smaller.data.sequence_length:
            smaller.model.max_position_embeddings = length
        smaller.data.sequence_length = length
        return need(smaller, draw(smaller), shared, alike=True).share <= 1.0

    if (found := next((one for one in _halves(size) if fits(one, length)), None)) is not None:
        return [f"train.micro_batch_size={found}"]
    if (found := next((one for one in _halves(length) if one > 1 and fits(1, one)), None)) is not None:
        return ["train.micro_batch_size=1", f"data.sequence_length={found}"]
    zero = config.deepspeed.get("zero_optimization", {}) | {"offload_optimizer": {"device": "cpu"}}
    zero |= {"stage": max(2, zero_stage(config))}
    offloaded = config.model_copy(update={"deepspeed": config.deepspeed | {"zero_optimization": zero}})
    with contextlib.suppress(ConfigError):  # what does not go with it
        check(offloaded)
        if on_gpus() and need(offloaded, draw(offloaded), shared, alike=True).share <= 1.0:
            key = "deepspeed.zero_optimization"
            return [f"{key}.stage={zero['stage']}", f"{key}.offload_optimizer.device=cpu"]
    return []


def _halves(number: int) -> Iterator[int]:
    """The powers of two below, from the largest on."""
    power = 1 << (number - 1).bit_length() >> 1
    while power >= 1 and number > 1:
        yield power
        power //= 2


def largest(config: Config, blueprint: Blueprint, shared: Sequence[Pool], rows: int | None) -> Config:
    """The configuration with the largest power of two that fits into all pools; prints it.

    What is predicted may take 0.9 of what is free; at ZeRO 3, where gathered weights may be let go of late, 0.8. An
    update takes no more than the `rows` of an epoch (None: not known). Raises ConfigError where 1 does not fit.
    """
    share, size, many = 0.8 if zero_stage(config) == 3 else 0.9, 1, config.train.micro_batches_per_update

    def of(size: int) -> Need:
        return need(config, replace(blueprint, micro_batch_size=size), shared)

    now = of(size)
    if now.share > share:
        raise ConfigError(
            f"train.micro_batch_size is auto, and not even 1 fits: {now}; predictions may take {share:.0%} of that. "
            "Give more pipeline ranks, a higher ZeRO stage (with replicas), or a smaller data.sequence_length or model"
        )
    while True:
        if rows is not None and 2 * size * many > rows:
            why = f"an update of {2 * size * many} would be more than an epoch, {rows} windows"
            break
        if (more := of(2 * size)).share > share:
            why = f"{2 * size} would need {_gib(more.needed)}"
            break
        size, now = 2 * size, more
    print(
        f"train.micro_batch_size: auto is {size}: {now}; predictions may take {share:.0%} of that, and {why}. An "
        f"update is {size} x {many} = {size * many} windows: choose the learning rate for that.",
        flush=True,
    )
    return with_size(config, size)


def with_size(config: Config, size: int | str) -> Config:
    """The configuration with another size of micro-batches, which `auto` has found."""
    sized = config.model_copy(deep=True)
    sized.train.micro_batch_size = size  # type: ignore[assignment]
    sized._origins["train.micro_batch_size"] = "by auto"
    return sized


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def pools(of_ranks: Iterable[tuple[str, int]], used: Literal["peak", "host"] = "peak") -> list[Pool]:
    """From the pool of every global rank: its name and what the process found free in it."""
    found: dict[str, Pool] = {}
    for rank, (name, free) in enumerate(of_ranks):
        before = found.get(name, Pool(name, free, ()))
        found[name] = Pool(name, min(before.free, free), (*before.ranks, rank), used)
    return list(found.values())


def offloaded_to() -> list[tuple[str, int]]:
    """The host's memory, where a process is on a GPU: its optimizer may be there."""
    return [(f"the host {socket.gethostname()}", host_memory())] if on_gpus() else []


def in_all(of_ranks: Sequence[Sequence[tuple[str, int]]]) -> list[Pool]:
    """The pools of devices, and of hosts, from those of every global rank."""
    hosts = [of_rank[1] for of_rank in of_ranks if len(of_rank) > 1]
    return pools(of_rank[0] for of_rank in of_ranks) + pools(hosts, "host")
