"""Learning rates are those of transformers' own schedules, at every update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from lptransformer.config.load import load
from lptransformer.engine.optimizer import build_lr_scheduler, decay_steps, learning_rate_after
from lptransformer.training.train import rate_from_here

FLOOR, DECAY = "cosine_with_min_lr", "warmup_stable_decay"
CASES: list[tuple[dict[str, Any], int | None]] = [  # keys, and how many updates decay
    ({"lr_scheduler": FLOOR, "min_learning_rate": 2e-4, "warmup_steps": 5}, None),
    ({"lr_scheduler": FLOOR}, None),
    ({"lr_scheduler": DECAY, "min_learning_rate": 2e-4, "warmup_steps": 5, "decay_steps": 12}, 12),
    ({"lr_scheduler": DECAY, "warmup_steps": 5}, 4),
    ({"lr_scheduler": DECAY, "warmup_steps": 38}, 2),
    ({"lr_scheduler": DECAY, "warmup_steps": 40}, 0),
    ({"lr_scheduler": DECAY, "steps": 3}, 1),
]


def config(**train: Any) -> Any:
    return load({"data": {"train": "t.txt"}, "train": {"learning_rate": 1e-3, "steps": 40, **train}})


@pytest.mark.parametrize(("keys", "decay"), CASES, ids=str)
def test_every_update_has_the_rate_of_the_library(keys: dict[str, Any], decay: int | None) -> None:
    train = config(**keys).train
    own, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3) for _ in range(2))
    scheduler = build_lr_scheduler(own, train, train.steps)
    floor = keys.get("min_learning_rate", 0.0)
    if decay is None:
        library = get_cosine_with_min_lr_schedule_with_warmup(theirs, train.warmup_steps, train.steps, min_lr=floor)
    else:
        library = get_wsd_schedule(theirs, train.warmup_steps, decay, train.steps, min_lr_ratio=floor / 1e-3)
        assert decay_steps(train, train.steps) == decay
    rates = []
    for update in range(train.steps + 1):
        rates.append(own.param_groups[0]["lr"])
        assert rates[-1] == theirs.param_groups[0]["lr"] == learning_rate_after(train, train.steps, update)
        for optimizer in (own, theirs):
            optimizer.step()
        scheduler.step()
        library.step()
    assert max(rates) <= 1e-3 and rates[-1] == pytest.approx(floor, abs=1e-12)


def test_more_steps_change_no_rate_while_it_is_stable_and_a_line_says_what_they_do_after() -> None:
    before, now = config(lr_scheduler=DECAY, decay_steps=10), config(lr_scheduler=DECAY, decay_steps=10, steps=80)
    assert rate_from_here(before, now, 30) == []
    (line,) = rate_from_here(before, now, 40)
    assert line == (
        "the learning rate after update 40 goes from 0 to 0.001, and on as warmup_stable_decay with its peak at 0.001 "
        "and its end at update 80, its last 10 updates decaying"
    )
