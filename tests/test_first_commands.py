"""What a person types first over the quick start's configuration: it works, or one line says what would.

Every way to start is run in training/test_launchers.py; here one process checks what each command asks for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import small_run
from tiers import slow

from lptransformer.__main__ import parser
from lptransformer.config.load import load
from lptransformer.methods.heads import HEADS
from lptransformer.methods.objectives import METHODS
from lptransformer.training.launcher import main as start_worker
from lptransformer.training.launcher import run, with_equals

ROOT = Path(__file__).parents[1]
QUICK = "configs/quickstart.yaml"
BOOK = "data/books/valid/wuthering-heights.txt"

WORKS = [
    *([QUICK, f"--objective.name={name}"] for name in METHODS),
    *([QUICK, f"--head.kind={name}"] for name, row in HEADS.items() if not row.fitted),
    [QUICK, "--engine=deepspeed_pipeline"],
    [QUICK, "--engine", "deepspeed_pipeline"],
    [QUICK, "--train.steps=4"],
    [QUICK, "--train.steps", "4"],
    ["--train.steps", "4", QUICK],
    [QUICK, "--train.lr_scheduler=constant"],
    slow([QUICK, "--train.micro_batch_size=auto"]),
    [QUICK, "--train.dtype=bf16"],
    [QUICK, "--model.family=gpt2"],
    [QUICK, "--model.num_layers=8"],
    [QUICK, "--optimizer.name=sgd"],
    [QUICK, "--parallel.pipeline=1"],
    [QUICK, "--parallel.data=2"],
    [QUICK, "--data.tokenizer=bytes"],
    [QUICK, f"--data.train={BOOK}", "--data.valid=null"],
    [f"--data.train={BOOK}"],
    ["--data.train", BOOK, "--train.steps", "20"],
    ["--data.train", BOOK, "--run.trace", "[1, 3]", "--objective", "{name: chunked, chunks: 2}"],
]
REFUSED = [
    ([], "data.train is missing"),
    (["configs/quickstar.yaml"], "configs/quickstar.yaml"),
    ([QUICK, "--data.train=nothing/*.txt"], "no file matches nothing/*.txt"),
    ([QUICK, "--data.valid=nothing.txt"], "no file matches nothing.txt"),
    ([QUICK, "--data.tokenizer=nowhere"], "nowhere"),
    ([QUICK, "--data.vocab_size=100"], "260 or more"),
    ([QUICK, "--data.sequence_length=1"], "2 or more"),
    ([QUICK, "--data.sequence_lenght=64"], "did you mean data.sequence_length?"),
    ([QUICK, "--objective.name=chunk"], "did you mean chunked?"),
    ([QUICK, "--objective.name=backprop", "--objective.chunks=2"], "objective.chunks = 2 (on the command line)"),
    ([QUICK, "--train.steps"], "has no value: write --train.steps=VALUE"),
    ([QUICK, "--train.step", "4"], "did you mean train.steps?"),
    ([QUICK, "--parallel.pipeline=8"], "every pipeline rank needs a block"),
]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize("typed", WORKS, ids=" ".join)
def test_it_works(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(parser(), ["train", *typed, "--dry-run", "--run.dir=runs/not-there"])
    said = capsys.readouterr()
    assert "dry run: runs/not-there is not touched" in said.out and "Traceback" not in said.err
    assert all(line.startswith("lptransformer: ") for line in said.err.splitlines())
    assert not Path("runs/not-there").exists()


@pytest.mark.parametrize(("typed", "says"), REFUSED, ids=[" ".join(typed) or "nothing" for typed, _ in REFUSED])
def test_or_one_line_says_what_would(typed: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(parser(), ["train", *typed, "--run.dir=runs/not-there"])
    *notes, refusal = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and refusal.startswith("lptransformer: ") and says in refusal, refusal
    assert all(" is left out, with " in note for note in notes)
    assert not Path("runs/not-there").exists()


@pytest.mark.parametrize(
    ("typed", "following"),
    [
        ([QUICK, "--data.sequence_lenght=64"], f"train {QUICK} --data.sequence_length=64"),
        ([QUICK, "--data.sequence_lenght", "64"], f"train {QUICK} --data.sequence_length=64"),
        ([QUICK, "--objective.name=chunk"], f"train {QUICK} --objective.name=chunked"),
        ([QUICK, "--objective.name=backprop", "--objective.chunks=2"], f"train {QUICK} --objective.name=backprop"),
        ([QUICK, "--resume"], f"train {QUICK}"),
        ([QUICK, "--resume", "--overwrite"], f"train {QUICK} --resume"),
        (
            [QUICK, "--data.sequence_length=100000000"],
            f"train {QUICK} --train.micro_batch_size=1 --data.sequence_length=",
        ),
        (["first.yaml"], "init --data FILES > first.yaml"),
        ([QUICK, "--data.vocab_size=100"], f"config {QUICK}"),
        ([QUICK, "--lr=0.01"], f"train {QUICK} --train.learning_rate=0.01"),
        ([QUICK, "--train.lr", "0.01"], f"train {QUICK} --train.learning_rate=0.01"),
        ([QUICK, "--steps", "5"], f"train {QUICK} --train.steps 5"),
        ([QUICK, "--batch_size=4"], f"train {QUICK} --train.micro_batch_size=4"),
        ([QUICK, "--until=0"], "train --help"),
        (["--data.train=nothing"], "init --data FILES > run.yaml"),
        ([QUICK, "--hostfile=nowhere"], "train --help"),
    ],
    ids=str,
)
def test_a_refusal_ends_with_the_next_command(
    typed: list[str], following: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(parser(), ["train", *typed, *(["--run.dir=runs/not-there"] if "--resume" in typed else [])])
    _, _, found = capsys.readouterr().err.strip().rpartition("; next: `python -m lptransformer ")
    without = found.replace(" --run.dir=runs/not-there", "")
    assert without == f"{following}`" or (following.endswith("=") and found.startswith(following)), found


def test_a_run_folder_instead_of_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named as CONFIG; and started again when it is complete."""
    small_run.stand_in(tmp_path, monkeypatch)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((tmp_path / "c.yaml").read_text())
    (tmp_path / "run" / "environment.json").write_text('[{"versions": {"lptransformer": "0.3"}}]')
    (tmp_path / "run" / "ended.json").write_text('{"how": "finished", "update": 2}')
    for typed, following in (
        (["train", "run", "--resume"], "train run/config.yaml --resume"),
        (["train", "c.yaml"], "report run"),
        (["train", "c.yaml", "--train.steps=3"], "train c.yaml --train.steps=3 --resume"),
        (["evaluate", "run", "text.txt"], "evaluate run --data=text.txt"),
    ):
        with pytest.raises(SystemExit) as end:
            run(parser(), typed)
        assert end.value.code == 2
        assert capsys.readouterr().err.strip().endswith(f"; next: `python -m lptransformer {following}`")


def test_a_text_too_small_for_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run.stand_in(tmp_path, monkeypatch)
    with pytest.raises(SystemExit):
        run(parser(), ["train", "c.yaml", "--data.tokenizer=sentencepiece"])
    said = capsys.readouterr().err
    assert "at most" in said and "c.yaml --data.tokenizer=sentencepiece --data.vocab_size=" in said


def test_blanks_before_values_of_keys_alone() -> None:
    typed = [
        "train",
        "c.yaml",
        "--resume",
        "--train.steps",
        "4",
        "--until",
        "3",
        "--engine",
        "local",
        "--data.train",
        "*",
    ]
    assert with_equals(typed) == [
        *("train", "c.yaml", "--resume", "--train.steps=4", "--until", "3", "--engine=local", "--data.train=*")
    ]
    for words in (["--train.steps", "=", "4"], ["--train.steps=", "4"], ["--train.steps", "=4"]):
        assert with_equals(words) == ["--train.steps=4"]
    assert with_equals(["--train.learning_rate", "-1", "--train.steps", "--resume"]) == [
        *("--train.learning_rate=-1", "--train.steps", "--resume")
    ]


@pytest.mark.parametrize("typed", [[QUICK], ["--config", QUICK], [f"--config={QUICK}"], ["--local_rank=0", QUICK]])
def test_a_launcher_s_process_takes_the_file_with_and_without_its_flag(
    typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        start_worker([*typed, "--parallel.pipeline=3"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "1 processes were started" in said and f"(in {QUICK})" not in said.split("needs")[1]


def test_two_files_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start_worker([QUICK, "--config", "other.yaml"])
    assert "give one file" in capsys.readouterr().err


def test_init_prints_a_configuration_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(parser(), ["init", "--data", BOOK, "--data", "data/books/train/*.txt"])
    (tmp_path / "first.yaml").write_text(capsys.readouterr().out)
    config = load(tmp_path / "first.yaml")
    assert config.data.train["train"].files == [BOOK, "data/books/train/*.txt"]
    run(parser(), ["train", str(tmp_path / "first.yaml"), "--dry-run"])
    assert "dry run" in capsys.readouterr().out
    run(parser(), ["init", "--data", "hub:own/set", "--data", "nothing/*"])
    assert "hub:" not in (said := capsys.readouterr().err) and "no file matches nothing/*" in said


def test_init_for_a_pretrained_model_has_no_start_that_harms_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig

    from lptransformer.config import pretrained

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaConfig(vocab_size=99, **sizes).save_pretrained(tmp_path)
    run(parser(), ["init", "--pretrained", str(tmp_path)])
    text = capsys.readouterr().out
    assert "hidden_size" not in text
    (tmp_path / "first.yaml").write_text(text)
    assert pretrained.warning(load(tmp_path / "first.yaml")) is None
    with pytest.raises(SystemExit):
        run(parser(), ["init", "--pretrained", str(tmp_path / "nowhere")])
    said = capsys.readouterr()
    assert said.out == "" and "no such folder" in said.err
