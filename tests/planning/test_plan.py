"""Plans: the recommendation with its reasons, whole plans, mistakes in one line."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lptransformer.__main__ import parser
from lptransformer.config.load import load, to_dict
from lptransformer.errors import UserError
from lptransformer.planning import plan as planning
from lptransformer.planning.candidates import Prediction, best, recommend
from lptransformer.planning.devices import Cluster, load_devices
from lptransformer.planning.plan import Plan
from lptransformer.planning.plan_report import advice, to_json
from lptransformer.planning.step_time import Bound
from lptransformer.training.launcher import run

PLANS = Path(__file__).parents[2] / "configs" / "plans"
H, BLOCKS, T, V = 64, 8, 32, 512
SMALL: dict[str, Any] = {
    "model": {"hidden_size": H, "num_layers": BLOCKS, "num_heads": 4},
    "data": {"train": "none.txt", "vocab_size": V, "sequence_length": T},
    "train": {"micro_batch_size": 2, "micro_batches_per_update": 8},
}


def plan(overrides: list[str] | None = None, gpu: str = "h100", **options: Any) -> Plan:
    return planning.make(load(SMALL, overrides or []), gpu=gpu, **options)


LARGER = ["model.hidden_size=1024", "model.num_layers=16", "data.sequence_length=1024"]


# --------------------------------------------------------------------------------------------------------- the choice


def prediction(method: str, seconds: float, local: bool, fits: bool = True, **more: Any) -> Prediction:
    values: dict[str, Any] = {"pipeline": 2, "data": 2, "micro_batches": 4, "recompute": 0.0, "memory_bytes": 1e9}
    values |= {"reduced_bytes": 2e9, "reduction_seconds": 0.25, **more}
    return Prediction(
        method=method,
        local=local,
        fits=fits,
        step_seconds=seconds,
        micro_batch_size=1,
        zero_stage=1,
        tokens_per_second=1000 / seconds,
        idle_shares=[0.1, 0.3],
        up_bytes=1e6,
        down_bytes=0.0,
        **values,
    )


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan(gpus_per_node=4)


def test_the_fastest_that_fits_is_chosen(made: Plan) -> None:
    fast, slow = prediction("data parallel", 1.0, False, fits=False), prediction("backprop, 1F1B", 2.0, False)
    assert recommend([fast, slow]) is slow
    assert recommend([fast]) is None
    lines = advice(replace(made, methods=[slow, fast]))
    assert lines[0].startswith("Use backprop, 1F1B")
    assert any(line.startswith("Does not fit") and "data parallel" in line for line in lines)
    assert advice(replace(made, methods=[fast]))[0].startswith("Nothing fits: what needs least is data parallel")


@pytest.mark.parametrize(
    ("local_seconds", "wins", "says"),
    [(1.0, True, "Local updates win"), (1.85, False, "within the error"), (2.5, False, "do not pay")],
)
def test_local_updates_must_be_worth_another_result(made: Plan, local_seconds: float, wins: bool, says: str) -> None:
    local = prediction("chunked", local_seconds, True)
    exact = prediction("data parallel", 2.0, False, pipeline=1, data=4)
    assert recommend([local, exact]) is (local if wins else exact)
    lines = advice(replace(made, methods=[local, exact]))
    assert says in lines[1]
    for reason in ("docs/benchmarks/quality.md", "12% for sums over its replicas (2.00 GB", "1 + R"):
        assert any(reason in line for line in lines), reason


@pytest.mark.parametrize(("seconds", "told"), [(0.5, True), (1.05, True), (1.2, False)])
def test_a_bound_is_never_recommended_and_told_where_it_takes_the_win_away(
    made: Plan, seconds: float, told: bool
) -> None:
    local, exact = prediction("chunked", 1.0, True), prediction("data parallel", 2.0, False)
    lines = advice(replace(made, methods=[local, exact], bounds=[Bound("zero bubble", "2401.10241", 4, 1, seconds)]))
    assert lines[0].startswith("Use chunked")
    assert any("zero bubble" in line and "2401.10241" in line for line in lines[1:]) == told
    lines = advice(replace(made, methods=[exact], bounds=[Bound("zero bubble", "2401.10241", 4, 1, seconds)]))
    assert lines[0].startswith("Use data parallel") and any("zero bubble" in line for line in lines[1:])


def test_a_process_alone_hears_nothing_of_links_and_pipelines(made: Plan) -> None:
    local = prediction("chunked", 2.0, True, pipeline=1, data=1, memory_bytes=5e8)
    exact = prediction("one process", 1.0, False, pipeline=1, data=1, reduced_bytes=0.0, reduction_seconds=0.0)
    alone = Cluster(made.cluster.device, 1, 1, made.cluster.link)
    said = " ".join(advice(replace(made, cluster=alone, methods=[exact, local], bounds=[])))
    assert not [word for word in ("replicas", " ring", "1F1B", " 0.0 MB") if word in said]


def test_small_sizes_have_small_units(made: Plan) -> None:
    exact = prediction("data parallel", 1.0, False, pipeline=1, data=2, reduced_bytes=33_333.0)
    assert "(33.3 kB per process" in " ".join(advice(replace(made, methods=[exact])))


def test_best_does_not_replay_what_cannot_be_faster() -> None:
    asked = []

    class Fake:
        def __init__(self, seconds: float, at_least: float, fits: bool = True) -> None:
            self.memory_bytes, self.at_least, self.fits = seconds, at_least, fits

        def evaluate(self) -> Prediction:
            asked.append(self.memory_bytes)
            return prediction("x", self.memory_bytes, False, self.fits)

    found = best([Fake(5.0, 4.5), Fake(2.0, 1.0), Fake(1.0, 0.5, fits=False), Fake(9.0, 3.0)])  # type: ignore[list-item]
    assert found.step_seconds == 2.0 and asked == [2.0]
    assert best([Fake(5.0, 4.5, fits=False), Fake(2.0, 1.0, fits=False)]).step_seconds == 2.0  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------------ whole plans


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_are_configurations(path: Path) -> None:
    config = load(path)
    again = load(to_dict(config))
    assert to_dict(again) == to_dict(config)


def test_data_parallel_wins_where_links_are_fast_and_the_model_is_small() -> None:
    made = plan(LARGER, gpus_per_node=4)
    chosen = recommend(made.methods)
    assert chosen is not None and chosen.method == "data parallel"
    names = {one.method.split(",")[0].split(" (")[0] for one in made.methods}
    assert {"data parallel", "backprop", "chunked", "overlapping", "chunked(2)"} <= names
    assert made.configured is None, "the configuration is of one process, the cluster of four"


def test_local_updates_win_over_a_slow_link_with_few_micro_batches() -> None:
    more = [*LARGER, "parallel.pipeline=4", "objective.chunks=4", "train.micro_batches_per_update=4"]
    made = plan(more, nodes=4, gpus_per_node=1, gpu="l4", link="1gbit")
    chosen = recommend(made.methods)
    assert chosen is not None and chosen.local
    assert made.configured is not None and len(made.configured.ranks) == 4
    assert made.configured.step_seconds >= chosen.step_seconds * 0.999


def test_a_plan_as_json_and_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = PLANS / "gpt2-124m-laptop.yaml"
    out = tmp_path / "plan.json"
    out.write_text("of before")
    run(parser(), ["plan", str(source), "--gpu", "laptop-core", "--json", str(out), "--model.num_layers=4"])
    text = capsys.readouterr().out
    for part in ("partition: chunked, as configured, 4 pipeline rank(s)", "seconds/update", "- Use ", "quality.md"):
        assert part in text
    written = json.loads(out.read_text())
    assert [row["blocks"] for row in written["configured"]["ranks"]] == ["0-0", "1-1", "2-2", "3-3"]
    assert written["methods"][0]["step_seconds"] > 0 and written["advice"][0].startswith("Use ")
    assert {bound["method"] for bound in written["bounds"]} == {"zero bubble", "interleaved 1F1B"}
    assert " s/update at best (2104.04473, section 2.2; not replayed)" in text
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_json_is_even_and_described() -> None:
    """The run as configured and the methods have the same keys, ranks their total; the document names them all."""
    made = plan(["parallel.pipeline=2"], gpus_per_node=2)
    written = json.loads(to_json(made))
    assert made.configured is not None
    for one, prediction in zip(
        [written["configured"], *written["methods"]], [made.configured, *made.methods], strict=True
    ):
        assert set(one) == set(written["configured"])
        assert one["idle_share"] == pytest.approx(sum(one["idle_shares"]) / len(one["idle_shares"]))
        assert [row["memory"]["peak"] for row in one["ranks"]] == [row.memory.peak for row in prediction.ranks]
        if one["ranks"]:
            assert max(row["memory"]["peak"] for row in one["ranks"]) == one["memory_bytes"]
    described = (PLANS.parent.parent / "docs" / "design.md").read_text().split("**Plan.**")[1].split("\n\n")[0]
    rank = written["configured"]["ranks"][0]
    for key in [*written, *written["configured"], *rank, *rank["memory"], *written["bounds"][0]]:
        assert f"`{key}`" in described, key


def test_the_target_of_json_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the work was done first")

    monkeypatch.setattr(planning, "make", work)
    for target in (tmp_path / "no" / "folder.json", tmp_path, ""):
        with pytest.raises(SystemExit):
            run(parser(), ["plan", str(PLANS / "gpt2-124m-laptop.yaml"), "--json", str(target)])


MISTAKES = [
    (["--gpu", "h10"], "did you mean h100?"),
    (["--gpu", "h100", "--nodes", "2"], "--link"),
    (["--gpu", "h100", "--nodes", "2", "--gpus-per-node", "1", "--link", "fast"], "known are"),
    (["--gpu", "h100", "--nodes", "0"], "--nodes=0"),
    (["--gpu", "h100", "--gpus-per-node", "-1"], "--gpus-per-node=-1"),
    (["--gpu", "h100", "--vocab-size", "1"], "--vocab-size=1"),
    (["--gpu", "h100", "--vocab-size", "9999999999999999999"], "--vocab-size=9999999999999999999"),
    (["--gpu", "h100", "--parallel.pipeline=13", "--objective.chunks=12"], "parallel.pipeline = 13"),
    (["--gpu", "h100", "--gpus-per-node", "7"], "no split of 7 processes"),
    (["--gpu", "h100", "--data.tokenizer=nowhere/at/all", "--data.vocab_size=null"], "nowhere/at/all"),
    (["--gpu", "h100", "--json", "/no/such/folder/x.json"], "--json=/no/such/folder/x.json"),
    (["--gpu", "h100", "--link", "1gbit"], "--nodes is 1"),
    (["--gpu", "h100", "--nodes", "9999999999", "--gpus-per-node", "8", "--link", "1gbit"], "79999999992 processes"),
    (["--gpu", "h100", "--train.micro_batch_size=auto"], "train.micro_batch_size is auto"),
    (["--gpu", "h100", "--train.micro_batch_size=99999999999"], "up to 65,536 windows"),
    (["--gpu", "h100", "--data.sequence_length=1000000000000"], "data.sequence_length = 1000000000000"),
]


@pytest.mark.parametrize(("flags", "says"), MISTAKES, ids=[says for _, says in MISTAKES])
def test_mistakes_are_one_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = [] if any("parallel" in flag for flag in flags) else ["--model.num_layers=4", "--parallel.pipeline=2"]
    with pytest.raises(SystemExit) as caught:
        run(parser(), ["plan", str(PLANS / "gpt2-124m-laptop.yaml"), *more, *flags])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert says in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("lptransformer: ")


def test_no_link_is_needed_on_one_node_and_no_tokenizer_is_trained(tmp_path: Path) -> None:
    made = plan(["data.cache=" + str(tmp_path / "nothing")], gpus_per_node=2)
    assert made.work.vocab_size == V and not (tmp_path / "nothing").exists()
    assert plan(gpus_per_node=2, vocab_size=999).work.vocab_size == 999
    assert plan(["data.tokenizer=bytes", "data.vocab_size=null"], gpus_per_node=1).work.vocab_size == 259


def test_the_vocabulary_is_the_one_of_training(tmp_path: Path) -> None:
    """A tokenizer that lies beside prepared text counts, and not data.vocab_size."""
    from lptransformer.data.prepare import prepare_all, vocabulary

    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50)
    prepared = prepare_all(str(tmp_path / "text.txt"), None, "sentencepiece", 290, T, tmp_path / "cache", False)
    folder = prepared.train[0].tokens.folder
    data = load(SMALL, [f"data.train={folder}"]).data
    wanted = vocabulary(**data.model_dump(include={"train", "valid", "tokenizer", "vocab_size"}))
    assert wanted == 290 != V
    assert plan([f"data.train={folder}"], gpus_per_node=1).work.vocab_size == wanted
    assert plan([f"data.train=[{folder}/none.txt]"], gpus_per_node=1).work.vocab_size == V
    shutil.rmtree(prepared.tokenizer_folder)
    with pytest.raises(UserError, match="the tokenizer that made it is not in the folder above it.*--vocab-size N"):
        plan([f"data.train={folder}"], gpus_per_node=1)


def test_deepspeed_s_pipeline_is_planned_as_what_it_is() -> None:
    """1F1B on its own partition, with the device's link and without this program's channel, under its own name."""
    backprop = ["objective.name=backprop", "parallel.pipeline=2", "parallel.partition=[5, 3]"]
    ours = plan(backprop, gpus_per_node=2)
    theirs = plan([*backprop, "engine=deepspeed_pipeline"], gpus_per_node=2)
    assert ours.configured is not None and theirs.configured is not None
    assert ours.configured.method == "backprop"
    assert theirs.configured.method == "backprop, DeepSpeed's PipelineEngine" and not theirs.configured.local
    assert [rank.blocks for rank in theirs.configured.ranks] == ["0-4", "5-7"]
    assert [rank.memory.held for rank in theirs.configured.ranks] == [2, 1], "1F1B"
    assert theirs.configured.step_seconds < ours.configured.step_seconds, "no host memory between its ranks"
    assert any("engine = 'deepspeed_pipeline'" in line for line in theirs.remarks)
    assert not any("PipelineEngine" in line for line in ours.remarks)


@pytest.mark.slow
def test_fp64_is_offered_no_replicas() -> None:
    """Training refuses them."""
    for dtype, most in (("fp32", 2), ("fp64", 1)):
        ours = [one for one in plan([f"train.dtype={dtype}"], gpus_per_node=2).methods if "chunk" in one.method]
        assert max(one.data for one in ours) == most


def test_what_trains_a_part_of_the_blocks_is_not_compared() -> None:
    made = plan(["objective.name=last"], gpus_per_node=1)
    assert made.configured is not None and made.configured.method == "last"
    assert not any("last" in one.method for one in made.methods)
    assert any("trains 1 of 8 blocks" in line for line in advice(made))


def test_a_cluster_of_another_size_is_told() -> None:
    assert any("of 1 x 1 processes" in line for line in advice(plan(gpus_per_node=2)))
    assert not any("of 1 x 1 processes" in line for line in advice(plan(gpus_per_node=1)))


TWO_RANKS = ["parallel.pipeline=2", "objective.chunks=2", "train.dtype=bf16", "model.hidden_size=1024"]
H100, ETHERNET = load_devices().device("h100"), load_devices().link("1gbit")


def said_of_copies(*overrides: str, vocab_size: int = 131_072, nodes: int = 1) -> str | None:
    """In an update of half a second."""
    from lptransformer.models.blueprint import make_blueprint

    config = load(SMALL, [*TWO_RANKS, *overrides])
    cluster = Cluster(H100, nodes, 2 // nodes, ETHERNET if nodes > 1 else H100.intra_link)
    return planning.copies_remark(config, make_blueprint(config, vocab_size, None), cluster, 0.5)


def test_copies_of_a_large_readout_are_told_with_what_to_set() -> None:
    """V x H weights in bf16, over 1.875 GB/s of the host's memory or 0.1125 GB/s between hosts: 0.143 s and 2.39 s."""
    shared = "head.kind=shared"
    assert said_of_copies(shared, vocab_size=V) is None, "a small one"
    said = said_of_copies(shared)
    assert (
        said is not None
        and "a refresh takes 0.143 s (268.4 MB over host-memory), which with head.refresh_every" in said
    )
    assert "is 0.29 of an update (0.5 s): set head.refresh_every=3 to" in said and "or head.kind=low_rank" in said
    assert said_of_copies(shared, "head.refresh_every=2") and said_of_copies(shared, "head.refresh_every=3") is None
    assert said_of_copies(shared, "parallel.pipeline=1") is None, "they stay in their process"
    assert said_of_copies() is None, "private heads"
    said = said_of_copies(shared, nodes=2)
    assert said is not None and "takes 2.39 s (268.4 MB over 1gbit)" in said and "head.refresh_every=48 " in said


def test_averaged_blocks_are_copies_too() -> None:
    assert said_of_copies("head.blocks=2", nodes=2) is None
    said = said_of_copies("head.blocks=2", "head.ema_decay=0.9", nodes=2)
    size = 2 * 2 * (12 * 1024 * 1024 + 13 * 1024)
    assert said is not None and f"s ({size / 1e6:.1f} MB over 1gbit)" in said and "or head.ema_decay=null" in said


def test_a_plan_tells_of_copies_by_the_time_that_it_predicts() -> None:
    made = plan(["parallel.pipeline=2", "objective.chunks=2", "head.kind=shared"], "l4", gpus_per_node=2)
    assert made.configured is not None
    seconds = V * H * 4 / (1.5e10 / 8)
    often = math.ceil(seconds / made.configured.step_seconds / 0.1)
    assert often > 1 and f"head.refresh_every={often} to" in made.remarks[-1]


def test_a_pretrained_model_has_its_own_vocabulary(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaConfig(vocab_size=99, **sizes).save_pretrained(tmp_path)
    config = load(
        {**SMALL, "model": {"pretrained": str(tmp_path)}, "data": {"train": "none.txt", "sequence_length": T}}
    )
    assert planning.make(config, gpu="h100").work.vocab_size == 99
    with pytest.raises(UserError, match="--vocab-size=50: the model of model.pretrained = .* has its own"):
        planning.make(config, gpu="h100", vocab_size=50)


def test_without_a_gpu_it_is_a_core_of_a_cpu() -> None:
    config = load(SMALL)
    assert planning.make(config).cluster.device.key == "laptop-core"
    assert parser().parse_args(["plan", "x.yaml"]).gpu == "laptop-core"


def test_a_gpu_without_the_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = load_devices()
    only_bf16 = replace(known, devices={"h100": replace(known.device("h100"), flops={"bf16": 1.0})})
    monkeypatch.setattr(planning, "load_devices", lambda: only_bf16)
    with pytest.raises(UserError, match="no number for train.dtype"):
        plan(gpus_per_node=1)


# Flags, and seconds of an update by method as in docs/benchmarks/plan.md: the first method is recommended.
NODES: dict[str, Any] = {"gpus_per_node": 8, "gpu": "h100"}
COMMITTED: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "gpt2-124m-laptop": ({}, {"data parallel": 18.24, "backprop, 1F1B": 26.19, "chunked, one per rank": 22.62}),
    "llama3-8b-2x8h100-25gbit": (
        {"nodes": 2, "link": "25gbit", **NODES},
        {"chunked, one per rank": 4.127, "backprop, 1F1B": 6.345, "data parallel": 14.71},
    ),
    "llama3-70b-64x8h100": (
        {"nodes": 64, "link": "3200gbit", **NODES},
        {"chunked(16), as configured": 9.517, "backprop, 1F1B": 22.13, "data parallel": 11.52},
    ),
}


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_plans_in_less_than_ten_seconds(name: str) -> None:
    started = time.process_time()
    options, seconds = COMMITTED[name]
    made = planning.make(load(PLANS / f"{name}.yaml"), **options)
    assert time.process_time() - started < 10
    found = {one.method: one.step_seconds for one in made.methods}
    assert {method: found[method] for method in seconds} == pytest.approx(seconds, rel=0.001)
    assert advice(made)[0].startswith(f"Use {next(iter(seconds))} (")


def saved_by(blueprint: Any, blocks: int, dtype: Any) -> int:
    """Bytes that autograd saves of this number of blocks, really run."""
    import torch

    from lptransformer.models import split

    base = split.new_piece(blueprint.model_config, blueprint.parts, range(blocks), False, False, 0).base.to(dtype)
    hidden = torch.randn(2, T, H, dtype=dtype).requires_grad_()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*base.parameters(), *base.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = base(inputs_embeds=hidden, use_cache=False)
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("family", "groups"), [("gpt2", None), ("llama", None), ("llama", 2)])
def test_activations_are_what_autograd_keeps(family: str, groups: int | None, dtype: str) -> None:
    """Counted on empty stages: equal to what a real block adds to what is saved for the backward pass."""
    import torch

    from lptransformer.models.blueprint import make_blueprint
    from lptransformer.planning.stage_memory import EmptyStages

    overrides = [f"model.family={family}", "model.num_layers=2", "loss.chunk_tokens=16", f"train.dtype={dtype}"]
    overrides += [] if groups is None else [f"model.num_key_value_heads={groups}"]
    blueprint = make_blueprint(load(SMALL, overrides), V, None)
    found, kind = EmptyStages(blueprint).of_others(2), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert found.block == saved_by(blueprint, 2, kind) - saved_by(blueprint, 1, kind)
    assert found.rows == 2 * T * H * (2 if dtype == "bf16" else 4)
    assert found.logits >= 16 * V * 16, "a chunk in fp32, its log-softmax, and the gradients of both"
