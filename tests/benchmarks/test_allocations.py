"""What torch's allocator has given out, against a case that can be counted by hand."""

from __future__ import annotations

import torch
from allocations import log_allocations

MATRIX = 256 * 1000 * 4
WEIGHT = 1000 * 1000 * 4


def test_every_byte_of_a_known_case_is_counted() -> None:
    x, weight = torch.randn(256, 1000), torch.randn(1000, 1000, requires_grad=True)
    with log_allocations() as log:
        log.mark("forward")
        h = x @ weight
        y = h.tanh().exp()  # tanh and exp keep their results
        log.mark("backward")
        y.sum().backward()
        log.mark("after")
        del h
        log.mark("less")
    assert log.names() == ["forward", "backward", "after", "less"]
    assert [log.alive(number) for number in range(4)] == [0, 3 * MATRIX, 2 * MATRIX + WEIGHT, MATRIX + WEIGHT]
    assert log.peak(0, 1) == 3 * MATRIX
    # The gradient of the weight is made while h, y and one gradient of their size are there.
    assert MATRIX * 3 + WEIGHT <= log.peak(1, 2) <= MATRIX * 3 + WEIGHT + 64
    assert log.peak(2) == 2 * MATRIX + WEIGHT


def test_what_was_there_before_does_not_count_when_it_goes() -> None:
    old = torch.zeros(1000)
    with log_allocations() as log:
        log.mark("begin")
        new = torch.zeros(10)
        del old
    assert (log.alive(0), log.peak(0)) == (0, new.nbytes)
