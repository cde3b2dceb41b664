"""Local against true gradients, ranks of hidden states, agreement of exits; the command and what it leaves."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import FEW, TEXT, make_run
from small_blueprint import small_blueprint
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lptransformer.__main__ import parser
from lptransformer.data.token_set import IGNORE_INDEX, Batch
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import DataError, RunError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.diagnosis import diagnose_run, draw_diagnosis, print_diagnosis, write_diagnosis
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.local_gradients import Diagnosis, diagnose
from lptransformer.evaluation.spectrum import Moments, effective_rank, stable_rank
from lptransformer.evaluation.trained_model import RunModel
from lptransformer.methods import objectives
from lptransformer.methods.spans import Phase, Span
from lptransformer.models import hf_config
from lptransformer.models.stage import make_stage
from lptransformer.run_folder import layout
from lptransformer.training.launcher import run as run_command

VOCAB, WINDOW, BLOCKS = 67, 12, 4
SIZES: dict[str, Any] = {"intermediate_size": None, "num_key_value_heads": None, "end_of_text_id": None}
SIZES |= {**FEW, "max_position_embeddings": WINDOW}
OVERLAPPING = {"chunks": 4, "overlap": 1, "first_head": True}


def make_model(name: str, of_family: str = "gpt2", head: dict[str, Any] | None = None, **options: Any) -> RunModel:
    config = hf_config.new_config(of_family, vocab_size=VOCAB, **SIZES)
    blueprint = small_blueprint(config, name, head=head, length=WINDOW, **options)
    stages = [make_stage(plan, blueprint, seed=3).eval() for plan in blueprint.stages]
    generator = torch.Generator().manual_seed(1)
    for stage in stages:
        for weight in stage.parameters():  # as new, heads know nothing and norms and biases are all alike
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return RunModel(0, blueprint, stages, torch.device("cpu"))


def make_batches(number: int, rows: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(number):
        ids = torch.randint(VOCAB, (rows, WINDOW + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, -1] = IGNORE_INDEX
        batches.append(Batch(ids[:, :-1], labels))
    return batches


def diagnosed(model: RunModel, name: str, batches: Sequence[Batch], **options: Any) -> Diagnosis:
    phase = objectives.build(BLOCKS, name, **options).usual
    return diagnose(model.groups, model.blueprint, phase, batches, model.device)


# ---- gradients


def whole(model: RunModel) -> Any:
    """The library's own model with the same weights."""
    gpt2 = model.blueprint.model_config.model_type == "gpt2"
    base, norm = ("transformer", "transformer.ln_f") if gpt2 else ("model", "model.norm")
    config = copy.deepcopy(model.blueprint.model_config)
    config.tie_word_embeddings = False
    net = (GPT2LMHeadModel if gpt2 else LlamaForCausalLM)(config).eval()
    weights: dict[str, Tensor] = {}
    for stage in model.stages:
        for key, weight in stage.named_parameters():
            if key.startswith("body."):
                weights[key.replace("body", base, 1)] = weight
            elif stage.plan.is_last:
                weights[key.replace("head.norm", norm).replace("head.readout", "lm_head")] = weight
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if "rotary" not in name]
    return net


def head_loss(model: RunModel, net: Any, block: int, output: Any, labels: Tensor) -> Tensor:
    """The mean loss of the head after a block, from what the whole model gave out."""
    logits = output.logits
    if block < BLOCKS - 1:
        head = next(stage.head for stage in model.exits if stage.plan.last_block == block)
        assert head is not None
        rows, norm, weight = output.hidden_states[block + 1], head.norm, head.readout.weight
        if isinstance(norm, nn.LayerNorm):
            rows = F.layer_norm(rows, (32,), norm.weight, norm.bias, net.config.layer_norm_epsilon)
        else:
            rows = F.rms_norm(rows, (32,), norm.weight, net.config.rms_norm_eps)
        logits = rows @ weight.T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, :-1].flatten())


def gradients(model: RunModel, net: Any, first: int, last: int, batch: Batch) -> dict[int | None, Tensor]:
    """Of the loss of the head after block `last`, stopped at the input of `first`; flat, by block."""
    gpt2 = isinstance(net, GPT2LMHeadModel)
    blocks = net.transformer.h if gpt2 else net.model.layers
    embedding = [net.transformer.wte, net.transformer.wpe] if gpt2 else [net.model.embed_tokens]
    net.zero_grad()

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].detach(), *args[1:])

    handle = blocks[first].register_forward_pre_hook(stop) if first > 0 else None
    output = net(batch.input_ids, output_hidden_states=True)
    head_loss(model, net, last, output, batch.labels).backward()
    if handle is not None:
        handle.remove()
    modules: dict[int | None, list[nn.Module]] = {None: embedding} if first == 0 else {}
    modules |= {block: [blocks[block]] for block in range(first, last + 1)}
    flat = {}
    for block, members in modules.items():
        found = [
            weight.grad.flatten() for module in members for weight in module.parameters() if weight.grad is not None
        ]
        assert len(found) == sum(len(list(module.parameters())) for module in members)
        flat[block] = torch.cat(found).clone()
    return flat


# What the definitions say: (span, {block: weight}) of every loss. The embedding (None) goes with block 0.
EXPECTED: dict[str, tuple[str, dict[str, Any], list[tuple[tuple[int, int], dict[int | None, float]]]]] = {
    "chunked": ("chunked", {"chunks": 2}, [((0, 1), {None: 1, 0: 1, 1: 1}), ((2, 3), {2: 1, 3: 1})]),
    "greedy": ("greedy", {}, [((0, 0), {None: 1, 0: 1}), ((1, 1), {1: 1}), ((2, 2), {2: 1}), ((3, 3), {3: 1})]),
    "overlapping": (
        "overlapping",
        {**OVERLAPPING, "own_weight": 0.3},
        [
            ((0, 0), {None: 0.3, 0: 0.3}),
            ((0, 1), {None: 0.7, 0: 0.7, 1: 0.3}),
            ((1, 2), {1: 0.7, 2: 0.3}),
            ((2, 3), {2: 0.7, 3: 1}),
        ],
    ),
    "furthest": (
        "overlapping",
        {**OVERLAPPING, "own_weight": 0.0},
        [((0, 1), {None: 1, 0: 1}), ((1, 2), {1: 1}), ((2, 3), {2: 1, 3: 1})],
    ),
    "deep_supervision": (
        "deep_supervision",
        {"chunks": [1, 3]},
        [((0, 0), {None: 1, 0: 1}), ((0, 3), {None: 1, 0: 1, 1: 1, 2: 1, 3: 1})],
    ),
    "last": ("last", {"trained_blocks": 2}, [((2, 3), {2: 1, 3: 1})]),
}


@pytest.mark.parametrize("of_family", ["gpt2", "llama"])
@pytest.mark.parametrize("case", sorted(EXPECTED))
def test_gradients_are_those_of_a_plain_loop_over_the_whole_hugging_face_model(case: str, of_family: str) -> None:
    name, options, losses = EXPECTED[case]
    model, batches = make_model(name, of_family, **options), make_batches(2)
    net = whole(model)
    of_batch = []
    for batch in batches:
        true = gradients(model, net, 0, BLOCKS - 1, batch)
        local: dict[int | None, Tensor] = {}
        for (first, last), weights in losses:
            found = gradients(model, net, first, last, batch)
            for block, weight in weights.items():
                local[block] = local.get(block, 0) + weight * found[block]
        of_batch.append((true, local))

    found = {one.block: one for one in diagnosed(model, name, batches, **options).gradients}
    assert list(found) == [None, *range(BLOCKS)]
    for block, one in found.items():
        if block not in of_batch[0][1]:
            assert (one.cosine, one.cosine_of_sum, one.norm_ratio, one.norm_ratio_of_sum) == (None,) * 4
            continue
        pairs = [(true[block], local[block]) for true, local in of_batch]
        cosines = [F.cosine_similarity(true, local, dim=0).item() for true, local in pairs]
        ratios = [(local.norm() / true.norm()).item() for true, local in pairs]
        true, local = sum(true for true, _ in pairs), sum(local for _, local in pairs)
        assert one.cosine == pytest.approx(sum(cosines) / 2, abs=2e-5)
        assert one.norm_ratio == pytest.approx(sum(ratios) / 2, rel=1e-4)
        assert one.cosine_of_sum == pytest.approx(F.cosine_similarity(true, local, dim=0).item(), abs=2e-5)
        assert one.norm_ratio_of_sum == pytest.approx((local.norm() / true.norm()).item(), rel=1e-4)
    if case in ("chunked", "greedy", "overlapping"):  # the case can tell right from wrong
        assert found[0].cosine < 0.9 and abs(found[0].cosine - found[0].cosine_of_sum) > 1e-4


def test_up_to_an_exit_the_true_gradient_is_that_of_its_loss() -> None:
    model, (batch,) = make_model("greedy"), make_batches(1)
    net = whole(model)
    phase = Phase(tuple(Span(block, block) for block in range(3)))
    found = diagnose(model.groups[:3], model.blueprint, phase, [batch], model.device)
    assert [one.last_block for one in found.exits] == [0, 1, 2] == [one.block for one in found.ranks]
    true = gradients(model, net, 0, 2, batch)
    local = {block: gradients(model, net, block or 0, block or 0, batch)[block] for block in true}
    for one in found.gradients:
        wanted = F.cosine_similarity(true[one.block], local[one.block], dim=0).item()
        assert one.cosine == pytest.approx(wanted, abs=2e-5)
    assert found.exits[-1].agreement == 1.0 and len(found.gradients) == 4 and found.gradients[-1].cosine == 1.0


def test_backprop_gives_the_true_gradient() -> None:
    found = diagnosed(make_model("backprop"), "backprop", make_batches(2))
    numbers = [(g.cosine, g.cosine_of_sum, g.norm_ratio, g.norm_ratio_of_sum) for g in found.gradients]
    assert numbers == [(1.0,) * 4] * (1 + BLOCKS)


def test_the_first_chunk_does_not_feel_the_last_head_and_the_last_chunk_feels_no_other() -> None:
    model, batches = make_model("chunked", chunks=2), make_batches(1)
    before = diagnosed(model, "chunked", batches, chunks=2).gradients
    assert [one.cosine for one in before[3:]] == [1.0, 1.0]
    last = model.stages[-1].head
    assert last is not None
    with torch.no_grad():
        last.readout.weight.neg_()
    after = diagnosed(model, "chunked", batches, chunks=2).gradients
    assert all(a.cosine != b.cosine for a, b in zip(after[:3], before[:3], strict=True))
    assert [one.cosine for one in after[3:]] == [1.0, 1.0]


def test_weights_of_heads_need_no_gradient_and_get_none() -> None:
    model, batches = make_model("greedy"), make_batches(1)
    wanted = diagnosed(model, "greedy", batches)
    for stage in model.exits:
        assert stage.head is not None
        stage.head.requires_grad_(False)
    assert diagnosed(model, "greedy", batches) == wanted
    assert all(weight.grad is None for stage in model.stages for weight in stage.parameters())


def test_a_gradient_of_zero_has_no_direction() -> None:
    """Span (0, 1) where the head after block 1 has a readout of zeros: its loss moves nothing."""
    model = make_model("chunked", chunks=2)
    head = model.stages[0].head
    assert head is not None
    with torch.no_grad():
        head.readout.weight.zero_()
    found = diagnosed(model, "chunked", make_batches(1), chunks=2).gradients[1]
    assert math.isnan(found.cosine or 0) and found.norm_ratio == 0


@pytest.mark.parametrize(
    "head",
    [{"kind": "shared"}, {"kind": "low_rank", "rank": 5}, {"blocks": 2}, {"blocks": 1, "ema_decay": 0.9}],
    ids=["shared", "low_rank", "blocks", "ema"],
)
def test_any_head_can_be_diagnosed(head: dict[str, Any]) -> None:
    """The numbers of the first exit are those of its whole logits, and its gradient is not the true one."""
    model, batches = make_model("chunked", head=head, chunks=2), make_batches(1)
    first, second = model.stages
    assert first.head is not None and second.head is not None
    with torch.no_grad():
        states = first.hidden_states(batches[0].input_ids)
        own = first.head.logits(states)[:, :-1].log_softmax(-1)
        last = second.head.logits(second.hidden_states(states))[:, :-1].log_softmax(-1)
    found = diagnosed(model, "chunked", batches, chunks=2)
    nll = F.nll_loss(own.flatten(0, 1), batches[0].labels[:, :-1].flatten())
    assert found.exits[0].nll_per_token == pytest.approx(nll.item(), rel=1e-5)
    assert found.exits[0].kl_from_last == pytest.approx((last.exp() * (last - own)).sum(-1).mean().item(), rel=1e-4)
    assert abs(found.gradients[1].cosine or 1) < 0.9


# ---- hidden states


def random_rows(tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_ranks_of_known_spectra() -> None:
    assert effective_rank(torch.ones(16)) == pytest.approx(16)
    assert stable_rank(torch.ones(16)) == pytest.approx(16)
    assert effective_rank(torch.tensor([3.0, 0, 0, 0])) == pytest.approx(1)
    assert stable_rank(torch.tensor([3.0, 0, 0, 0])) == pytest.approx(1)
    # Shares 1/2, 1/4, 1/4: an entropy of 1.5 ln 2. Of their squares it would be 4/6, 1/6, 1/6.
    assert effective_rank(torch.tensor([2.0, 1, 1])) == pytest.approx(2**1.5)
    assert stable_rank(torch.tensor([2.0, 1, 1])) == pytest.approx(6 / 4)
    assert math.isnan(effective_rank(torch.zeros(3))) and math.isnan(stable_rank(torch.zeros(3)))


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["near zero", "far from zero"])
def test_singular_values_are_those_of_the_centred_rows(offset: float) -> None:
    rows = random_rows(200, 12) @ random_rows(12, 12) + offset
    moments = Moments()
    for part in rows.split(37):
        moments.add(part)
    wanted = torch.linalg.svdvals(rows - rows.mean(dim=0))
    torch.testing.assert_close(moments.singular_values().flip(0), wanted, rtol=1e-7, atol=0)


def test_rows_on_a_line_have_rank_one_in_fp32_too() -> None:
    moments = Moments()
    moments.add((random_rows(300, 1) @ random_rows(1, 64) + 5 * random_rows(1, 64)).float())
    assert effective_rank(moments.singular_values()) == pytest.approx(1, abs=1e-3)
    assert stable_rank(moments.singular_values()) == pytest.approx(1, abs=1e-6)


def test_rows_that_are_all_alike_or_not_finite_have_no_rank() -> None:
    for rows in (torch.ones(9, 4), torch.full((9, 4), math.inf)):
        moments = Moments()
        moments.add(rows)
        assert math.isnan(effective_rank(moments.singular_values()))


@pytest.mark.parametrize("of_family", ["gpt2", "llama"])
def test_ranks_are_of_the_hidden_states_that_the_hugging_face_model_gives_out(of_family: str) -> None:
    model, batches = make_model("chunked", of_family, chunks=2), make_batches(3)
    net = whole(model)
    with torch.no_grad():
        outputs = [net(batch.input_ids, output_hidden_states=True).hidden_states for batch in batches]
    found = diagnosed(model, "chunked", batches, chunks=2)
    assert (found.tokens, found.hidden_size) == (3 * 3 * WINDOW, 32)
    places = [(one.block, one.stage, one.ends_stage) for one in found.ranks]
    assert places == [(0, 0, False), (1, 0, True), (2, 1, False), (3, 1, True)]
    for one in found.ranks[:-1]:  # the library gives out the last block's after the final norm
        rows = torch.cat([output[one.block + 1].flatten(0, 1) for output in outputs]).double()
        singular = torch.linalg.svdvals(rows - rows.mean(dim=0))
        shares = singular / singular.sum()
        assert one.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)
        assert one.stable_rank == pytest.approx((singular.square().sum() / singular[0] ** 2).item(), rel=1e-5)
    assert 1 < found.ranks[-1].effective_rank < 32


# ---- exits


def test_agreement_is_that_of_the_whole_logits() -> None:
    model, batches = make_model("greedy"), make_batches(2)
    net = whole(model)
    same, kl = torch.zeros(BLOCKS), torch.zeros(BLOCKS)
    for batch in batches:
        with torch.no_grad():
            output = net(batch.input_ids, output_hidden_states=True)
            last = output.logits[:, :-1].softmax(-1)
            for number, stage in enumerate(model.exits[:-1]):
                assert stage.head is not None
                states = stage.head.norm(output.hidden_states[number + 1])
                own = (states @ stage.head.readout.weight.T)[:, :-1].softmax(-1)
                same[number] += (own.argmax(-1) == last.argmax(-1)).sum()
                kl[number] += (last * (last.log() - own.log())).sum()
    found = diagnosed(model, "greedy", batches).exits
    tokens = 2 * 3 * (WINDOW - 1)
    assert [one.agreement for one in found[:-1]] == pytest.approx((same / tokens)[:-1].tolist())
    assert [one.kl_from_last for one in found[:-1]] == pytest.approx((kl / tokens)[:-1].tolist(), rel=1e-4)
    assert (found[-1].agreement, found[-1].kl_from_last) == (1.0, 0.0)
    assert [(one.stage, one.last_block) for one in found] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert found[0].agreement < 1


def test_an_exit_that_is_the_last_one_agrees_with_it() -> None:
    """The blocks after the first exit add nothing, and its head is the last one's."""
    model = make_model("chunked", chunks=2)
    first, second = model.stages
    assert first.head is not None and second.head is not None
    first.head.load_state_dict(second.head.state_dict())
    for name, weight in second.body.named_parameters():
        if "c_proj" in name:
            weight.data.zero_()
    one, last = diagnosed(model, "chunked", make_batches(2), chunks=2).exits
    assert (one.agreement, one.kl_from_last) == (1.0, pytest.approx(0.0, abs=1e-9))
    assert one.nll_per_token == pytest.approx(last.nll_per_token, rel=1e-6)


# ---- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, two checkpoints and two validation sets, not to be changed but by a diagnosis."""
    texts = {"moor": TEXT * 2, "sea": TEXT.replace("moor", "sea")[:500], "drop": "wet"}
    return make_run(tmp_path_factory.mktemp("saved"), valid=texts, updates=(10, 20))


def test_a_run_is_diagnosed_on_windows_from_all_over_the_set(saved: Path) -> None:
    results = diagnose_run(saved, batches=3, batch_size=2)
    about = {key: results[key] for key in list(results)[:10]}
    assert about == {
        **{"run": str(saved), "step": 20, "set": "moor", "objective": "chunked", "delayed": False, "exit": None},
        **{"window": 16, "windows": 6, "batches": 3, "batch_size": 2},
    }
    # The same by hand: windows 0, 1/6, 2/6 ... of the way through the set.
    ids = load_tokenizer(saved / "tokenizer").encode(TEXT * 2).tolist()
    rows = torch.tensor([ids[16 * w : 16 * w + 16] for w in (i * (len(ids) // 16) // 6 for i in range(6))])
    labels = torch.cat([rows[:, 1:], torch.full((6, 1), IGNORE_INDEX)], dim=1)
    batches = [Batch(rows[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    model = trained_model.load(saved, 20)
    wanted = diagnose(model.groups, model.blueprint, Phase((Span(0, 1), Span(2, 3))), batches, model.device)
    assert {key: results[key] for key in list(results)[10:]} == asdict(wanted)


def test_the_checkpoint_and_the_set_are_chosen(saved: Path) -> None:
    small = {"batches": 1, "batch_size": 1}
    newest, older = diagnose_run(saved, **small), diagnose_run(saved, step=10, **small)
    sea = diagnose_run(saved, set_name="sea", **small)
    assert (newest["step"], older["step"], sea["set"]) == (20, 10, "sea")
    assert len({one["exits"][0]["nll_per_token"] for one in (newest, older, sea)}) == 3


def test_the_model_ends_at_the_exit_asked_for(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first chunk is trained by the loss at its end, so up to there its gradients are the true ones."""
    words = ["diagnose", str(saved), "--exit", "1", "--batches", "1", "--by-stage", "always"]
    run_command(parser(), words)
    assert "up to the exit after block 1 after 20 updates" in capsys.readouterr().out
    part = json.loads((saved / "diagnosis.json").read_text())
    whole = diagnose_run(saved, batches=1)
    assert part["exit"] == 1 and [one["block"] for one in part["gradients"]] == [None, 0, 1]
    assert {one["cosine"] for one in part["gradients"]} == {1.0} and whole["gradients"][1]["cosine"] < 0.99
    assert part["ranks"] == whole["ranks"][:2]
    assert part["exits"][0]["nll_per_token"] == whole["exits"][0]["nll_per_token"] and len(part["exits"]) == 1


def test_a_set_with_fewer_windows_is_taken_whole(saved: Path) -> None:
    results = diagnose_run(saved, set_name="sea", batches=5, batch_size=7)
    assert (results["windows"], results["batches"]) == (500 // 16, 5)
    assert results["tokens"] == 31 * 16


def test_of_a_hybrid_objective_the_usual_phase_counts(saved: Path, tmp_path: Path) -> None:
    """Its global updates would give the true gradient."""
    hybrid = tmp_path / "hybrid"
    shutil.copytree(saved, hybrid)
    config = (hybrid / "config.yaml").read_text()
    (hybrid / "config.yaml").write_text(config.replace("backprop_every: null", "backprop_every: 2"))
    assert layout.read_config(hybrid).objective.backprop_every == 2
    of_hybrid, plain = (diagnose_run(run, batches=1)["gradients"] for run in (hybrid, saved))
    assert of_hybrid == plain and plain[0]["cosine"] < 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"set_name": "bog"}, UserError, "--set bog.*: moor, sea, drop"),
        ({"set_name": "drop"}, DataError, "drop: 3 tokens are too few for a window of 16"),
        ({"batches": 0}, UserError, "--batches 0"),
        ({"batch_size": -1}, UserError, "--batch-size -1"),
        ({"step": 15}, RunError, "15 updates .*10, 20"),
        ({"exit_block": 2}, UserError, "--exit 2: .* has exits after the blocks 1, 3"),
    ],
)
def test_mistakes_are_named(saved: Path, options: dict[str, Any], error: type[UserError], message: str) -> None:
    with pytest.raises(error, match=message):
        diagnose_run(saved, **options)


def test_a_model_folder_has_no_objective_to_diagnose(saved: Path, tmp_path: Path) -> None:
    export_run(saved, tmp_path / "out", keep_exits=True)
    with pytest.raises(UserError, match="is a model folder: it does not say which loss trained which block"):
        diagnose_run(tmp_path / "out")


def test_the_command_prints_three_tables_and_leaves_three_files(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parser().parse_args(["diagnose", str(saved), "--step", "10", "--batches", "2", "--batch-size", "3"])
    args.overrides = []
    args.run(args)
    printed = capsys.readouterr().out
    results = json.loads((saved / "diagnosis.json").read_text())
    assert (results["step"], results["batches"], results["batch_size"], results["set"]) == (10, 2, 3, "moor")
    for title in ("local gradient of chunked", "hidden states after every block", "agreement of the exits"):
        assert title in printed
    for number in (results["gradients"][0]["cosine"], results["ranks"][0]["effective_rank"]):
        assert f"{number:.3f}" in printed
    assert str(saved / "diagnosis.json") in printed
    assert (saved / "diagnosis.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(saved.glob("*.svg")), "PNG alone"
    assert not list(saved.glob("*.tmp"))


def test_who_replaces_a_run_replaces_its_diagnosis(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    write_diagnosis(run, diagnose_run(run, batches=1, batch_size=1))
    layout.remove(run)
    assert not list(run.iterdir())


def test_what_is_not_a_number_is_shown_and_written_all_the_same(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = diagnose_run(saved, batches=1, batch_size=1)
    results["gradients"][0] |= {"cosine": math.nan, "norm_ratio": math.inf}
    results["gradients"][1] |= {"cosine": None}
    results["ranks"][0] |= {"effective_rank": math.nan}
    results["exits"][0] |= {"agreement": math.nan, "kl_from_last": math.nan}
    print_diagnosis(results)
    assert "nan" in capsys.readouterr().out
    written = json.loads(write_diagnosis(tmp_path, results).read_text(), parse_constant=pytest.fail)
    first, second = written["gradients"][:2]
    assert (first["cosine"], first["norm_ratio"], second["cosine"]) == ("NaN", "Infinity", None)


def test_the_same_results_give_the_same_picture(saved: Path, tmp_path: Path) -> None:
    results = diagnose_run(saved, batches=1, batch_size=1)
    for name in ("a", "b"):
        draw_diagnosis(results, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
