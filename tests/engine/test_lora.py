"""LoRA in the engine against peft's own model of the whole, in an ordinary loop; what is written opens with peft."""

from __future__ import annotations

import contextlib
import io
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Pool
from engine_jobs import load_config, open_engine, optimizer_tensors
from measured_rank import peak_bytes
from overlays import overlay, peft_logits, with_overlay
from parity import largest_difference
from saved_runs import make_run
from test_frozen import BACKPROP, PRETRAINED, TWO, plain_training, tied_folder, whole_and_resumed
from torch import Tensor
from transformers import AutoModelForCausalLM

from lptransformer.config.load import load
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_adapter, export_run
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.seeds import unit_seed
from lptransformer.planning.dry_run import predicted
from lptransformer.training import build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(overlay("peft", tmp_path_factory.mktemp("peft")))


def peft_model(folder: Path, rank: int, targets: list[str], depth: int) -> Any:
    """The library's model with peft's adapters on it, each block's from its seed."""
    from peft import LoraConfig, get_peft_model

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets))
    for block in range(depth):
        torch.manual_seed(unit_seed(0, f"adapter {block}"))
        for name, module in model.named_modules():
            if f".{block}." in name and name.endswith(tuple(targets)):
                torch.nn.init.kaiming_uniform_(module.lora_A["default"].weight, a=5**0.5)
    return model


def plain_lora(folder: Path, targets: list[str], overrides: tuple[str, ...]) -> tuple[list[float], dict[str, Tensor]]:
    model = peft_model(folder, 4, targets, 4)
    norms, weights = plain_training(folder, overrides, 4, model)
    return norms, {name: one for name, one in weights.items() if ".lora_" in name}


LORA = ("lora.rank=4", "lora.alpha=12")
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.mark.parametrize(
    ("family", "zero", "dtype", "pipeline"),
    [
        ("llama", 0, "fp32", 1),
        ("gpt2", 0, "fp32", 2),
        ("llama", 1, "fp32", 2),
        ("llama", 2, "fp32", 1),
        ("gpt2", 3, "fp32", 1),
        ("llama", 1, "bf16", 2),
        ("llama", 3, "bf16", 1),
    ],
)
def test_it_is_peft_on_the_whole_model(
    pool: Pool, peft: str, tmp_path: Path, family: str, zero: int, dtype: str, pipeline: int
) -> None:
    """Backprop on one and two pipeline ranks, and from a checkpoint with the same bits; the base stays."""
    tied_folder(family, tmp_path / "model")
    overrides = (*PRETRAINED, *LORA, f"model.pretrained={tmp_path / 'model'}", BACKPROP)
    overrides += (f"lora.targets=[{', '.join(TARGETS[family])}]", f"train.dtype={dtype}")
    placed = (*overrides, f"deepspeed.zero_optimization.stage={zero}", f"parallel.pipeline={pipeline}")
    found = pool.run(pipeline, with_overlay, peft, partial(whole_and_resumed, folder=str(tmp_path)), placed)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    held: dict[str, Tensor] = {}
    for whole, continued, _ in found:
        for index, weights in whole.weights.items():
            assert all(torch.equal(one, continued.weights[index][name]) for name, one in weights.items())
            held |= {
                name.replace("body.", "transformer." if family == "gpt2" else "model."): one
                for name, one in weights.items()
            }
    for name, one in held.items():
        if ".lora_" not in name and not name.startswith("head."):
            assert torch.equal(one, base[name].to(one.dtype)), name
    (answer,) = pool.run(1, with_overlay, peft, plain_lora, tmp_path / "model", TARGETS[family], overrides)
    norms, wanted = answer
    reports = [report.grad_norm for report in found[0][0].reports[0]]
    assert reports == (norms if zero == 0 else pytest.approx(norms, rel=1e-5 if dtype == "fp32" else 0.1))
    assert len(wanted) == 2 * 4 * len(TARGETS[family])
    for name, weight in wanted.items():
        got = held[name.removeprefix("base_model.model.").replace(".default.", ".")]
        if zero == 0:
            assert torch.equal(got, weight), name
        else:
            assert largest_difference(got.float(), weight) < (1e-3 if dtype == "fp32" else 0.2), name


def chunked(overrides: tuple[str, ...]) -> dict[str, Tensor]:
    engine = open_engine(overrides)
    for _ in range(3):
        engine.train_batch()
    weights = {f"{index}/{name}": one for index, stage in engine.local.items() for name, one in stage.weights().items()}
    engine.close()
    return weights


def test_auxiliary_heads_train_beside_them_on_any_placement(pool: Pool, peft: str, tmp_path: Path) -> None:
    tied_folder("llama", tmp_path / "model")
    overrides = (*PRETRAINED, *LORA, f"model.pretrained={tmp_path / 'model'}", TWO)
    overrides += ("head.kind=private", "head.blocks=1")
    (one,) = pool.run(1, with_overlay, peft, chunked, overrides)
    lower, upper = pool.run(2, with_overlay, peft, chunked, (*overrides, "parallel.pipeline=2"))
    assert one.keys() == lower.keys() | upper.keys()
    assert all(torch.equal(weight, (lower | upper)[name]) for name, weight in one.items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    assert torch.equal(one["1/head.readout.weight"], base["lm_head.weight"]), "the model's own stays"
    assert not torch.equal(one["0/head.readout.weight"], base["lm_head.weight"]), "a copy of it trains"
    assert not torch.equal(one["0/head.blocks.layers.2.mlp.up_proj.weight"], base["model.layers.2.mlp.up_proj.weight"])
    assert one["0/body.layers.1.mlp.up_proj.lora_B.weight"].any()


def what_trains(overrides: tuple[str, ...]) -> tuple[set[str], dict[str, int], int]:
    """The weights that three updates change, how many numbers each has, and how many numbers moments have."""
    engine = open_engine(overrides)
    stages = engine.local.items()
    before = {f"{index}/{name}": one.clone() for index, stage in stages for name, one in stage.weights().items()}
    for _ in range(3):
        engine.train_batch()
    after = {f"{index}/{name}": one for index, stage in stages for name, one in stage.weights().items()}
    moments = sum(one.numel() for _, stage in stages for one in optimizer_tensors(stage) if one.dim() > 0)
    engine.close()
    changed = {name for name, one in after.items() if not torch.equal(one, before[name])}
    return changed, {name: one.numel() for name, one in after.items()}, moments


def test_beside_a_fitted_head_adapters_and_its_map_alone_train(pool: Pool, peft: str, tmp_path: Path) -> None:
    """With the defaults of a pretrained model: the blocks of the head are frozen, and nothing frozen has a moment."""
    tied_folder("llama", tmp_path / "model")
    overrides = (*PRETRAINED, *LORA, f"model.pretrained={tmp_path / 'model'}", "objective.chunks=2")
    config = load_config(overrides)
    assert (config.head.kind, config.head.blocks, config.value("head.train_blocks")) == ("fitted", 1, False)
    ((changed, sizes, moments),) = pool.run(1, with_overlay, peft, what_trains, overrides)
    wanted = {name for name in sizes if name.endswith((".lora_A.weight", ".lora_B.weight"))}
    assert len(wanted) == 4 * 7 * 2, "seven linear maps in each of four blocks"
    maps = {"0/head.map.norm.weight", "0/head.map.linear.weight", "0/head.map.linear.bias", "0/head.norm.weight"}
    assert changed == wanted | maps
    assert moments == 2 * sum(sizes[name] for name in changed)


def train_run(raw: dict[str, Any]) -> str:
    from lptransformer.training.train import train

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(load(raw))
    return printed.getvalue()


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gpt2", False)])
def test_exports_merged_and_as_a_peft_folder(pool: Pool, peft: str, tmp_path: Path, family: str, tied: bool) -> None:
    """Both have the run's logits; without peft the run is read, evaluated and exported."""
    export_run(make_run(tmp_path / "first", model={"family": family}), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(tmp_path / "model")
    raw: dict[str, Any] = {
        "model": {"pretrained": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "first/texts/train.txt"), "sequence_length": 16, "cache": str(tmp_path / "c")},
        "objective": {"chunks": 2},
        "parallel": {"pipeline": 2},
        "lora": {"rank": 4},
        "train": {"steps": 5, "micro_batch_size": 2, "micro_batches_per_update": 1, "lr_scheduler": "constant"}
        | {"learning_rate": 1e-3},
        "run": {"dir": str(tmp_path / "run")},
    }
    printed, _ = pool.run(2, with_overlay, peft, train_run, raw)
    assert "weights train" in printed and "lora.rank = 4" in printed
    assert "peft" not in sys.modules
    assert export_run(tmp_path / "run", tmp_path / "out").notes == ()
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    ids = torch.randint(0, 259, (2, 16), generator=torch.Generator().manual_seed(0))
    own = trained_model.load(tmp_path / "run", 5).logits(ids)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.tie_word_embeddings == tied
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, own)
        assert largest_difference(model(ids).logits, own) > 0.01, "it has learnt something"
    (logits,) = pool.run(1, with_overlay, peft, peft_logits, tmp_path / "model", tmp_path / "adapter", ids)
    assert largest_difference(logits, own) < 1e-5


def predicted_and_measured(overrides: tuple[str, ...]) -> list[tuple[float, float]]:
    """With new weights: what reading a folder leaves behind for a while would be measured too."""
    config = load_config(overrides)
    plan = make_blueprint(config, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "pretrained_folder", lambda config: None)
        return [(one.peak, peak_bytes(config, plan, rank)) for rank, one in enumerate(predicted(config, plan))]


@pytest.mark.parametrize("zero", [0, 1])
def test_its_memory_is_predicted(pool: Pool, peft: str, tmp_path: Path, zero: int) -> None:
    tied_folder("llama", tmp_path / "model")
    overrides = (*PRETRAINED, *LORA, f"model.pretrained={tmp_path / 'model'}", TWO, "parallel.pipeline=2")
    overrides += (f"deepspeed.zero_optimization.stage={zero}", "deepspeed.zero_optimization.reduce_bucket_size=9000")
    (found,) = pool.run(1, with_overlay, peft, predicted_and_measured, overrides)
    for expected, measured in found:
        assert expected == pytest.approx(measured, rel=0.1)
