"""LM heads of every kind: against plain torch, how they start, what they copy, and which options are refused."""

from __future__ import annotations

import copy
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refusals import DATA, message, says
from saved_runs import FEW, make_run
from small_blueprint import small_blueprint
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, PhiConfig

from lptransformer.config.checks import check_depth
from lptransformer.config.load import load, to_dict
from lptransformer.data.token_set import Batch
from lptransformer.errors import ConfigError, RunError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_run
from lptransformer.models import hf_config
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.cross_entropy import IGNORE_INDEX
from lptransformer.models.head import CROSS_ENTROPY, Copy, Head, LossBatch, LossTerm, Readout, token_positions
from lptransformer.models.stage import Stage, load_stage, make_stage

VOCAB, HIDDEN, DEPTH, LENGTH, ROWS = 41, 16, 5, 12, 3
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": DEPTH}
SIZES |= {"num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": LENGTH}
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=DEPTH, n_head=4, n_positions=LENGTH, tie_word_embeddings=False
    ),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "gemma2": Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=4, sliding_window=4, final_logit_softcapping=0.5, pad_token_id=None
    ),
}
for _config in CONFIGS.values():
    hf_config.for_training(_config)
BLOCK = 1  # of the auxiliary head
KINDS: dict[str, dict[str, Any]] = {
    "private": {},
    "shared": {"kind": "shared"},
    "low rank": {"kind": "low_rank", "rank": 5},
    "private, 2 blocks": {"blocks": 2},
    "shared, 1 block": {"kind": "shared", "blocks": 1},
    "low rank, more blocks than follow": {"kind": "low_rank", "rank": 5, "blocks": 4},
    "private, averaged blocks": {"blocks": 2, "ema_decay": 0.75},
    "shared, followed blocks": {"kind": "shared", "blocks": 3, "ema_decay": 0.0},
    "fitted": {"kind": "fitted"},
    "fitted, 2 frozen blocks": {"kind": "fitted", "blocks": 2},
    "fitted, more blocks than follow": {"kind": "fitted", "blocks": 4, "train_blocks": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_family = pytest.mark.parametrize("name", CONFIGS)


def stage(
    name: str = "llama", seed: int | None = 0, pretrained: Path | None = None, index: int = 0, **options: Any
) -> Stage:
    blueprint = blueprint_of(name, **options)
    return make_stage(blueprint.stages[index], blueprint, seed=seed, pretrained=pretrained)


def blueprint_of(name: str = "llama", **head: Any) -> Blueprint:
    return small_blueprint(CONFIGS[name], chunks=[BLOCK + 1, DEPTH - BLOCK - 1], head=head, length=LENGTH)


def head_of(one: Stage) -> Head:
    assert one.head is not None
    return one.head


def head(*args: Any, **options: Any) -> Head:
    return head_of(stage(*args, **options))


def shake(module: nn.Module) -> None:
    """No weight and no copy keeps a value that would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    for tensor in module.state_dict().values():
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states [b, T, H] that need a gradient, and labels [b, T]."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    labels[:, -1] = IGNORE_INDEX
    hidden_states = torch.randn(ROWS, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden_states.to(dtype).requires_grad_(), labels


def loss_of(
    one: Head, hidden_states: Tensor, labels: Tensor, scale: float = 1.0, positions: Tensor | None = None
) -> LossTerm:
    return one(hidden_states, LossBatch(labels, scale, positions))[CROSS_ENTROPY]


def unit(seed: int, name: str) -> None:
    torch.manual_seed(int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1)


# ---- against plain torch


def plain_logits(name: str, one: Head, hidden_states: Tensor) -> Tensor:
    """By the definition of every kind, from the head's own tensors. Extra blocks run in a whole model of the library's
    that has no others, in their order."""
    state = {**dict(one.named_parameters()), **dict(one.named_buffers())}
    blocks = "h" if name == "gpt2" else "layers"
    if "map.linear.weight" in state:
        mapped = one.map.norm(hidden_states) @ state["map.linear.weight"].T + state["map.linear.bias"]
        hidden_states = hidden_states + mapped
    numbers = sorted({int(key.split(".")[2]) for key in state if key.startswith(f"blocks.{blocks}.")})
    if numbers:
        config = copy.deepcopy(CONFIGS[name])
        config.num_hidden_layers = len(numbers)
        if name == "gemma2":
            config.layer_types = [CONFIGS[name].layer_types[number] for number in numbers]
        model = AutoModel.from_config(config).to(hidden_states.dtype)
        model.set_submodule("ln_f" if name == "gpt2" else "norm", nn.Identity())
        weights = {
            f"{blocks}.{place}.{key}": state[f"blocks.{blocks}.{number}.{key}"]
            for place, number in enumerate(numbers)
            for key, _ in model.get_submodule(f"{blocks}.{place}").named_parameters()
        }
        if name == "gpt2":
            weights["wpe.weight"] = torch.zeros_like(model.wpe.weight)
        inputs = {"inputs_embeds": hidden_states, "use_cache": False}
        hidden_states = torch.func.functional_call(model, weights, kwargs=inputs).last_hidden_state
    if "norm.linear.weight" in state:
        rows = one.norm.norm(hidden_states) @ state["norm.linear.weight"].T + state["norm.linear.bias"]
    else:
        rows = one.norm(hidden_states)
    if one.down is not None:
        rows = rows @ state["down.weight"].T
    logits = rows @ state["readout.weight"].T
    if "readout.temperature" in state:
        logits = logits * state["readout.temperature"]
    if name == "gemma2":
        logits = 0.5 * torch.tanh(logits / 0.5)
    return logits


@every_family
@every_kind
def test_loss_logits_and_gradients_are_those_of_plain_torch(name: str, kind: str) -> None:
    one = head(name, **KINDS[kind]).double()
    shake(one)
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if name == "gpt2" else {"rtol": 1e-5, "atol": 1e-6}  # norms in fp32
    hidden_states, labels = problem()
    logits = plain_logits(name, one, hidden_states)
    torch.testing.assert_close(one.logits(hidden_states), logits, **tolerance)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(ROWS, LENGTH)
    inputs = [hidden_states, *one.parameters()]
    for positions in (None, token_positions(0, BLOCK, 3, ROWS, LENGTH, 0.5)):
        expected = (losses if positions is None else torch.stack([losses[i, positions[i]] for i in range(ROWS)])).sum()
        right = torch.autograd.grad(expected / 7, inputs, retain_graph=True)
        loss, total = loss_of(one, hidden_states, labels, 1 / 7, positions)
        torch.testing.assert_close(total, expected, **tolerance)
        torch.testing.assert_close(loss, expected / 7, **tolerance)
        for found, wanted in zip(torch.autograd.grad(loss, inputs), right, strict=True):
            torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("kind", ["private", "low rank", "shared, 1 block", "private, averaged blocks"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    one = head("gpt2", **KINDS[kind]).double()
    shake(one)
    hidden_states, labels = problem()
    part = hidden_states.detach()[:1, :4].requires_grad_()
    torch.autograd.gradcheck(lambda h, *_: loss_of(one, h, labels[:1, :4], 0.3).loss, (part, *one.norm.parameters()))


def test_loss_and_logits_of_a_head_agree() -> None:
    one = Head(nn.LayerNorm(HIDDEN), Readout(nn.Parameter(torch.randn(VOCAB, HIDDEN)), 8))
    assert [name for name, _ in one.named_parameters()] == ["norm.weight", "norm.bias", "readout.weight"]
    hidden_states, labels = problem(torch.float32)
    _, total = loss_of(one, hidden_states, labels)
    expected = F.cross_entropy(one.logits(hidden_states).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)


# ---- what is trained, and what is not


def test_parameters_are_listed_blocks_first_and_temperature_last() -> None:
    def order(**options: Any) -> list[str]:
        return list(dict.fromkeys(name.partition(".")[0] for name, _ in head(**options).named_parameters()))

    assert order() == ["norm", "readout"]
    assert order(kind="low_rank", rank=5, blocks=1) == ["blocks", "norm", "down", "readout"]
    shared = [name for name, _ in head(kind="shared", blocks=2, ema_decay=0.5).named_parameters()]
    assert shared == ["norm.weight", "readout.temperature"]
    assert order(kind="fitted", blocks=1, train_blocks=True) == ["map", "blocks", "norm"]


@every_kind
def test_what_is_copied_is_kept_and_everything_else_is_trained(kind: str) -> None:
    options = KINDS[kind]
    one = head(**options)
    shake(one)  # without it the norm before a map of zeros has a gradient of zeros
    blocks = {name for name in one.state_dict() if name.startswith("blocks.")}
    is_fitted = options.get("kind") == "fitted"
    read_only = blocks if "ema_decay" in options or (is_fitted and "train_blocks" not in options) else set()
    read_only |= {"readout.weight"} if options.get("kind") in ("shared", "fitted") else set()
    copied, frozen = {copied.target for copied in one.copies}, {f"head.{name}" for name in one.frozen}
    assert (frozen if is_fitted else copied) == {f"head.{name}" for name in read_only} and not (copied and frozen)
    trained = {name for name, _ in one.named_parameters()}
    averages = {f"average.{name.removeprefix('blocks.')}" for name in blocks if options.get("ema_decay", 0) > 0}
    assert set(one.state_dict()) == trained | read_only | averages and not trained & read_only
    loss, _ = loss_of(one, *problem(torch.float32))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in one.parameters())


def test_copies_name_the_stages_that_they_follow() -> None:
    config = CONFIGS["llama"]
    last = stage(index=1)
    one = head(kind="shared", blocks=2, ema_decay=0.5)
    readout, *blocks = one.copies
    assert readout == Copy("head.readout.weight", "head.readout.weight", DEPTH - 1, 0.0)
    assert {copied.source_block for copied in blocks} == {2, 3} and {copied.decay for copied in blocks} == {0.5}
    assert Copy("head.blocks.layers.3.mlp.up_proj.weight", "body.layers.3.mlp.up_proj.weight", 3, 0.5) in blocks
    shapes = {name: tensor.shape for name, tensor in last.named_parameters()}
    for copied in one.copies:
        assert shapes[copied.source] == one.get_buffer(copied.target.removeprefix("head.")).shape
    assert config.num_hidden_layers == DEPTH


@pytest.mark.parametrize(("kind", "products"), [("private", 3), ("shared", 2)])
def test_a_shared_readout_takes_no_gradient_of_the_weight(kind: str, products: int) -> None:
    one = head(kind=kind)
    with FlopCounterMode(display=False) as counter:
        loss_of(one, *problem(torch.float32)).loss.backward()
    assert counter.get_total_flops() == products * 2 * ROWS * LENGTH * HIDDEN * VOCAB


def test_the_blocks_of_a_head_are_no_part_of_the_stage_below() -> None:
    """Extra blocks see the hidden states that go up, and change nothing about them."""
    inputs = torch.arange(LENGTH)[None]
    with torch.no_grad():
        bodies = [stage(**KINDS[kind]).hidden_states(inputs) for kind in KINDS]
    assert all(torch.equal(body, bodies[0]) for body in bodies)


# ---- a fraction of the tokens


def test_positions_are_a_pure_function_and_ascend() -> None:
    def draw(*args: int) -> Tensor:
        return token_positions(*args, rows=50, sequence_length=LENGTH, fraction=0.5)

    first = draw(0, 1, 7)
    state = torch.get_rng_state()
    assert first.dtype == torch.int64 and first.shape == (50, round(0.5 * (LENGTH - 1)))
    assert (first.diff(dim=1) > 0).all() and first.min() == 0 and first.max() == LENGTH - 2
    assert torch.equal(first, draw(0, 1, 7)) and torch.equal(state, torch.get_rng_state())
    for other in ((1, 1, 7), (0, 2, 7), (0, 1, 8)):
        assert not torch.equal(first, draw(*other))
    assert len({tuple(row) for row in first.tolist()}) > 40  # rows are drawn apart
    counts = torch.bincount(torch.cat([draw(0, 1, n) for n in range(20)]).flatten(), minlength=LENGTH - 1)
    torch.testing.assert_close(
        counts / 1000, torch.full_like(counts / 1000, first.shape[1] / (LENGTH - 1)), rtol=0.15, atol=0
    )


@pytest.mark.parametrize(("fraction", "count"), [(1e-6, 1), (0.1, 1), (0.25, 3), (0.999, 11), (1.0, 11)])
def test_the_number_of_positions(fraction: float, count: int) -> None:
    assert token_positions(0, 0, 0, 2, LENGTH, fraction).shape == (2, count)


def test_all_positions_are_the_full_loss() -> None:
    one = head().double()
    positions = token_positions(0, BLOCK, 0, ROWS, LENGTH, 1.0)
    assert torch.equal(positions, torch.arange(LENGTH - 1).expand(ROWS, -1))
    losses = [loss_of(one, *problem(), 0.5, chosen) for chosen in (None, positions)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-14, atol=0)


@every_kind
def test_norm_and_readout_see_no_position_that_does_not_count(kind: str) -> None:
    one = head(**KINDS[kind])
    seen: list[tuple[int, ...]] = []
    one.norm.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    one.readout.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    loss_of(one, *problem(torch.float32), 1.0, token_positions(0, BLOCK, 0, ROWS, LENGTH, 0.25))
    assert seen == [(ROWS, 3, HIDDEN), (ROWS * 3, 5 if one.down is not None else HIDDEN)]


# ---- refreshing


def test_a_refresh_copies_in_place_and_averages_where_it_decays() -> None:
    one = head(kind="shared", blocks=1, ema_decay=0.75)
    readout, name = one.readout.weight, "layers.2.mlp.up_proj.weight"
    blocks, average = one.get_buffer(f"blocks.{name}"), one.get_buffer(f"average.{name}")
    start, versions = blocks.clone(), [torch.randn(blocks.shape) for _ in range(3)]
    new_readout = torch.randn(VOCAB, HIDDEN)
    expected = start
    for version in versions:
        one.refresh({"head.readout.weight": new_readout, f"head.blocks.{name}": version})
        expected = 0.75 * expected + (1 - 0.75) * version
    assert torch.equal(readout, new_readout) and readout is one.readout.weight
    assert torch.equal(blocks, expected) and torch.equal(average, expected)
    untouched = "layers.2.mlp.down_proj.weight"
    assert torch.equal(one.get_buffer(f"blocks.{untouched}"), stage(index=1).body.get_parameter(untouched))
    with pytest.raises(KeyError):
        one.refresh({"head.norm.weight": torch.ones(HIDDEN)})


def test_an_average_is_not_rounded_to_bf16() -> None:
    """With a decay near 1 a bf16 average would never move."""
    one = head(blocks=1, ema_decay=0.999).bfloat16()
    name = "layers.2.mlp.up_proj.weight"
    start = one.get_buffer(f"average.{name}").clone()
    assert start.dtype == torch.float32 and one.get_buffer(f"blocks.{name}").dtype == torch.bfloat16
    assert torch.equal(start, stage(index=1).body.get_parameter(name))  # and it starts as precise as the model
    new = (start + 0.01).bfloat16()
    for _ in range(5):
        one.refresh({f"head.blocks.{name}": new})
    average = one.get_buffer(f"average.{name}")
    torch.testing.assert_close(average, new.float() + 0.999**5 * (start - new.float()))
    assert torch.equal(one.get_buffer(f"blocks.{name}"), average.bfloat16()) and not torch.equal(average, start)
    assert one.double().get_buffer(f"average.{name}").dtype == torch.float64
    assert one.float().get_buffer(f"average.{name}").dtype == torch.float32


@pytest.mark.parametrize(
    "kind", [{"kind": "shared", "ema_decay": 0.5}, {"kind": "fitted"}], ids=lambda one: one["kind"]
)
def test_what_is_read_only_is_cast_to_go_with_bf16_weights(kind: dict[str, Any]) -> None:
    """DeepSpeed casts parameters alone."""
    one = head(**kind, blocks=1)
    for parameter in one.parameters():
        parameter.data = parameter.data.bfloat16()
    one.cast_copies(torch.bfloat16)
    loss_of(one, *problem(torch.bfloat16)).loss.backward()
    assert {tensor.dtype for name, tensor in one.state_dict().items() if "average" not in name} == {torch.bfloat16}
    assert all(tensor.dtype == torch.float32 for name, tensor in one.state_dict().items() if "average" in name)


def test_no_gradient_goes_through_a_refresh() -> None:
    one = head(kind="shared")
    one.refresh({"head.readout.weight": torch.randn(VOCAB, HIDDEN, requires_grad=True)})
    assert not one.readout.weight.requires_grad and one.readout.weight.grad_fn is None


# ---- how heads start


def test_a_private_head_from_scratch_has_the_weights_of_its_unit() -> None:
    for name, readout_std in (("gpt2", 0.02), ("llama", 0.02)):
        one = head(name, seed=5)
        unit(5, f"head {BLOCK}")
        expected = torch.empty(VOCAB, HIDDEN).normal_(0.0, readout_std)
        assert torch.equal(one.readout.weight, expected) and (one.norm.weight == 1).all()


def test_a_low_rank_head_and_extra_blocks_have_seeds_of_their_own() -> None:
    one = head(seed=5, kind="low_rank", rank=4, blocks=2)
    assert one.down is not None and one.blocks is not None
    unit(5, f"head {BLOCK}")
    assert torch.equal(one.down.weight, torch.empty(4, HIDDEN).normal_(0.0, 0.02))
    assert torch.equal(one.readout.weight, torch.empty(VOCAB, 4).normal_(0.0, 0.02))
    for number, index in enumerate((BLOCK + 1, BLOCK + 2)):
        unit(5, f"head {BLOCK} block {number}")
        first = one.blocks.get_parameter(f"layers.{index}.self_attn.q_proj.weight")
        assert torch.equal(first, torch.empty(HIDDEN, HIDDEN).normal_(0.0, 0.02))
    other = head(seed=5, kind="low_rank", rank=4, blocks=1)
    assert torch.equal(one.down.weight, other.down.weight)  # type: ignore[union-attr]


def test_with_more_blocks_than_follow_the_models_last_are_the_pattern() -> None:
    names = {name.split(".")[2] for name, _ in head(blocks=4).named_parameters() if name.startswith("blocks.")}
    assert names == {"1", "2", "3", "4"}
    names = {name.split(".")[2] for name, _ in head(blocks=3).named_parameters() if name.startswith("blocks.")}
    assert names == {"2", "3", "4"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        shake(model)
        model.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@every_family
@pytest.mark.parametrize("from_folder", [False, True])
def test_a_head_that_starts_as_the_model_copies_it(name: str, from_folder: bool, folders: dict[str, Path]) -> None:
    folder = folders[name] if from_folder else None
    options: dict[str, Any] = {} if from_folder else {"init": "model"}  # which is the default with a folder
    last = stage(name, pretrained=folder, index=1)
    own = head_of(last)
    one = head(name, pretrained=folder, blocks=3, **options)
    assert one.blocks is not None and _same(one.blocks, last.body)
    assert _same(one.norm, own.norm) and torch.equal(one.readout.weight, own.readout.weight)
    assert one.readout.weight.data_ptr() != own.readout.weight.data_ptr()
    shared = head(name, pretrained=folder, kind="shared", **options)
    assert _same(shared.norm, own.norm) and torch.equal(shared.readout.weight, own.readout.weight)
    assert shared.readout.temperature == 1.0  # type: ignore[union-attr]


@every_family
@pytest.mark.parametrize("blocks", [0, 2, 4])
def test_a_fitted_head_has_the_models_last_blocks_and_a_map_of_nothing(
    name: str, blocks: int, folders: dict[str, Path]
) -> None:
    last = stage(name, pretrained=folders[name], index=1)
    one = head(name, pretrained=folders[name], kind="fitted", blocks=blocks)
    assert one.fitted is not None and not any(weight.any() for weight in one.fitted.linear.parameters())
    assert torch.equal(one.readout.weight, head_of(last).readout.weight)
    rows, own = problem(torch.float32)[0], one.fitted.norm
    assert _same(own, stage(name, kind="fitted", seed=3).head.fitted.norm)  # type: ignore[union-attr]
    assert torch.equal(own(rows), head(name).norm(rows))  # as the family begins: of weight 1
    if blocks == 0:
        assert one.norm is one.fitted and torch.equal(one.fitted(rows), torch.zeros_like(rows))
        return
    assert torch.equal(one.fitted(rows), rows) and _same(one.norm, head_of(last).norm) and one.blocks is not None
    held = {key.split(".")[1] for key in one.blocks.state_dict()}
    assert held == {str(block) for block in range(max(BLOCK + 1, DEPTH - blocks), DEPTH)}
    weights = last.body.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in one.blocks.state_dict().items())


def test_heads_of_a_process_share_what_is_frozen() -> None:
    blueprint = small_blueprint(CONFIGS["llama"], chunks=[1, 2, 2], head={"kind": "fitted", "blocks": 2}, length=LENGTH)
    made = [head_of(make_stage(plan, blueprint, seed=0)) for plan in blueprint.stages[:2]]
    held: dict[str, Tensor] = {}
    for one in made:
        one.share_frozen(held, torch.device("cpu"))
    lower, upper = (dict(one.named_buffers()) for one in made)
    assert set(made[0].frozen) == set(made[1].frozen) == set(held) and "blocks.layers.4.mlp.up_proj.weight" in held
    assert all(lower[name].data_ptr() == upper[name].data_ptr() for name in held)


@every_family
def test_from_scratch_only_what_is_read_only_is_copied(name: str, folders: dict[str, Path]) -> None:
    for folder in (None, folders[name]):
        last = stage(name, pretrained=folder, index=1)
        fresh = head(name)
        one = head(name, pretrained=folder, kind="shared", blocks=3, ema_decay=0.5, init="scratch")
        assert one.blocks is not None
        assert _same(one.norm, fresh.norm) and torch.equal(one.readout.weight, head_of(last).readout.weight)
        weights, copied = dict(last.body.named_parameters()), dict(one.blocks.named_buffers())
        assert all(torch.equal(copied[key], weight) for key, weight in weights.items())
        private = head(name, pretrained=folder, init="scratch", blocks=1)
        assert torch.equal(private.readout.weight, fresh.readout.weight)
        assert _same(private, head(name, blocks=1))


@pytest.mark.parametrize("rank", [1, 6, HIDDEN])
def test_a_low_rank_head_starts_as_the_nearest_matrix_to_the_models_readout(
    rank: int, folders: dict[str, Path]
) -> None:
    last = head_of(stage(pretrained=folders["llama"], index=1))
    one = head(pretrained=folders["llama"], kind="low_rank", rank=rank)
    assert one.down is not None
    product = (one.readout.weight @ one.down.weight).detach()
    assert torch.linalg.matrix_rank(product) == rank
    left_out = torch.linalg.svdvals(last.readout.weight.detach())[rank:]
    error = torch.linalg.matrix_norm(product - last.readout.weight.detach())  # Eckart and Young: no smaller one
    torch.testing.assert_close(error, left_out.square().sum().sqrt(), rtol=1e-4, atol=1e-5)
    assert _same(one.norm, last.norm)


def test_a_rank_that_no_readout_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"head.rank is 17: a readout of 41 x 16 has at most rank 16"):
        head(kind="low_rank", rank=17)


# ---- families whose readout has a bias, or rows that are narrower than the hidden states


UNUSUAL: dict[str, Any] = {
    "a bias": PhiConfig(**SIZES, pad_token_id=None),
    "a projection": OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8, pad_token_id=None),
    "no final norm": OPTConfig(
        **SIZES, ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False, pad_token_id=None
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_every_kind_of_head_starts_as_the_models_own(name: str, tmp_path: Path) -> None:
    config = hf_config.for_training(copy.deepcopy(UNUSUAL[name]))
    model = AutoModelForCausalLM.from_config(config)
    shake(model)
    model.save_pretrained(tmp_path / "model")
    hidden_states, labels = problem(torch.float32)
    kinds: list[tuple[dict[str, Any], float]] = [({}, 0), ({"kind": "shared"}, 0)]
    kinds.append(({"kind": "low_rank", "rank": 8}, 1e-4))  # no more than the rank of a readout behind the projection
    if name == "a bias":
        kinds[-1][0]["rank"] = HIDDEN
    for options, tolerance in kinds:
        plan = small_blueprint(config, chunks=[BLOCK + 1, DEPTH - BLOCK - 1], head=options, length=LENGTH)
        first, last = (make_stage(one, plan, seed=0, pretrained=tmp_path / "model") for one in plan.stages)
        own, made = head_of(last), head_of(first)
        expected = own.logits(hidden_states)
        torch.testing.assert_close(made.logits(hidden_states), expected, rtol=tolerance, atol=tolerance)
        loss_of(made, hidden_states, labels).loss.backward()
        assert all(parameter.grad is not None for parameter in made.parameters())
        fresh = head_of(make_stage(plan.stages[0], plan, seed=None))  # as a checkpoint is loaded
        assert {key: one.shape for key, one in fresh.state_dict().items()} == {
            key: one.shape for key, one in made.state_dict().items()
        }
        if options.get("kind") == "shared":
            weights = {f"head.{key}": one for key, one in own.state_dict().items()}
            made.refresh({copied.target: weights[copied.source] + 1 for copied in made.copies})
            assert torch.equal(made.readout.weight, own.readout.weight + 1)
            assert name != "a bias" or torch.equal(made.readout.bias, own.readout.bias + 1)


# ---- checkpoints


@every_kind
def test_a_stage_is_loaded_from_its_checkpoint(kind: str) -> None:
    blueprint = blueprint_of(**KINDS[kind])
    one = stage(**KINDS[kind])
    shake(one)
    again = load_stage(blueprint.stages[0], blueprint, one.state_dict())
    assert _same(one, again) and not again.training
    copies = head_of(one).copies
    assert head_of(again).copies == copies
    name = copies[0].target if copies else f"head.{list(head_of(one).state_dict())[-1]}"
    lacking = {key: tensor for key, tensor in one.state_dict().items() if key != name}
    with pytest.raises(RunError, match=rf"{name} is missing in the checkpoint"):
        load_stage(blueprint.stages[0], blueprint, lacking)


def test_a_checkpoint_of_another_head_is_refused() -> None:
    blueprint = blueprint_of(kind="shared")
    with pytest.raises(RunError, match=r"head.readout.temperature is missing in the checkpoint"):
        load_stage(blueprint.stages[0], blueprint, stage().state_dict())


def test_the_last_head_is_the_models_own_whatever_the_options_say() -> None:
    plain = stage(index=1)
    for kind in KINDS:
        other = stage(index=1, **KINDS[kind])
        assert _same(plain, other) and head_of(other).copies == ()


@pytest.mark.parametrize("kind", ["shared, 1 block", "private, averaged blocks"])
def test_a_run_is_evaluated_at_its_exits(kind: str, tmp_path: Path) -> None:
    own = trained_model.load(make_run(tmp_path, head=KINDS[kind] | {"blocks": 1}), 10)
    ids = torch.arange(32).view(2, 16)
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE_INDEX)], 1)
    first = own.stages[0]
    with torch.no_grad():
        logits = head_of(first).logits(first.hidden_states(ids)).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum").item()
    found = trained_model.token_nlls(own.groups, [Batch(ids, labels)], own.device)
    assert found[0].sum().item() == pytest.approx(expected)


def test_a_model_with_capped_logits_is_trained_further_and_exported(tmp_path: Path) -> None:
    sizes = SIZES | {"vocab_size": 300, "max_position_embeddings": 16}
    config = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=4, final_logit_softcapping=0.5, pad_token_id=None)
    whole = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path / "gemma2")
    model = {"pretrained": str(tmp_path / "gemma2"), **dict.fromkeys(FEW)}
    run = make_run(tmp_path, model=model, head={"kind": "shared", "blocks": 2})
    export_run(run, tmp_path / "out")
    own, ids = trained_model.load(run, 10), torch.arange(32).view(2, 16)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = own.logits(ids)
        assert torch.equal(exported(ids).logits, logits)
        assert not torch.equal(whole(ids).logits, logits) and 0.3 < logits.abs().max() < 0.5
        nats = exported(ids, labels=ids).loss.item() * 30
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE_INDEX)], 1)
    found = trained_model.token_nlls(own.groups, [Batch(ids, labels)], own.device)
    assert found[-1].sum().item() == pytest.approx(nats, rel=1e-6)


# ---- the configuration

DEEP = {**DATA, "model": {"num_layers": 8}, "objective": {"chunks": 4}}  # heads after the blocks 1, 3, 5
CLI = "(on the command line)"
REFUSED = [
    ("head.rank=8", f"head.rank = 8 {CLI} has no meaning with head.kind = 'private'", "remove it"),
    ("head.kind=low_rank head.rank=256", f"head.rank = 256 {CLI}", "model.hidden_size = 256", "private"),
    ("head.kind=low_rank model.hidden_size=64", "head.rank = 64 (by default)", "model.hidden_size = 64"),
    ("head.ema_decay=0.9", f"head.ema_decay = 0.9 {CLI} has no meaning with head.blocks = 0", "give 1 or more"),
    (
        "head.ema_decay=0.9 head.blocks=3",
        f"head.ema_decay = 0.9 {CLI} with head.blocks = 3 {CLI}: the head after block 5 would follow blocks 6 to 8",
        "model.num_layers = 8 (in the given mapping) the last one is block 7",
        "give head.blocks=2 or less",
    ),
    ("head.blocks=9", f"head.blocks = 9 {CLI} is more than model.num_layers = 8", "at most 8"),
    (
        "head.refresh_every=2",
        f"head.refresh_every = 2 {CLI} has no meaning with head.kind = 'private'",
        "head.ema_decay = None",
        "nothing to refresh",
    ),
    (
        "head.kind=shared objective.name=backprop objective.chunks=null",
        "head.kind = 'shared'",
        "'backprop'",
        "no head but",
    ),
    ("head.token_fraction=0.5 objective.name=last objective.chunks=null", "head.token_fraction = 0.5", "'last'"),
    ("head.blocks=1 objective.chunks=1", "head.blocks = 1", "no head but the model's"),
    ("head.kind=fitted", f"head.kind = 'fitted' {CLI} without model.pretrained", "give its folder"),
    ("head.init=model objective.name=delayed objective.chunks=null", "head.init = 'model'", "'delayed'"),
]
WRONG = [
    ("head.kind=privat", "head.kind = 'privat'", "private, shared, low_rank, fitted", "did you mean private?"),
    ("head.ema_decay=1", "head.ema_decay = 1", "a number, 0 or more and below 1, or null"),
    ("head.token_fraction=0", "head.token_fraction = 0", "a number above 0, up to 1"),
    ("head.token_fraction=1.5", "head.token_fraction = 1.5", "a number above 0, up to 1"),
    ("head.refresh_every=0", "head.refresh_every = 0", "a whole number, 1 or more"),
    ("head.blocks=-1", "head.blocks = -1", "a whole number, 0 or more"),
    ("head.kind=low_rank head.rank=0", "head.rank = 0", "a whole number, 1 or more"),
    ("head.init=random", "head.init = 'random'", "scratch, model or null"),
]
TAKEN = [
    "head.kind=low_rank head.rank=255",
    "head.ema_decay=0 head.blocks=2",
    "head.ema_decay=0.9 head.blocks=2 head.refresh_every=3 head.kind=low_rank",
    "head.kind=shared head.refresh_every=4 head.token_fraction=1e-3 head.blocks=8 head.init=scratch",
    "head.ema_decay=0.5 head.blocks=6 objective.name=overlapping objective.chunks=[1,7] objective.first_head=true",
    "loss.chunk_tokens=7 objective.name=backprop objective.chunks=null",
]


@pytest.mark.parametrize("row", [*REFUSED, *WRONG], ids=lambda row: row[0])
def test_options_that_cannot_work_are_refused(row: tuple[str, ...]) -> None:
    overrides, *parts = row
    says(message(DEEP, *overrides.split()), *parts)


@pytest.mark.parametrize("overrides", TAKEN)
def test_options_at_the_edge_of_what_can_work(overrides: str) -> None:
    config = load(DEEP, overrides.split())
    assert to_dict(load(to_dict(config))) == to_dict(config)


def test_averaged_blocks_in_a_model_of_another_depth() -> None:
    """The message says where the depth came from."""
    config = load(DEEP, ["head.ema_decay=0.9", "head.blocks=2", "objective.chunks=[2,2,2,2]"])
    config.objective.chunks = 7
    with pytest.raises(ConfigError, match=r"would follow blocks 6 to 7, but with model.num_layers = 7 \(in m\)"):
        check_depth(config, 7, None, "in m")
