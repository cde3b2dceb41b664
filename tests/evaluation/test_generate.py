"""Text from exits: what the library generates of the same model, whether another exit drafts or not."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from saved_runs import FEW, TEXT, make_run, rewrite
from tiers import full, slow
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from lptransformer.__main__ import parser
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import ModelError, UserError
from lptransformer.evaluation import generate as generation
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.generate import Sampling, Source, chat_ids, generate, open_source, prompt_ids
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.evaluation.trained_model import RunModel
from lptransformer.models.head import factorised
from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.training.launcher import run as run_command

LLAMA = {"family": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS: dict[str, dict[str, Any]] = {
    "private": {},
    "low_rank": {"kind": "low_rank", "rank": 24},
    "shared": {"kind": "shared"},
    "blocks": {"blocks": 1},
    "fitted": {"kind": "fitted", "blocks": 0},
    "fitted, blocks": {"kind": "fitted", "blocks": 2},
}
CHAT = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '|' }}{% endfor %}a:"
LOGIT_LENS = "logit lens"


Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return cache(lambda head: make(tmp_path_factory.mktemp("made"), head))


def make(folder: Path, head: str) -> Path:
    """A run of four blocks with an exit after each, whose exits agree now and then; or its export, without them."""
    options, model = HEADS.get(head, {}), LLAMA
    if head.startswith("fitted"):
        export_run(make_run(folder / "before", model=LLAMA), folder / "model")
        model = {"pretrained": str(folder / "model"), **dict.fromkeys(FEW)}
    run = make_run(folder, model=model, head=options, chunks=4)
    if head == "low_rank":  # a random one would agree with nobody
        last = saved_stage.read_weights(checkpoint.stage_folder(run, 10, 3))
        factors = factorised(last["head.readout.weight"], options["rank"])
        own = dict(zip(("head.down.weight", "head.readout.weight"), factors, strict=True))
        rewrite(checkpoint.stage_folder(run, 10, 2), lambda weights: weights | own)
    if head == LOGIT_LENS:
        export_run(run, folder / "exported")
        return folder / "exported"
    return run


def prompts(number: int) -> Iterator[list[int]]:
    """Of one to six random bytes."""
    generator = torch.Generator().manual_seed(0)
    for index in range(number):
        yield torch.randint(3, 259, (1 + index % 6,), generator=generator).tolist()


def stages_up_to(model: RunModel, block: int) -> RunModel:
    return replace(model, stages=[stage for stage in model.stages if stage.plan.last_block <= block])


# ---- greedy


@pytest.mark.parametrize("head", HEADS)
def test_an_exit_goes_on_with_the_likeliest_token_of_its_stages(head: str, made: Made) -> None:
    """Token by token, through the stages that `evaluate` measures, without a cache."""
    run = made(head)
    own = trained_model.load(run, 10)
    for block in (1, 3):
        source = open_source(run, exit_block=block)
        for ids in ([5], [70, 71, 72, 73]):
            expected = list(ids)
            for _ in range(8):
                logits = stages_up_to(own, block).logits(torch.tensor([expected]))
                expected.append(int(logits[0, -1].argmax()))
                if expected[-1] in source.ends:
                    break
            assert generate(source, ids, 8).ids == expected[len(ids) :]


@pytest.mark.parametrize("head", [*HEADS, LOGIT_LENS])
def test_a_draft_changes_no_token(head: str, made: Made, number: int = 12, tokens: int = 8) -> None:
    source = open_source(made(head), draft_block=2, draft_tokens=3)
    alone, counted = replace(source, draft=None), Counter[str]()
    for ids in prompts(number):
        drafted = generate(source, ids, tokens)
        assert drafted.ids == generate(alone, ids, tokens).ids
        counted.update(drafted=drafted.drafted, accepted=drafted.accepted)
    assert 0 < counted["accepted"] < counted["drafted"]


@pytest.mark.slow
@pytest.mark.parametrize("head", [*HEADS, LOGIT_LENS])
def test_nor_on_two_hundred_prompts(head: str, made: Made) -> None:
    test_a_draft_changes_no_token(head, made, 200, 4)


def test_what_was_drafted_and_accepted_is_what_the_library_says(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    update = AssistedCandidateGenerator.update_candidate_strategy

    def listen(self: Any, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        told.append((scores.shape[1] - 1, int(num_matches)))
        update(self, input_ids, scores, num_matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", listen)
    source = open_source(made("shared"), draft_block=2, draft_tokens=3)
    for ids in prompts(4):
        told.clear()
        generated = generate(source, ids, 20)
        assert [generated.drafted, generated.accepted] == [sum(column) for column in zip(*told, strict=True)]
        assert generated.passes == len(told) and max(told)[0] == 3
        assert generated.acceptance == generated.accepted / generated.drafted
    assert generate(replace(source, draft=None), ids, 5).acceptance is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["private", LOGIT_LENS])
def test_a_draft_and_its_model_share_their_weights_in_memory(head: str, dtype: str, made: Made) -> None:
    source = open_source(made(head), draft_block=1, dtype=dtype)
    assert source.draft is not None
    own = {name: weight.data_ptr() for name, weight in source.model.named_parameters()}
    for name, weight in source.draft.named_parameters():
        in_head = name in ("model.norm.weight", "lm_head.weight")
        assert (weight.data_ptr() == own[name]) == (head == LOGIT_LENS or not in_head), name
        assert weight.dtype == trained_model.DTYPES[dtype]
    assert len(own) == len(set(own.values()))


def test_bf16_is_what_the_library_opens_in_bf16(made: Made) -> None:
    folder = made(LOGIT_LENS)
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    source, ids = open_source(folder, dtype="bf16"), torch.tensor([list(range(3, 40))])
    with torch.no_grad():
        assert torch.equal(source.model(ids).logits, opened(ids).logits)


# ---- sampling


def test_sampling_is_the_library_s(made: Made) -> None:
    opened: Any = AutoModelForCausalLM.from_pretrained(made(LOGIT_LENS))
    source, ids = open_source(made("private")), torch.tensor([[70, 71]])
    for sampling in (Sampling(), Sampling(temperature=1.5), Sampling(top_k=5), Sampling(1.2, top_p=0.6, top_k=40)):
        torch.manual_seed(1)
        found = generate(source, ids[0].tolist(), 12, sampling).ids
        torch.manual_seed(1)
        named = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        assert opened.generate(ids, do_sample=True, max_new_tokens=12, **named)[0, 2:].tolist() == found
    assert generate(source, ids[0].tolist(), 12, Sampling(top_k=1)).ids == generate(source, ids[0].tolist(), 12).ids


@pytest.mark.slow
def test_with_a_draft_tokens_are_drawn_from_the_model_s_own_distribution() -> None:
    """Pairs of tokens, counted, against the product of their probabilities (chi squared); not those of the draft."""
    model, draft = (five_tokens(seed) for seed in (0, 1))
    draft.generation_config.num_assistant_tokens = 2
    draft.generation_config.assistant_confidence_threshold = 0.0
    source = Source(model, draft, load_tokenizer("bytes"), (), (), None)
    sampling, times, counted, accepted = Sampling(1.3, top_k=4), 1000, Counter[tuple[int, ...]](), 0
    torch.manual_seed(0)
    for _ in range(times):
        generated = generate(source, [0, 1], 3, sampling)
        counted[tuple(generated.ids[:2])] += 1
        accepted += generated.accepted
    assert 0.1 * times < accepted < 1.9 * times

    def off(of: Any) -> float:
        expected = {pair: times * share for pair, share in of_pairs(of, sampling).items()}
        return sum((counted[pair] - number) ** 2 / max(number, 1.0) for pair, number in expected.items())

    assert off(model) < 37.7 < 200 < off(draft)  # 15 degrees of freedom: 0.1 % of all draws are above 37.7


def five_tokens(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 5, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_attention_heads=2)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def of_pairs(model: Any, sampling: Sampling) -> dict[tuple[int, int], float]:
    """The probability of each pair of tokens after [0, 1]."""

    def following(ids: list[int]) -> Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1] / sampling.temperature
        kept = logits >= logits.topk(sampling.top_k).values[-1]
        return logits.masked_fill(~kept, -torch.inf).softmax(-1)

    first = following([0, 1])
    return {(a, b): float(first[a] * following([0, 1, a])[b]) for a in range(5) for b in range(5)}


# ---- what a model is, and when it ends


def test_what_generates_has_the_logits_of_its_stages_or_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    build = generation.exit_model

    def forgetful(*arguments: Any) -> Any:
        model: Any = build(*arguments)
        model.model.norm.weight = torch.nn.Parameter(1.01 * model.model.norm.weight)
        return model

    monkeypatch.setattr(generation, "exit_model", forgetful)
    with pytest.raises(ModelError, match=r"--exit 1: what generates does not have the logits of its stages: .* by up"):
        open_source(made("blocks"), exit_block=1)


def folder_of(family: str, path: Path, **sizes: Any) -> Path:
    """A tiny model of a family. Its vocabulary is that of bytes, but no tokenizer is there: the library takes other
    files for some families."""
    torch.manual_seed(0)
    config = type(families.TRAINED[family])(**families.TRAINED[family].to_dict() | {"vocab_size": 259, **sizes})
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "family",
    [
        "GPT-OSS",
        *map(slow, ("GPT-2", "Granite", "Mistral, sliding window", "LFM2")),
        *map(
            full,
            (
                "Gemma 3",
                "Cohere 2",
                "GPT-NeoX",
                "OPT",
                "Bloom",
                "Falcon",
                "Qwen3-MoE",
                "Gemma 2",
                "StableLM",
                "SmolLM3",
                "Nemotron",
            ),
        ),
    ],
)
def test_families_generate_and_draft(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with kinds of blocks, scales and caps of their own; past the sliding window, of four tokens."""
    monkeypatch.setattr(generation, "load_tokenizer", lambda folder: load_tokenizer("bytes"))
    folder = folder_of(family, tmp_path / "model")
    opened: Any = AutoModelForCausalLM.from_pretrained(folder)
    source = open_source(folder, draft_block=1)
    for ids in ([70], [70, 71, 72, 73, 74, 75, 76]):
        options = {"do_sample": False, "eos_token_id": 1, "pad_token_id": 0}  # the tokenizer's, which ends a text
        expected = opened.generate(torch.tensor([ids]), max_new_tokens=10, **options)
        assert generate(source, ids, 10).ids == expected[0, len(ids) :].tolist()


def test_a_family_that_cannot_take_a_token_back_does_not_draft(tmp_path: Path) -> None:
    kinds = {"attn_layer_period": 2, "attn_layer_offset": 1}
    model = {"pretrained": str(folder_of("Jamba", tmp_path / "model", **kinds)), **dict.fromkeys(FEW)}
    run = make_run(tmp_path, model=model, head={"kind": "private"})
    assert len(generate(open_source(run, exit_block=1), [70, 71], 5).ids) == 5
    with pytest.raises(ModelError, match="--draft 1: JambaForCausalLM keeps a state in which no token can be taken ba"):
        open_source(run, draft_block=1)


def test_a_head_s_block_at_a_place_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Attention is in every second block: those like blocks 2 and 3 would stand at places 3 and 4."""
    kinds = {"attn_layer_period": 2, "attn_layer_offset": 1}
    model = {"pretrained": str(folder_of("Jamba", tmp_path / "model", **kinds)), **dict.fromkeys(FEW)}
    run = make_run(tmp_path, model=model, head={"kind": "private", "blocks": 2}, chunks=4)
    with pytest.raises(ModelError, match="--exit 2: it cannot generate: its weights are of no JambaForCausalLM: "):
        open_source(run, exit_block=2)


@pytest.mark.parametrize("family", ["Gemma 3", slow("Cohere 2"), slow("GPT-OSS"), full("SmolLM3"), full("Qwen3-MoE")])
def test_a_head_s_block_keeps_its_kind(family: str, tmp_path: Path) -> None:
    """The head after block 0 has a block like block 1, which does not see as far as the model's others; block 3, the
    last one, is what the head after block 2 has one like."""
    folder = folder_of(family, tmp_path / "model")
    model = {"pretrained": str(folder), **dict.fromkeys(FEW)}
    run = make_run(tmp_path, model=model, head={"kind": "private", "blocks": 1}, chunks=4)
    own = trained_model.load(run, 10)
    for block in (0, 2):
        source, ids = open_source(run, exit_block=block), torch.tensor([list(range(60, 76))])
        with torch.no_grad():
            assert torch.equal(source.model(ids).logits, stages_up_to(own, block).logits(ids))


@pytest.mark.parametrize("ends", ["generation_config.json", "config.json"])
def test_a_text_ends_at_the_end_tokens_of_the_folder(ends: str, made: Made, tmp_path: Path) -> None:
    """Of one list, or one token."""
    whole = generate(open_source(made(LOGIT_LENS)), [70, 71], 10)
    assert len(whole.ids) == 10 and whole.ended == "max tokens"
    end = next(one for one in whole.ids if one != whole.ids[0])
    folder = shutil.copytree(made(LOGIT_LENS), tmp_path / "model")
    in_list = ends == "generation_config.json"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]} if in_list else {}))
    content = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 1 if in_list else end}
    (folder / "config.json").write_text(json.dumps(content))
    source = open_source(folder, draft_block=2)
    for one in (source, replace(source, draft=None)):
        ended = generate(one, [70, 71], 10)
        assert ended.ids == whole.ids[: whole.ids.index(end) + 1] and ended.ended == "end token"


def test_a_text_ends_at_the_length_of_the_model(made: Made) -> None:
    source = open_source(made("private"), draft_block=1)
    assert source.longest == 64
    for one in (source, replace(source, draft=None)):
        generated = generate(one, [70] * 60, 128)
        assert len(generated.ids) == 4 and generated.ended == "length of the model"
    with pytest.raises(UserError, match="the text so far has 64 tokens: the model takes 64 with those that come"):
        generate(source, [70] * 64)


# ---- text


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_characters_of_several_tokens_are_shown_whole(kind: str, tmp_path: Path) -> None:
    made_with = make_run(tmp_path, tokenizer=kind) / "tokenizer"
    tokenizer, text, shown = load_tokenizer(made_with), " the wind, é 😀 ｘ\n and on ", list[str]()
    prompt = tokenizer.encode("The moor").tolist()
    stream = generation._Stream(tokenizer, prompt, shown.append)
    stream.put(torch.tensor([prompt]))
    ids = tokenizer.encode(text).tolist()
    assert len(ids) > len(text.split()) + 12
    for one in ids:
        stream.put(torch.tensor([one]))
    assert "".join(shown) == stream.text() == text and len(shown) > 8 and "\ufffd" not in "".join(shown)
    stream.put(torch.tensor([tokenizer.encode("😀").tolist()[0]]))  # that never becomes one
    stream.end()
    assert "".join(shown) == stream.text()


def test_the_first_blank_of_an_answer_is_kept(tmp_path: Path) -> None:
    """Of a tokenizer that puts a blank before every text, and takes it away again."""

    class Backend:
        def decode(self, ids: list[int], **options: bool) -> str:
            assert options["skip_special_tokens"] and not options["clean_up_tokenization_spaces"]
            return "".join(" ab"[one] for one in ids).removeprefix(" ")

    stream = generation._Stream(replace(load_tokenizer("bytes"), backend=Backend()), [0, 1], lambda text: None)
    for ids in ([[0, 1]], [0], [2]):
        stream.put(torch.tensor(ids))
    assert stream.text() == " b"


def test_a_folder_s_tokenizer_begins_a_prompt_as_it_does_by_itself(made: Made) -> None:
    source = open_source(made(LOGIT_LENS))
    assert prompt_ids(source, "a") == [100] and prompt_ids(replace(source, begin=(1,)), "a") == [1, 100]

    class Backend:
        bos_token_id = 1

        def __call__(self, text: str) -> Any:
            return type("Encoding", (), {"input_ids": [1, 100, 2]})

    assert replace(load_tokenizer("bytes"), backend=Backend()).adds_begin


# ---- the command


def spoken(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """What `generate` prints to stdout and to stderr."""
    run_command(parser(), ["generate", *arguments])
    said = capsys.readouterr()
    return said.out, said.err


def typed(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))


@pytest.fixture
def run(made: Made) -> Path:
    return made("private")


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    """A model folder with a chat template."""
    path = shutil.copytree(made(LOGIT_LENS), tmp_path / "model")
    (path / "chat_template.jinja").write_text(CHAT)
    return path


def test_a_prompt_is_gone_on_from(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = spoken(capsys, str(run), "--prompt", "wind", "--max-tokens", "9")
    source = open_source(run)
    expected = generate(source, prompt_ids(source, "wind"), 9)
    assert out == expected.text + "\n" and "9 tokens in " in err and "per second; ended by max tokens" in err
    typed(monkeypatch, b"wind\n")
    out, err = spoken(capsys, str(run), "--prompt", "-", "--max-tokens", "9", "--draft", "2", "--json")
    answer = json.loads(out)
    assert (answer["text"], answer["tokens"], answer["seed"]) == (expected.text, 9, None)
    assert answer["acceptance"] == answer["accepted"] / answer["drafted"] and not err
    assert answer["tokens_per_second"] == answer["tokens"] / answer["seconds"] > 0
    out, err = spoken(capsys, str(run), "--prompt", "wind", "--max-tokens", "9", "--draft", "2", "--draft-tokens=1")
    assert out == expected.text + "\n" and "drafted tokens accepted (" in err and "tokens per pass" in err


def test_another_exit_step_and_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, model=LLAMA, chunks=2, updates=(10, 20))
    texts = set()
    for flags in ([], ["--exit=1"], ["--step=10"], ["--dtype=bf16", "--exit=1"]):
        chosen = {"exit_block": 1 if "--exit=1" in flags else None, "step": 10 if "--step=10" in flags else None}
        source = open_source(run, **chosen, dtype="bf16" if len(flags) == 2 else "fp32")
        out, _ = spoken(capsys, str(run), "--prompt=The wind", "--max-tokens=30", *flags)
        assert out == generate(source, prompt_ids(source, "The wind"), 30).text + "\n"
        texts.add(out)
    assert len(texts) >= 3


def test_a_seed_is_taken_or_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(run), "--prompt=wind", "--max-tokens=12", "--temperature=3", "--top-k=200", "--top-p=0.99"]
    out, err = spoken(capsys, *options)
    seed = err.strip().rpartition("seed ")[2]
    assert spoken(capsys, *options, f"--seed={seed}")[0] == out
    assert spoken(capsys, *options, f"--seed={int(seed) + 1}")[0] != out
    assert json.loads(spoken(capsys, *options, "--json", "--seed=3")[0])["seed"] == 3


def test_a_conversation(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Line by line until the end of standard input; each reply is to all that was said."""
    typed(monkeypatch, b"one\n\n two\n")
    out, err = spoken(capsys, str(folder), "--chat", "--max-tokens=5", "--json")
    replies = [json.loads(line)["text"] for line in out.splitlines()]
    source = open_source(folder)
    messages = []
    for said, reply in zip(("one", "two"), replies, strict=True):
        messages.append({"role": "user", "content": said})
        text = "".join(f"{one['role'][0]}:{one['content']}|" for one in messages) + "a:"
        assert chat_ids(source, messages) == source.tokenizer.encode(text).tolist()
        assert generate(source, chat_ids(source, messages), 5).text == reply
        messages.append({"role": "assistant", "content": reply})
    assert spoken(capsys, str(folder), "--chat", "--prompt=one", "--max-tokens=5")[0] == replies[0] + "\n"


def test_a_folder_s_exit_without_a_head_is_a_logit_lens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lens = "has no head of its own there, so its norm and readout stand behind that block (logit lens)\n"
    plain = [str(folder), "--prompt=wind", "--max-tokens=5"]
    assert f"exit after block 1: {folder} {lens}" in spoken(capsys, *plain, "--exit=1")[1]
    assert f"exit after block 2: {folder} {lens}" in spoken(capsys, *plain, "--draft=2")[1]
    assert "lens" not in spoken(capsys, *plain)[1]


@pytest.mark.parametrize(("head", "layers"), [("blocks", (4, 3)), ("fitted", (3, 2)), ("fitted, blocks", (4, 4))])
def test_exits_that_are_kept_beside_a_folder_generate(
    head: str, layers: tuple[int, int], made: Made, tmp_path: Path
) -> None:
    run = made(head)
    export_run(run, tmp_path / "exported", keep_exits=True)
    kept = open_source(tmp_path / "exported", exit_block=2, draft_block=1)
    assert not kept.notes and (len(kept.model.model.layers), len(kept.draft.model.layers)) == layers  # type: ignore
    assert generate(kept, [70, 71], 8).ids == generate(open_source(run, exit_block=2), [70, 71], 8).ids


@pytest.mark.parametrize("head", ["fitted", "fitted, blocks"])
def test_a_fitted_exit_is_measured_whole_and_is_no_model_of_its_own(head: str, made: Made, tmp_path: Path) -> None:
    run, text = made(head), tmp_path / "text.txt"
    with pytest.raises(ModelError, match="--exit 1: .* a linear map stands before .* export with --keep-exits"):
        export_run(run, tmp_path / "exit", exit_block=1)
    assert not list(tmp_path.iterdir())
    export_run(run, tmp_path / "exported", keep_exits=True)
    text.write_text(TEXT)
    measured = [evaluate_run(one, [str(text)], window=16) for one in (run, tmp_path / "exported")]
    of_run, of_folder = ([one["nll_per_token"] for one in each["exits"]] for each in measured if each is not None)
    assert len(of_run) == 4 and of_folder == of_run
    generating = open_source(run, exit_block=1).model
    ids = torch.randint(3, 259, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = stages_up_to(trained_model.load(run, 10), 1).logits(ids)
        assert torch.allclose(generating(ids).logits, logits, atol=1e-4)
        getattr(generating.fitted_map, "linear", generating.fitted_map).weight += 0.1
        assert not torch.allclose(generating(ids).logits, logits, atol=1e-2)


REFUSED: list[tuple[list[str], str]] = [
    ([], "give --prompt TEXT (- is standard input), or --chat"),
    (["--prompt=a", "--max-tokens=0"], "--max-tokens 0: it must be 1 or more"),
    (["--prompt=a", "--temperature=0"], "--temperature 0.0: it must be above 0; leave it out for the likeliest token"),
    (["--prompt=a", "--temperature=nan"], "--temperature nan"),
    (["--prompt=a", "--top-p=1.5"], "--top-p 1.5: a share, above 0 and at most 1"),
    (["--prompt=a", "--top-k=0"], "--top-k 0: it must be 1 or more"),
    (["--prompt=a", "--seed=1"], "--seed 1 has no meaning for the likeliest token"),
    (["--prompt=a", "--top-k=2", "--seed=-1"], "--seed -1: it must be 0 or more"),
    (["--prompt=a", "--draft-tokens=2"], "--draft-tokens 2 has no meaning without --draft K"),
    (["--prompt=a", "--draft=1", "--draft-tokens=0"], "--draft-tokens 0: it must be 1 or more"),
    (["--prompt=a", "--draft=3"], "--draft 3: an exit before the one that generates, after block 3"),
    (["--prompt=a", "--draft=2", "--exit=1"], "--draft 2: an exit before the one that generates, after block 1"),
    (["--prompt=a", "--draft=9"], "--draft 9: "),
    (["--prompt=a", "--exit=9"], "--exit 9: "),
    (["--prompt=a", "--step=11"], "no complete checkpoint after 11 updates (--step)"),
    (["--prompt="], "there is no token to go on from"),
    (["--prompt=" + "a" * 64], "the text so far has 64 tokens: the model takes 64"),
    (["--prompt=\udcff"], "--prompt: it is no UTF-8"),
    (["--prompt=-"], "standard input: it is no UTF-8"),
    (["--chat"], "--chat: the tokenizer has no chat template; give a text to go on from: --prompt TEXT"),
    (["--prompt=a", "--promtp=b"], "`generate` takes no such argument"),
]


@pytest.mark.parametrize(
    ("flags", "says"), REFUSED, ids=lambda one: ascii(" ".join(one))[:40] if isinstance(one, list) else ""
)
def test_what_has_no_meaning_is_refused(
    flags: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, b"\xff\n")
    with pytest.raises(SystemExit) as end:
        spoken(capsys, str(run), *flags)
    said = capsys.readouterr()
    assert end.value.code == 2 and says in said.err and said.err.count("\n") == 1 and not said.out


def test_a_damaged_folder_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only every other line') }}")
    with pytest.raises(UserError, match="--chat: the tokenizer's chat template fails: only every other line"):
        chat_ids(open_source(folder), [{"role": "user", "content": "a"}])
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json is damaged"):
        open_source(folder)
