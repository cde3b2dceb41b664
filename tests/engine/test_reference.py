"""The plain loop of reference.py against algebra that does not use it: ordinary Hugging Face training, and autograd by
hand on the library's own forward. From reference.Net these tests take initial weights; hidden states are caught in the
whole model's forward. In float64 (GPT-2: Llama's norms compute in fp32) to 1e-12 of a tensor's greatest element, in
fp32 bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import pytest
import reference
import torch
from reference import Result
from reference_objectives import HeadOptions, Phase, Span
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW
from transformers import GPT2Config, LlamaConfig, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

FAMILIES = ("gpt2", "llama")
VOCAB, WINDOW, BLOCKS, ACCUMULATION, SEED = 13, 8, 4, 2, 5
PLAIN_SGD: dict[str, Any] = {"name": "sgd"}
MOMENTUM: dict[str, Any] = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}
ADAMW: dict[str, Any] = {"name": "adamw", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CHUNKED = [(0, 1), (2, 3)]
GLOBAL = [(2, 1), (0, 3)]  # backprop; the head after block 1 goes on learning and trains no block


def config(family: str = "gpt2") -> GPT2Config | LlamaConfig:
    shared = {"vocab_size": VOCAB, "use_cache": False, "tie_word_embeddings": False}
    shared |= {"bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": BLOCKS, "n_head": 2, "n_positions": WINDOW}
        return GPT2Config(**sizes, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, **shared)
    return LlamaConfig(hidden_size=16, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=32, **shared)


def batches(updates: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of two windows; the later in an update has fewer label tokens."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(updates * ACCUMULATION):
        ids = torch.randint(VOCAB, (2, WINDOW), generator=generator)
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        labels[0, : 3 * (index % ACCUMULATION)] = -100
        made.append((ids, labels))
    return made


def train(
    objective: Sequence[Span] | Sequence[Phase], updates: int, options: dict[str, Any] = PLAIN_SGD, **more: Any
) -> Result:
    family, clip = more.pop("family", "gpt2"), more.pop("clip", 0.0)
    rates = [0.1 / (1 + update) if options["name"] == "sgd" else 0.01 for update in range(updates)]
    return reference.train(
        config(family), objective, batches(updates), ACCUMULATION, options, rates, clip, SEED, 1024, **more
    )


def initial(spans: Sequence[Span], options: HeadOptions | None = None, family: str = "gpt2") -> reference.Net:
    net = reference.Net(config(family), spans, options)
    net.initialise(SEED)
    return net.train()


def in_double(spans: Sequence[Span], options: HeadOptions | None = None) -> reference.Net:
    return initial(spans, options).double()


# --------------------------------------------------------------------------------------------- by hand


def states(model: PreTrainedModel, ids: Tensor, stop: int | None = None) -> list[Tensor]:
    """The input of every block and of the final norm, from the library's forward; no gradient passes below `stop`."""
    base = model.base_model
    blocks, norm = (base.h, base.ln_f) if hasattr(base, "h") else (base.layers, base.norm)
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(args[0].detach() if len(caught) == stop else args[0])
        return (caught[-1], *args[1:])

    hooks = [module.register_forward_pre_hook(catch) for module in [*blocks, norm]]
    base(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(caught) == BLOCKS + 1
    return caught


def nll(hidden: Tensor, norm: nn.Module, readout: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    logits = readout(norm(hidden))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def head_nll(net: reference.Net, end: int, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss of a private head, or of the model's own."""
    if end == BLOCKS - 1:
        return nll(hidden, net.norm, net.readout, labels)
    return nll(hidden, net.head[str(end)].norm, net.head[str(end)].readout, labels)


def update_batches(update: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    made = batches(update + 1)[-ACCUMULATION:]
    return made, sum(int((labels != -100).sum()) for _, labels in made)


def gradients(net: reference.Net, loss: Callable[[Tensor, Tensor], Tensor], update: int = 0) -> dict[str, Tensor]:
    """Of a loss(ids, labels) per label token over an update, by name; what it does not reach is left out."""
    net.zero_grad()
    made, tokens = update_batches(update)
    for ids, labels in made:
        (loss(ids, labels) / tokens).backward()
    return {name: p.grad.clone() for name, p in net.named().items() if p.grad is not None}


def unit(name: str) -> int | str:
    """The block (the embedding with the first) or the head that a parameter is of."""
    parts = name.split(".")
    if parts[0] == "head":
        return f"head {parts[1]}"
    number = next((int(part) for part in parts if part.isdigit()), None)
    if number is None:
        return 0 if "wte" in name or "wpe" in name or "embed" in name else f"head {BLOCKS - 1}"
    return number


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())
    for name, tensor in wanted.items():
        # Keys' biases have no gradient but rounding.
        scale = max(tensor.abs().max().item(), 1e-6)
        assert (got[name] - tensor).abs().max().item() <= tolerance * scale, name


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def moved(got: dict[str, Tensor], start: dict[str, Tensor]) -> set[int | str]:
    """The units of which any weight differs."""
    return {unit(name) for name in start if not torch.equal(got[name], start[name])}


def of_the_model(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}


# --------------------------------------------------------------------------------------------- ordinary training


@pytest.mark.parametrize("options", [ADAMW, MOMENTUM], ids=["adamw", "sgd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_backprop_equals_the_loop_that_anybody_would_write(family: str, options: dict[str, Any]) -> None:
    """The library's own labels and loss. It divides every micro-batch's loss in single precision: losses to 1e-6."""
    model = initial([(0, 3)], family=family).model
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    arguments = {key: value for key, value in options.items() if key not in ("name", "weight_decay")}
    step = (AdamW if options is ADAMW else SGD)(groups, lr=0.05, **arguments)
    losses, norms = [], []
    data = [(ids, F.pad(ids[:, 1:], (0, 1), value=-100)) for ids, _ in batches(3)]
    for update in range(3):
        total = 0.0
        for ids, _ in data[update * ACCUMULATION :][:ACCUMULATION]:
            tokens = ACCUMULATION * 2 * (WINDOW - 1)
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=tokens).loss
            loss.backward()
            total += loss.item()
        losses.append([pytest.approx(total, rel=1e-6)])
        norms.append([clip_grad_norm_(model.parameters(), 0.25).item()])
        step.step()
        step.zero_grad()

    got = reference.train(config(family), [(0, 3)], data, ACCUMULATION, options, [0.05] * 3, 0.25, SEED, 1024)
    assert got.grad_norms == norms and min(norms)[0] > 0.25
    assert got.losses == losses
    assert_same(got.weights, {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("spans", [CHUNKED, [(0, 0), (1, 2), (3, 3)], [(0, 0), (1, 1), (2, 2), (3, 3)]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_partition_equals_the_walk_that_runs_every_block_once(family: str, spans: list[Span]) -> None:
    net = initial(spans, family=family)
    parts = [[p for n, p in net.named().items() if unit(n) in (*range(s, e + 1), f"head {e}")] for s, e in spans]
    steps = [SGD(part, lr=0.1) for part in parts]
    norms = []
    for update in range(3):
        made, tokens = update_batches(update)
        for ids, labels in made:
            hidden = net.embed(ids)
            for index, (first, last) in enumerate(spans):
                hidden = net.run_blocks(hidden.detach() if index else hidden, (first, last))
                (head_nll(net, last, hidden, labels) * (1 / tokens)).backward()
        norms.append([clip_grad_norm_(part, 0.5).item() for part in parts])
        for step in steps:
            step.param_groups[0]["lr"] = 0.1 / (1 + update)
            step.step()
            step.zero_grad()
    got = train(spans, 3, clip=0.5, family=family)
    assert got.grad_norms == norms
    assert_same(got.weights, {name: p.detach() for name, p in net.named().items()})


@pytest.mark.parametrize("options", [ADAMW, MOMENTUM], ids=["adamw", "sgd"])
def test_the_last_blocks_alone_equal_training_with_the_rest_frozen(options: dict[str, Any]) -> None:
    net = initial([(2, 3)])
    free = [p for name, p in net.named().items() if unit(name) in (2, 3, "head 3")]
    net.requires_grad_(False)
    for parameter in free:
        parameter.requires_grad_(True)
    step = reference.make_optimizer(free, options)
    for update in range(3):
        for name, gradient in gradients(net, lambda i, y: head_nll(net, 3, states(net.model, i)[4], y), update).items():
            net.named()[name].grad = gradient
        for group in step.param_groups:
            group["lr"] = 0.01 if options is ADAMW else 0.1 / (1 + update)
        step.step()
    got = train([(2, 3)], 3, options)
    assert_close(got.weights, {name: p.detach() for name, p in net.named().items()}, 1e-6)
    start = {name: p.detach() for name, p in initial([(2, 3)]).named().items()}
    assert moved(got.weights, start) == {2, 3, "head 3"}
    assert [len(norms) for norms in got.grad_norms] == [1, 1, 1], "what is frozen has no norm"


# --------------------------------------------------------------------------------------------- spans that overlap

# For block 1, which is in both spans (0, 1) and (1, 3): the weight of the nearer and of the further head's loss.
BOTH = {None: (1.0, 1.0), 0.0: (0.0, 1.0), 0.3: (0.3, 0.7), 0.5: (0.5, 0.5), 1.0: (1.0, 0.0)}


@pytest.mark.parametrize("own_weight", BOTH)
def test_two_spans_that_overlap_equal_two_losses_by_hand(own_weight: float | None) -> None:
    spans, (near_weight, far_weight) = [(0, 1), (1, 3)], BOTH[own_weight]
    net = in_double(spans)
    losses = []
    for update in range(3):
        near = gradients(net, lambda ids, y: head_nll(net, 1, states(net.model, ids)[2], y), update)
        far = gradients(net, lambda ids, y: head_nll(net, 3, states(net.model, ids, stop=1)[4], y), update)
        assert {unit(name) for name in near} == {0, 1, "head 1"} and {unit(name) for name in far} == {
            *(1, 2, 3),
            "head 3",
        }
        combined = near | far
        for name in near.keys() & far.keys():
            combined[name] = near_weight * near[name] + far_weight * far[name]
        made, tokens = update_batches(update)
        with torch.no_grad():
            caught = [(states(net.model, ids), y) for ids, y in made]
            losses.append([sum(head_nll(net, e, h[e + 1], y).item() for h, y in caught) / tokens for e in (1, 3)])
            for name, parameter in net.named().items():
                parameter -= 0.1 / (1 + update) * combined[name]
    got = train([Phase(spans, own_weight)], 3, dtype=torch.float64, gradients_of=2)
    assert_close(got.gradients, combined)
    assert_close(got.weights, {name: p.detach() for name, p in net.named().items()})
    assert got.losses == [pytest.approx(values, rel=1e-12) for values in losses]


def test_deep_supervision_equals_one_backward_of_the_sum_of_the_losses() -> None:
    spans = [(0, 0), (0, 2), (0, 3)]
    net = in_double(spans)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        hidden = states(net.model, ids)
        return sum((head_nll(net, last, hidden[last + 1], labels) for _, last in spans), torch.zeros(()))

    assert_close(train(spans, 1, dtype=torch.float64, gradients_of=0).gradients, gradients(net, loss))


def test_the_weights_of_losses() -> None:
    spans = [(0, 0), (0, 1), (0, 2), (1, 3)]
    # By block: the weights of the losses of the heads after blocks 0 to 3.
    wanted = {
        None: [[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]],
        0.4: [[0.2, 0.2, 0.6, 0], [0, 0.2, 0.2, 0.6], [0, 0, 0.4, 0.6], [0, 0, 0, 1]],
        0.0: [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]],
    }
    for own_weight, rows in wanted.items():
        phase = Phase(spans, own_weight)
        for block, row in enumerate(rows):
            got = [phase.weight(s, block) if s[0] <= block <= s[1] else 0 for s in spans]
            assert got == pytest.approx(row), (own_weight, block)


def test_the_order_in_which_spans_are_given_does_not_matter() -> None:
    """Three losses reach block 1: a sum of three depends on its order."""
    phase, turned = Phase([(0, 1), (0, 2), (1, 3)], 0.3), Phase([(1, 3), (0, 2), (0, 1)], 0.3)
    assert_same(train([phase], 2, ADAMW).weights, train([turned], 2, ADAMW).weights)


# --------------------------------------------------------------------------------------------- the gradient law

OBJECTIVES = {
    "backprop": Phase([(0, 3)]),
    "greedy": Phase([(0, 0), (1, 1), (2, 2), (3, 3)]),
    "chunked": Phase(CHUNKED),
    "overlapping": Phase([(0, 1), (1, 2), (2, 3)], 0.5),
    "overlapping, first head": Phase([(0, 0), (0, 1), (1, 3)], 0.5),
    "last": Phase([(3, 3)]),
    "deep supervision": Phase([(0, 0), (0, 1), (0, 3)]),
    "global update": Phase(GLOBAL),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_labels_at_one_head_change_its_span_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    phase, loss = OBJECTIVES[name], reference.Net.loss
    usual = train([phase], 1).weights
    for first, last in phase.spans:

        def other(self: reference.Net, h: Tensor, y: Tensor, block: int, *rest: Any, end: int = last) -> Tensor:
            return loss(self, h, y.roll(1, 0) if block == end else y, block, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(reference.Net, "loss", other)
            changed = train([phase], 1).weights
        assert moved(changed, usual) == {*range(first, last + 1), f"head {last}"}


@pytest.mark.parametrize("options", [PLAIN_SGD, ADAMW], ids=["sgd", "adamw"])
def test_an_empty_span_moves_its_head_only(options: dict[str, Any]) -> None:
    spans = [(2, 1), (2, 3)]
    start = {name: p.detach() for name, p in initial(spans).named().items()}
    with_head, without = train(spans, 2, options).weights, train([(2, 3)], 2, options).weights
    assert moved(with_head, start) == {2, 3, "head 1", "head 3"}
    assert_same(of_the_model(with_head), without)


# --------------------------------------------------------------------------------------------- phases, delay


@pytest.mark.parametrize("options", [ADAMW, MOMENTUM], ids=["adamw", "sgd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_global_updates_alone_equal_backprop_for_the_model(family: str, options: dict[str, Any]) -> None:
    phases = [Phase(CHUNKED), Phase(GLOBAL)]
    got = train(phases, 3, options, phase_of_update=[1, 1, 1], family=family)
    wanted = train([(0, 3)], 3, options, family=family)
    assert_same(of_the_model(got.weights), wanted.weights)
    assert [[loss] for _, loss in got.losses] == wanted.losses


def test_each_update_follows_its_phase() -> None:
    got = train([Phase(CHUNKED), Phase(GLOBAL)], 2, phase_of_update=[0, 1], dtype=torch.float64, gradients_of=1)
    net = in_double(CHUNKED)
    after_one = train(CHUNKED, 1, dtype=torch.float64).weights
    with torch.no_grad():
        for name, parameter in net.named().items():
            parameter.copy_(after_one[name])
    whole = gradients(net, lambda ids, y: head_nll(net, 3, states(net.model, ids)[4], y), update=1)
    own = gradients(net, lambda ids, y: head_nll(net, 1, states(net.model, ids, stop=2)[2].detach(), y), update=1)
    assert_close(got.gradients, whole | own)
    assert [len(norms) for norms in got.grad_norms] == [2, 1]


def test_blocks_of_another_phase_stay_as_they_are() -> None:
    """Weight decay and momentum do not move them either."""
    phases = [Phase([(2, 3)]), Phase([(0, 3)])]
    before = train(phases, 2, ADAMW, phase_of_update=[0, 1]).weights
    assert moved(train(phases, 3, ADAMW, phase_of_update=[0, 1, 0]).weights, before) == {2, 3, "head 3"}


@pytest.mark.parametrize("options", [ADAMW, MOMENTUM], ids=["adamw", "sgd"])
def test_delayed_equals_a_loop_that_keeps_the_weights_of_every_update(options: dict[str, Any]) -> None:
    net = initial([(0, 3)])
    step = reference.make_optimizer(list(net.named().values()), options)
    kept, losses = [], []
    for update, version in enumerate([0, 0, 1, 2, 3]):
        kept.append(copy.deepcopy(net))
        old = kept[version]
        made, tokens = update_batches(update)
        total = 0.0
        for ids, labels in made:
            loss = head_nll(old, 3, states(old.model, ids)[4], labels)
            (loss * (1 / tokens)).backward()
            total += loss.item()
        losses.append([total / tokens])
        for mine, theirs in zip(net.named().values(), old.named().values(), strict=True):
            mine.grad, theirs.grad = theirs.grad, None
        for group in step.param_groups:
            group["lr"] = 0.01 if options is ADAMW else 0.1 / (1 + update)
        step.step()
    got = train([(0, 3)], 5, options, delayed=True)
    assert got.losses == losses
    assert_same(got.weights, {name: p.detach() for name, p in net.named().items()})
    usual = train([(0, 3)], 5, options).losses
    assert losses[0] == usual[0] and all(ours != theirs for ours, theirs in zip(losses[1:], usual[1:], strict=True))


# --------------------------------------------------------------------------------------------- clipping, dtype, faults

RUNS: list[tuple[Phase, list[list[int]]]] = [
    (Phase([(0, 3)]), [[0, 1, 2, 3]]),
    (Phase(CHUNKED), [[0, 1], [2, 3]]),
    (Phase(GLOBAL), [[0, 1, 2, 3]]),
    (Phase([(0, 1), (1, 2), (3, 3)]), [[0, 1, 2], [3]]),
    (Phase([(0, 0), (0, 1), (2, 3)]), [[0, 1], [2, 3]]),
    (Phase([(2, 3)]), [[0], [1], [2, 3]]),
    (Phase([(0, 1), (1, 3)], 0.5), [[0], [1], [2, 3]]),
    (Phase([(0, 0), (0, 2), (1, 3)], 0.5), [[0], [1, 2], [3]]),
]


@pytest.mark.parametrize(("phase", "runs"), RUNS)
def test_what_is_clipped_together(phase: Phase, runs: list[list[int]]) -> None:
    """Each run's norm is that of its blocks' and heads' gradients, and the step is along them, shortened."""
    assert [list(run) for run in phase.runs(BLOCKS)] == runs
    got = train([phase], 1, clip=0.3, dtype=torch.float64, gradients_of=0)
    ends = [last for _, last in phase.spans]
    groups = [{*run, *(f"head {end}" for end in ends if end in run)} for run in runs]
    squares = [sum(float(g.square().sum()) for n, g in got.gradients.items() if unit(n) in group) for group in groups]
    norms = [square**0.5 for square in squares]
    assert got.grad_norms == [pytest.approx([norm for norm in norms if norm > 0], rel=1e-12)]
    wanted = {name: p.detach().clone() for name, p in in_double(phase.spans).named().items()}
    for name, gradient in got.gradients.items():
        norm = next(norm for norm, group in zip(norms, groups, strict=True) if unit(name) in group)
        assert norm > 0.3, "else nothing is clipped"
        wanted[name] -= 0.1 * gradient * 0.3 / (norm + 1e-6)
    assert_close(got.weights, wanted)


def test_a_head_of_an_empty_span_over_frozen_blocks_is_clipped_alone() -> None:
    got = train([(2, 1), (2, 3)], 1, gradients_of=0)
    heads = [g for name, g in got.gradients.items() if unit(name) == "head 1"]
    assert got.grad_norms == [
        [
            pytest.approx(torch.cat([g.flatten() for g in heads]).norm().item()),
            pytest.approx(
                torch.cat([g.flatten() for n, g in got.gradients.items() if unit(n) != "head 1"]).norm().item()
            ),
        ]
    ]


@pytest.mark.parametrize(
    ("phase", "skipped"),
    [
        (Phase(CHUNKED), {0, 1, "head 1"}),
        (Phase([(0, 0), (0, 1), (2, 3)]), {0, 1, "head 0", "head 1"}),
        (Phase([(0, 1), (1, 3)], 0.5), {0, 1, "head 1"}),
        (Phase(GLOBAL), {0, 1, 2, 3, "head 1", "head 3"}),
    ],
)
def test_a_norm_that_is_not_finite_skips_its_group_alone(
    monkeypatch: pytest.MonkeyPatch, phase: Phase, skipped: set[int | str]
) -> None:
    usual, loss = train([phase], 1, ADAMW).weights, reference.Net.loss

    def infinite(self: reference.Net, hidden: Tensor, labels: Tensor, block: int, *rest: Any) -> Tensor:
        value = loss(self, hidden, labels, block, *rest)
        return value * torch.inf if block == 1 else value

    monkeypatch.setattr(reference.Net, "loss", infinite)
    got = train([phase], 1, ADAMW).weights
    start = {name: p.detach() for name, p in initial(phase.spans).named().items()}
    assert moved(got, usual) == skipped
    assert_same({n: t for n, t in got.items() if unit(n) in skipped}, {n: start[n] for n in got if unit(n) in skipped})


def test_double_precision_starts_from_the_weights_of_single_precision() -> None:
    single, double = train(CHUNKED, 0).weights, train(CHUNKED, 0, dtype=torch.float64).weights
    assert_same(double, {name: tensor.double() for name, tensor in single.items()})
    single, double = train(CHUNKED, 2).weights, train(CHUNKED, 2, dtype=torch.float64).weights
    assert_close({name: tensor.double() for name, tensor in single.items()}, double, 1e-5)


@pytest.mark.parametrize("fault", reference.FAULTS[1:])
@pytest.mark.parametrize("name", ["greedy", "overlapping", "global update"])
def test_planted_errors_change_the_result(name: str, fault: str) -> None:
    phase = OBJECTIVES[name]
    usual, faulty = train([phase], 2, clip=0.5), train([phase], 2, clip=0.5, fault=fault)
    assert usual.grad_norms != faulty.grad_norms
    assert moved(faulty.weights, usual.weights) >= {0 if fault != "stale_weights" else 3}


# --------------------------------------------------------------------------------------------- heads


def seeded(name: str, *modules: nn.Module, model: PreTrainedModel) -> list[Tensor]:
    torch.manual_seed(int.from_bytes(sha256(f"{SEED}/{name}".encode()).digest()[:8], "big") >> 1)
    for module in modules:
        module.apply(model._init_weights)
    return [parameter.detach() for module in modules for parameter in module.parameters()]


def test_initial_weights_and_names_of_heads() -> None:
    options = HeadOptions(readout="low_rank", rank=3, blocks=2)
    net = initial(CHUNKED, options)
    weights = train(CHUNKED, 0, heads=options).weights
    norm, down, up = nn.LayerNorm(16), nn.Linear(16, 3, bias=False), nn.Linear(3, VOCAB, bias=False)
    made = seeded("head 1", norm, down, up, model=net.model)
    names = ["head.1.norm.weight", "head.1.norm.bias", "head.1.down.weight", "head.1.up.weight"]
    assert_same({name: weights[name] for name in names}, dict(zip(names, made, strict=True)))
    for index in range(2):
        block = GPT2Block(net.base.config, layer_idx=2 + index)
        seeded(f"head 1 block {index}", block, model=net.model)
        wanted = {f"head.1.blocks.{index}.{name}": p.detach() for name, p in block.named_parameters()}
        assert_same({name: weights[name] for name in wanted}, wanted)
    assert len([name for name in weights if name.startswith("head.")]) == 4 + 2 * 12
    assert [p.shape for p in net.head_parameters(1)[-4:]] == [tensor.shape for tensor in made], "blocks come first"
    shared = train(CHUNKED, 0, heads=HeadOptions(readout="shared", lags={1: 0})).weights
    names = ["head.1.temperature", "head.1.norm.weight", "head.1.norm.bias"]
    assert [name for name in shared if name.startswith("head.")] == names
    assert shared["head.1.temperature"].item() == 1.0 and shared["head.1.temperature"].shape == ()
    net = initial(CHUNKED, HeadOptions(readout="shared", lags={1: 0}))
    assert [p.shape for p in net.head_parameters(1)] == [(16,), (16,), ()], "the temperature comes last"


# (lag, refresh_every): of which update the copy is in updates 0, 1, 2, ...
VERSIONS = {(0, 1): [0, 1, 2, 3, 4, 5], (1, 1): [0, 0, 1, 2, 3, 4], (1, 2): [0, 0, 0, 2, 2, 4], (2, 3): [0] * 5 + [3]}


@pytest.mark.parametrize("setting", VERSIONS)
def test_a_shared_readout_equals_a_loop_that_keeps_the_readouts(setting: tuple[int, int]) -> None:
    """With lag 0 and a refresh at every update: tied to the current readout, detached."""
    options = HeadOptions(readout="shared", lags={1: setting[0]}, refresh_every=setting[1])
    net = in_double(CHUNKED, options)
    head, readouts = net.head["1"], []
    for update, version in enumerate(VERSIONS[setting]):
        readouts.append(net.readout.weight.detach().clone())
        tied = net.readout.weight.detach() if setting == (0, 1) else readouts[version]

        def loss(ids: Tensor, labels: Tensor, tied: Tensor = tied) -> Tensor:
            hidden = states(net.model, ids, stop=2)
            below = states(net.model, ids)[2]  # hidden[2] is detached
            own = nll(below, head.norm, lambda rows: head.temperature * (rows @ tied.T), labels)
            return own + head_nll(net, 3, hidden[4], labels)

        found = gradients(net, loss, update)
        with torch.no_grad():
            for name, parameter in net.named().items():
                parameter -= 0.1 / (1 + update) * found[name]
    got = train(CHUNKED, 6, heads=options, dtype=torch.float64, gradients_of=5)
    assert_close(got.gradients, found)
    assert_close(got.weights, {name: p.detach() for name, p in net.named().items()})


def test_a_low_rank_readout_equals_the_product_of_its_matrices() -> None:
    options = HeadOptions(readout="low_rank", rank=3)
    net = in_double(CHUNKED, options)
    head = net.head["1"]

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        below, above = states(net.model, ids)[2], states(net.model, ids, stop=2)[4]
        own = nll(below, head.norm, lambda rows: rows @ (head.up.weight @ head.down.weight).T, labels)
        return own + head_nll(net, 3, above, labels)

    got = train(CHUNKED, 1, heads=options, dtype=torch.float64, gradients_of=0)
    assert_close(got.gradients, gradients(net, loss))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_extra_blocks_equal_the_models_own_next_blocks_with_their_weights(family: str, count: int) -> None:
    """Put into the place of blocks 2 (and 3), the library's own forward runs them."""
    dtype = torch.float64 if family == "gpt2" else torch.float32
    options = HeadOptions(blocks=count)
    net = initial(CHUNKED, options, family).to(dtype)
    head = net.head["1"]
    for index in range(count):
        net.blocks[2 + index].load_state_dict(head.blocks[index].state_dict())
    found = gradients(net, lambda ids, y: head_nll(net, 1, states(net.model, ids)[2 + count], y))
    prefix = "transformer.h" if family == "gpt2" else "model.layers"
    wanted = {}
    for name, gradient in found.items():
        if unit(name) in (2, 3):
            block, rest = name.removeprefix(f"{prefix}.").split(".", 1)
            name = f"head.1.blocks.{int(block) - 2}.{rest}"
        wanted[name] = gradient
    assert {unit(name) for name in wanted} == {0, 1, "head 1"}
    got = train(CHUNKED, 1, heads=options, dtype=dtype, family=family, gradients_of=0).gradients
    assert_close(
        {name: gradient for name, gradient in got.items() if unit(name) in (0, 1, "head 1")},
        wanted,
        1e-12 if family == "gpt2" else 1e-5,
    )


def test_blocks_that_follow_the_next_ones_pass_the_gradient_and_have_none() -> None:
    """At first they equal the model's own next block, so that the whole model's forward gives the loss."""
    options = HeadOptions(blocks=1, ema_decay=0.75, lags={1: 0})
    net = in_double(CHUNKED, options)
    found = gradients(net, lambda ids, y: head_nll(net, 1, states(net.model, ids)[3], y))
    wanted = {name: gradient for name, gradient in found.items() if unit(name) != 2}
    got = train(CHUNKED, 1, heads=options, dtype=torch.float64, gradients_of=0).gradients
    assert_close({name: gradient for name, gradient in got.items() if unit(name) in (0, 1, "head 1")}, wanted)


# (lag, refresh_every), number of updates: the versions that have been mixed in by the last of them.
MIXED = {(0, 1, 4): [1, 2, 3], (1, 2, 6): [2, 4], (2, 1, 5): [1, 2], (3, 2, 5): []}


@pytest.mark.parametrize("setting", MIXED)
def test_blocks_that_follow_the_next_ones_are_their_moving_average(setting: tuple[int, int, int]) -> None:
    lag, every, updates = setting
    options = HeadOptions(blocks=2, ema_decay=0.75, lags={1: lag}, refresh_every=every)
    after = [train(CHUNKED, count, heads=options, dtype=torch.float64).weights for count in range(updates + 1)]
    names = [name for name in after[0] if name.startswith("head.1.blocks.")]
    assert len(names) == 2 * 12
    for name in names:
        index, rest = name.removeprefix("head.1.blocks.").split(".", 1)
        followed = f"transformer.h.{2 + int(index)}.{rest}"
        average = after[0][followed]
        for version in MIXED[setting]:
            average = 0.75 * average + 0.25 * after[version][followed]
        assert_close({name: after[updates][name]}, {name: average})
    assert not torch.equal(after[0][followed], after[updates][followed])


def some_positions(block: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * micro_batch + block)
    return torch.stack([torch.randperm(WINDOW - 1, generator=generator)[:3] for _ in range(2)])


def test_a_loss_at_some_positions_counts_these_and_no_others() -> None:
    """Those of an auxiliary head only; divided by their own number of label tokens."""
    spans = [(0, 0), (1, 2), (3, 3)]
    net = in_double(spans)
    counts, all_tokens = [0, 0], update_batches(0)[1]
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
    last = torch.zeros((), dtype=torch.float64)
    for index, (ids, labels) in enumerate(batches(1)):
        for number, (first, end) in enumerate(spans[:2]):
            head = net.head[str(end)]
            likely = head.readout(head.norm(states(net.model, ids, stop=first or None)[end + 1])).log_softmax(-1)
            for row, positions in enumerate(some_positions(end, index).tolist()):
                for position in positions:
                    if (label := labels[row, position]) != -100:
                        losses[number] = losses[number] - likely[row, position, label]
                        counts[number] += 1
        last = last + head_nll(net, 3, states(net.model, ids, stop=3)[4], labels)
    assert max(counts) < 2 * ACCUMULATION * 3 < all_tokens, "some have no label"
    sums = [loss / count for loss, count in zip([*losses, last], [*counts, all_tokens], strict=True)]
    torch.stack(sums).sum().backward()
    options = HeadOptions(positions=some_positions)
    got = train(spans, 1, heads=options, dtype=torch.float64, gradients_of=0)
    assert_close(got.gradients, {name: p.grad for name, p in net.named().items() if p.grad is not None})
    assert got.losses == [pytest.approx([value.item() for value in sums], rel=1e-12)]


def test_positions_are_asked_for_by_the_number_of_the_micro_batch_in_the_run() -> None:
    asked = []

    def positions(block: int, micro_batch: int) -> Tensor:
        asked.append((block, micro_batch))
        return some_positions(block, micro_batch)

    train([(0, 0), (1, 2), (3, 3)], 2, heads=HeadOptions(positions=positions))
    assert sorted(asked) == [(block, micro_batch) for block in (0, 2) for micro_batch in range(2 * ACCUMULATION)]


def test_all_positions_equal_no_choice() -> None:
    everywhere = HeadOptions(positions=lambda block, micro_batch: torch.arange(WINDOW).expand(2, -1))
    assert_same(train(CHUNKED, 2, heads=everywhere).weights, train(CHUNKED, 2).weights)
