"""Models and their pieces: joined they are the model, bit for bit, and what cannot be cut is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    OPTConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    T5Config,
    VaultGemmaConfig,
    ZambaConfig,
)
from transformers.activations import ACT2FN

from lptransformer.config.load import load
from lptransformer.errors import ModelError
from lptransformer.evaluation import trained_model
from lptransformer.models import hf_config, hf_parts, split
from lptransformer.models.cross_entropy import LogitRule
from lptransformer.models.head import CROSS_ENTROPY, Head, LossBatch, Readout
from lptransformer.models.split import Piece

VOCAB, BLOCKS = 61, 4
ONE_PIECE = [range(0, 4)]
CUTS = [ONE_PIECE, [range(0, 2), range(2, 4)], [range(0, 1), range(1, 3), range(3, 4)]]
LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**LIKE_LLAMA, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=32),
    "gpt2 untied": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=32, tie_word_embeddings=False
    ),
    "llama": LlamaConfig(**LIKE_LLAMA),
    "llama grouped heads": LlamaConfig(**GROUPED),
    "llama grouped heads, tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "neox": GPTNeoXConfig(**LIKE_LLAMA),
    "mistral with a window": MistralConfig(**GROUPED, sliding_window=4),
    "qwen3, tied": Qwen3Config(
        **GROUPED,
        head_dim=8,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    ),
    "opt, tied": OPTConfig(**{**LIKE_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32}),
}
# Families that scale or cap their logits, with numbers that matter at the logits of a tiny model.
MULTIPLIED = {"embedding_multiplier": 12.0, "residual_multiplier": 0.5, "logits_scaling": 7.0}
RULES: dict[str, LogitRule] = {
    "gemma2, tied": LogitRule(cap=0.5),
    "vaultgemma, tied": LogitRule(cap=0.7),
    "cohere, tied": LogitRule(factor=0.3),
    "cohere2 with a window, tied": LogitRule(factor=3.0),
    "granite": LogitRule(divisor=7.0),
    "granite, tied": LogitRule(divisor=7.0),
    "granite with experts": LogitRule(divisor=7.0),
    "hyperclovax": LogitRule(factor=7.0),
}
CONFIGS |= {
    "gemma2, tied": Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=0.5),
    "vaultgemma, tied": VaultGemmaConfig(**GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=0.7),
    "cohere, tied": CohereConfig(**GROUPED, logit_scale=0.3),
    "cohere2 with a window, tied": Cohere2Config(**GROUPED, logit_scale=3.0, sliding_window=4),
    "granite": GraniteConfig(**GROUPED, **MULTIPLIED, tie_word_embeddings=False),
    "granite, tied": GraniteConfig(**GROUPED, **MULTIPLIED, tie_word_embeddings=True),
    "granite with experts": GraniteMoeConfig(**GROUPED, **MULTIPLIED, num_local_experts=4, num_experts_per_tok=2),
    "hyperclovax": HyperCLOVAXConfig(**GROUPED, **MULTIPLIED),
}
every_family = pytest.mark.parametrize("name", CONFIGS)
every_cut = pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{len(cut)} pieces")


def whole_model(config: Any) -> Any:
    """A causal LM of the library in which no weight has a value that would hide a mistake, such as 0 or 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of every family."""
    root = tmp_path_factory.mktemp("models")
    paths = {name: root / name.replace(" ", "-") for name in CONFIGS}
    for name, path in paths.items():
        whole_model(CONFIGS[name]).save_pretrained(path)
    return paths


def input_ids() -> Tensor:
    return torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))  # [3, 20]


@torch.no_grad()
def joined_hidden_states(joined: list[Piece]) -> Tensor:
    hidden_states = joined[0].base.eval()(input_ids=input_ids(), use_cache=False).last_hidden_state
    for piece in joined[1:]:
        hidden_states = piece.base.eval()(inputs_embeds=hidden_states, use_cache=False).last_hidden_state
    return hidden_states


def last_head(config: Any, last: Piece, chunk_tokens: int = 16) -> Head:
    assert last.norm is not None and last.readout is not None
    return Head(last.norm, Readout(last.readout.weight, chunk_tokens, hf_parts.anatomy(config).logit_rule))


@torch.no_grad()
def joined_logits(config: Any, joined: list[Piece]) -> Tensor:
    return last_head(config, joined[-1]).logits(joined_hidden_states(joined))


def make(config: Any, cut: list[range], folder: Path | None = None, seed: int | None = 0) -> list[Piece]:
    parts = hf_parts.anatomy(config)
    placed = [(blocks, blocks.start == 0, blocks.stop == BLOCKS) for blocks in cut]
    if folder is not None:
        return [split.load_piece(folder, config, parts, *place) for place in placed]
    return [split.new_piece(config, parts, *place, seed) for place in placed]


def weights_of(config: Any, joined: list[Piece]) -> dict[str, Tensor]:
    """All weights under the names of the whole model."""
    parts, weights = hf_parts.anatomy(config), {}
    for piece in joined:
        weights |= {f"{parts.base}.{name}": parameter for name, parameter in piece.base.named_parameters()}
    last = joined[-1]
    assert last.norm is not None and last.readout is not None
    weights |= {f"{parts.norm}.{name}": parameter for name, parameter in last.norm.named_parameters()}
    return weights | {f"{parts.lm_head}.weight": last.readout.weight}


# ---- pieces joined are the model


@every_cut
@every_family
def test_loaded_pieces_joined_give_the_logits_of_the_whole_model(
    name: str, cut: list[range], folders: dict[str, Path]
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folders[name])
    with torch.no_grad():
        expected = whole(input_ids()).logits
    config = hf_config.read_config(folders[name])
    assert torch.equal(joined_logits(config, make(config, cut, folders[name])), expected)


@every_cut
@every_family
def test_new_pieces_joined_give_the_logits_of_the_whole_model(name: str, cut: list[range]) -> None:
    config = copy.deepcopy(CONFIGS[name])
    joined = make(config, cut)
    config.tie_word_embeddings = False
    whole = AutoModelForCausalLM.from_config(config).eval()
    whole.load_state_dict(weights_of(config, joined))
    with torch.no_grad():
        assert torch.equal(joined_logits(config, joined), whole(input_ids()).logits)


@every_family
def test_the_loss_of_the_last_head_and_its_gradients_are_those_of_the_whole_model(
    name: str, folders: dict[str, Path]
) -> None:
    """Scales and caps are inside the chunked loss."""
    config = hf_config.read_config(folders[name])
    (piece,) = make(config, ONE_PIECE, folders[name])
    head = last_head(config, piece)
    config.tie_word_embeddings = False  # a gradient of the readout that is its own
    whole = AutoModelForCausalLM.from_config(config).eval()
    whole.load_state_dict(weights_of(config, [piece]))
    expected = whole(input_ids(), labels=input_ids()).loss
    expected.backward()
    hidden_states = joined_hidden_states([piece])
    labels = torch.cat([input_ids()[:, 1:], torch.full((3, 1), -100)], 1)
    loss, total = head(hidden_states, LossBatch(labels, 1 / (labels != -100).sum().item()))[CROSS_ENTROPY]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(total, expected * 57, rtol=1e-6, atol=0)
    gradient = whole.get_output_embeddings().weight.grad
    torch.testing.assert_close(head.readout.weight.grad, gradient, rtol=1e-5, atol=1e-7)
    norm = dict(whole.get_submodule(hf_parts.anatomy(config).norm).named_parameters())
    assert norm
    for key, parameter in head.norm.named_parameters():
        torch.testing.assert_close(parameter.grad, norm[key].grad, rtol=1e-5, atol=1e-7)


@every_family
def test_the_rule_for_logits_is_found(name: str) -> None:
    assert hf_parts.anatomy(CONFIGS[name]).logit_rule == RULES.get(name, LogitRule())


def test_a_rule_for_logits_that_no_number_of_the_configuration_gives_is_not_found() -> None:
    config = Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
    plain = torch.linspace(-100, 100, 99)
    assert hf_parts._find_logit_rule(config, plain, LogitRule(cap=50.0)(plain)) == LogitRule(cap=50.0)
    assert hf_parts._find_logit_rule(config, plain, LogitRule(30.0, 1.0, 50.0)(plain)) == LogitRule(30.0, 1.0, 50.0)
    for logits in (LogitRule(cap=31.0)(plain), plain * 2, plain.clamp(-30, 30), plain + 1):
        assert hf_parts._find_logit_rule(config, plain, logits) is None


@every_family
def test_every_weight_is_in_one_piece(name: str, folders: dict[str, Path]) -> None:
    config = hf_config.read_config(folders[name])
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    expected = sorted(name for name, _ in AutoModelForCausalLM.from_config(untied).named_parameters())
    for joined in (make(config, CUTS[2], folders[name]), make(config, CUTS[2])):
        parts = hf_parts.anatomy(config)
        found = [f"{parts.base}.{key}" for piece in joined for key, _ in piece.base.named_parameters()]
        assert joined[-1].norm is not None
        found += [f"{parts.norm}.{key}" for key, _ in joined[-1].norm.named_parameters()]
        assert sorted([*found, f"{parts.lm_head}.weight"]) == expected


@every_family
def test_new_weights_do_not_depend_on_the_partition(name: str) -> None:
    config = CONFIGS[name]
    one, *others = (weights_of(config, make(config, cut)) for cut in CUTS)
    other_seed = weights_of(config, make(config, ONE_PIECE, seed=1))
    for other in others:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    matrices = [key for key in one if one[key].dim() > 1]
    assert not any(torch.equal(one[key], other_seed[key]) for key in matrices)


@pytest.mark.parametrize("name", ["gpt2", "llama grouped heads, tied"])
@pytest.mark.parametrize("loaded", [False, True])
def test_embedding_and_readout_are_never_one_tensor(name: str, loaded: bool, folders: dict[str, Path]) -> None:
    config = hf_config.read_config(folders[name])
    (piece,) = make(config, ONE_PIECE, folders[name] if loaded else None)
    parts = hf_parts.anatomy(config)
    embedding = piece.base.get_submodule(parts.token_embedding.removeprefix(f"{parts.base}.")).weight
    assert piece.readout is not None and isinstance(embedding, Tensor)
    assert embedding.data_ptr() != piece.readout.weight.data_ptr()
    assert torch.equal(embedding, piece.readout.weight) == loaded  # a tied readout starts as a copy


@every_family
def test_loaded_weights_are_fp32_whatever_the_file_holds(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = hf_config.read_config(tmp_path)
    for piece in make(config, CUTS[1], tmp_path):
        assert {parameter.dtype for parameter in piece.base.parameters()} == {torch.float32}
    for piece in make(config, CUTS[1]):
        assert {parameter.dtype for parameter in piece.base.parameters()} == {torch.float32}


# ---- nothing more than the owned tensors


class Allocations(TorchDispatchMode):
    """The shapes of all results of torch operations that are in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, Tensor) and one.device.type != "meta":
                self.shapes.add(tuple(one.shape))
        return result


@pytest.mark.parametrize("name", ["gpt2", "llama grouped heads, tied"])
@pytest.mark.parametrize("loaded", [False, True])
def test_only_owned_tensors_are_allocated(name: str, loaded: bool, folders: dict[str, Path]) -> None:
    config = hf_config.read_config(folders[name])
    parts = hf_parts.anatomy(config)
    table = (VOCAB, 32)
    place: tuple[range, bool, bool]
    for place, with_table in (((range(0, 1), True, False), True), ((range(1, 3), False, False), False)):
        with Allocations() as seen:
            if loaded:
                piece = split.load_piece(folders[name], config, parts, *place)
            else:
                piece = split.new_piece(config, parts, *place, 0)
        if not loaded:  # the library loads in threads, which are not seen
            assert (table in seen.shapes) == with_table
        embedding = VOCAB * 32 + (32 * 32 if name == "gpt2" else 0)
        owned = len(place[0]) * parts.block_parameters + with_table * embedding
        assert sum(parameter.numel() for parameter in piece.base.parameters()) == owned
        assert not any(parameter.is_meta for parameter in piece.base.parameters())


def test_anatomy_allocates_no_weights() -> None:
    with Allocations() as seen:
        hf_parts.anatomy(CONFIGS["llama"])
    assert not seen.shapes & {(VOCAB, 32), (48, 32), (32, 48)}


def test_auxiliary_heads_are_like_the_models_own_and_differ_from_block_to_block() -> None:
    config = CONFIGS["llama"]
    parts = hf_parts.anatomy(config)
    heads = [split.new_head(config, parts, block, seed=0) for block in (0, 1, 0)]
    readouts = [one.linear((parts.hidden_size, parts.vocab_size))[0].weight for one in heads]
    assert readouts[0].shape == (VOCAB, 32) and type(heads[0].norm).__name__ == "LlamaRMSNorm"
    assert torch.equal(readouts[0], readouts[2]) and not torch.equal(readouts[0], readouts[1])


def test_a_saved_configuration_is_the_same_configuration() -> None:
    for config in CONFIGS.values():
        config = hf_config.for_training(copy.deepcopy(config))
        again = hf_config.saved_config(json.loads(json.dumps(config.to_dict())))
        assert type(again) is type(config) and again.to_dict() == config.to_dict()
    with pytest.raises(ModelError, match="no causal LM"):
        hf_config.saved_config({"model_type": "t5"})


def test_dropout_is_off() -> None:
    config = hf_config.for_training(OPTConfig(**LIKE_LLAMA, dropout=0.1, layerdrop=0.1, attention_dropout=0.1))
    assert (config.dropout, config.layerdrop, config.attention_dropout) == (0.0, 0.0, 0.0)


# ---- what cannot be cut


class Unfilled(torch.nn.Module):
    """An activation with a buffer that the library does not fill in."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.ones(1), persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.slope


ZAMBA = {**LIKE_LLAMA, "attention_head_dim": 16, "num_key_value_heads": 4, "tie_word_embeddings": False}
UNCUTTABLE = {
    "final norm before the blocks too": (NanoChatConfig(**GROUPED), "it uses its final norm 2 times"),
    "scaled inputs": (RecurrentGemmaConfig(**GROUPED), "it does more than run"),
    "a head of several maps": (BertConfig(**LIKE_LLAMA, is_decoder=True), "is no part of its embedding"),
    "blocks that see the embedding": (ZambaConfig(**ZAMBA), "its blocks take more hidden states"),
    "blocks that share weights": (
        ZambaConfig(
            **{
                **ZAMBA,
                "num_hidden_layers": 6,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "tie_word_embeddings": True,
            }
        ),
        "its blocks share weights",
    ),
}


@pytest.mark.parametrize("why", UNCUTTABLE)
def test_a_family_that_cannot_be_cut_is_refused(why: str) -> None:
    config, message = UNCUTTABLE[why]
    with pytest.raises(ModelError, match=message) as caught:
        hf_parts.anatomy(config)
    assert "\n" not in str(caught.value) and "cannot be cut" in str(caught.value)


def test_a_buffer_without_a_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACT2FN, "unfilled", Unfilled)
    config = LlamaConfig(**LIKE_LLAMA, hidden_act="unfilled")
    with pytest.raises(ModelError, match=r"nothing says what .*slope begins with"):
        make(config, CUTS[1])


# ---- model folders that are not whole


def _edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def _edit_weights(folder: Path, name: str, tensor: Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights | ({} if tensor is None else {name: tensor}), folder / "model.safetensors", {"format": "pt"})


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _shard(folder: Path, **elsewhere: str) -> None:
    """Two shards with their index, which may name other files for some tensors."""
    weights = load_file(folder / "model.safetensors")
    names = {name: f"model-0000{1 + (name > UP)}-of-00002.safetensors" for name in weights}
    for shard in set(names.values()):
        save_file({name: weights[name] for name in weights if names[name] == shard}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {**names, **elsewhere}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def _shard_missing(folder: Path) -> None:
    _shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _shard_elsewhere(folder: Path) -> None:
    """The tensors are there, and would be read."""
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    _shard(folder, **{UP: "../elsewhere.safetensors"})


UP = "model.layers.2.mlp.up_proj.weight"
BROKEN = {
    "missing tensor": (lambda folder: _edit_weights(folder, UP, None), UP),
    "wrong shape": (lambda folder: _edit_weights(folder, UP, torch.zeros(7, 32)), rf"{UP} \(7, 32\), not \(48, 32\)"),
    "truncated": (lambda folder: _truncate(folder / "model.safetensors"), "model.safetensors is damaged or truncated"),
    "empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "truncated pickle": (
        lambda folder: (_pickle(folder), _truncate(folder / "pytorch_model.bin")),
        "the weights cannot be read",
    ),
    "missing shard": (_shard_missing, r"index\.json names model-00002-of-00002\.safetensors, which is not there"),
    "shard of elsewhere": (_shard_elsewhere, r"names \.\./elsewhere\.safetensors, which is outside of the folder"),
    "shard by its path": (
        lambda folder: _shard(folder, **{UP: "/x.safetensors"}),
        "names /x.safetensors, which is out",
    ),
    "index that is none": (
        lambda folder: (_shard(folder), (folder / "model.safetensors.index.json").write_text("[]")),
        "is no index of weights",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "fewer blocks in the config": (lambda folder: _edit_config(folder, num_hidden_layers=3), r"model\.layers\.3\."),
    "more blocks in the config": (lambda folder: _edit_config(folder, num_hidden_layers=5), r"model\.layers\.4\."),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{nope"), "JSON"),
    "unknown model": (lambda folder: _edit_config(folder, model_type="nope"), "nope"),
    "not a causal LM": (lambda folder: T5Config().save_pretrained(folder), "no causal LM"),
    "value of a wrong type": (lambda folder: _edit_config(folder, num_attention_heads="x"), "num_attention_heads"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_folder_is_refused_by_name(what: str, folders: dict[str, Path], tmp_path: Path) -> None:
    spoil, message = BROKEN[what]
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        config = hf_config.read_config(folder)
        parts = hf_parts.anatomy(config)
        last = config.num_hidden_layers - 1
        split.load_piece(folder, config, parts, range(2, last + 1), False, True)
    assert f"the model in {folder}" in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_alone_is_to_be_merged_first(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(ModelError, match="an adapter .* merge it into that one first"):
        load({"model": {"pretrained": str(tmp_path)}, "data": {"train": "x"}})
    with pytest.raises(ModelError, match="an adapter .* merge it into that one first"):
        trained_model.find(tmp_path)


@pytest.mark.parametrize("kept", [_pickle, _shard])
def test_weights_in_other_files_are_the_same(kept: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    kept(tmp_path)
    config = hf_config.read_config(tmp_path)
    piece = split.load_piece(tmp_path, config, hf_parts.anatomy(config), range(0, 4), True, True)
    assert all(torch.equal(weights[f"model.{name}"], one) for name, one in piece.base.named_parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama grouped heads, tied"])
@pytest.mark.parametrize("cut", CUTS, ids=len)
def test_a_tied_model_may_be_stored_as_its_readout_alone(
    name: str, cut: list[range], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[name], tmp_path, dirs_exist_ok=True)
    config = hf_config.read_config(tmp_path)
    parts = hf_parts.anatomy(config)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop(f"{parts.token_embedding}.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    whole = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    places = [(blocks, blocks.start == 0, blocks.stop == BLOCKS) for blocks in cut]
    pieces = [split.load_piece(tmp_path, config, parts, *place) for place in places]
    assert all(piece.norm is None and piece.readout is None for piece in pieces[:-1])
    head = last_head(config, pieces[-1])
    with torch.no_grad():
        assert torch.equal(head.logits(joined_hidden_states(pieces)), whole(input_ids()).logits)


def test_tensors_of_other_stages_may_be_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    """A stage reads what it owns: another one says what it misses."""
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    _edit_weights(tmp_path, UP, None)
    config = hf_config.read_config(tmp_path)
    split.load_piece(tmp_path, config, hf_parts.anatomy(config), range(0, 2), True, False)
