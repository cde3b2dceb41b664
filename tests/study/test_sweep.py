"""Sweep files, successive halving, the supervision of processes: with a stand-in for training, and once for real."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_runs import BASE, make_run
from rich.console import Console

from lptransformer.__main__ import parser
from lptransformer.errors import ConfigError, RunError, TrainingError
from lptransformer.study import records, sweep
from lptransformer.study.halving import Halving, planned_updates, targets
from lptransformer.study.sweep import run_sweep
from lptransformer.study.sweep_display import DONE, FAILED, RUNNING, RunState, SweepDisplay
from lptransformer.study.sweep_file import Run, Sweep, read
from lptransformer.training.launcher import run

TESTS = Path(__file__).parents[1]
SWEEP: dict[str, Any] = {
    "base": "base.yaml",
    "dir": "runs/s",
    "grid": {"train.learning_rate": [0.001, 0.01], "train.seed": [0, 1]},
    "methods": {
        "backprop": {"objective.name": "backprop"},
        "chunked-2": {"objective.name": "chunked", "objective.chunks": 2},
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a base configuration and its texts."""
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text("It is a truth universally acknowledged. " * 200)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def write(**changes: Any) -> Path:
    """SWEEP with changes (None: without the key) as a file."""
    content = {key: value for key, value in (SWEEP | changes).items() if value is not None}
    Path("s.yaml").write_text(yaml.safe_dump(content))
    return Path("s.yaml")


# --- sweep files


def test_the_runs_are_the_product_of_grid_and_methods(folder: Path) -> None:
    found = read(write(set={"train.steps": 20}))
    assert [one.name for one in found.runs] == [
        f"{method}/learning_rate={rate},seed={seed}"
        for method in ("backprop", "chunked-2")
        for rate in ("0.001", "0.01")
        for seed in (0, 1)
    ]
    last = found.runs[-1]
    assert last.folder == Path("runs/s/chunked-2/learning_rate=0.01,seed=1") and last.setting == "learning_rate=0.01"
    train = last.config.train
    assert (train.steps, train.learning_rate, train.seed, last.config.objective.chunks) == (20, 0.01, 1, 2)
    assert list(found.methods["backprop"].values())[0] == [one.name for one in found.runs[:2]]
    assert found.score.set == "choose" and found.score.exit_block is None


def test_the_base_is_found_from_the_file_and_the_text_from_where_one_stands(folder: Path) -> None:
    (folder / "sweeps").mkdir()
    write(base="../base.yaml").rename(folder / "sweeps" / "s.yaml")
    assert read("sweeps/s.yaml").runs[0].config.data.train["train"].files == ["text.txt"]


def test_a_method_can_have_its_own_values_for_an_axis(folder: Path) -> None:
    methods = {
        "a": {"objective.name": "backprop"},
        "b": {"objective.chunks": 4, "train.learning_rate": [0.5, 0.7, 0.9]},
    }
    found = read(write(methods=methods, grid={"train.learning_rate": [0.1, 0.2]}))
    rates = [(one.method, one.config.train.learning_rate) for one in found.runs]
    assert rates == [("a", 0.1), ("a", 0.2), ("b", 0.5), ("b", 0.7), ("b", 0.9)]


def test_a_method_s_keys_win_over_those_for_all(folder: Path) -> None:
    methods = {"a": {"train.steps": 10}, "b": {}}
    found = read(write(set={"train.steps": 20}, grid=None, methods=methods))
    assert [one.config.train.steps for one in found.runs] == [10, 20]


def test_the_command_line_is_the_same_for_all_runs_and_wins(folder: Path) -> None:
    found = read(write(set={"train.steps": 20}), ["--train.steps=30", "--data.train=a*.txt"])
    assert {one.config.train.steps for one in found.runs} == {30}
    assert found.runs[0].config.data.train["train"].files == ["a*.txt"]


def test_values_go_through_the_command_line_of_train_unchanged(folder: Path) -> None:
    values = {"objective.chunks": [1, 3], "train.learning_rate": 1e-05, "data.valid": {"choose": "*.txt"}}
    (one,) = read(write(set=values, grid=None, methods=None)).runs
    from lptransformer.config.load import load

    again = load("base.yaml", one.arguments)
    assert again == one.config and again.objective.chunks == [1, 3] and again.train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"base": None}, ["base is None"]),
        ({"base": "nowhere.yaml"}, ["nowhere.yaml", "cannot read"]),
        ({"methdos": {}}, ["unknown key methdos", "methods"]),
        ({"grid": {"train.learning_rate": 0.1}}, ["train.learning_rate is 0.1", "list"]),
        ({"grid": {"train.learning_rate": []}}, ["train.learning_rate is []", "list"]),
        ({"grid": {"train.learning_rate": [0.1, -1]}}, ["learning_rate=-1", "train.learning_rate = -1", "above 0"]),
        ({"grid": {"train.learnign_rate": [0.1]}}, ["train.learnign_rate", "train.learning_rate"]),
        ({"grid": {"train.seed": [1, 1]}}, ["two runs are called", "seed=1"]),
        ({"set": {"train.seed": 1}}, ["train.seed is an axis"]),
        ({"set": {"run.dir": "x"}}, ["run.dir", "remove"]),
        ({"methods": {"a": {"run.dir": "x"}}}, ["run.dir", "remove"]),
        ({"methods": {"a/b": {}}}, ["'a/b'", "letters"]),
        ({"methods": {"a": {"objective.chunks": 9}}}, ["run a/", "objective.chunks", "9", "in the sweep"]),
        ({"methods": {"a": {}, "b": {"objective.chunks": 2}}}, ["a/", "b/", "the same run"]),
        ({"methods": {}}, ["methods is empty"]),
        ({"halving": {"updates": [10]}}, ["updates is [10]", "two or more"]),
        ({"halving": {"updates": [20, 10]}}, ["updates is [20, 10]", "rising"]),
        ({"halving": {"updates": [10, 20]}}, ["20", "train.steps = 40"]),
        ({"halving": {"updates": [10, 40], "keep": 1}}, ["keep is 1", "between 0 and 1"]),
        ({"halving": {"update": [10, 40]}}, ["unknown key update", "updates"]),
        ({"score": {"set": "emma"}}, ["'emma'", "choose, report"]),
        ({"score": {"exit": "first"}}, ["'first'", "last"]),
        ({"score": {"exit": 1}}, ["exit is 1", "backprop/", "[3]"]),
        ({"set": {"data.valid": {}}}, ["no validation set", "data.valid"]),
        ({"checkpoints": "some"}, ["'some'", "last, none, all"]),
        ({"dir": 3}, ["dir is 3"]),
    ],
)
def test_what_is_wrong_in_a_sweep_file(folder: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(write(**changes))
    assert all(part in str(error.value) for part in ["s.yaml", *parts][0 if "nowhere.yaml" not in parts else 1 :])
    assert "\n" not in str(error.value)


def test_a_bad_sweep_is_refused_before_anything_is_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(grid={"train.learning_rate": [0.1, -1]})
    for arguments in (["s.yaml"], ["s.yaml", "--dry-run"], ["nowhere.yaml"], ["s.yaml", "--processes=0"]):
        with pytest.raises(SystemExit) as end:
            run(parser(), ["sweep", *arguments])
        message = capsys.readouterr().err.strip()
        assert end.value.code == 2 and message.startswith("lptransformer: ") and "\n" not in message
    assert not Path("runs").exists() and not Path("prepared").exists()


def test_the_shipped_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS.parent)
    files = sorted(Path("configs/sweeps").glob("*.yaml"))
    assert Path("configs/sweeps/quick.yaml") in files
    for file in files:
        found = read(file)
        assert found.folder.parts[0] == "runs" and len(found.runs) > 1


# --- successive halving

SETTINGS = {"a": ["a0", "a1"], "b": ["b0", "b1"], "c": ["c0", "c1"]}
RUNGS = Halving((10, 20, 40), 0.5)


def known(values: dict[tuple[str, int], float]) -> Any:
    return lambda name, update: values.get((name, update))


def test_a_rung_is_decided_when_all_are_there() -> None:
    scored = {(run, 10): 1.0 for members in SETTINGS.values() for run in members}
    assert set(targets(SETTINGS, RUNGS, known({})).values()) == {10}
    missing = dict(scored)
    del missing["c1", 10]
    assert set(targets(SETTINGS, RUNGS, known(missing)).values()) == {10}
    assert targets(SETTINGS, RUNGS, known(missing), {"c1"})["a0"] == 20


def test_the_best_settings_go_on_by_the_mean_over_seeds() -> None:
    at = {"a0": 1.0, "a1": 5.0, "b0": 2.0, "b1": 2.1, "c0": 2.2, "c1": 2.3}
    found = targets(SETTINGS, RUNGS, known({(run, 10): score for run, score in at.items()}))
    assert found == {"a0": 10, "a1": 10, "b0": 20, "b1": 20, "c0": 20, "c1": 20}  # 2 of 3: half, rounded up
    second = {(run, 20): score for run, score in {"b0": 1.9, "b1": 1.9, "c0": 1.0, "c1": 1.0}.items()}
    found = targets(SETTINGS, RUNGS, known({(run, 10): score for run, score in at.items()} | second))
    assert found == {"a0": 10, "a1": 10, "b0": 20, "b1": 20, "c0": 40, "c1": 40}


def test_what_diverged_or_failed_is_out_and_one_setting_always_goes_on() -> None:
    scored: dict[tuple[str, int], float] = {("a", 10): math.nan, ("b", 10): 9.0}
    settings = {"a": ["a"], "b": ["b"], "c": ["c"]}
    assert targets(settings, Halving((10, 20), 0.3), known(scored), {"c"}) == {"a": 10, "b": 20, "c": 10}
    all_failed = targets(settings, Halving((10, 20), 0.3), known({}), {"a", "b", "c"})
    assert sorted(all_failed.values()) == [10, 10, 20]  # it ends, whatever happens


@pytest.mark.parametrize(("keep", "of", "kept"), [(0.5, 3, 2), (0.34, 3, 1), (0.5, 1, 1), (0.1, 3, 1), (0.5, 8, 4)])
def test_how_many_go_on(keep: float, of: int, kept: int) -> None:
    assert Halving((10, 20), keep).kept(of) == kept


def test_the_plan_counts_every_rung() -> None:
    assert planned_updates(SETTINGS, RUNGS) == 2 * (3 * 10 + 2 * 10 + 1 * 20)


# --- supervision, with a stand-in for training


@pytest.fixture
def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Runs do not train. Gives the flags of every process that was started."""
    started: list[list[str]] = []

    def command(of: Sweep, one: Run, flags: Sequence[str]) -> list[str]:
        started.append([one.name, *flags])
        return [sys.executable, str(TESTS / "fake_train.py"), str(of.base), *flags, *one.arguments]

    monkeypatch.setattr(sweep, "train_command", command)
    monkeypatch.setattr(sweep, "prepare_all", lambda **data: None)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    yield started


def status() -> dict[str, Any]:
    return json.loads(Path("runs/s/status.json").read_text())


def test_a_rung_that_finished_runs_have_passed_is_refused(pretend: list[list[str]]) -> None:
    """They would have to be trained again, and what they have would be gone."""
    grid = {"train.learning_rate": [0.001, 0.01, 0.02]}
    run_sweep(read(write(grid=grid, halving={"updates": [10, 40]})), processes=4)
    many = len(pretend)
    with pytest.raises(
        RunError, match=r"runs/s/.* was scored after 40 updates, and not after 15: give halving.updates"
    ):
        run_sweep(read(write(grid=grid, halving={"updates": [10, 15, 40]})), processes=4)
    assert len(pretend) == many
    run_sweep(read(write(grid=grid, halving={"updates": [10, 40]})), processes=4)
    assert len(pretend) == many


def test_a_sweep_from_start_to_end_and_again(pretend: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    found = read(write(grid={"train.learning_rate": [0.001, 0.01]}))
    run_sweep(found, processes=4)
    out = capsys.readouterr().out
    assert "best of backprop: backprop/learning_rate=0.01  2.0250 nats/token on choose after 40 updates" in out
    assert {state["status"] for state in status().values()} == {"done"} and len(pretend) == 4
    made = records.read(Path("runs/s/records.json"))
    assert [(one["name"], one["method"]) for one in made] == [(one.name, one.method) for one in found.runs]
    assert made[0]["score"] == {"set": "choose", "exit_block": None} and made[0]["processes_at_once"] == 4
    assert made[0]["overrides"] == {"train.learning_rate": 0.001, "objective.name": "backprop"}
    assert records.read(found.runs[0].folder / "record.json") == made[:1]
    run_sweep(found, processes=4)
    assert len(pretend) == 4, "what is complete is not trained again"
    assert records.read(Path("runs/s/records.json")) == made
    path = found.runs[0].folder / "record.json"
    path.write_text(path.read_text().replace(f'"format": {records.FORMAT}', '"format": 0'))
    run_sweep(found, processes=4)
    assert records.read(path) == made[:1] and len(pretend) == 4, "a record of another format is made again"
    more = read(write(grid={"train.learning_rate": [0.001, 0.01, 0.02]}))
    run_sweep(more, processes=4)
    assert [started[0] for started in pretend[4:]] == [f"{m}/learning_rate=0.02" for m in ("backprop", "chunked-2")]


def test_halving_stops_at_rungs_and_resumes_the_best(pretend: list[list[str]]) -> None:
    halved = {"updates": [10, 20, 40], "keep": 0.5}
    rates = [0.0001, 0.001, 0.01, 0.1]
    found = read(write(grid={"train.learning_rate": rates}, methods={"m": {}}, halving=halved))
    run_sweep(found, processes=4)
    flags = {name: [flags for other, *flags in pretend if other == name] for name in status()}
    first, resumed = ["--until=10"], ["--resume", "--until=20"]
    assert flags["m/learning_rate=0.0001"] == [first]
    assert flags["m/learning_rate=0.001"] == [first, resumed]  # as good as 0.1, and before it
    assert flags["m/learning_rate=0.1"] == [first]
    assert flags["m/learning_rate=0.01"] == [first, resumed, ["--resume"]]
    assert [state["status"] for state in status().values()] == ["dropped", "dropped", "done", "dropped"]
    assert [one["updates"] for one in records.read(Path("runs/s/records.json"))] == [10, 20, 40, 10]
    run_sweep(found, processes=1)
    assert len(pretend) == 7, "started again, nothing is left to do"


@pytest.mark.parametrize(("kept", "left"), [("last", ["step-00000040"]), ("none", []), ("all", 3)])
def test_how_many_checkpoints_stay(pretend: list[list[str]], kept: str, left: Any) -> None:
    halved = {"updates": [10, 20, 40]}
    run_sweep(read(write(grid=None, methods={"m": {}}, halving=halved, checkpoints=kept)))
    saved = sorted(path.name for path in Path("runs/s/m/checkpoints").glob("*"))
    assert saved == left or len(saved) == left
    run_sweep(read(write(grid=None, methods={"m": {}}, halving=halved, checkpoints=kept)))
    assert len(pretend) == 3, "the records say that it is done"


def test_a_run_that_fails_is_told_and_the_others_go_on(
    pretend: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    write(grid={"train.learning_rate": [0.5, 0.01]}, methods={"m": {}})
    with pytest.raises(SystemExit) as end:
        run(parser(), ["sweep", "s.yaml", "--processes=2"])
    assert end.value.code == 1
    said = capsys.readouterr()
    assert re.search(r"1 of 2 runs failed:\n  m/learning_rate=0.5 after 0 updates: stage 0 skipped 10", said.out)
    assert said.err.startswith("lptransformer: 1 of 2 runs of s.yaml failed")
    failed, fine = status().values()
    assert failed["status"] == "failed" and "exit code 1" in failed["error"] and "train.log" in failed["error"]
    assert fine["status"] == "done" and len(records.read(Path("runs/s/records.json"))) == 1
    with pytest.raises(TrainingError):
        run_sweep(read(Path("s.yaml")))
    assert [name for name, *_ in pretend[2:]] == ["m/learning_rate=0.5"], "it is tried again, the other is not"


def test_a_run_that_fails_does_not_hold_up_a_rung(pretend: list[list[str]]) -> None:
    found = read(write(grid={"train.learning_rate": [0.5, 0.01]}, methods={"m": {}}, halving={"updates": [10, 40]}))
    with pytest.raises(TrainingError):
        run_sweep(found, processes=2)
    assert [state["status"] for state in status().values()] == ["failed", "done"]


def test_stopped_by_a_signal_and_started_again(pretend: list[list[str]]) -> None:
    found = read(write(grid={"train.learning_rate": [0.25, 0.3]}, methods={"m": {}}))
    found.folder.mkdir(parents=True)
    lock = (found.folder / "sweep.lock").open("w")
    supervisor = sweep.Supervisor(found, processes=1, lock=lock.fileno())
    watched = Path("runs/s/m/learning_rate=0.25/metrics.jsonl")

    class Stopping(SweepDisplay):
        """Somebody presses Ctrl-C, in effect, when the first run has written something."""

        def tick(self) -> None:
            if watched.exists() and not supervisor.signals and supervisor.stopped_by is None:
                os.kill(os.getpid(), signal.SIGTERM)

    supervisor.display = Stopping(supervisor.states, 80)
    with lock, pytest.raises(SystemExit) as end:
        supervisor.work()
    assert end.value.code == 128 + signal.SIGTERM
    assert [state["status"] for state in status().values()] == ["stopped", "waiting"]
    assert len(pretend) == 1, "no other run was started"
    run_sweep(found)
    assert pretend[1] == ["m/learning_rate=0.25", "--resume"]
    assert [state["status"] for state in status().values()] == ["done", "done"]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(pretend: list[list[str]]) -> None:
    found = read(write(grid=None, methods={"m": {}}))
    run_sweep(found)
    import shutil

    shutil.rmtree("runs/s/m/checkpoints")
    metrics = Path("runs/s/m/metrics.jsonl")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:5]))
    run_sweep(found)
    assert pretend[1] == ["m", "--overwrite"]


def test_a_run_that_was_killed_between_saving_and_evaluating_is_resumed_where_it_was_saved(
    pretend: list[list[str]],
) -> None:
    found = read(write(grid=None, methods={"m": {}}, halving={"updates": [10, 40]}, checkpoints="all"))
    run_sweep(found)
    metrics = Path("runs/s/m/metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"update": 40, "evaluation"' not in line))
    run_sweep(found)
    assert pretend[2] == ["m", "--resume"]
    assert (Path("runs/s/m/checkpoints/step-00000040")).exists()


def test_another_run_in_a_run_s_folder_is_refused(pretend: list[list[str]]) -> None:
    run_sweep(read(write(grid=None, methods={"m": {}})))
    changed = read(write(grid=None, methods={"m": {"train.seed": 3}}))
    with pytest.raises(RunError, match="runs/s/m holds another run: train.seed: 0 in the run, 3 now"):
        run_sweep(changed)
    with pytest.raises(RunError, match="another run"):
        run_sweep(changed, dry_run=True)


def test_two_sweeps_do_not_work_in_one_folder(pretend: list[list[str]]) -> None:
    found = read(write())
    with sweep.alone(found.folder), pytest.raises(RunError, match="a sweep is at work there"):
        run_sweep(found)
    # Whoever was given the lock keeps it, also when the sweep that took it is gone.
    with sweep.alone(found.folder) as lock:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock])
    try:
        with pytest.raises(RunError, match="wait for them"):
            run_sweep(found)
    finally:
        child.kill()
        child.wait()


def test_a_dry_run_lists_the_runs_and_makes_nothing(
    pretend: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    run(parser(), ["sweep", "s.yaml", "--dry-run"])
    out = capsys.readouterr().out
    assert "8 runs in runs/s" in out and out.count("waiting") == 8 and not Path("runs").exists() and not pretend


def test_a_score_counts_when_all_sets_are_evaluated(folder: Path) -> None:
    (one,) = (found := read(write(grid=None, methods={"m": {}}))).runs
    assert sweep.scores(one, found) == {} and sweep.newest(one, found) == (0, None)
    make_run(one.folder, loss=lambda update, block: float(update + block), updates=20)
    assert sweep.scores(one, found) == {10: 13.0, 20: 23.0}
    metrics = one.folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))  # killed before the second set
    assert sweep.scores(one, found) == {10: 13.0}
    assert sweep.newest(one, found) == (20, 23.0)


def test_why_a_process_ended(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("lptransformer: of the start before\n")
    begin = log.stat().st_size
    with log.open("a") as file:
        file.write("Traceback\nlptransformer: the reason\na warning at exit\n")
    assert sweep.last_words(log, begin, 1) == f"the reason (exit code 1, {log})"
    log.write_text("Segmentation\n")
    assert sweep.last_words(log, 0, -9) == f"Segmentation (ended by SIGKILL, {log})"
    assert "it said nothing" in sweep.last_words(log, log.stat().st_size, 1)


# --- the display


def shown(states: Sequence[RunState], terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, force_interactive=terminal, width=110, color_system=None)
    display = SweepDisplay({state.name: state for state in states}, 120, console, interval_seconds=0.0)
    with display:
        display.event("something [happened]")
        display.tick()
    return text.getvalue()


STATES = [
    RunState("a/1", "a", DONE, updates=40, target=40, score=1.5, score_update=40),
    RunState("a/2", "a", RUNNING, updates=10, target=40, score=1.25, score_update=10),
    RunState("b/1", "b", FAILED, target=40, score=math.nan),
]


def test_without_a_terminal_the_display_is_plain_lines() -> None:
    lines = shown(STATES, terminal=False).splitlines()
    assert lines == ["something [happened]", "3 runs: 1 done, 1 running, 1 failed  eta --:--  a/2 10/40"]


def test_in_a_terminal_the_display_shows_what_runs_and_what_is_best() -> None:
    text = shown(STATES, terminal=True)
    assert "something [happened]" in text and "3 runs: 1 done, 1 running, 1 failed" in text
    assert re.search(r"a/2 +10/40 +1\.2500", text) and re.search(r"a +1\.2500 +a/2 +10", text)


# --- train --until, and a real sweep


@pytest.mark.parametrize("until", ["0", "41", "-3"])
def test_until_is_an_update_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str], until: str) -> None:
    with pytest.raises(SystemExit) as end:
        run(parser(), ["train", "base.yaml", f"--until={until}"])
    message = capsys.readouterr().err
    assert end.value.code == 2 and f"--until={until}" in message and "train.steps = 40" in message
    assert not Path("runs").exists()


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    line = [sys.executable, "-m", "lptransformer", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_until_and_resume_are_the_same_run(folder: Path) -> None:
    """The learning rate goes by train.steps, so a run in two parts equals the run in one."""
    from lptransformer.run_folder.metrics_log import read_metrics

    options = ["--train.steps=6", "--train.lr_scheduler=cosine", "--data.sequence_length=16"]
    for arguments in (
        ["--run.dir=whole"],
        ["--run.dir=parts", "--until=2"],
        ["--run.dir=parts", "--until=5", "--resume"],
        ["--run.dir=parts", "--resume"],
    ):
        done = command(folder, "train", "base.yaml", *options, *arguments)
        assert done.returncode == 0, done.stderr

    def numbers(run: str) -> list[tuple[Any, ...]]:
        rows = [record for record in read_metrics(folder / run) if "stages" in record]
        return [(row["update"], row["learning_rate"], *(entry["loss"] for entry in row["stages"])) for row in rows]

    assert numbers("parts") == numbers("whole")
    evaluated = [record["update"] for record in read_metrics(folder / "parts") if "evaluation" in record]
    assert evaluated == [2, 2, 5, 5, 6, 6]
    refused = command(folder, "train", "base.yaml", *options, "--run.dir=parts", "--resume", "--until=5")
    assert refused.returncode == 2 and "complete" in refused.stderr


@pytest.mark.slow
def test_a_real_sweep_its_stop_and_its_report(folder: Path) -> None:
    """Everything once with real processes: halving, SIGTERM, starting again, the report."""
    small = {"train.steps": 200, "data.sequence_length": 16, "train.lr_scheduler": "cosine"}
    rates = {"train.learning_rate": [0.001, 0.01]}
    write(set=small, grid=rates, methods={"m": {}}, halving={"updates": [50, 200]}, score={"set": "choose"})
    line = [sys.executable, "-m", "lptransformer", "sweep", "s.yaml", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while not list(Path("runs/s").glob("*/*/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "continues from here" in out
    done = command(folder, "sweep", "s.yaml", "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = sorted(state["status"] for state in status().values())
    assert counts == ["done", "dropped"], done.stdout
    reported = command(folder, "report", "runs/s")
    assert reported.returncode == 0 and "choose: the last exit" in reported.stdout
    assert (folder / "report" / "losses-choose.png").exists()
