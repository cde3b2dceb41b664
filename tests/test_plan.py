"""Plans: the numbers by hand, the recommendation with its reasons, mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lptransformer import config as configuration
from lptransformer import objective, workload
from lptransformer.__main__ import parser
from lptransformer.advice import advise, choose
from lptransformer.cost import model_costs
from lptransformer.devices import Cluster, table
from lptransformer.errors import UserError
from lptransformer.launcher import run
from lptransformer.partition import cut
from lptransformer.plan import Plan, Request, make
from lptransformer.plan_tables import to_json
from lptransformer.predict_local import of_objective, stage_seconds
from lptransformer.predict_rivals import RIVALS, data_parallel, of_rival
from lptransformer.rank_memory import ActivationBytes, precision
from lptransformer.workload import Candidate, Prediction, Work, balanced_sizes, best

PLANS = Path(__file__).parent.parent / "configs" / "plans"
H, BLOCKS, T, V = 64, 8, 32, 512
SMALL: dict[str, Any] = {
    "model": {"hidden_size": H, "num_layers": BLOCKS, "num_heads": 4},
    "data": {"train": "none.txt", "vocab_size": V, "sequence_length": T},
    "train": {"micro_batch_size": 2, "micro_batches_per_update": 8},
}


def work(micro_batches: int = 8, vocab_size: int = V, block_bytes: float = 1e6, dtype: str = "fp32") -> Work:
    costs = model_costs(12 * H * H, H, vocab_size, T, embedding_parameters=vocab_size * H, norm_parameters=2 * H)
    kept = ActivationBytes(block_bytes, 1e4, 2 * T * H * 4, 64 * vocab_size * 16, 4)
    states = precision(dtype)
    return Work(
        costs, BLOCKS, H, vocab_size, T, 2, micro_batches, dtype, kept, vocab_size * 16, H * 4, 64, states, 32.0
    )


def cluster(nodes: int = 1, per_node: int = 4, link: str = "100gbit") -> Cluster:
    return Cluster(table().device("h100"), nodes, per_node, table().link(link))


def plan(overrides: list[str] | None = None, **request: Any) -> Plan:
    return make(configuration.load(SMALL, overrides or []), Request(**{"gpu": "h100", **request}))


LARGER = ["model.hidden_size=1024", "model.num_layers=16", "data.sequence_length=1024"]


# --------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [((12, 4, 1.0, 0.0), [3, 3, 3, 3]), ((12, 4, 1.0, 3.0), [4, 4, 3, 1]), ((5, 1, 1.0, 9.0), [5])]
    + [((8, 2, 3.0, 2.0, 2.0), [4, 4]), ((4, 4, 1.0, 50.0), [1, 1, 1, 1])],
)
def test_balanced_sizes(arguments: tuple[Any, ...], sizes: list[int]) -> None:
    assert balanced_sizes(*arguments) == sizes


def test_seconds_of_a_stage() -> None:
    """FLOPs over what the device achieves; the ring of the replicas and the optimizer in the update."""
    one, here = work(), cluster()
    goal = objective.build(BLOCKS, "chunked", chunks=2)
    stages = cut(goal, 2, one.costs)
    low, high = stage_seconds(stages, one, here, 2, 1)
    rate = 6.69e13 * 0.43
    block = (2 * 12 * H * H + 2 * T * H) * 2 * T
    assert low.forward == pytest.approx((4 * block + 3 * 2 * H * V * 2 * T) / rate)
    assert (low.backward, low.pull) == pytest.approx((2 * 4 * block / rate, 4 * block / rate))
    weights = 4 * 12 * H * H + 2 * H + V * H
    ring = here.ring_seconds(4 * weights, 2)
    assert high.update == pytest.approx(weights / 2 * 32 / 3.35e12 + ring)
    (zero_3, _) = stage_seconds(stages, one, here, 2, 3)
    assert zero_3.forward > low.forward and zero_3.backward > low.backward and zero_3.update < low.update


def test_local_updates_have_no_bubble_and_backprop_has_one() -> None:
    one, here = work(micro_batches=4), cluster(per_node=4)
    goal = objective.build(BLOCKS, "chunked", chunks=4)
    local = of_objective("chunked", goal, one, here, 4, 1, zero_stage=0).evaluate()
    assert local.local and len(local.ranks) == 4 and max(local.idle_shares) < 0.9
    seconds = stage_seconds(cut(goal, 4, one.costs), one, here, 1, 0)
    slowest = max(4 * (s.forward + s.backward) + s.update for s in seconds)
    assert local.step_seconds >= slowest and min(local.idle_shares) >= 0
    rival = of_rival(RIVALS[0], one, here, 4, 1, zero_stage=0, recompute=0.0)
    assert rival is not None
    backprop = rival.evaluate()
    assert not backprop.local and backprop.idle_share > 3 / 8  # (p - 1) / (m + p - 1) at least
    assert backprop.down_bytes == backprop.up_bytes == 4 * one.activations.rows
    assert (local.up_bytes, local.down_bytes) == (4 * one.activations.rows, 0)


def test_the_engine_s_own_1f1b_and_the_rival_s_agree() -> None:
    """Where links cost nothing, and up to what an update is beside the schedule."""
    from dataclasses import replace

    fast = replace(table().link("nvlink4"), bits_per_second=1e30, latency_seconds=0.0)
    device = replace(table().device("h100"), intra_link=fast, memory_bandwidth=1e30)
    here, one = Cluster(device, 1, 4, fast), work(vocab_size=4)
    sizes = balanced_sizes(BLOCKS, 4, one.costs.block_flops, one.costs.head_flops)
    own = of_objective("1F1B", objective.build(BLOCKS, "backprop"), one, here, 4, 1, zero_stage=0, sizes=sizes)
    rival = of_rival(RIVALS[0], one, here, 4, 1, zero_stage=0, recompute=0.0)
    assert rival is not None
    assert own.evaluate().step_seconds == pytest.approx(rival.evaluate().step_seconds, rel=0.02)
    assert not own.evaluate().local


def test_data_parallel_by_hand() -> None:
    one, here = work(), cluster(2, 1, "1gbit")
    found = data_parallel(one, here, 2, zero_stage=1, recompute=0.0).evaluate()
    rate, tokens = 6.69e13 * 0.43, 2 * T
    body, head = BLOCKS * one.costs.block_flops * tokens / rate, one.costs.head_flops * tokens / rate
    weights = BLOCKS * 12 * H * H + 2 * V * H + 2 * H
    ring = 2 * (1 / 2 * 4 * weights / (1e9 * 0.9 / 8) + 1e-4)
    wanted = 4 * 3 * (body + head) + (ring - 2 * (body + head)) + weights / 2 * 32 / 3.35e12
    assert found.step_seconds == pytest.approx(wanted)
    assert found.reduced_bytes == pytest.approx(4 * weights)


def saved_by(hf_config: Any, parts: Any, blocks: int, dtype: Any) -> int:
    """Bytes that autograd saves of so many blocks, really run."""
    import torch

    from lptransformer import pieces

    base = pieces.new_piece(hf_config, parts, range(blocks), False, False, 0).base.to(dtype)
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

    from lptransformer import family as families
    from lptransformer.config_sections import HeadSection
    from lptransformer.stage_memory import EmptyStages

    sizes = {"hidden_size": H, "num_layers": 2, "num_heads": 4, "intermediate_size": None}
    hf_config = families.new_config(
        family, **sizes, num_key_value_heads=groups, vocab_size=V, max_position_embeddings=T, end_of_text_id=None
    )
    parts = families.anatomy(hf_config)
    found = EmptyStages(hf_config, parts, HeadSection(chunk_tokens=16), dtype=dtype, sequence_length=T).of_others(2)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert found.block == saved_by(hf_config, parts, 2, kind) - saved_by(hf_config, parts, 1, kind)
    assert found.rows == 2 * T * H * (2 if dtype == "bf16" else 4)
    assert found.logits >= 16 * V * 16, "a chunk in fp32, its log-softmax, and the gradients of both"


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
        update_seconds=0.1,
        **values,
    )


def test_the_fastest_that_fits_is_chosen() -> None:
    fast, slow = prediction("data parallel", 1.0, False, fits=False), prediction("backprop, 1F1B", 2.0, False)
    assert choose([fast, slow]) is slow
    assert choose([fast]) is None
    assert advise([fast], work(), cluster())[0].startswith("Nothing fits: what needs least is data parallel")


@pytest.mark.parametrize(("local_seconds", "wins"), [(1.0, True), (1.85, False), (2.5, False)])
def test_local_updates_must_be_worth_another_result(local_seconds: float, wins: bool) -> None:
    local = prediction("chunked", local_seconds, True)
    exact = prediction("data parallel", 2.0, False, pipeline=1, data=4)
    assert choose([local, exact]) is (local if wins else exact)
    lines = advise([local, exact], work(), cluster())
    said = ["Local updates win", "within the error", "do not pay"][[1.0, 1.85, 2.5].index(local_seconds)]
    assert said in lines[1]
    assert any("docs/benchmarks/quality.md" in line for line in lines)
    assert any("not hidden behind compute, 12%" in line for line in lines), "what the link costs"
    assert any("1 + R" in line for line in lines)


def test_a_process_alone_hears_nothing_of_links_and_pipelines() -> None:
    local = prediction("chunked", 2.0, True, pipeline=1, data=1, memory_bytes=5e8)
    for name in ("one process", "data parallel"):
        exact = prediction(name, 1.0, False, pipeline=1, data=1, reduced_bytes=0.0, reduction_seconds=0.0)
        said = " ".join(advise([exact, local], work(), cluster(per_node=1)))
        assert not [word for word in ("sends", " ring", "1F1B", " 0.0 MB") if word in said]
        assert "500.0 MB, where backprop takes 1.0 GB" in said


def test_small_sizes_have_small_units() -> None:
    exact = prediction("data parallel", 1.0, False, pipeline=1, data=2, reduced_bytes=33_333.0)
    said = " ".join(advise([exact], work(), cluster()))
    assert "sends 33.3 kB" in said


def test_what_does_not_fit_is_said() -> None:
    methods = [prediction("chunked", 1.0, True), prediction("data parallel", 3.0, False, fits=False)]
    assert any("Does not fit" in line and "data parallel" in line for line in advise(methods, work(), cluster()))


def test_best_does_not_simulate_what_cannot_be_faster() -> None:
    asked = []

    def candidate(seconds: float, bound: float, fits: bool = True) -> Candidate:
        def evaluate() -> Prediction:
            asked.append(seconds)
            return prediction("x", seconds, False, fits)

        return Candidate(fits, seconds, bound, evaluate)

    found = best([candidate(5.0, 4.5), candidate(2.0, 1.0), candidate(1.0, 0.5, fits=False), candidate(9.0, 3.0)])
    assert found is not None and found.step_seconds == 2.0 and asked == [2.0]
    asked.clear()
    found = best([candidate(5.0, 4.5, fits=False), candidate(2.0, 1.0, fits=False)])
    assert found is not None and found.memory_bytes == 1e9 and asked == [2.0]
    assert best([]) is None


# ------------------------------------------------------------------------------------------------------ whole plans


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_are_configurations(path: Path) -> None:
    config = configuration.load(path)
    again = configuration.load(configuration.to_dict(config))
    assert configuration.to_dict(again) == configuration.to_dict(config)


def test_data_parallel_wins_where_links_are_fast_and_the_model_is_small() -> None:
    made = plan(LARGER, gpus_per_node=4)
    chosen = choose(made.methods)
    assert chosen is not None and chosen.method == "data parallel"
    names = {one.method.split(",")[0].split(" (")[0] for one in made.methods}
    assert {"data parallel", "backprop", "chunked", "overlapping", "chunked(2)"} <= names
    assert made.configured is None, "the configuration is of one process, the cluster of four"


def test_local_updates_win_over_a_slow_link_with_few_micro_batches() -> None:
    more = [*LARGER, "parallel.pipeline=4", "objective.chunks=4", "train.micro_batches_per_update=4"]
    made = plan(more, nodes=4, gpus_per_node=1, gpu="l4", link="1gbit")
    chosen = choose(made.methods)
    assert chosen is not None and chosen.local
    assert made.configured is not None and len(made.configured.ranks) == 4
    assert made.configured.step_seconds >= chosen.step_seconds * 0.999


def test_a_plan_as_json_and_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = PLANS / "gpt2-124m-laptop.yaml"
    out = tmp_path / "plan.json"
    out.write_text("of before")
    run(parser(), ["plan", str(source), "--gpu", "laptop-core", "--json", str(out), "--model.num_layers=4"])
    text = capsys.readouterr().out
    for part in ("partition: the run as configured, 4 pipeline rank(s)", "seconds/update", "- Use ", "quality.md"):
        assert part in text
    written = json.loads(out.read_text())
    assert [row["blocks"] for row in written["configured"]["ranks"]] == ["0-0", "1-1", "2-2", "3-3"]
    assert written["methods"][0]["step_seconds"] > 0 and written["advice"][0].startswith("Use ")
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
    for key in [*written, *written["configured"], *rank, *rank["memory"]]:
        assert f"`{key}`" in described, key


def test_the_target_of_json_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lptransformer import plan as planning

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
    (["--gpu", "h100", "--data.tokenizer=nowhere/at/all"], "nowhere/at/all"),
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
    from lptransformer.prepare import prepare_all, vocabulary

    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50)
    prepared = prepare_all(str(tmp_path / "text.txt"), None, "sentencepiece", 290, T, tmp_path / "cache", False)
    folder = prepared.train[0].tokens.folder
    data = configuration.load(SMALL, [f"data.train={folder}"]).data
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
    assert any("engine = 'deepspeed_pipeline'" in line for line in theirs.advice)
    assert not any("PipelineEngine" in line for line in ours.advice)


def test_fp64_is_offered_no_replicas() -> None:
    """Training refuses them."""
    for dtype, most in (("fp32", 2), ("fp64", 1)):
        ours = [one for one in plan([f"train.dtype={dtype}"], gpus_per_node=2).methods if "chunk" in one.method]
        assert max(one.data for one in ours) == most


def test_what_trains_a_part_of_the_blocks_is_not_recommended() -> None:
    made = plan(["objective.name=last"], gpus_per_node=2)
    fastest = made.methods[0]
    assert fastest.method == "last, as configured"
    assert "last" not in made.advice[0] and any("trains 1 of 8 blocks" in line for line in made.advice)


def test_a_cluster_of_another_size_is_told() -> None:
    assert any("of 1 x 1 processes" in line for line in plan(gpus_per_node=2).advice)
    assert not any("of 1 x 1 processes" in line for line in plan(gpus_per_node=1).advice)


def test_without_a_device_it_is_a_cpu() -> None:
    made = plan(gpu=Request().gpu, gpus_per_node=1)
    assert made.cluster.device == table().device("cpu")
    assert [one.method for one in made.methods if one.pipeline == 1]


def test_a_gpu_without_the_dtype_is_refused() -> None:
    from dataclasses import replace

    from lptransformer import plan as planning

    device = replace(table().device("h100"), flops={"bf16": 1.0})
    known = planning.table()
    try:
        planning.table = lambda: replace(known, devices={"h100": device})  # type: ignore[assignment]
        with pytest.raises(UserError, match="no number for train.dtype"):
            plan(gpus_per_node=1)
    finally:
        planning.table = table


def test_smaller_micro_batches_are_the_same_update() -> None:
    one = work(micro_batches=4)
    half = one.cut_smaller(1)
    assert half.tokens == one.tokens and half.micro_batches == 8
    assert half.activations.block == one.activations.block / 2
    found = workload.splits(cluster(per_node=8), one, BLOCKS)
    assert (1, 8, 1) in {(pipeline, data, way.micro_batch_size) for pipeline, data, way in found}
    assert (1, 8, 2) not in {(pipeline, data, way.micro_batch_size) for pipeline, data, way in found}
