"""The families of Hugging Face that are tried, as tiny models, and the page about them: docs/families.md.

python tests/families.py > docs/families.md
"""

from __future__ import annotations

from typing import Any

from transformers import (
    BartConfig,
    BloomConfig,
    CodeGenConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GlmConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

BLOCKS = 4
_TOKENS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_PLAIN = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, **_TOKENS}
_PLAIN |= {"intermediate_size": 48, "max_position_embeddings": 32}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_OLD = {"vocab_size": 61, "n_layer": BLOCKS, "n_head": 4, **_TOKENS}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_BART = {"d_model": 32, "decoder_layers": BLOCKS, "encoder_layers": BLOCKS, "is_decoder": True, **_TOKENS}

TRAINED: dict[str, Any] = {
    "GPT-2": GPT2Config(**_OLD, n_embd=32, n_positions=32),
    "GPT-Neo": GPTNeoConfig(
        **{"vocab_size": 61, "hidden_size": 32, "num_layers": BLOCKS, "num_heads": 4, **_TOKENS},
        attention_types=[[["global", "local"], 2]],
    ),
    "GPT-NeoX": GPTNeoXConfig(**_PLAIN),
    "OPT": OPTConfig(**{**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bloom": BloomConfig(**_OLD, hidden_size=32),
    "Falcon": FalconConfig(**_PLAIN),
    "MPT": MptConfig(vocab_size=61, d_model=32, n_layers=BLOCKS, n_heads=4, **_TOKENS),
    "Llama": LlamaConfig(**_GROUPED),
    "Llama, tied": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "Mistral, sliding window": MistralConfig(**_GROUPED, sliding_window=4),
    "Mixtral": MixtralConfig(**_GROUPED, num_local_experts=4),
    "Qwen2": Qwen2Config(**_GROUPED),
    "Qwen2-MoE": Qwen2MoeConfig(**_GROUPED, **_EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    "Qwen3-MoE": Qwen3MoeConfig(**_GROUPED, **_EXPERTS, head_dim=8),
    "Phi-3": Phi3Config(**_GROUPED),
    "OLMo": OlmoConfig(**_GROUPED),
    "OLMo 2": Olmo2Config(**_GROUPED),
    "OLMo 3": Olmo3Config(**_GROUPED),
    "Gemma": GemmaConfig(**_GROUPED, head_dim=8),
    "Gemma 2": Gemma2Config(**_GROUPED, head_dim=8, sliding_window=4),
    "Gemma 3": Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=4),
    "Granite": GraniteConfig(**_GROUPED, embedding_multiplier=12.0, residual_multiplier=0.5, logits_scaling=7.0),
    "Granite-MoE": GraniteMoeConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "StableLM": StableLmConfig(**_GROUPED),
    "StarCoder2": Starcoder2Config(**_GROUPED),
    "Cohere": CohereConfig(**_GROUPED),
    "Cohere 2": Cohere2Config(**_GROUPED, sliding_window=4),
    "SmolLM3": SmolLM3Config(**_GROUPED),
    "GLM-4": GlmConfig(**_GROUPED, head_dim=8),
    "Nemotron": NemotronConfig(**_GROUPED),
    "GPT-OSS": GptOssConfig(**_GROUPED, head_dim=8, num_local_experts=4),
    "Jamba": JambaConfig(**_GROUPED),
    "LFM2": Lfm2Config(**_GROUPED),
    "Mamba": MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=BLOCKS, **_TOKENS),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "Phi": (PhiConfig(**_PLAIN), "the head has a bias"),
    "GPT-J": (GPTJConfig(**_OLD, n_embd=32, rotary_dim=4), "the head has a bias"),
    "CodeGen": (CodeGenConfig(**_OLD, n_embd=32, rotary_dim=4), "the head has a bias"),
    "OPT with a projected embedding": (
        OPTConfig(**_PLAIN, word_embed_proj_dim=16),
        "weights beside its blocks",
    ),
    "BART's decoder": (
        BartConfig(vocab_size=61, **_BART, decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=32),
        "no final norm",
    ),
    "Llama with is_causal: false": (LlamaConfig(**_GROUPED, is_causal=False), "not causal"),
}

_HEAD = """\
# Families of Hugging Face models

Written by `tests/families.py` from the list that the tests try (`tests/models/test_family_check.py`): a tiny model of
each with the transformers of requirements.txt. Trained means: cut into two pieces it has the library's logits bit for
bit, and its loss and gradients to 1e-5; the last token changes nothing before it; the final norm takes what the last
block gives. Every start from a folder, and every evaluation of one, tries the same on a small model of the folder's own
configuration (`models/family_check`), so a family that is not here is tried too, and refused where it fails.

Router losses of mixtures of experts are not trained (`output_router_logits`).

| family | class | |
|---|---|---|
"""


def page() -> str:
    from transformers import AutoModelForCausalLM

    def row(name: str, config: Any, what: str) -> str:
        return f"| {name} | `{AutoModelForCausalLM._model_mapping[type(config)].__name__}` | {what} |"

    lines = [row(name, config, "trained") for name, config in TRAINED.items()]
    lines += [row(name, config, f"refused: {why}") for name, (config, why) in REFUSED.items()]
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
