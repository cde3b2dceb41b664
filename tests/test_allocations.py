"""What torch's allocator has given out, against a case that can be counted by hand."""

from __future__ import annotations

import torch
from allocations import recorded

MATRIX = 256 * 1000 * 4
WEIGHT = 1000 * 1000 * 4


def test_every_byte_of_a_known_case_is_counted() -> None:
    x, weight = torch.randn(256, 1000), torch.randn(1000, 1000, requires_grad=True)
    with recorded() as record:
        record.mark("forward")
        h = x @ weight
        y = h.tanh().exp()  # tanh and exp keep their results
        record.mark("backward")
        y.sum().backward()
        record.mark("after")
        del h
        record.mark("less")
    assert record.names() == ["forward", "backward", "after", "less"]
    assert [record.alive(number) for number in range(4)] == [0, 3 * MATRIX, 2 * MATRIX + WEIGHT, MATRIX + WEIGHT]
    assert record.peak(0, 1) == 3 * MATRIX
    # The gradient of the weight is made while h, y and one gradient of their size are there.
    assert MATRIX * 3 + WEIGHT <= record.peak(1, 2) <= MATRIX * 3 + WEIGHT + 64
    assert record.peak(2) == 2 * MATRIX + WEIGHT


def test_what_was_there_before_does_not_count_when_it_goes() -> None:
    old = torch.zeros(1000)
    with recorded() as record:
        record.mark("begin")
        new = torch.zeros(10)
        del old
    assert (record.alive(0), record.peak(0)) == (0, new.nbytes)
