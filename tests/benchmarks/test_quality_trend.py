"""benchmarks/quality_trend.py: gaps and shares from losses that are known; and the study's tables from its records."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_runs import falling, make_run
from matplotlib.figure import Figure

from lptransformer.study import collect

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality_trend  # noqa: E402

ENDS = {"backprop": (1.0, 1.2), "chunked": (1.1, 1.3)}  # by seed; on "report" one nat more


def records(folder: Path, steps: int = 40) -> list[dict[str, object]]:
    found = []
    for method, ends in ENDS.items():
        for seed, end in enumerate(ends):
            name = f"{method}-{steps}-{seed}"
            overrides = (f"--train.steps={steps}", f"--train.seed={seed}", f"--objective.name={method}")
            run = make_run(folder / name, overrides, lambda update, block, end=end: end)
            found.append({**collect.build(run), "method": method})
    shallow = make_run(
        folder / f"shallow-{steps}", (f"--train.steps={steps}", "--model.num_layers=2"), lambda u, b: 1.5
    )
    return [*found, {**collect.build(shallow), "method": quality_trend.SHALLOW}]


def test_the_gap_is_in_percent_of_backprop_s_loss_of_the_same_seeds(tmp_path: Path) -> None:
    ((regime, methods),) = quality_trend.regimes(records(tmp_path)).items()
    assert regime == (16, 40)
    chunked = next(one for one in methods if one.method == "chunked")
    lost = quality_trend.gap(chunked, methods, "report")
    assert lost.mean == pytest.approx(100 * 0.1 / 2.1) and lost.error == pytest.approx(0.0, abs=1e-9)
    shallow = next(one for one in methods if one.method == quality_trend.SHALLOW)
    assert quality_trend.gap(shallow, methods, "report").mean == pytest.approx(100 * 0.5 / 2.0)  # seed 0 alone


def test_methods_are_compared_with_others_than_backprop_too(tmp_path: Path) -> None:
    named = [{**one, "method": "chunked-4"} if one["method"] == "chunked" else one for one in records(tmp_path)]
    _, beside, _ = quality_trend.tables(quality_trend.regimes(named), "report")
    ((to, _, _, itself, shallow),) = beside.rows
    assert (to, itself) == ("chunked-4", "+0.00 ± 0.00")
    assert shallow == f"{100 * 0.4 / 2.1:+.2f}"  # of the seed that both have


def test_token_counts_have_rows_of_their_own_and_runs_that_are_not_complete_have_none(tmp_path: Path) -> None:
    half = make_run(tmp_path / "half", ("--train.steps=80", "--objective.name=backprop"), falling(1.0), updates=40)
    all_ = [*records(tmp_path), *records(tmp_path, 20), {**collect.build(half), "method": "backprop"}]
    gaps, _, kept = quality_trend.tables(quality_trend.regimes(all_), "report")
    assert [row[0] for row in gaps.rows] == [16, 16] and len({row[1] for row in gaps.rows}) == 2
    assert kept.rows[0][-2:] == ("80 %", "0 %")  # (1.5 - 1.1) / (1.5 - 1.0), of the seed that all three have


def test_the_picture_has_lines_of_what_is_there_more_than_once_and_names_at_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(quality_trend, "save", lambda figure, path: drawn.append(figure))
    once = make_run(tmp_path / "once", ("--train.steps=40",), falling(1.0))
    found = [*records(tmp_path), *records(tmp_path, 20), {**collect.build(once), "method": "once"}]
    quality_trend.draw(quality_trend.regimes(found), "report", tmp_path / "trend")
    (figure,) = drawn
    over_tokens, over_width = figure.axes
    names = {text.get_text() for text in over_tokens.texts}
    assert names == {"backprop", "chunked", quality_trend.SHALLOW}
    assert [text.get_text() for text in over_width.texts] == ["backprop"], "there is one width"
    assert not any(axes.get_legend() for axes in figure.axes)


@pytest.mark.slow
def test_the_study_s_document_is_what_its_records_give(tmp_path: Path) -> None:
    """Every table of docs/benchmarks/quality.md that a report makes, by the commands that stand there."""
    document = ROOT / "docs/benchmarks/quality.md"
    commands = [line for line in _commands(document.read_text()) if "docs/benchmarks/quality/" in line]
    assert len(commands) >= 3
    copy = tmp_path / "quality.md"
    copy.write_text(document.read_text())
    for command in commands:
        words = re.sub(r"--out \S+", f"--out {tmp_path}", command.replace("docs/benchmarks/quality.md", str(copy)))
        words = words.replace("python", sys.executable, 1)
        if "quality_trend" in command:
            words += f" --document {copy} --picture {tmp_path / 'trend'}"
        subprocess.run(["bash", "-c", words], cwd=ROOT, check=True, capture_output=True)  # with its braces
    assert copy.read_text() == document.read_text()


def _commands(text: str) -> list[str]:
    """The command lines of a document, each on one line."""
    blocks = [block.partition("```")[0] for block in text.split("```bash\n")[1:]]
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
