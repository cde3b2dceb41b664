"""What the local-update engine promises beyond equality with the plain loop (test_parity.py): stages are independent,
pipeline ranks do not wait for each other, checkpoints continue exactly, updates that are not finite are skipped."""

from __future__ import annotations

import gc
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from distributed import Pool
from engine_jobs import (
    VALID_LABEL_TOKENS,
    Ahead,
    RandomValidSet,
    Tamper,
    Trained,
    follow_control,
    load_config,
    lose_a_neighbour,
    make_stream,
    open_engine,
    run_ahead,
    train,
)
from parity import compare, expected, gather, learning_rates, runs_of, whole_model_config
from tiers import slow
from torch import Tensor

from lptransformer.engine.deepspeed_stage import TrainedStage
from lptransformer.engine.p2p import Control

FOUR_STAGES = ("objective.chunks=4", "parallel.pipeline=2")  # two on each pipeline rank


def start(pool: Pool, overrides: tuple[str, ...], updates: int, **options: Any) -> list[Trained]:
    parallel = load_config(overrides).parallel
    return pool.run(parallel.pipeline * parallel.data, call_train, overrides, updates, options)


def call_train(overrides: tuple[str, ...], updates: int, options: dict[str, Any]) -> Trained:
    return train(overrides, updates, **options)


def zero(stage: int, dtype: str = "fp32") -> tuple[str, ...]:
    return (f"deepspeed.zero_optimization.stage={stage}", f"train.dtype={dtype}")


MODES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def by_stage(trained: list[Trained]) -> dict[int, Trained]:
    """Who has the stage: its first replica."""
    return {stage: one for one in reversed(trained) for stage in one.plans}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def outcome(trained: list[Trained]) -> dict[Any, Any]:
    """All numbers of a run, without its times: by replica and stage."""
    return {
        (one.data_rank, stage): [(r.update, r.loss_sum, r.grad_norm, r.learning_rate, r.skipped) for r in reports]
        for one in trained
        for stage, reports in one.reports.items()
    }


def assert_same(ours: list[Trained], theirs: list[Trained]) -> None:
    """Losses, norms and learning rates of every stage and update, and all final weights, bit for bit."""
    assert not any(one.error for one in (*ours, *theirs))
    assert outcome(ours) == outcome(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(equal(one.weights[stage], other.weights[stage]) for stage in one.plans)


# --------------------------------------------------------------------------------------------- independence

PLAIN = ("optimizer.name=sgd", "optimizer.momentum=0", "train.grad_clip=0", "train.lr_scheduler=constant")
PLAIN += ("train.warmup_steps=0", "train.learning_rate=0.5")


@pytest.mark.parametrize("family", ["gpt2", slow("llama")])
def test_labels_of_a_stage_reach_its_own_weights_and_no_others(pool: Pool, family: str) -> None:
    """One update from one state, with SGD: a changed weight is a changed gradient."""
    overrides = (f"model.family={family}", *FOUR_STAGES, *PLAIN)
    usual = by_stage(start(pool, overrides, 1))
    for changed in range(4):
        trained = by_stage(start(pool, overrides, 1, tamper=Tamper(changed, "other labels")))
        for stage, one in trained.items():
            ours, theirs = one.weights[stage], usual[stage].weights[stage]
            if stage != changed:
                assert equal(ours, theirs), f"labels of stage {changed} changed weights of stage {stage}"
                assert one.reports[stage][0].loss_sum == usual[stage].reports[stage][0].loss_sum
                continue
            assert one.reports[stage][0].loss_sum != usual[stage].reports[stage][0].loss_sum
            same = {name for name in ours if torch.equal(ours[name], theirs[name])}
            assert not same, f"labels of stage {stage} did not reach its {same}"


@pytest.mark.slow
def test_a_slow_stage_changes_no_bit_of_any_result(pool: Pool) -> None:
    """200 ms at each of its 20 micro-batches: rank 1 waits for stage 0, rank 0 for the places that stage 3 takes."""
    overrides = (*FOUR_STAGES, "train.micro_batches_per_update=2")
    usual = start(pool, overrides, 10)
    for stage in (0, 3):
        slowed = start(pool, overrides, 10, tamper=Tamper(stage, "sleep"))
        assert_same(slowed, usual)
        reports = {stage: one.reports[stage] for stage, one in by_stage(slowed).items()}
        assert sum(report.seconds for report in reports[stage]) > 20 * 0.2, "it was slow"
        assert sum(report.idle_seconds for report in reports[3 - stage]) > 2.0, "the other rank waited"


# --------------------------------------------------------------------------------------------- no barrier


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_runs_ahead_by_the_whole_bound_and_no_collective_spans_two(pool: Pool, stage: int, dtype: str) -> None:
    """Two pipeline ranks of two replicas; rank 1 is held before its first update."""
    in_flight = 3
    overrides = ("objective.chunks=2", "parallel.pipeline=2", "parallel.data=2", f"parallel.in_flight={in_flight}")
    overrides += ("train.micro_batches_per_update=2", *zero(stage, dtype))
    seen: list[Ahead] = pool.run(4, run_ahead, overrides, in_flight, 0.5)
    assert len({one.pid for one in seen}) == 4
    for rank, one in enumerate(seen):
        # One micro-batch per update and replica: as many updates as the channel has places, and not one more.
        assert one.updates_while_held == (in_flight + 1 if rank < 2 else 0)
        assert one.engine_types == ["deepspeed.runtime.engine.DeepSpeedEngine"]
        assert one.zero_stages == [stage]
        assert one.default_group_size == 2
        assert one.engine_group_sizes and set(one.engine_group_sizes.values()) <= {1, 2}
        assert "DeepSpeedEngine.data_parallel_group" in one.engine_group_sizes
        assert one.members == [2 * (rank // 2), 2 * (rank // 2) + 1], "of every group of this process's world"
        assert one.collectives, "the log has DeepSpeed's collectives"
        assert {size for _, size in one.collectives} == {2}, "over the replicas of one pipeline rank"
        assert one.link_sizes == [2]
        assert one.group_calls == {"send" if rank < 2 else "recv"}, "between pipeline ranks only messages"


# --------------------------------------------------------------------------------------------- resume


QUICK_RESUMES = [((0, "fp32"), (2, 1)), ((2, "fp32"), (2, 2))]
RESUMES = [(mode, parallel) for mode in MODES for parallel in [(1, 1), (2, 1), (2, 2)]]


@pytest.mark.parametrize(
    ("mode", "parallel"), [*QUICK_RESUMES, *(slow(*case) for case in RESUMES if case not in QUICK_RESUMES)], ids=str
)
def test_ten_updates_equal_five_and_five_from_a_checkpoint(
    pool: Pool, tmp_path: Path, mode: tuple[int, str], parallel: tuple[int, int]
) -> None:
    pipeline, data = parallel
    overrides = ("objective.chunks=2", f"parallel.pipeline={pipeline}", f"parallel.data={data}", *zero(*mode))
    overrides += ("train.warmup_steps=6",)  # the learning rate still rises when the run is continued
    whole = start(pool, overrides, 10)
    first = start(pool, overrides, 5, save=tmp_path)
    second = start(pool, overrides, 5, load=tmp_path)
    for one, begun, continued in zip(whole, first, second, strict=True):
        for stage in one.plans:
            continued.reports[stage] = begun.reports[stage] + continued.reports[stage]
            assert not equal(begun.weights[stage], one.weights[stage])
    assert_same(second, whole)
    if mode == (0, "fp32"):
        compare(gather(second), expected(overrides, 10, replicas=data))  # every micro-batch once and in order


def test_a_checkpoint_of_a_cut_span_continues_too(pool: Pool, tmp_path: Path) -> None:
    overrides = ("objective.chunks=1", "parallel.pipeline=2", *zero(0))
    whole = start(pool, overrides, 6)
    first = start(pool, overrides, 3, save=tmp_path)
    second = start(pool, overrides, 3, load=tmp_path)
    for begun, continued in zip(first, second, strict=True):
        for stage in begun.plans:
            continued.reports[stage] = begun.reports[stage] + continued.reports[stage]
    assert_same(second, whole)


# --------------------------------------------------------------------------------------------- skipping


def check_skips(one: Trained, stage: int, skipped: set[int], overrides: tuple[str, ...]) -> None:
    """The stage skipped these updates and no others, kept weights and optimizer state at them, and went on after."""
    reports, history = one.reports[stage], one.history[stage]
    assert {report.update for report in reports if report.skipped} == skipped
    assert [r.learning_rate for r in reports] == learning_rates(load_config(overrides), len(reports))
    for report, (weights, state), (next_weights, next_state) in zip(reports, history, history[1:], strict=False):
        kept = len(state) == len(next_state) and all(torch.equal(a, b) for a, b in zip(state, next_state, strict=True))
        assert equal(weights, next_weights) == (report.update in skipped or report.learning_rate == 0)
        assert kept == (report.update in skipped)
        assert all(tensor.isfinite().all() for tensor in [*next_weights.values(), *next_state])


QUICK_SKIPS = [((0, "fp32"), "infinite loss"), ((2, "fp32"), "infinite inputs")]
SKIPS = [(mode, what) for mode in MODES for what in ("infinite loss", "infinite inputs")]


@pytest.mark.parametrize(
    ("mode", "what"), [*QUICK_SKIPS, *(slow(*case) for case in SKIPS if case not in QUICK_SKIPS)], ids=str
)
def test_a_stage_whose_loss_is_not_finite_skips(pool: Pool, mode: tuple[int, str], what: str) -> None:
    """The second of two stages at update 4, in one of its micro-batches, on one of two replicas only."""
    overrides = ("objective.chunks=2", "parallel.pipeline=2", "parallel.data=2", "train.warmup_steps=1", *zero(*mode))
    usual = start(pool, overrides, 6, history=True)
    tampered = start(pool, overrides, 6, history=True, tamper=Tamper(1, what, (4,), data_rank=1, micro_batches=(1,)))
    for one, other in zip(tampered[:2], usual[:2], strict=True):
        assert not one.error
        check_skips(one, 0, set(), overrides)
        assert outcome([one]) == outcome([other]) and equal(one.weights[0], other.weights[0]), "stage 0 does not notice"
    for one, other in zip(tampered[2:], usual[2:], strict=True):
        assert not one.error
        check_skips(one, 1, {4}, overrides)
        check_skips(other, 1, set(), overrides)
        report = one.reports[1][3]
        assert report.loss_sum is not None and math.isfinite(report.loss_sum) == (one.data_rank == 0)
        assert report.grad_norm is not None and not math.isfinite(report.grad_norm)


def test_stages_above_take_a_broken_stage_as_it_is(pool: Pool) -> None:
    """What is not finite in stage 1's output makes every stage above skip that update, and none below."""
    overrides = (*FOUR_STAGES, "train.warmup_steps=1")
    trained = start(pool, overrides, 5, history=True, tamper=Tamper(1, "infinite inputs", (3,)))
    for stage, one in by_stage(trained).items():
        check_skips(one, stage, {3} if stage >= 1 else set(), overrides)


@pytest.mark.parametrize("mode", [(0, "fp32"), (2, "fp32"), (1, "bf16"), slow((1, "fp32")), slow((2, "bf16"))], ids=str)
@pytest.mark.parametrize(("stage", "what"), [(0, "infinite gradient"), (1, "infinite loss")])
def test_the_stages_of_a_span_skip_together(pool: Pool, mode: tuple[int, str], stage: int, what: str) -> None:
    """A span over both ranks. The gradient breaks in stage 0 alone, or comes broken from the loss of stage 1."""
    overrides = ("objective.chunks=1", "parallel.pipeline=2", "train.warmup_steps=1", *zero(*mode))
    trained = start(pool, overrides, 5, history=True, tamper=Tamper(stage, what, (3,)))
    assert [one.error for one in trained] == ["", ""]
    for index, one in by_stage(trained).items():
        check_skips(one, index, {3}, overrides)
    assert trained[0].reports[0][4].grad_norm == trained[1].reports[1][4].grad_norm


@pytest.mark.parametrize("mode", [MODES[0], MODES[2], *(slow(mode) for mode in MODES[1:2] + MODES[3:])], ids=str)
def test_too_many_skipped_updates_in_a_row_end_the_run(pool: Pool, mode: tuple[int, str]) -> None:
    """Not at update 3, with two in a row, but at 7. The message has the micro-batches that the replica itself saw."""
    overrides = ("objective.chunks=4", "parallel.data=2", "train.max_skipped_updates=3", *zero(*mode))
    broken = Tamper(2, "infinite loss", (2, 3, 5, 6, 7, 8), data_rank=1, micro_batches=(1,))
    replicas = start(pool, overrides, 10, tamper=broken)
    for one, why in zip(replicas, ["gradient", r"loss of micro-batches \[3\]"], strict=True):
        assert one.error.startswith("stage 2 (blocks 4-5) skipped 3 updates in a row")
        assert re.search(f"at update 7 .*{why} is not finite", one.error), one.error
        assert len(one.reports[2]) == 6


STABLE = ("train.lr_scheduler=warmup_stable_decay", "train.min_learning_rate=0.001", "train.warmup_steps=2")
SCHEDULES = {  # of which the first three updates are one: before, after
    "linear": (("train.warmup_steps=3",), ("train.lr_scheduler=linear", "train.steps=30")),
    "a floor": (("train.warmup_steps=3",), ("train.lr_scheduler=cosine_with_min_lr", "train.min_learning_rate=0.001")),
    "stable": ((*STABLE, "train.steps=5", "train.decay_steps=2"), ("train.steps=7", "train.decay_steps=3")),
}


@pytest.mark.parametrize(
    ("mode", "name"),
    [(MODES[0], "linear"), (MODES[0], "stable"), slow(MODES[0], "a floor"), slow(MODES[3], "stable")],
    ids=str,
)
def test_a_resumed_run_follows_the_schedule_that_is_given(
    pool: Pool, tmp_path: Path, mode: tuple[int, str], name: str
) -> None:
    """Until the warm-up ends, schedules of any kind and length are one; one that is stable goes on as it is."""
    before = ("objective.chunks=2", *zero(*mode), *SCHEDULES[name][0])
    after = (*before, *SCHEDULES[name][1])
    start(pool, before, 3, save=tmp_path)
    (whole,), (resumed,) = start(pool, after, 6), start(pool, after, 3, load=tmp_path)
    for stage in (0, 1):
        rates = [report.learning_rate for report in resumed.reports[stage]]
        assert rates == [report.learning_rate for report in whole.reports[stage][3:]] and rates[0] == 0.01 > rates[2]
        assert rates == learning_rates(load_config(after), 6)[3:]
        assert equal(resumed.weights[stage], whole.weights[stage])


def by_hand(changed: tuple[str, ...], overrides: tuple[str, ...]) -> dict[int, dict[str, Tensor]]:
    """Three updates, then three with other hyperparameters, without a checkpoint between them."""
    now = load_config((*overrides, *changed))
    with open_engine(overrides) as engine:
        for _ in range(3):
            engine.train_batch()
        for stage in engine.local.values():
            stage.lr_scheduler.base_lrs = [now.train.learning_rate] * len(stage.lr_scheduler.base_lrs)
            factor = stage.lr_scheduler.lr_lambdas[0](3)
            for group in stage.optimizer.param_groups:
                group["betas"], group["eps"] = (now.optimizer.beta1, now.optimizer.beta2), now.optimizer.eps
                group["weight_decay"] = now.optimizer.weight_decay if group["weight_decay"] else 0.0
                group["lr"] = now.train.learning_rate * factor
            stage.grad_clip = now.train.grad_clip
            if stage.zero_stage:
                stage.engine.optimizer.clip_grad = now.train.grad_clip
        for _ in range(3):
            engine.train_batch()
        return {index: stage.weights() for index, stage in engine.local.items()}


@pytest.mark.parametrize("mode", [MODES[0], slow(MODES[1]), slow(MODES[3]), slow(MODES[5])], ids=str)
def test_a_resumed_run_has_the_hyperparameters_that_are_given(
    pool: Pool, tmp_path: Path, mode: tuple[int, str]
) -> None:
    overrides = ("objective.chunks=2", *zero(*mode))
    changed = ("train.learning_rate=0.003", "train.grad_clip=0.05", "optimizer.weight_decay=0.3")
    changed += ("optimizer.beta1=0.8", "optimizer.beta2=0.99", "optimizer.eps=1e-6")
    start(pool, overrides, 3, save=tmp_path)
    (resumed,) = start(pool, (*overrides, *changed), 3, load=tmp_path)
    (wanted,) = pool.run(1, by_hand, changed, overrides)
    assert all(equal(resumed.weights[stage], wanted[stage]) for stage in (0, 1))
    (unchanged,) = start(pool, overrides, 3, load=tmp_path)
    assert not equal(unchanged.weights[0], wanted[0])


def test_skips_are_counted_across_a_resume(pool: Pool, tmp_path: Path) -> None:
    overrides = ("objective.chunks=2", "train.max_skipped_updates=3")
    broken = Tamper(1, "infinite loss")
    (first,) = start(pool, overrides, 2, tamper=broken, save=tmp_path)
    assert first.error == ""
    (second,) = start(pool, overrides, 2, tamper=broken, load=tmp_path)
    assert "stage 1 (blocks 4-7) skipped 3 updates in a row; at update 3" in second.error


def test_the_other_ranks_end_too_when_a_stage_gives_up(pool: Pool) -> None:
    overrides = (*FOUR_STAGES, "train.max_skipped_updates=2")
    below, above = start(pool, overrides, 10, tamper=Tamper(3, "infinite loss"))
    assert above.error.startswith("stage 3 (blocks 6-7) skipped 2 updates in a row")
    assert below.error.startswith("the channel of hidden states 0-1 broke")


# --------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("stage", [0, slow(3)])
def test_evaluation_sums_equal_the_plain_forward(pool: Pool, stage: int) -> None:
    overrides = ("model.family=llama", "objective.chunks=2", *zero(stage))
    config = load_config(overrides)
    stream = make_stream(config)
    together = by_stage(start(pool, overrides, 3, evaluate=True))
    apart = by_stage(start(pool, (*overrides, "parallel.pipeline=2"), 3, evaluate=True))
    replicas = start(pool, (*overrides, "parallel.pipeline=2", "parallel.data=2"), 3, evaluate=True)

    net = reference.Net(whole_model_config(config, stream.vocab_size), runs_of(config))
    weights = expected(overrides, 3, clip_formula="zero3" if stage == 3 else "torch").weights
    sums = [0.0, 0.0]
    with torch.no_grad():
        for name, parameter in [
            *net.model.named_parameters(),
            *((f"head.{n}", p) for n, p in net.head.named_parameters()),
        ]:
            parameter.copy_(weights[name])
        for batch in RandomValidSet(stream).batches(config.train.micro_batch_size):
            hidden = net.embed(batch.input_ids)
            for index, span in enumerate(runs_of(config)):
                hidden = net.run_blocks(hidden, span)
                sums[index] += net.loss(hidden, batch.labels, span[1], config.loss.chunk_tokens).item()

    for index, nll_sum in enumerate(sums):
        report = together[index].evaluations[index]
        assert (report.update, report.evaluation, report.label_tokens) == (3, "valid", sum(VALID_LABEL_TOKENS))
        assert report.nll_sum == pytest.approx(nll_sum, rel=1e-6)
        assert apart[index].evaluations[index].nll_sum == report.nll_sum, "bit for bit"
        parts = [one.evaluations[index] for one in replicas if index in one.plans]
        assert [part.label_tokens for part in parts] == [
            VALID_LABEL_TOKENS[0] + VALID_LABEL_TOKENS[2],
            VALID_LABEL_TOKENS[1],
        ]
        assert sum(part.nll_sum or 0.0 for part in parts) == pytest.approx(nll_sum, rel=1e-6)


@pytest.mark.slow  # test_evaluation_sums_equal_the_plain_forward with one more option
def test_evaluation_sums_of_rounded_hidden_states_do_not_depend_on_the_placement(pool: Pool) -> None:
    overrides = ("objective.chunks=2", "border.codec=int8")
    together = by_stage(start(pool, overrides, 2, evaluate=True))
    apart = by_stage(start(pool, (*overrides, "parallel.pipeline=2"), 2, evaluate=True))
    exact = by_stage(start(pool, ("objective.chunks=2",), 2, evaluate=True))
    here, there, without = (one[1].evaluations[1].nll_sum for one in (together, apart, exact))
    assert here == there != without


@pytest.mark.parametrize("mode", [MODES[0], *map(slow, MODES[1:])], ids=str)
def test_evaluating_and_saving_in_between_change_nothing(pool: Pool, tmp_path: Path, mode: tuple[int, str]) -> None:
    overrides = (*FOUR_STAGES, *zero(*mode))
    usual = start(pool, overrides, 4)
    assert_same(start(pool, overrides, 4, every_update=tmp_path), usual)


# --------------------------------------------------------------------------------------------- control, neighbours


@pytest.mark.parametrize("parallel", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)], ids=str)
def test_all_ranks_see_the_same_control_at_the_same_update(pool: Pool, parallel: tuple[int, int]) -> None:
    pipeline, data = parallel
    overrides = ("objective.chunks=4", f"parallel.pipeline={pipeline}", f"parallel.data={data}")
    requests = [(0, 0, 2, Control.SAVE), (0, data - 1, 4, Control.SAVE | Control.STOP), (0, 0, 5, Control.EVALUATE)]
    seen = pool.run(pipeline * data, follow_control, overrides, 6, requests)
    wanted = [
        Control.NOTHING,
        Control.SAVE,
        Control.NOTHING,
        Control.SAVE | Control.STOP,
        Control.EVALUATE,
        Control.NOTHING,
    ]
    assert seen == [[int(control) for control in wanted]] * (pipeline * data)


def test_a_stop_asked_for_on_another_rank_reaches_all_at_one_update(pool: Pool) -> None:
    """Rank 0 hears of it through the store, at an update of its own, and the decision travels in band."""
    overrides = ("objective.chunks=2", "parallel.pipeline=2", "parallel.data=2")
    seen = pool.run(4, follow_control, overrides, 12, [(1, 1, 2, Control.STOP), (1, 0, 3, Control.EVALUATE)])
    assert seen[1:] == seen[:1] * 3
    stop = int(Control.SAVE | Control.STOP)
    assert seen[0][0] == 0 and set(seen[0]) == {0, stop} and seen[0] == sorted(seen[0])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_neighbour_that_goes_is_noticed(pool: Pool, tmp_path: Path, lost: int) -> None:
    overrides = ("objective.chunks=2", "parallel.pipeline=2")
    error, seconds = pool.run(2, lose_a_neighbour, overrides, lost, tmp_path, False)[1 - lost]
    assert error.startswith("the channel of hidden states 0-1 broke") and seconds < 5


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_neighbour_that_dies_is_noticed(pool: Pool, tmp_path: Path, lost: int) -> None:
    overrides = ("objective.chunks=2", "parallel.pipeline=2")
    with pytest.raises(RuntimeError, match=rf"ranks \[{lost}\] of 2 died"):
        pool.run(2, lose_a_neighbour, overrides, lost, tmp_path, True)
    assert (tmp_path / f"rank-{1 - lost}.txt").read_text().startswith("the channel of hidden states 0-1 broke")


def tensors_alive(overrides: tuple[str, ...], training: bool) -> list[int]:
    """How many there are after every micro-batch of an evaluation, or before every one of the second update."""
    counts: list[int] = []

    def count(*_: Any) -> None:
        gc.collect()
        counts.append(sum(isinstance(one, Tensor) for one in gc.get_objects()))

    with open_engine(overrides) as engine:
        if training:
            engine.train_batch()
            (lowest, *_) = engine.local.values()
            assert isinstance(lowest, TrainedStage)
            lowest.engine.module.register_forward_pre_hook(count)
            engine.train_batch()
        else:
            engine.eval_batch("valid", count)
    return counts


def test_no_result_is_kept_of_a_micro_batch(pool: Pool) -> None:
    """Not a scalar, of an update its ids and labels alone: between large tensors that are freed it would make their
    memory useless, and an evaluation of a long text took gigabytes."""
    (counts,) = pool.run(1, tensors_alive, ("objective.chunks=4",), False)
    assert len(counts) == len(VALID_LABEL_TOKENS) and len(set(counts)) == 1, counts
    (counts,) = pool.run(1, tensors_alive, ("objective.chunks=4", "train.micro_batches_per_update=6"), True)
    more = [after - before for before, after in itertools.pairwise(counts[1:])]  # without what is of all: the losses
    assert len(counts) == 6 and set(more) == {2}, counts
