"""Objectives as data: the spans of each, what a block takes of each loss, and when an update is a global one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import every_objective, objectives, wanted_of_block

from lptransformer.errors import ConfigError
from lptransformer.methods.objectives import METHODS, Objective, build, chunked, greedy
from lptransformer.methods.spans import Phase, Span

Pairs = list[tuple[int, int]]


def pairs(phase: Phase | None) -> Pairs:
    assert phase is not None
    return [(span.first, span.last) for span in phase.spans]


def overlapping(num_blocks: int, chunks: int | list[int], overlap: int, own_weight: float, first_head: bool) -> Phase:
    options: dict[str, Any] = {"chunks": chunks, "overlap": overlap, "own_weight": own_weight, "first_head": first_head}
    return build(num_blocks, "overlapping", **options).usual


# --------------------------------------------------------------------------------------------------- the spans

SPANS: list[tuple[int, str, dict[str, Any], Pairs]] = [
    (1, "backprop", {}, [(0, 0)]),
    (5, "backprop", {}, [(0, 4)]),
    (3, "greedy", {}, [(0, 0), (1, 1), (2, 2)]),
    (8, "chunked", {"chunks": 1}, [(0, 7)]),
    (8, "chunked", {"chunks": 2}, [(0, 3), (4, 7)]),
    (8, "chunked", {"chunks": 3}, [(0, 2), (3, 5), (6, 7)]),  # the longer ones first
    (8, "chunked", {"chunks": [1, 5, 2]}, [(0, 0), (1, 5), (6, 7)]),
    (5, "last", {"trained_blocks": 1}, [(4, 4)]),
    (5, "last", {"trained_blocks": 2}, [(3, 4)]),
    (5, "last", {"trained_blocks": 5}, [(0, 4)]),
    (6, "deep_supervision", {"chunks": 3}, [(0, 1), (0, 3), (0, 5)]),
    (6, "deep_supervision", {"chunks": [1, 5]}, [(0, 0), (0, 5)]),
    (6, "delayed", {"chunks": 3}, [(0, 5)]),
]


@pytest.mark.parametrize(("num_blocks", "name", "options", "spans"), SPANS)
def test_the_spans_of_each_objective(num_blocks: int, name: str, options: dict[str, Any], spans: Pairs) -> None:
    objective = build(num_blocks, name, **options)
    assert pairs(objective.usual) == spans and objective.usual.own_weight is None
    assert objective.phases == (objective.usual,) and objective.delayed == (name == "delayed")
    assert objective.heads == tuple(last for _, last in spans)
    assert objective.trained == {block for first, last in spans for block in range(first, last + 1)}


OVERLAPS: list[tuple[int, int | list[int], int, bool, Pairs]] = [
    # blocks, chunks, overlap, first head, spans
    (4, 4, 1, False, [(0, 1), (1, 2), (2, 3)]),  # the paper's figure
    (4, 4, 1, True, [(0, 0), (0, 1), (1, 2), (2, 3)]),
    (4, 4, 2, False, [(0, 2), (1, 3)]),
    (4, 4, 2, True, [(0, 0), (0, 1), (0, 2), (1, 3)]),
    (4, 4, 3, False, [(0, 3)]),
    (4, 4, 3, True, [(0, 0), (0, 1), (0, 2), (0, 3)]),
    (8, 4, 1, False, [(0, 3), (2, 5), (4, 7)]),
    (6, [1, 2, 3], 1, False, [(0, 2), (1, 5)]),
    (6, [1, 2, 3], 1, True, [(0, 0), (0, 2), (1, 5)]),
    (6, [3, 2, 1], 2, True, [(0, 2), (0, 4), (0, 5)]),
]


@pytest.mark.parametrize(("num_blocks", "chunks", "overlap", "first_head", "spans"), OVERLAPS)
def test_the_spans_of_overlapping(
    num_blocks: int, chunks: int | list[int], overlap: int, first_head: bool, spans: Pairs
) -> None:
    phase = overlapping(num_blocks, chunks, overlap, 0.3, first_head)
    assert pairs(phase) == spans and phase.own_weight == 0.3 and phase.clip_at == ()


@settings(deadline=None)  # a busy machine is no error
@given(num_blocks=st.integers(1, 40), data=st.data())
def test_chunks_are_as_equal_as_possible(num_blocks: int, data: st.DataObject) -> None:
    spans = chunked(num_blocks, data.draw(st.integers(1, num_blocks))).spans
    assert [block for span in spans for block in range(span.first, span.last + 1)] == list(range(num_blocks))
    sizes = [span.last - span.first + 1 for span in spans]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("chunks", [1, 3, [2, 1, 3]])
def test_one_definition_is_a_case_of_another(chunks: int | list[int]) -> None:
    by_chunks = build(6, "chunked", chunks=chunks)
    for own_weight, first_head in itertools.product((0.0, 0.5, 1.0), (False, True)):
        assert overlapping(6, chunks, 0, own_weight, first_head) == by_chunks.usual
    assert build(6, "greedy").usual == build(6, "chunked", chunks=6).usual == greedy(6)
    assert build(6, "chunked", chunks=1) == build(6, "deep_supervision", chunks=1) == build(6, "backprop")
    assert build(6, "last", trained_blocks=6) == build(6, "backprop")


def test_delayed_clips_by_its_runs() -> None:
    assert build(6, "delayed", chunks=[1, 3, 2]).usual.clip_at == (0, 1, 4)
    assert all(build(6, name, chunks=2, trained_blocks=1).usual.clip_at == () for name in ("backprop", "last"))


@pytest.mark.parametrize("name", METHODS)
def test_options_of_a_method_are_those_of_its_class(name: str) -> None:
    options = METHODS[name].options(name=name)
    assert build(4, **options.model_dump()) == build(4, name, **{"chunks": 2, "nothing": 1}), "others do no harm"


# --------------------------------------------------------------------------------------------------- the weights


def weights(phase: Phase) -> list[list[float]]:
    """By block and span."""
    return [[phase.weight(span, block) for span in phase.spans] for block in range(phase.spans[-1].last + 1)]


def test_losses_are_added_up() -> None:
    assert weights(build(3, "chunked", chunks=2).usual) == [[1, 0], [1, 0], [0, 1]]
    assert weights(build(3, "deep_supervision", chunks=3).usual) == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert weights(build(3, "last", trained_blocks=1).usual) == [[0], [0], [1]]


MEANS: list[tuple[int, float, bool, list[list[float]]]] = [
    # overlap, own weight, first head, by block and span; 4 blocks in 4 runs
    (1, 0.3, False, [[1, 0, 0], [0.3, 0.7, 0], [0, 0.3, 0.7], [0, 0, 1]]),
    (1, 0.3, True, [[0.3, 0.7, 0, 0], [0, 0.3, 0.7, 0], [0, 0, 0.3, 0.7], [0, 0, 0, 1]]),
    (1, 0.0, True, [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]),  # 2010.04116
    (1, 1.0, True, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    (2, 0.5, False, [[1, 0], [0.5, 0.5], [0.5, 0.5], [0, 1]]),
    (2, 0.5, True, [[0.25, 0.25, 0.5, 0], [0, 0.25, 0.25, 0.5], [0, 0, 0.5, 0.5], [0, 0, 0, 1]]),
    (3, 0.3, True, [[0.1, 0.1, 0.1, 0.7], [0, 0.15, 0.15, 0.7], [0, 0, 0.3, 0.7], [0, 0, 0, 1]]),
    (3, 0.3, False, [[1], [1], [1], [1]]),
]


@pytest.mark.parametrize(("overlap", "own_weight", "first_head", "wanted"), MEANS)
def test_a_block_takes_a_weighted_mean(
    overlap: int, own_weight: float, first_head: bool, wanted: list[list[float]]
) -> None:
    got = weights(overlapping(4, 4, overlap, own_weight, first_head))
    assert got == [pytest.approx(row) for row in wanted]


@settings(deadline=None)
@given(objectives())
def test_what_a_block_takes_of_all_losses(objective: Objective) -> None:
    """A mean has weights that add up to 1; in a sum each loss that reaches the block counts in full."""
    for phase in objective.phases:
        for block in range(objective.num_blocks):
            got = {span.last: phase.weight(span, block) for span in phase.spans if phase.weight(span, block) != 0}
            assert got == pytest.approx(wanted_of_block(phase, block))
            reached = any(span.first <= block <= span.last for span in phase.spans)
            if phase.own_weight is not None:
                assert sum(got.values()) == pytest.approx(1.0 if reached else 0.0)


def test_every_phase_has_one_span_for_every_head_in_their_order() -> None:
    for objective in every_objective(4):
        for phase in objective.phases:
            assert tuple(span.last for span in phase.spans) == objective.heads
            assert objective.heads[-1] == 3


# -------------------------------------------------------------------------------------------------------- hybrid


def test_in_a_global_update_the_last_loss_trains_all_blocks_and_auxiliary_heads_train_none() -> None:
    cases: list[tuple[str, dict[str, Any], Pairs]] = [
        ("chunked", {"chunks": 3}, [(2, 1), (4, 3), (0, 5)]),
        ("greedy", {}, [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (0, 5)]),
        ("deep_supervision", {"chunks": 2}, [(3, 2), (0, 5)]),
        ("overlapping", {"chunks": 3, "overlap": 1, "own_weight": 0.3, "first_head": False}, [(4, 3), (0, 5)]),
        ("overlapping", {"chunks": 3, "overlap": 1, "own_weight": 0, "first_head": True}, [(2, 1), (4, 3), (0, 5)]),
    ]
    for name, options, spans in cases:
        objective = build(6, name, backprop_every=3, **options)
        usual = build(6, name, **options)
        assert objective.phases == (usual.usual, objective.backprop) and objective.heads == usual.heads
        assert pairs(objective.backprop) == spans
        assert objective.backprop is not None and objective.backprop.own_weight is None
        *auxiliary, whole = objective.backprop.spans
        assert [objective.backprop.weight(whole, block) for block in range(6)] == [1.0] * 6
        assert not any(objective.backprop.weight(span, block) for span in auxiliary for block in range(6))


@pytest.mark.parametrize("often", [{"backprop_every": 1}, {"backprop_share": 1.0}])
def test_nothing_but_global_updates_is_backprop(often: dict[str, Any]) -> None:
    overlap: dict[str, Any] = {"overlap": 1, "own_weight": 0.5, "first_head": True}
    for name in ("chunked", "greedy", "deep_supervision", "overlapping"):
        assert build(6, name, chunks=3, **overlap, **often) == build(6, "backprop"), "no auxiliary heads either"


WHEN: list[tuple[dict[str, Any], int, str]] = [
    # options, steps, the phase of every update
    ({}, 6, "000000"),
    ({"backprop_every": 2}, 7, "0101010"),
    ({"backprop_every": 3}, 9, "001001001"),
    ({"backprop_every": 10}, 9, "000000000"),
    ({"backprop_share": 0.25}, 8, "00000011"),
    ({"backprop_share": 0.1}, 20, "00000000000000000011"),
    ({"backprop_share": 0.26}, 10, "0000000111"),  # 2.6 updates, rounded
    ({"backprop_share": 0.01}, 10, "0000000000"),
    ({"backprop_every": 4, "backprop_share": 0.3}, 10, "0001000111"),
]


@pytest.mark.parametrize(("often", "steps", "phases"), WHEN)
def test_when_an_update_is_a_global_one(often: dict[str, Any], steps: int, phases: str) -> None:
    objective = build(4, "chunked", chunks=2, **often)
    assert "".join(str(objective.phase_at(update, steps)) for update in range(steps)) == phases


# ---------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("name", ["chunked", "deep_supervision", "delayed", "overlapping"])
@pytest.mark.parametrize("chunks", [0, 9, -1, [], [4, 5], [8, 0], [9, -1]])
def test_chunks_that_do_not_fit_are_refused(name: str, chunks: int | list[int]) -> None:
    with pytest.raises(ConfigError, match="objective.chunks is") as caught:
        build(8, name, chunks=chunks, overlap=0, own_weight=0.5, first_head=False)
    assert str(chunks) in str(caught.value) and "8" in str(caught.value)


@pytest.mark.parametrize(("chunks", "overlap"), [(1, 1), (3, 3), ([2, 2, 2, 2], 5)])
def test_an_overlap_over_more_runs_than_there_are_is_refused(chunks: int | list[int], overlap: int) -> None:
    runs = chunks if isinstance(chunks, int) else len(chunks)
    said = rf"objective.overlap is {overlap}: with {runs} runs .*objective.chunks.* it can be 0 to {runs - 1}$"
    with pytest.raises(ConfigError, match=said):
        overlapping(8, chunks, overlap, 0.5, False)


def test_more_trained_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError, match="objective.trained_blocks is 5: a model of 4 blocks"):
        build(4, "last", trained_blocks=5)


def test_a_span() -> None:
    assert [block for block in range(6) if block in Span(2, 4)] == [2, 3, 4]
    assert not [block for block in range(6) if block in Span(3, 2)], "no blocks"
