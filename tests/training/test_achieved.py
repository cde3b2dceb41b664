"""FLOP/s that a run has achieved: work counted by hand, over the seconds of its rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_run
import torch
from engine_jobs import VOCAB_SIZE, load_config
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from lptransformer.__main__ import parser
from lptransformer.engine.process_groups import leave
from lptransformer.models.blueprint import make_blueprint
from lptransformer.planning.devices import load_devices
from lptransformer.run_folder import layout
from lptransformer.run_folder.metrics_log import read_updates
from lptransformer.training import reporter
from lptransformer.training.launcher import run


def test_the_rows_of_a_run_and_its_report_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run.stand_in(tmp_path, monkeypatch)
    monkeypatch.setattr(reporter, "peak_flops", lambda device, dtype: 1e12)
    run(parser(), ["train", "c.yaml"])
    leave()
    width, window, vocab_size = 16, 16, layout.read_model_config(Path("run"))["vocab_size"]
    block = GPT2Block(GPT2Config(n_embd=width, n_head=2), layer_idx=0)
    forward = 2 * sum(weight.numel() for weight in block.parameters()) + 2 * window * width
    wanted = 4 * window * (2 * 3 * forward + 2 * 3 * 2 * width * vocab_size)  # 4 windows, 2 blocks, 2 heads
    rows, before = read_updates("run"), 0.0
    assert len(rows) == 2
    for row in rows:
        assert row["tflops_per_process"] * 1e12 * (row["seconds"] - before) == pytest.approx(wanted, rel=1e-9)
        assert row["mfu"] == pytest.approx(row["tflops_per_process"], rel=1e-12)
        before = row["seconds"]
    assert "tflops_per_process,mfu," in Path("run/metrics.csv").read_text().splitlines()[0]
    capsys.readouterr()
    run(parser(), ["report", "run"])
    said = capsys.readouterr().out
    assert " TFLOP/s  MFU " in said
    text = Path("run/metrics.jsonl").read_text().replace('"tflops_per_process"', '"a"').replace('"mfu"', '"b"')
    Path("run/metrics.jsonl").write_text(text)  # as earlier versions wrote them
    run(parser(), ["report", "run"])
    assert "TFLOP/s" not in capsys.readouterr().out


def test_the_phase_of_an_update_and_the_processes_count() -> None:
    """An overlapping border costs one more gradient at the inputs of its upper run, of two blocks here."""
    overrides = ("objective.name=overlapping", "objective.chunks=4", "objective.overlap=1")
    every_third = (*overrides, "objective.backprop_every=3")
    one, split = (
        make_blueprint(load_config(keys), VOCAB_SIZE, None)
        for keys in (every_third, (*every_third, "parallel.pipeline=2", "parallel.data=2"))
    )
    local, again, whole = (one.process_flops(update) for update in (1, 2, 3))
    assert local == again == 4 * split.process_flops(1) and whole == 4 * split.process_flops(3)
    assert (local - whole) / one.tokens / one.costs.block_flops == pytest.approx(2 * 2)  # two borders are pulled


@pytest.mark.parametrize(
    ("name", "dtype", "key"),
    [("NVIDIA H200", "bf16", "h200"), ("NVIDIA H200", "tf32", "h200"), ("NVIDIA T4", "bf16", None)],
)
def test_the_peak_is_that_of_a_device_that_is_known_by_name(
    name: str, dtype: str, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device: Any = SimpleNamespace(type="cuda")
    assert reporter.peak_flops(device, dtype) == (load_devices().device(key).flops[dtype] if key else None)
    assert reporter.peak_flops(torch.device("cpu"), dtype) is None


def test_a_start_on_a_known_gpu_tells_what_copies_of_a_large_readout_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(name: str, vocab_size: int) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        overrides = ["parallel.pipeline=2", "objective.chunks=2", "head.kind=shared", "model.hidden_size=1024"]
        config = load_config([*overrides, "data.sequence_length=512"])
        return reporter.copies_at_the_start(config, make_blueprint(config, vocab_size, None), torch.device("cuda", 0))

    large = said("NVIDIA H200", 131_072)
    assert large is not None and "a refresh takes 0.286 s (536.9 MB over host-memory)" in large
    assert said("NVIDIA H200", VOCAB_SIZE) is said("NVIDIA T4", 131_072) is None
