"""lptransformer.training.progress: plain lines, the display in a terminal, tables, the loss plot."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from lptransformer.console import print_table
from lptransformer.run_folder import loss_plot
from lptransformer.run_folder.loss_plot import plot_losses
from lptransformer.run_folder.metrics import MetricsRow
from lptransformer.training import progress
from lptransformer.training.progress import Progress

STAGES = [(0, 0, 1), (1, 2, 2)]


@pytest.fixture(autouse=True)
def no_terminal_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


class Clock:
    """Stands in for time.monotonic in lptransformer.training.progress."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def update_row(
    update: int, losses: tuple[float | None, float | None] = (3.21, 3.05), skipped: bool = False
) -> MetricsRow:
    entries = [
        {
            "stage": stage,
            "last_block": last,
            "loss": loss,
            "grad_norm": 0.8 + 0.1 * stage,
            "skipped": skipped and stage == 1,
            "idle_share": 0.02 * (stage + 1),
            "memory_bytes": 412_000_000,
        }
        for (stage, _, last), loss in zip(STAGES, losses, strict=True)
    ]
    numbers = {"tokens": 1000 * update, "seconds": 0.5 * update, "tokens_per_second": 12_345.0, "learning_rate": 1e-3}
    return {"update": update, **numbers, "stages": entries}


def evaluation_row(update: int, name: str = "emma", nll: float = 3.0) -> MetricsRow:
    exits = [
        {
            "stage": stage,
            "last_block": last,
            "nll_per_token": nll - stage,
            "perplexity": math.exp(nll - stage),
            "bits_per_byte": 1.5,
            "word_perplexity": 900.0,
            "tokens": 10,
        }
        for stage, _, last in STAGES
    ]
    return {"update": update, "evaluation": name, "exits": exits}


# --- plain lines


def test_a_plain_line_says_everything(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress(600, STAGES) as shown:
        clock.now += 2.0
        shown.update(update_row(119))
        clock.now += 6.0
        shown.update(update_row(120))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "update 120/600  loss 3.210 3.050  grad 0.8 0.9  lr 1.0e-03  12.3k tok/s  eta 48:00  idle 2% 4%  412 MB"
    )


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"tflops_per_process": 0.05214, "mfu": None}, "12.3k tok/s  0.0521 TFLOP/s  eta"),
        ({"tflops_per_process": 412.3, "mfu": 0.4167}, "12.3k tok/s  412 TFLOP/s  MFU 41.7%  eta"),
    ],
)
def test_what_is_known_of_the_flops(
    capsys: pytest.CaptureFixture[str], clock: Clock, known: dict[str, Any], said: str
) -> None:
    with Progress(600, STAGES) as shown:
        shown.update(update_row(1) | known)
    assert said in capsys.readouterr().out


def test_plain_lines_are_rare_but_the_first_and_the_last_come(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress(100, STAGES, interval_seconds=5.0) as shown:
        for update in range(1, 101):
            clock.now += 0.25
            shown.update(update_row(update))
    updates = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert updates == [1, 21, 41, 61, 81, 100]


def test_a_run_that_stops_early_still_shows_its_last_update(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(100, STAGES) as shown:
        for update in (1, 2, 3):
            shown.update(update_row(update))
        raise KeyboardInterrupt
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "3/100"]


def test_plain_evaluations_and_messages(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    long_path = "checkpoints/[bold]step :smile: " + "x" * 200
    with Progress(10, STAGES) as shown:
        shown.update(update_row(5))
        shown.evaluation(evaluation_row(5))
        shown.message(long_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "evaluation 5/10  emma  nll 3.000 2.000  perplexity 20.09 7.39  bits/byte 1.500 1.500"
    assert lines[2] == long_path  # neither markup nor line breaks


def test_skips_between_two_lines_are_told(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress(10, STAGES) as shown:
        shown.update(update_row(1))
        shown.update(update_row(2, skipped=True))
        clock.now += 6.0
        shown.update(update_row(3))
        clock.now += 6.0
        shown.update(update_row(4))
    first, second, third = capsys.readouterr().out.splitlines()
    assert second.endswith("SKIPPED by stage 1")
    assert "SKIPPED" not in first and "SKIPPED" not in third


def test_numbers_that_are_not_there_or_not_finite(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    row = update_row(1, losses=(None, math.nan))
    row["stages"][0]["grad_norm"] = None
    with Progress(10, STAGES) as shown:
        shown.update(row)
        shown.evaluation(evaluation_row(1, nll=math.inf))
    out = capsys.readouterr().out
    assert "loss - nan  grad - 0.9" in out and "perplexity inf inf" in out


def test_a_file_gets_plain_lines_even_with_forced_colours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(10, STAGES) as shown:
        shown.update(update_row(10))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "\x1b[?25l" not in out  # the cursor is not hidden


def test_the_eta_of_a_resumed_run_counts_from_where_it_resumed(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Progress(1000, STAGES) as shown:
        clock.now += 60.0  # the first update is slow
        shown.update(update_row(901))
        clock.now += 10.0
        shown.update(update_row(911))
    assert "eta 01:29" in capsys.readouterr().out.splitlines()[1]  # 89 updates at a second each


# --- in a terminal


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, height=40)


def without_escapes(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


@pytest.mark.parametrize("width", [80, 160])
def test_the_display_has_a_row_per_stage(width: int, clock: Clock) -> None:
    console = terminal(width)
    with Progress(600, STAGES, console=console) as shown:
        clock.now += 1.0
        shown.update(update_row(119, skipped=True))
        clock.now += 1.0
        shown.update(update_row(120))
        shown.evaluation(evaluation_row(100))
        shown.evaluation(evaluation_row(120, nll=4.0))
        shown.evaluation(evaluation_row(120, name="ulysses"))
    last = without_escapes(console).rpartition("update 120/600")[2]
    assert "12.3k tok/s" in last and "00:02 elapsed" in last and "eta 08:00" in last
    rows = [line.split() for line in last.splitlines()]
    stages = [row[:9] for row in rows if row[:1] in (["0"], ["1"])]
    assert stages == [
        ["0", "0-1", "3.210", "0.8", "1.0e-03", "412", "MB", "2%", "0"],
        ["1", "2", "3.050", "0.9", "1.0e-03", "412", "MB", "4%", "1"],
    ]
    assert re.search(r"emma @120\s+ulysses @120", last)  # the newest of each set
    assert re.search(r"after block 1\s+4\.000 / 54\.60\s+3\.000 / 20\.09", last)
    assert re.search(r"after block 2\s+3\.000 / 20\.09\s+2\.000 / 7\.39", last)


def test_the_display_before_the_first_update() -> None:
    console = terminal(100)
    with Progress(600, STAGES, console=console):
        pass
    assert "update 0/600" in without_escapes(console) and "starting" in without_escapes(console)


def test_a_message_stands_above_the_display() -> None:
    console = terminal(100)
    with Progress(600, STAGES, console=console) as shown:
        shown.update(update_row(1))
        shown.message("[saved] step-1")
    text = without_escapes(console)
    assert text.count("[saved] step-1\n") == 1
    assert text.index("[saved] step-1") < text.rindex("update 1/600")


def test_the_cursor_comes_back_after_an_error() -> None:
    console = terminal(100)
    with pytest.raises(ValueError), Progress(600, STAGES, console=console):
        raise ValueError
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[?25l" in console.file.getvalue() and console.file.getvalue().rstrip().endswith("\x1b[?25h")


# --- tables


def test_a_plain_table_is_aligned_and_never_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    path = "runs/" + "x" * 150
    print_table("Result", ["exit", "perplexity", "folder"], [["block 3", 1033.12345, path], ["block 5", None, "[y]"]])
    assert capsys.readouterr().out.splitlines() == [
        "Result",
        "exit     perplexity  folder",
        "-------  ----------  " + "-" * 155,
        "block 3   1,033.123  " + path,
        "block 5           -  [y]",
    ]


def test_a_table_in_a_terminal_keeps_every_character() -> None:
    console = terminal(60)
    print_table("Result", ["exit", "folder"], [["block 3", "y" * 150]], console=console)
    text = without_escapes(console)
    assert "Result" in text and "block 3" in text and text.count("y") == 150 and "┃" in text


def test_a_table_without_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Nothing", ["a"], [])
    assert capsys.readouterr().out.splitlines() == ["Nothing", "a", "-"]


# --- the plot


def test_the_plot_is_a_whole_picture(tmp_path: Path) -> None:
    rows: list[MetricsRow] = [evaluation_row(0, nll=9.0)]
    for update in range(1, 121):
        loss = 5.0 + 4.0 * math.exp(-update / 20)
        rows.append(update_row(update, losses=(loss, math.nan if update == 50 else loss - 1)))
        if update % 40 == 0:
            rows += [evaluation_row(update, nll=loss), evaluation_row(update, name="ulysses", nll=loss)]
    plot_losses(rows, tmp_path / "loss.png", STAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    height, width, _ = picture.shape
    assert width >= 1000 and height >= 400
    colours = picture[..., :3]
    saturated = colours.max(axis=2) - colours.min(axis=2) > 0.3
    assert saturated[:, : width // 2].sum() > 500 and saturated[:, width // 2 :].sum() > 500  # curves on both sides


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[MetricsRow]) -> list[Any]:
    """The axes of the plot of these rows."""
    kept: list[Any] = []
    monkeypatch.setattr(loss_plot, "save", lambda figure, *_: kept.append(figure))
    plot_losses(rows, "loss.png", STAGES)
    return list(kept[0].axes)


def test_the_plot_shows_the_end_of_the_run_and_says_how_high_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[MetricsRow] = [evaluation_row(0, nll=30.0)]
    for update in range(1, 201):
        loss = 2.0 + 8.0 * math.exp(-update / 8)
        rows.append(update_row(update, losses=(loss, loss - 0.5)))
    rows.append(evaluation_row(200, nll=2.1))
    for axes in drawn(monkeypatch, rows):
        low, high = axes.get_ylim()
        assert low < 1.5 and 2.1 < high < 4.0
        texts = [text.get_text() for text in axes.texts]
        assert "\N{UPWARDS ARROW} the first losses, from 30.00, are cut off" in texts and axes.get_legend() is None
        assert sum(text.startswith("exit after block") for text in texts) == 2
        assert sum("\N{BLACK CIRCLE}" in text for text in texts) == 1, "an evaluation set has one name"


def test_the_plot_of_a_run_that_gets_worse_shows_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [update_row(update, losses=(3.0, 3.0 if update < 100 else 7.0)) for update in range(1, 101)]
    axes = drawn(monkeypatch, rows)[0]
    assert axes.get_ylim()[1] > 7.0 and not any("cut off" in text.get_text() for text in axes.texts)


def test_the_plot_of_a_run_that_was_resumed_with_more_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [update_row(update) for update in range(1, 21)]
    for row in rows[:10]:  # one stage of all blocks
        row["stages"] = [{**row["stages"][1], "stage": 0}]
    upper, lower = (line.get_ydata() for line in drawn(monkeypatch, rows)[0].lines[::2][::-1])
    assert upper == pytest.approx([3.05] * 20), "an exit is known by its block"
    assert lower == pytest.approx([math.nan] * 10 + [3.21] * 10, nan_ok=True)


def test_the_plot_as_svg_too(tmp_path: Path) -> None:
    plot_losses([update_row(1)], tmp_path / "loss.png", STAGES, svg=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "loss.svg"]


def test_the_plot_of_a_stage_without_a_head_and_of_no_records(tmp_path: Path) -> None:
    plot_losses([update_row(1, losses=(None, 3.0)), update_row(2, losses=(None, 2.9))], tmp_path / "a.png", STAGES)
    plot_losses([], tmp_path / "b.png", STAGES)
    assert (tmp_path / "a.png").stat().st_size > 5000 and (tmp_path / "b.png").stat().st_size > 5000


def test_a_plot_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="disk full"):
        plot_losses([update_row(1)], path, STAGES)
    assert path.read_bytes() == b"old"


def test_smoothing_does_not_shift_a_straight_line_and_keeps_gaps() -> None:
    line = [float(i) for i in range(500)]
    np.testing.assert_allclose(loss_plot._smooth(line), line)
    noisy = np.random.default_rng(0).normal(size=500)
    assert np.std(loss_plot._smooth(noisy.tolist())) < 0.6 * np.std(noisy)
    assert math.isnan(loss_plot._smooth([1.0, math.nan, 3.0])[1]) and loss_plot._smooth([]) == []
