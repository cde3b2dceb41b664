"""The engine as it is used from Python: in a `with`, its model so far, an evaluation that is stopped."""

from __future__ import annotations

from pathlib import Path

import baseline_jobs
import engine_jobs
import pytest
import small_run
import torch
import torch.distributed as dist
from distributed import Pool
from tiers import slow
from transformers import AutoModelForCausalLM

import lptransformer
from lptransformer.engine.p2p import Control
from lptransformer.errors import RunError
from lptransformer.evaluation.export import export_run
from lptransformer.run_folder.metrics import EvaluationReport


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return small_run.stand_in(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "overrides",
    [(), slow(("engine=deepspeed_pipeline", "objective.name=backprop")), slow(("train.dtype=bf16",))],
    ids=str,
)
def test_the_model_so_far_is_that_of_the_export(folder: Path, overrides: tuple[str, ...]) -> None:
    ids = torch.randint(0, 259, (2, 16), generator=torch.Generator().manual_seed(0))
    with lptransformer.initialize("c.yaml", list(overrides)) as engine:
        engine.train_batch()
        assert engine.global_steps == engine.update == 1
        model = engine.pretrained_model()
        engine.save_checkpoint("run")
        before = model(ids).logits
        engine.train_batch()
        assert torch.equal(model(ids).logits, before), "a copy: training goes on without it"
        assert not torch.equal(engine.pretrained_model()(ids).logits, before)
    assert not dist.is_initialized()
    export_run(Path("run"), Path("out"))
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained("out")(ids).logits, before)


def tf32() -> list[bool]:
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


def test_an_error_inside_leaves_the_world_too_and_torch_s_switches_as_they_were(folder: Path) -> None:
    before = tf32()
    with pytest.raises(ZeroDivisionError), lptransformer.initialize("c.yaml", ["train.tf32=true"]):
        assert tf32() == [True, True]
        raise ZeroDivisionError
    assert not dist.is_initialized() and tf32() == before == [False, True]


@pytest.mark.parametrize("allowed", [False, True])
def test_fp32_is_fp32_until_the_engine_is_closed_but_with_tf32(folder: Path, allowed: bool) -> None:
    before = tf32()
    engine = lptransformer.initialize("c.yaml", [f"train.tf32={allowed}"])
    assert tf32() == [allowed, allowed]
    engine.close()
    assert tf32() == before


def model_of_a_part(overrides: tuple[str, ...]) -> str:
    with engine_jobs.open_engine(overrides) as engine, pytest.raises(RunError) as caught:
        engine.pretrained_model()
    return str(caught.value)


def test_no_process_of_several_pipeline_ranks_has_the_whole_model(pool: Pool) -> None:
    for said in pool.run(2, model_of_a_part, ("parallel.pipeline=2",)):
        assert "the model is on 2 pipeline ranks" in said and "export" in said


def stopped_while_evaluating(local: bool, overrides: tuple[str, ...]) -> tuple[list[int], list[int], Control]:
    """A stop is asked for, as by a signal, behind the first micro-batches of an evaluation. Returns how many reports
    of this process three evaluations have, what the second one heard of, and what followed the next update."""
    open_engine = engine_jobs.open_engine if local else baseline_jobs.open_baseline
    heard: list[int] = []
    counts = []
    with open_engine(overrides) as engine:
        own = {plan.index for plan in engine.stages if plan.pipeline_rank == engine.world.pipeline_rank}

        def stop(done: int) -> None:
            heard.append(done)
            engine.request(Control.SAVE | Control.STOP, urgent=True)

        engine.train_batch()
        for advance in (lambda done: None, stop, stop):
            reports = [one for one in engine.eval_batch("valid", advance) if isinstance(one, EvaluationReport)]
            counts.append(sum(one.stage in own and one.data_rank == engine.world.data_rank for one in reports))
        control = engine.train_batch().control
    return counts, heard, control


@pytest.mark.parametrize(
    ("engine", "overrides"),
    [
        ("local", ("parallel.pipeline=2", "objective.chunks=2")),
        slow("local", ("parallel.pipeline=2", "parallel.data=2", "deepspeed.zero_optimization.stage=3")),
        slow("pipeline", ("parallel.pipeline=2", "parallel.data=2")),
    ],
)
def test_a_stop_ends_an_evaluation_within_a_micro_batch(pool: Pool, engine: str, overrides: tuple[str, ...]) -> None:
    local, processes = engine == "local", 4 if "parallel.data=2" in overrides else 2
    for counts, heard, control in pool.run(processes, stopped_while_evaluating, local, overrides):
        # DeepSpeed's pipeline takes the three micro-batches of the set at once: the next evaluation is the one to end.
        assert counts == ([1, 0, 0] if local else [1, 1, 0]), "half a set is no result"
        assert len(heard) <= 3 and control & Control.STOP and control & Control.SAVE
