"""A trained model, whole or a group of blocks at a time; run folders whose files are damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import TEXT, WINDOW, make_run, rewrite, write_text
from transformers import AutoModelForCausalLM, LlamaConfig

from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import ModelError, RunError
from lptransformer.evaluation import perplexity, trained_model
from lptransformer.evaluation.diagnosis import diagnose_run
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.run_folder import checkpoint, saved_stage


def test_a_model_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(content: object) -> None:
        raise ModelError("no such family")

    for name in ("read_config", "read_model_config"):
        monkeypatch.setattr(trained_model.layout, name, lambda run: {})
    monkeypatch.setattr(trained_model, "saved_config", damaged)
    with pytest.raises(RunError, match=f"{tmp_path}: its configuration or model.json is damaged: no such family"):
        trained_model.blueprint_of(tmp_path)


@pytest.mark.parametrize("text", ["{}", "not JSON", '{"plan": {"index": 0}, "num_stages": 1}'])
def test_a_state_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / saved_stage.STATE).write_text(text)
    with pytest.raises(RunError, match=f"{tmp_path / saved_stage.STATE} cannot be read"):
        saved_stage.read_state(tmp_path)


# ---- a group of blocks at a time


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: a run whose heads have all kinds of parts, and beside it a folder of it with its exits."""
    folder = tmp_path_factory.mktemp("saved")
    head = {"kind": "shared", "blocks": 1}
    run = make_run(folder, model={"family": "llama"}, head=head, chunks=2, valid={"moor": TEXT})
    export_run(run, folder / "out", keep_exits=True)
    return run


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Groups of one block; how many weights of groups before were still in memory whenever one was read."""
    alive: list[int] = []
    read, weights = trained_model._read_group, weakref.WeakSet[torch.Tensor]()

    def watched(*args: Any) -> Any:
        alive.append(len(weights))
        stage = read(*args)
        weights.update(stage.parameters())
        return stage

    monkeypatch.setattr(trained_model, "GROUP_BYTES", 1)
    monkeypatch.setattr(trained_model, "_read_group", watched)
    return alive


@pytest.mark.parametrize("room", [0, 1e9], ids=["a batch waits", "all batches wait"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("folder", ["run", "out"])
def test_a_group_at_a_time_gives_the_same_bits(
    saved: Path, one_block: list[int], folder: str, dtype: str, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As groups of one block that are all in memory, and as the stages that they are parts of."""
    model, data = saved.parent / folder, [str(saved.parent / "texts" / "moor.txt")]
    monkeypatch.setattr(perplexity, "host_memory", lambda: room)
    found = evaluate_run(model, data, dtype=dtype, by_stage="always")
    batches = -(-len(TEXT) // (8 * WINDOW))
    assert one_block == [0] * 4 * (1 if room else batches)
    assert found == evaluate_run(model, data, dtype=dtype, by_stage="never")
    monkeypatch.undo()
    assert found == evaluate_run(model, data, dtype=dtype)


@pytest.mark.parametrize("exit_block", [None, 1])
def test_a_diagnosis_by_group_gives_the_same_bits(
    saved: Path, one_block: list[int], exit_block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = {"batches": 2, "batch_size": 3, "exit_block": exit_block}
    found = diagnose_run(saved, by_stage="always", **small)
    up = 4 if exit_block is None else 2
    kept = 1 if exit_block is None else 0  # the last readout, on the way down; one that is shared is no parameter
    assert one_block[: up - 1] == [0] * (up - 1) and set(one_block[up:]) <= {kept, kept + 1}
    assert found == diagnose_run(saved, by_stage="never", **small)
    monkeypatch.undo()
    assert found == diagnose_run(saved, **small)


def test_what_does_not_fit_goes_by_group_and_says_so(
    saved: Path, one_block: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Between what fits and what does not is the room for the weights of the whole, and of a group as it is read."""
    target = trained_model.find(saved)
    whole = sum(weight.numel() for stage in trained_model.load(saved, 10).stages for weight in stage.parameters())
    for free, by_stage in ((8 * whole, False), (2 * whole, True)):
        monkeypatch.setattr(trained_model, "own_memory", lambda free=free: ("here", free))
        assert trained_model.goes_by_stage(target, "auto") is by_stage
        said = capfd.readouterr().err
        assert (f"{saved} needs" in said and "a group of blocks at a time (--by-stage)" in said) is by_stage
        assert trained_model.goes_by_stage(target, "always") and not trained_model.goes_by_stage(target, "never")
    monkeypatch.setattr(trained_model, "own_memory", lambda: ("here", 8 * whole))
    assert trained_model.goes_by_stage(target, "auto", processes=4)  # they share it
    diagnose_run(saved, batches=1, batch_size=1)
    evaluate_run(saved)
    monkeypatch.setattr(trained_model, "own_memory", lambda: ("here", 2 * whole))
    before = len(one_block)
    evaluate_run(saved)
    assert one_block[before:] == [0] * 4


def test_a_tensor_of_no_block_is_refused_where_groups_are_read(tmp_path: Path, one_block: list[int]) -> None:
    run = make_run(tmp_path, valid={"moor": TEXT})
    folder = checkpoint.stage_folder(run, 10, 1)
    rewrite(folder, lambda weights: weights | {"body.h.7.ln_1.weight": torch.ones(32)})
    with pytest.raises(RunError, match=r"body.h.7.ln_1.weight is \(32,\) in the checkpoint and unknown in the model"):
        evaluate_run(run, by_stage="always")
    unwanted = ("body.h.7.ln_1.weight", "body.h.3.ln_1.weight")
    rewrite(folder, lambda weights: {name: one for name, one in weights.items() if name not in unwanted})
    with pytest.raises(RunError, match="body.h.3.ln_1.weight is missing in the checkpoint"):
        evaluate_run(run, by_stage="always")


def test_bf16_is_what_the_library_computes_in_bf16(tmp_path: Path) -> None:
    """The rotary embedding's frequencies stay precise: rounded, they are wrong by whole turns far from the start."""
    length = 512
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 64}
    config = LlamaConfig(**sizes, vocab_size=259, max_position_embeddings=length, initializer_range=0.3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path / "model")
    text = TEXT[:length]
    results = evaluate_run(tmp_path / "model", [str(write_text(tmp_path / "text.txt", text))], dtype="bf16")
    ids = torch.tensor([tokenizer.encode(text).tolist()])
    with torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
        logits = opened(ids).logits[0, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert results is not None and results["exits"][0]["nll_per_token"] == pytest.approx(nll, rel=1e-6)


PEAK = """
import ctypes, gc, sys
from pathlib import Path
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.diagnosis import diagnose_run
from lptransformer.evaluation.perplexity import evaluate_run
trained_model.GROUP_BYTES = 26_000_000  # two blocks
what, folder, text, how, dtype = sys.argv[1:]

def resident(which):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(which)]
    return int(line.split()[1]) * 1024

trained_model.blueprint_of_target(trained_model.find(Path(folder)))  # tries a small model of a folder's family
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = resident("VmRSS")
if what == "evaluate":
    found = evaluate_run(Path(folder), [text], by_stage=how, dtype=dtype, batch_size=2)
else:
    found = diagnose_run(Path(folder), by_stage=how, batches=1, batch_size=1)
print(hash(str(found["exits"])), resident("VmHWM") - before)
"""


@pytest.mark.slow  # starts programs
def test_the_peak_of_memory_is_that_of_a_group(tmp_path: Path) -> None:
    """12 blocks of width 512 are 151 MB in fp32, two of them 25: in one process each, what both ways add to it."""
    run = make_run(tmp_path, model={"hidden_size": 512, "num_layers": 12, "num_heads": 8}, valid={"moor": TEXT})
    export_run(run, tmp_path / "out")
    text = str(tmp_path / "texts" / "moor.txt")

    def peak(what: str, folder: str, how: str, dtype: str = "fp32") -> tuple[str, float]:
        words = [sys.executable, "-c", PEAK, what, str(tmp_path / folder), text, how, dtype]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "0"})
        assert done.returncode == 0, done.stderr[-2000:]
        bits, added = done.stdout.split()
        return bits, int(added) / 1e6

    for what, folder, dtype, less in (("evaluate", "out", "bf16", 35), ("diagnose", "run", "fp32", 80)):
        (bits, whole), (same, staged) = (peak(what, folder, how, dtype) for how in ("never", "always"))
        print(what, folder, dtype, f"whole {whole:.0f} MB, a group at a time {staged:.0f} MB")
        assert same == bits
        assert whole - staged > less  # the ten blocks that are not there are 63 and 126 MB
