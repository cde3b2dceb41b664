"""`lptransformer.initialize` on rows that a program has, and on a model in memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import small_run
import torch
import torch.nn.functional as F
from distributed import Pool
from refusals import says
from tiers import slow
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaModel

from lptransformer import initialize
from lptransformer.config.load import load
from lptransformer.data.given_rows import GivenRows, RowsInOrder
from lptransformer.data.prepare import prepare_all
from lptransformer.data.train_stream import TrainStream
from lptransformer.engine.interface import TrainingEngine
from lptransformer.engine.p2p import Control
from lptransformer.errors import ConfigError, DataError, ModelError, RunError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.run_folder import layout
from lptransformer.run_folder.metrics import EvaluationReport, StageReport

LENGTH, IDS = 16, 259
Row = dict[str, Any]
CONFIG = {**small_run.CONFIG, "data": {"tokenizer": "bytes", "sequence_length": LENGTH}}
CONFIG["train"] = CONFIG["train"] | {"steps": 6}
SIZES: dict[str, Any] = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.3}
PRETRAINED = {"data": {"sequence_length": LENGTH}, "train": CONFIG["train"] | {"learning_rate": 1e-2}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return small_run.stand_in(tmp_path, monkeypatch)


def make_rows(many: int, seed: int = 0, top: int = 99) -> list[Row]:
    """Of unlike lengths, some tokens without a label, among them a row without any."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Row] = []
    for number in range(many):
        length = 2 + int(torch.randint(LENGTH - 1, (), generator=generator))
        ids = torch.randint(top, (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < (1.0 if number % 5 == 3 else 0.3), -100)
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def weights_of(engine: TrainingEngine) -> dict[str, Tensor]:
    return {f"{stage}.{name}": one.clone() for stage, of in enumerate(engine._weights()) for name, one in of.items()}


def trained(config: Any, updates: int = 3, **given: Any) -> dict[str, Tensor]:
    with initialize(config, **given) as engine:
        for _ in range(updates):
            engine.train_batch()
        return weights_of(engine)


def same_bits(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(one, others[name]) for name, one in some.items())


# --------------------------------------------------------------------------------------------------- rows


def test_the_same_windows_give_the_same_bits(folder: Path) -> None:
    text = {**CONFIG, "data": CONFIG["data"] | {"train": "text.txt"}}
    expected = trained(text)
    tokens = prepare_all(**load(text).data.model_dump()).train[0].tokens
    rows = [{"input_ids": tokens.row(index).tolist()} for index in range(tokens.full_rows)]
    with_labels = [{**row, "labels": row["input_ids"], "text": "not read"} for row in rows]
    assert same_bits(trained(text, train_data=rows), expected), "train_data in place of data.train"
    assert same_bits(trained(CONFIG, train_data=datasets.Dataset.from_list(with_labels)), expected)
    assert not same_bits(trained(CONFIG, train_data=rows[1:]), expected)


@cache
def small_model(tied: bool = False) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch as a collator of transformers makes it."""
    longest = max(len(row["input_ids"]) for row in rows)

    def stacked(rows: Sequence[list[int]], value: int) -> Tensor:
        return torch.stack([F.pad(torch.tensor(row), (0, longest - len(row)), value=value) for row in rows])

    return {
        "input_ids": stacked([row["input_ids"] for row in rows], 0),
        "labels": stacked([row["labels"] for row in rows], -100),
        "attention_mask": stacked([[1] * len(row["input_ids"]) for row in rows], 0),
    }


@pytest.mark.parametrize("kind", ["list", slow("iterable")])
def test_labels_are_those_of_transformers(folder: Path, kind: str) -> None:
    """The loss of an update, of all of its rows at once in the library's own model."""
    rows = make_rows(4)  # an update
    with torch.no_grad():
        expected = small_model()(**padded(rows)).loss.item()
    config = {**PRETRAINED, "objective": {"name": "backprop"}}
    given: Any = rows if kind == "list" else iter(rows)
    with initialize(config, train_data=given, model=small_model()) as engine:
        (report,) = (one for one in engine.train_batch().reports if isinstance(one, StageReport))
    assert report.loss_sum is not None and report.label_tokens == sum(
        label != -100 for row in rows for label in row["labels"][1:]
    )
    assert report.loss_sum / report.label_tokens == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fit_tokens", [10_000, 100])
def test_heads_are_fitted_on_rows_that_can_be_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fit_tokens: int
) -> None:
    """More than all rows, or those of two updates; either way training begins with the first row."""
    monkeypatch.setattr("lptransformer.engine.fitting.FIT_TOKENS", fit_tokens)
    monkeypatch.setattr("lptransformer.training.build.FIT_TOKENS", fit_tokens)
    rows = make_rows(10)  # two updates and a half
    first = F.pad(torch.tensor(rows[0]["labels"][1:]), (0, LENGTH - len(rows[0]["labels"]) + 1), value=-100)
    ended = pytest.raises(DataError, match="train_data ended after 10 rows")
    with ended, initialize(PRETRAINED, train_data=iter(rows), model=small_model()) as engine:
        assert engine.blueprint.head.kind == "fitted"
        maps = [one for name, one in weights_of(engine).items() if name.endswith("map.linear.weight")]
        assert len(maps) == 1 and maps[0].abs().max() > 0
        assert torch.equal(engine.stream.batch(0).labels[0], first)
        for update in range(3):
            assert engine.update == update
            engine.train_batch()


def endless(rows: Sequence[Row]) -> Iterator[Row]:
    while True:
        yield from rows


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.chunks=2",),
        slow(("objective.name=delayed",)),
        slow(("engine=deepspeed_pipeline", "objective.name=backprop")),
    ],
    ids=str,
)
def test_a_generator_is_resumed_by_skipping(folder: Path, overrides: tuple[str, ...]) -> None:
    rows = make_rows(11)
    expected = trained(CONFIG, 4, overrides=overrides, train_data=endless(rows))
    with initialize(CONFIG, overrides, train_data=endless(rows)) as engine:
        engine.train_batch()
        engine.request(Control.SAVE)  # where gradients are delayed, before the update that it follows
        engine.train_batch()
        engine.save_checkpoint("half")
    with initialize(CONFIG, overrides, train_data=endless(rows)) as engine:
        assert engine.load_checkpoint("half") == 2
        for _ in range(2):
            engine.train_batch()
        assert same_bits(weights_of(engine), expected)


@pytest.mark.parametrize("engine", ["local", "deepspeed_pipeline"])
def test_an_evaluation_asks_for_no_row_of_the_next_update(folder: Path, engine: str) -> None:
    """After the last update there is none."""
    overrides = (f"engine={engine}", "objective.name=backprop", "train.steps=2")
    with initialize(CONFIG, overrides, train_data=iter(make_rows(8)), valid_data={"valid": make_rows(3)}) as trains:
        for _ in range(2):
            trains.train_batch()
            (report,) = trains.eval_batch("valid")
        assert isinstance(report, EvaluationReport) and report.nll_sum > 0


def test_rows_are_asked_for_one_at_a_time(folder: Path) -> None:
    """Though a thread fetches the next micro-batch: they may all come from one open file."""
    inside = threading.Lock()

    class OneFile(list[Row]):
        def __getitem__(self, index: Any) -> Any:
            assert inside.acquire(blocking=False), "two at once"
            time.sleep(0.002)
            inside.release()
            return super().__getitem__(index)

    rows = GivenRows(OneFile(make_rows(20)), LENGTH, 99)
    with ThreadPoolExecutor(2) as threads:
        counts = list(threads.map(lambda _: rows.label_counts(range(20)), range(2)))
    assert counts[0] == counts[1]


def stream(rows: Any, micro_batch_size: int = 2, micro_batches: int = 3) -> RowsInOrder:
    return RowsInOrder(rows, LENGTH, 99, micro_batch_size=micro_batch_size, micro_batches=micro_batches)


def ids_of(batch: Any) -> list[list[int]]:
    return [row.tolist() for row in batch.input_ids]


def test_rows_in_order_are_read_an_update_ahead() -> None:
    rows = [{"input_ids": [number + 1, 7, 8]} for number in range(20)]
    taken: list[int] = []

    def counted() -> Iterator[Row]:
        for number, row in enumerate(rows):
            taken.append(number)
            yield row

    read = stream(counted())
    assert [read.label_counts(index) for index in range(3)] == [[2, 2]] * 3 and len(taken) == 6
    assert [ids[0] for index in (1, 0) for ids in ids_of(read.batch(index))] == [3, 4, 1, 2], "kept, in any order"
    assert read.batch(3).input_ids[0, 0] == 7 and len(taken) == 12
    assert read.label_counts(0) == [2, 2], "what was counted of the update before is known"
    assert read.position(3) == {"epoch": 0, "offset": 6} and read.index({"epoch": 0, "offset": 6}) == 3
    with pytest.raises(DataError, match="train_data ended after 20 rows, and an update takes 6"):
        read.batch(11)
    with pytest.raises(DataError, match=r"begins at row 5 of epoch 0.*train\.micro_batch_size"):
        read.index({"epoch": 0, "offset": 5})


def test_what_can_be_read_again_begins_again() -> None:
    class Again:
        def __iter__(self) -> Iterator[Row]:
            return ({"input_ids": [number + 1, 7]} for number in range(4))

    read = stream(Again())
    assert [ids[0] for index in range(6) for ids in ids_of(read.batch(index))] == [1, 2, 3, 4] * 3
    for _ in range(4):
        read.batch(9)
    assert [ids[0] for ids in ids_of(read.batch(0))] == [1, 2], "an older checkpoint"
    once = stream(endless([{"input_ids": [1, 7]}]))
    once.batch(12)
    with pytest.raises(DataError, match=r"an iterator that was read up to row 29.*update 1 begins at row 0.*anew"):
        once.batch(0)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ([1, 2], ("is a list", "{input_ids, labels}")),
        ({"text": "a"}, ("holds text", "{input_ids, labels}")),
        ({"input_ids": "abc"}, ("input_ids is text", "whole numbers")),
        ({"input_ids": ["a", "b"]}, ("input_ids is text", "whole numbers")),
        ({"input_ids": [1.5]}, ("float64", "whole numbers")),
        ({"input_ids": [[1, 2], [3, 4]]}, ("2 dimensions", "whole numbers")),
        ({"input_ids": [[1, 2], [3]]}, ("input_ids cannot be read",)),
        ({"input_ids": []}, ("has 0 tokens",)),
        ({"input_ids": [1] * 17}, ("has 17 tokens", "data.sequence_length is 16")),
        ({"input_ids": [1, 2, 3], "labels": [2, 3]}, ("3 input_ids and 2 labels", "not shifted")),
        ({"input_ids": [1, 99]}, ("holds 99", "ids are 0 to 98")),
        ({"input_ids": [1, -1]}, ("holds -1",)),
        ({"input_ids": [1, 2], "labels": [1, -1]}, ("holds -1",)),
        ({"input_ids": [1, 2], "labels": [1, 99]}, ("holds 99",)),
        ({"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1]}, ("attention_mask hides more than padding",)),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, ("attention_mask",)),
    ],
)
def test_a_row_that_is_none(row: Any, parts: tuple[str, ...]) -> None:
    rows = GivenRows([{"input_ids": [1, 2]}, row], LENGTH, 99)
    with pytest.raises(DataError) as caught:
        rows.window(1)
    says(str(caught.value), "train_data: row 1", *parts)
    in_order = stream([{"input_ids": [1, 2]}, row], 2, 1)
    with pytest.raises(DataError) as caught:
        in_order.label_counts(0)
    says(str(caught.value), "train_data: row 1", *parts)


def test_what_rows_may_hold() -> None:
    """Lists, arrays and tensors; masked padding is no part of the row; the first token has no label."""
    kinds: list[Row] = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]},
        {"input_ids": np.array([5, 6, 7], np.int32), "labels": np.array([5, 6, -100])},
        {
            "input_ids": torch.tensor([5, 6, 7, 0]),
            "labels": [5, 6, -100, 0],
            "attention_mask": torch.tensor([1, 1, 1, 0]),
        },
    ]
    batch = TrainStream([GivenRows(kinds, LENGTH, 99)], None, 0, 3).batch(0)
    assert batch.input_ids.tolist() == [[5, 6, 7] + [0] * 13] * 3 and batch.position_ids is None
    assert batch.labels.tolist() == [[6] + [-100] * 15] * 3 and batch.label_tokens == 3


# ---------------------------------------------------------------------------------------- several processes


def rows_of(kind: str, rank: int) -> Any:
    """What a process gives, and which differs on process 1 but for "same"."""
    rows = make_rows(24)
    if rank == 0 or kind.startswith("same"):
        return iter(rows) if kind in ("same generator", "later", "label later") else rows
    if kind == "later":
        return iter([*rows[:13], {"input_ids": [1, 2, 3]}, *rows[14:]])  # in the micro-batch 0 of update 4
    if kind == "label later":
        changed = {**rows[14], "labels": [-100] * len(rows[14]["labels"])}
        return iter([*rows[:14], changed, *rows[15:]])
    return {"first": rows[::-1], "number": rows[:-1], "broken": [*rows[:-1], {"input_ids": [1000]}]}[kind]


def train_on_rows(kind: str, overrides: tuple[str, ...], updates: int) -> dict[str, Tensor] | tuple[str, str]:
    """In a process of a run: the weights of its stages, or what ended it."""
    rows = rows_of(kind, int(os.environ.get("RANK", "0")))
    try:
        with initialize({**CONFIG, "parallel": {"timeout_seconds": 20}}, overrides, train_data=rows) as engine:
            for _ in range(updates):
                engine.train_batch()
            return weights_of(engine)
    except (UserError, SystemExit) as error:
        return type(error).__name__, str(error)


TWO, REPLICAS = ("parallel.pipeline=2", "objective.chunks=2"), ("parallel.data=2",)


def test_other_rows_in_another_process_end_the_run(folder: Path, pool: Pool) -> None:
    """Every process says the same, also one that has come to its end."""
    for kind, message in pool.run(2, train_on_rows, "later", TWO, 5):
        assert kind == "DataError", message
        finder = "pipeline rank 1 (process 1)"
        says(message, f"update 4, micro-batch 0: {finder} has other rows", "every process", "same order")


@pytest.mark.parametrize(
    ("kind", "overrides", "said"),
    [
        ("first", TWO, "process 1 has another first micro-batch"),
        slow("number", REPLICAS, "another number of rows"),
        slow("label later", TWO, "has other rows"),
    ],
)
def test_other_rows_are_seen_at_the_start(
    folder: Path, pool: Pool, kind: str, overrides: tuple[str, ...], said: str
) -> None:
    answers = pool.run(2, train_on_rows, kind, overrides, 5)
    assert said in answers[0][1]
    if "later" not in kind:
        assert [answer[0] for answer in answers] == ["DataError", "SystemExit"], "one message"


@pytest.mark.parametrize("kind", ["same generator", slow("same")])
def test_the_placement_changes_nothing(folder: Path, pool: Pool, kind: str) -> None:
    epochs = ("train.steps=null", "train.epochs=0.5") if kind == "same" else ()  # 12 rows, 3 updates of 4
    alone = train_on_rows(kind, ("objective.chunks=2", *epochs), 3)
    assert isinstance(alone, dict)
    parts = pool.run(2, train_on_rows, kind, (*TWO, *epochs), 3)
    together = {
        f"{rank}.{name.partition('.')[2]}": one for rank, part in enumerate(parts) for name, one in part.items()
    }
    assert same_bits(together, alone)


# ---------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("tied", [True, slow(False)])
def test_a_model_in_memory_is_that_of_its_folder(folder: Path, tied: bool) -> None:
    model = small_model(tied)
    model.save_pretrained(folder / "model")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with initialize(PRETRAINED, train_data=make_rows(12), model="model") as engine:
        start = weights_of(engine)
    assert len(start) > 30 and same_bits(trained(PRETRAINED, 0, train_data=make_rows(12), model=model), start)
    keys = {"objective": {"name": "backprop"}, "model": {"tie": "keep" if tied else "separate"}}
    with initialize({**PRETRAINED, **keys}, train_data=make_rows(12), model=model) as engine:
        ids = torch.arange(12).view(1, 12)
        assert torch.equal(engine.pretrained_model()(ids).logits, model(ids).logits)
        engine.train_batch()
        assert not torch.equal(engine.pretrained_model()(ids).logits, model(ids).logits)
    assert same_bits(dict(model.state_dict()), before), "training has weights of its own"


@pytest.mark.parametrize("checked", [False, True])
def test_the_arguments_win_over_the_file(folder: Path, checked: bool) -> None:
    raw = {**PRETRAINED, "model": {"hidden_size": 32, "num_layers": 2}, "data": PRETRAINED["data"] | {"train": "none"}}
    with initialize(load(raw) if checked else raw, train_data=make_rows(12), model=small_model()) as engine:
        assert (engine.blueprint.parts.hidden_size, len(engine.stages)) == (16, 2)
        assert engine.blueprint.parts.vocab_size == 99


def test_its_run_folder(folder: Path) -> None:
    """A run is evaluated and read as any other; what takes a tokenizer says so."""
    model = small_model()
    with initialize(PRETRAINED, train_data=make_rows(12), model=model) as engine:
        engine.train_batch()
        engine.save_checkpoint("run")
        expected = engine.pretrained_model()(torch.arange(12).view(1, 12)).logits
    assert torch.equal(trained_model.load(Path("run"), 1).logits(torch.arange(12).view(1, 12)), expected)
    assert layout.read_data(Path("run")) == {"train": {}, "valid": {}}
    assert (Path("run") / layout.PRETRAINED / "config.json").is_file()
    for refuses in (lambda: export_run(Path("run"), Path("out")), lambda: evaluate_run("run", "text.txt")):
        with pytest.raises(RunError, match=r"no folder tokenizer.*rows of a program.*data\.tokenizer"):
            refuses()
    with initialize(PRETRAINED, ["data.tokenizer=bytes", "data.valid=text.txt"], train_data=make_rows(12)) as engine:
        engine.train_batch()
        engine.save_checkpoint("with")
        assert list(engine.valid) == ["valid"]
    export_run(Path("with"), Path("out"))
    assert AutoModelForCausalLM.from_pretrained("out").config.vocab_size == IDS


def test_validation_rows(folder: Path) -> None:
    rows = make_rows(5, seed=1)
    given = {"train_data": make_rows(8), "valid_data": {"held out": rows}, "model": small_model()}
    with initialize({**PRETRAINED, "objective": {"name": "backprop"}}, **given) as engine:
        with pytest.raises(ConfigError):
            initialize(CONFIG)  # what is refused leaves this one alone
        engine.train_batch()
        model = engine.pretrained_model()
        (report,) = (one for one in engine.eval_batch("held out") if isinstance(one, EvaluationReport))
    with torch.no_grad():
        loss = model(**padded(rows)).loss.item()
    assert report.nll_sum is not None
    assert report.nll_sum / report.label_tokens == pytest.approx(loss, rel=1e-6)


REFUSED: dict[str, tuple[type[UserError], tuple[str, ...], Callable[[], Any]]] = {
    "no text": (ConfigError, ("data.train is missing",), lambda: initialize(CONFIG)),
    "valid alone": (
        ConfigError,
        ("valid_data goes with train_data",),
        lambda: initialize(CONFIG, valid_data={"v": make_rows(1)}),
    ),
    "a share": (
        ConfigError,
        ("data.valid = 0.1", "of train_data nothing is held out"),
        lambda: initialize(CONFIG, ["data.valid=0.1"], train_data=make_rows(1)),
    ),
    "two of a name": (
        ConfigError,
        ("both a set v", "another name"),
        lambda: initialize(
            CONFIG, ["data.valid={v: text.txt}"], train_data=make_rows(1), valid_data={"v": make_rows(1)}
        ),
    ),
    "no tokenizer to train": (
        ConfigError,
        ("data.tokenizer is sentencepiece", "train_data has none"),
        lambda: initialize(CONFIG, ["data.tokenizer=null", "data.valid=text.txt"], train_data=make_rows(1)),
    ),
    "nothing": (DataError, ("train_data has no rows",), lambda: initialize(CONFIG, train_data=[])),
    "a mapping": (
        DataError,
        ("is a dict of train, test", "give one of these"),
        lambda: initialize(CONFIG, train_data={"train": [], "test": []}),
    ),
    "a number": (DataError, ("train_data is a int",), lambda: initialize(CONFIG, train_data=7)),
    "valid without a length": (
        DataError,
        ("valid_data v is a list_iterator without a length",),
        lambda: initialize(CONFIG, train_data=make_rows(1), valid_data={"v": iter([])}),
    ),
    "epochs without a length": (
        ConfigError,
        ("train.epochs = 2.0", "train_data has no length", "give train.steps"),
        lambda: initialize(CONFIG, ["train.epochs=2"], train_data=iter(make_rows(9))),
    ),
    "no model": (ModelError, ("model is a int", "OWNER/NAME"), lambda: initialize(PRETRAINED, model=7)),
    "no causal LM": (
        ModelError,
        ("model is a LlamaModel", "its causal LM, LlamaForCausalLM"),
        lambda: initialize(PRETRAINED, train_data=make_rows(9), model=LlamaModel(LlamaConfig(**SIZES))),
    ),
    "no tokenizer": (
        ConfigError,
        ("model is in memory and has no tokenizer", "data.tokenizer"),
        lambda: initialize(PRETRAINED, ["data.train=text.txt"], model=small_model()),
    ),
    "a folder that is not there": (
        ModelError,
        ("model.pretrained = 'none' (given to initialize)", "no such folder"),
        lambda: initialize(PRETRAINED, train_data=make_rows(9), model="none"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(folder: Path, case: str) -> None:
    kind, parts, call = REFUSED[case]
    before = {*folder.iterdir(), folder / "prepared"}  # a cache, of whole things
    with pytest.raises(kind) as caught:
        call()
    says(str(caught.value), *parts)
    assert {*folder.iterdir()} <= before


def test_weights_that_are_not_there(folder: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(ModelError, match=r"weight transformer\.wte\.weight \(99, 16\) it has one of .* on meta"):
        initialize(PRETRAINED, train_data=make_rows(9), model=model)
