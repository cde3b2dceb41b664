"""The pool of worker processes itself: the other tests rely on what it reports."""

from __future__ import annotations

import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from distributed import Pool

KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")


def describe(extra: str) -> dict[str, str | int | None]:
    values: dict[str, str | int | None] = {key: os.environ.get(key) for key in (*KEYS, "DS_ACCELERATOR", extra)}
    return values | {"pid": os.getpid(), "threads": torch.get_num_threads(), "initialised": dist.is_initialized()}


def rank() -> int:
    return int(os.environ["RANK"])


def all_reduce(scale: float) -> torch.Tensor:
    dist.init_process_group("gloo")
    values = torch.full((3,), (rank() + 1) * scale)
    dist.all_reduce(values)
    return values  # the group is left to the pool


def fail_on(failing_rank: int) -> None:
    dist.init_process_group("gloo")
    if rank() == failing_rank:
        raise LookupError(f"planted on {failing_rank}")
    dist.barrier()  # waits for the one that fails


class TwoArguments(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")  # cannot be unpickled


def fail_unpicklably() -> None:
    raise TwoArguments(1, 2)


def exit_with(code: int) -> None:
    raise SystemExit(code)


def sleep_on(sleeping_rank: int) -> int:
    if rank() == sleeping_rank:
        time.sleep(60)
    return os.getpid()


def die_on(dying_rank: int) -> None:
    dist.init_process_group("gloo")
    if rank() == dying_rank:
        print("last words", flush=True)
        os._exit(3)
    dist.barrier()  # raises, because the other is gone


def train_at_zero_3(updates: int) -> float:
    import deepspeed

    from lptransformer.engine.process_groups import join

    join(1, int(os.environ["WORLD_SIZE"]), timeout_seconds=30)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for _ in range(updates):
        loss = engine(torch.ones(1, 4)).square().sum()
        engine.backward(loss)
        engine.step()
    return loss.item()


def test_results_come_by_rank_with_a_launchers_environment(pool: Pool) -> None:
    results = pool.run(2, describe, "EXTRA", env={"EXTRA": "yes"})
    for index, result in enumerate(results):
        assert [result[key] for key in KEYS] == [str(index), str(index), "2", "2", "2", "127.0.0.1", "1"]
        assert result["EXTRA"] == "yes" and result["DS_ACCELERATOR"] == "cpu" and result["threads"] == 1
    again = pool.run(1, describe, "EXTRA")
    assert again[0]["pid"] == results[0]["pid"]  # the same process, and nothing of the last job in it
    assert again[0]["EXTRA"] is None and again[0]["WORLD_SIZE"] == "1"


def test_this_process_computes_on_one_thread_too() -> None:
    assert torch.get_num_threads() == 1


def test_gloo_works_in_consecutive_jobs_of_different_sizes(pool: Pool) -> None:
    for world_size, expected in ((2, 1.5), (3, 3.0), (1, 0.5)):
        results = pool.run(world_size, all_reduce, 0.5)
        assert [result.tolist() for result in results] == [[expected] * 3] * world_size
        assert not any(result["initialised"] for result in pool.run(world_size, describe, ""))


def test_zero_3_works_on_ranks_that_have_had_different_jobs_before(pool: Pool) -> None:
    alone = pool.run(1, train_at_zero_3, 3)
    assert pool.run(2, train_at_zero_3, 3) == pytest.approx(alone * 2, rel=1e-6)


def test_an_exception_is_raised_again_with_its_rank_and_traceback(pool: Pool) -> None:
    before = [result["pid"] for result in pool.run(2, describe, "")]
    with pytest.raises(LookupError) as caught:
        pool.run(2, fail_on, 1)
    assert caught.value.args == ("planted on 1",)  # not what the other rank met in the barrier
    first = caught.value.__notes__[0]
    assert first.startswith("rank 1 raised:") and "engine/test_process_groups.py" in first and "in fail_on" in first
    assert [result["pid"] for result in pool.run(2, describe, "")] == before


def test_exceptions_that_cannot_travel_are_told(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="TwoArguments: 1 and 2"):
        pool.run(1, fail_unpicklably)
    with pytest.raises(SystemExit) as caught:
        pool.run(1, exit_with, 2)
    assert caught.value.code == 2


def test_a_function_without_a_name_is_refused_before_anything_starts() -> None:
    pool = Pool()
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        pool.run(1, lambda: None)
    assert pool.workers == []
    pool.close()


def test_a_timeout_names_the_ranks_and_where_they_were_and_the_pool_recovers() -> None:
    pool = Pool()
    try:
        before = pool.run(2, sleep_on, -1)
        with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 had not answered sleep_on in 1.0 s") as caught:
            pool.run(2, sleep_on, 1, timeout=1.0)
        assert any("rank 1 had not answered" in note and "in sleep_on" in note for note in caught.value.__notes__)
        for pid in before:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert not set(pool.run(2, sleep_on, -1)) & set(before)
    finally:
        pool.close()


def test_a_death_is_told_and_the_pool_recovers() -> None:
    pool = Pool()
    try:
        with pytest.raises(RuntimeError, match=r"ranks \[1\] of 2 died in die_on") as caught:
            pool.run(2, die_on, 1)
        assert "rank 1 died with exit code 3" in caught.value.__notes__
        assert "output of rank 1:\nlast words" in caught.value.__notes__
        assert pool.run(1, describe, "")[0]["RANK"] == "0"
    finally:
        pool.close()
