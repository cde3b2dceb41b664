"""What fits into memory: the refusal of what cannot, and the number for `train.micro_batch_size: auto`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import small_run
import yaml
from safetensors.torch import load_file

from lptransformer import processes
from lptransformer.__main__ import parser
from lptransformer.config.checks import micro_batch_size
from lptransformer.config.load import load, to_yaml
from lptransformer.config.schema import Config
from lptransformer.engine.process_groups import leave
from lptransformer.errors import ConfigError
from lptransformer.models.blueprint import Blueprint, make_blueprint
from lptransformer.planning import dry_run
from lptransformer.planning.dry_run import predicted
from lptransformer.run_folder import layout
from lptransformer.training import memory, this_host
from lptransformer.training import train as training
from lptransformer.training.build import initialize
from lptransformer.training.launcher import run
from lptransformer.training.memory import Pool

CONFIG = small_run.CONFIG | {"train": {**small_run.CONFIG["train"], "micro_batch_size": "auto"}}
BYTES = 259  # entries of the vocabulary


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return small_run.stand_in(tmp_path, monkeypatch, CONFIG)


def given(*overrides: str) -> tuple[Config, Blueprint]:
    config = load(CONFIG, overrides)
    sized = config if config.train.micro_batch_size != "auto" else memory.with_size(config, 1)
    return config, make_blueprint(sized, BYTES, None)


@cache
def peak(size: int, *overrides: str) -> int:
    """What is predicted for a number given by hand, of the pipeline rank that needs most."""
    config, plan = given(*overrides, f"train.micro_batch_size={size}")
    return max(rank.peak for rank in predicted(config, plan))


def memory_for(size: int, *overrides: str) -> int:
    """The memory of which 0.9 are just enough for a number."""
    return int(peak(size, *overrides) / 0.9) + 2


def number(config: Config, plan: Blueprint, free: int, rows: int | None) -> int:
    """What `auto` comes to where every pipeline rank has a pool of its own."""
    pools = [Pool(f"host-{rank}", free, (rank,)) for rank in range(config.parallel.pipeline)]
    size = memory.largest(config, plan, pools, rows).train.micro_batch_size
    assert isinstance(size, int)
    return size


# ---------------------------------------------------------------------------------------------------- the number


@pytest.mark.parametrize("overrides", [(), ("parallel.pipeline=2", "objective.name=backprop")])
def test_the_number_fits_and_its_double_does_not(overrides: tuple[str, ...]) -> None:
    config, plan = given(*overrides)
    assert number(config, plan, memory_for(2, *overrides), None) == 2
    assert number(config, plan, memory_for(4, *overrides) - 4, None) == 2
    with pytest.raises(ConfigError, match="not even 1 fits.*more pipeline ranks"):
        number(config, plan, memory_for(1, *overrides) - 4, None)


def test_zero_3_is_given_a_smaller_share() -> None:
    config, plan = given("deepspeed.zero_optimization.stage=3")
    free = int(peak(4, "deepspeed.zero_optimization.stage=3") / 0.85)
    assert number(config, plan, free, None) < 4


def test_an_update_takes_no_more_than_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    config, plan = given()  # 2 micro-batches in an update
    assert number(config, plan, 2**40, 16) == 8
    assert number(config, plan, 2**40, 15) == 4
    assert "an update of 16 would be more than an epoch, 15 windows" in capsys.readouterr().out
    assert number(config, plan, 2**40, 1) == 1


def test_it_says_what_it_chose(capsys: pytest.CaptureFixture[str]) -> None:
    config, plan = given()
    number(config, plan, memory_for(4), None)
    said = capsys.readouterr().out
    needed, has, more = (f"{size / 2**30:.3g} GiB" for size in (peak(4), memory_for(4), peak(8)))
    for part in ("auto is 4:", needed, has, "90%", f"8 would need {more}", "4 x 2 = 8 windows"):
        assert part in said


# -------------------------------------------------------------------------------------------- who may read the word


def test_the_word_is_never_taken_for_a_number() -> None:
    config = load(CONFIG)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size is auto.*--train\.micro_batch_size=8"):
        micro_batch_size(config)
    again = load(yaml.safe_load(to_yaml(config)))
    assert again.train.micro_batch_size == "auto" and "micro_batch_size: auto" in to_yaml(again)
    with pytest.raises(ConfigError, match="must be a whole number, 1 or more, or auto"):
        load(CONFIG, ["train.micro_batch_size=atuo"])
    with pytest.raises(ConfigError, match="deepspeed_pipeline"):
        load(CONFIG, ["engine=deepspeed_pipeline", "objective.name=backprop"])


@pytest.mark.parametrize("arguments", [["plan", "c.yaml", "--gpu=h100"], ["sweep", "s.yaml", "--dry-run"]])
def test_other_commands_refuse_it(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    (folder / "s.yaml").write_text("base: c.yaml\ngrid: {train.seed: [0, 1]}\nscore: {set: valid}\n")
    with pytest.raises(SystemExit) as end:
        run(parser(), arguments)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "train.micro_batch_size is auto" in message and "give" in message
    assert not (folder / "runs").exists()


def test_the_engine_by_itself_finds_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "own_memory", lambda: ("here", memory_for(4)))
    with initialize(CONFIG) as engine:
        assert engine.blueprint.micro_batch_size == 4


def test_a_dry_run_shows_the_number(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "own_memory", lambda: ("here", memory_for(4)))
    run(parser(), ["train", "c.yaml", "--dry-run"])
    said = capsys.readouterr().out
    assert "auto is 4:" in said and f"an update: {4 * 2 * 16} tokens" in said
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "text.txt"]


# ------------------------------------------------------------------------------------------------------- in training


def weights(folder: Path, update: int) -> dict[str, bytes]:
    files = sorted((folder / f"checkpoints/step-{update:08d}").glob("stage-*/weights.safetensors"))
    assert files
    return {f"{f.parent.name} {name}": t.numpy().tobytes() for f in files for name, t in load_file(f).items()}


@pytest.mark.slow
def test_a_run_folder_has_the_number_keeps_it_and_is_the_run_of_that_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = memory_for(4)
    monkeypatch.setattr(memory, "own_memory", lambda: ("here", free))
    by_hand = ["train", "c.yaml", "--train.micro_batch_size=4", "--run.dir=by-hand"]
    for arguments in (["train", "c.yaml", "--until=1"], by_hand):
        run(parser(), arguments)
        leave()
    written = (Path("run") / layout.CONFIG).read_text()
    assert yaml.safe_load(written)["train"]["micro_batch_size"] == 4
    free = 1  # would give no number now
    run(parser(), ["train", "c.yaml", "--resume", "--force"])
    leave()
    assert (Path("run") / layout.CONFIG).read_text() == written
    assert weights(Path("run"), 2) == weights(Path("by-hand"), 2)


def train_with_memory(folder: str, memories: list[int], resume: bool, until: int) -> str:
    """A process of a run, with a memory of its own; the run folder's configuration."""
    os.chdir(folder)
    rank = int(os.environ["RANK"])
    config = load("c.yaml", ["parallel.pipeline=2"])
    with pytest.MonkeyPatch.context() as patch:  # this process goes on to other tests
        patch.setattr(memory, "own_memory", lambda: (f"host-{rank}", memories[rank]))
        training.train(config, resume=resume, until=until)
    return (Path("run") / layout.CONFIG).read_text()


@pytest.mark.slow
def test_processes_agree_on_the_smallest_memory(folder: Path, pool: Any) -> None:
    pipeline = "parallel.pipeline=2"
    small, large = memory_for(2, pipeline), memory_for(8, pipeline)
    for memories, resume, until in (([large, small], False, 1), ([large, large], True, 2)):
        for text in pool.run(2, train_with_memory, str(folder), memories, resume, until):
            assert yaml.safe_load(text)["train"]["micro_batch_size"] == 2


def refused_for_memory(folder: str, memories: list[int]) -> str:
    os.chdir(folder)
    rank = int(os.environ["RANK"])
    config = load("c.yaml", ["parallel.pipeline=2"])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "own_memory", lambda: (f"host-{rank}", memories[rank]))
            training.train(config)
    except (ConfigError, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return "trained"


@pytest.mark.slow
def test_where_nothing_fits_one_process_says_why_and_all_leave(folder: Path, pool: Any) -> None:
    first, second = pool.run(2, refused_for_memory, str(folder), [2**40, 1000])
    assert "not even 1 fits" in first and second == "SystemExit 2"
    assert not (folder / "run").exists()


# -------------------------------------------------------------------------------------------------- free memory


def group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    group(root / "job" / "step", "max", 700, 0)
    group(root / "job", "1000", 800, 50)
    assert list(processes.cgroup_rooms(root, own)) == [250]

    old = root / "memory" / "job"
    old.mkdir(parents=True)
    for name, value in (("limit_in_bytes", 900), ("usage_in_bytes", 500)):
        (old / f"memory.{name}").write_text(f"{value}\n")
    (old / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 30\n")
    own.write_text("5:cpu:/job\n4:memory:/job\n0::/gone\n")
    assert list(processes.cgroup_rooms(root, own)) == [430]
    assert list(processes.cgroup_rooms(root, tmp_path / "no such file")) == []


def test_processes_of_a_host_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processes, "cgroup_rooms", lambda: [1001])
    own = memory.own_memory()
    assert own[1] == 1001 and memory.pools([own, own]) == [Pool(own[0], 1001, (0, 1))]
    assert memory.pools([("a", 5), ("b", 7), ("a", 3)]) == [Pool("a", 3, (0, 2)), Pool("b", 7, (1,))]


def test_pipeline_ranks_on_one_gpu_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    cuda = processes.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: ([10, 90][device], 100))
    assert memory.own_memory()[1] == 90
    shared = memory.pools([tuple(one) for one in json.loads(this_host.of_gpus(4))])
    assert [(pool.free, pool.ranks) for pool in shared] == [(10, (0, 2)), (90, (1, 3))]
    assert [pool.name.split(" of ")[0] for pool in shared] == ["GPU 0", "GPU 1"]


# ------------------------------------------------------------------------------------------ what cannot fit is refused

FIXED = ("train.micro_batch_size=8", "parallel.pipeline=2")


def needed(*overrides: str) -> int:
    """Bytes of the two processes of a run on one host."""
    config, plan = given("parallel.pipeline=2", *overrides)
    return sum(rank.peak for rank in predicted(config, plan))


@pytest.fixture
def refusal(folder: Path) -> Callable[..., str]:
    return refused


def refused(free: int, *overrides: str) -> str:
    config, plan = given(*FIXED, *overrides)
    with pytest.raises(ConfigError) as caught:
        memory.refuse_what_does_not_fit(config, plan, [Pool("here", free, (0, 1))])
    return str(caught.value)


def test_what_fits_is_not_refused() -> None:
    config, plan = given(*FIXED)
    memory.refuse_what_does_not_fit(config, plan, [Pool("here", needed(FIXED[0]), (0, 1))])


def test_a_refusal_has_both_numbers_and_the_largest_micro_batch_that_fits(refusal: Callable[..., str]) -> None:
    free = needed("train.micro_batch_size=4")
    said = refusal(free)
    assert "train.micro_batch_size = 8 (on the command line) with data.sequence_length = 16" in said
    assert f"2 processes need {needed(FIXED[0]) / 2**30:.3g} GiB (predicted) of the {free / 2**30:.3g} GiB" in said
    assert "train.micro_batch_size=4 would; --force starts it anyway" in said
    assert "train.micro_batch_size=2 would" in refusal(free - 1)


def test_or_else_the_longest_window_that_fits(refusal: Callable[..., str]) -> None:
    long = "data.sequence_length=1000"
    assert "train.micro_batch_size=1 and data.sequence_length=64 would" in refusal(
        needed("train.micro_batch_size=1", "data.sequence_length=64"), long
    )
    assert "A smaller model, more pipeline ranks or a higher ZeRO stage would" in refusal(1000)


def test_on_gpus_an_offloaded_optimizer_is_a_remedy_and_the_hosts_are_asked_too(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    for module in (memory, dry_run):
        monkeypatch.setattr(module, "on_gpus", lambda: True)
    zero = "deepspeed.zero_optimization"
    offloaded = (f"{zero}.stage=2", f"{zero}.offload_optimizer.device=cpu")
    small = ("train.micro_batch_size=1", "data.sequence_length=2")
    assert needed(*small, *offloaded) < needed(*small)
    said = refusal(needed(*small) - 1, *small)
    assert f"{' and '.join(offloaded)} would; --force" in said
    sgd = (*small, "optimizer.name=sgd")  # which is not offloaded
    assert "A smaller model" in refusal(needed(*sgd) - 1, *sgd)

    config, plan = given(*FIXED, *offloaded)
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    pools = memory.in_all([[("GPU 0", 2**40), *memory.offloaded_to()]] * 2)
    assert [(pool.ranks, pool.used) for pool in pools] == [((0, 1), "peak"), ((0, 1), "host")]
    with pytest.raises(ConfigError, match=r"offload_optimizer = .* does not fit: .* that the host .* has free"):
        memory.refuse_what_does_not_fit(config, plan, pools)
    config, plan = given(*small)
    full = memory.in_all([[("GPU 0", needed(*small) - 1), *memory.offloaded_to()]])
    assert memory.what_would_fit(config, plan, full) == [], "the host has no room for it"


def test_very_long_windows_are_refused_in_seconds(refusal: Callable[..., str]) -> None:
    started = time.process_time()
    assert "1000000" in refusal(2**34, "data.sequence_length=1000000")
    assert time.process_time() - started < 20


def test_the_command_refuses_before_anything_is_started_and_force_starts_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "own_memory", lambda: ("here", 1000))
    command = ["train", "c.yaml", "--train.micro_batch_size=2", "--until=1"]
    with pytest.raises(SystemExit) as end:
        run(parser(), command)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "does not fit" in said
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "text.txt"]
    run(parser(), [*command, "--force"])
    leave()
    assert (folder / "run" / "checkpoints").is_dir()
