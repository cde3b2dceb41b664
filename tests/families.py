"""The families of Hugging Face that are tried, as tiny models, and the page about them: docs/families.md.

python tests/families.py > docs/families.md
"""

from __future__ import annotations

from typing import Any

import transformers as hf

BLOCKS = 4
_TOKENS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_PLAIN = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, **_TOKENS}
_PLAIN |= {"intermediate_size": 48, "max_position_embeddings": 32}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_OLD = {"vocab_size": 61, "n_layer": BLOCKS, "n_head": 4, **_TOKENS}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_BART: dict[str, Any] = {"vocab_size": 61, "d_model": 32, "decoder_layers": BLOCKS, "encoder_layers": BLOCKS, **_TOKENS}
_BART |= {"is_decoder": True, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 32}

_MIXED = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {**_PLAIN, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8}
_LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1}
_LATENT |= {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_MAMBA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": BLOCKS, **_TOKENS}
_NEXT = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

TRAINED: dict[str, Any] = {
    "AFMoE": hf.AfmoeConfig(**_GROUPED, **_EXPERTS, head_dim=8),
    "Arcee": hf.ArceeConfig(**_GROUPED),
    "Bamba": hf.BambaConfig(**_GROUPED, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, attn_layer_indices=[1, 3]),
    "BioGPT": hf.BioGptConfig(**_PLAIN),
    "BitNet": hf.BitNetConfig(**_GROUPED),
    "Bloom": hf.BloomConfig(**_OLD, hidden_size=32),
    "CodeGen": hf.CodeGenConfig(**_OLD, n_embd=32, rotary_dim=4),
    "Cohere": hf.CohereConfig(**_GROUPED),
    "Cohere 2": hf.Cohere2Config(**_GROUPED, sliding_window=4),
    "DeepSeek-V2": hf.DeepseekV2Config(**_LATENT),
    "DiffLlama": hf.DiffLlamaConfig(**_PLAIN, num_key_value_heads=4),
    "ERNIE 4.5": hf.Ernie4_5Config(**_GROUPED, head_dim=8),
    "ERNIE 4.5 MoE": hf.Ernie4_5_MoeConfig(**_GROUPED, moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "EXAONE 4": hf.Exaone4Config(**_GROUPED),
    "Falcon": hf.FalconConfig(**_PLAIN),
    "Falcon Mamba": hf.FalconMambaConfig(**_MAMBA),
    "FlexOLMo": hf.FlexOlmoConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2),
    "Gemma": hf.GemmaConfig(**_GROUPED, head_dim=8),
    "Gemma 2": hf.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=4),
    "Gemma 3": hf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=4),
    "GLM": hf.GlmConfig(**_GROUPED, head_dim=8),
    "GLM-4": hf.Glm4Config(**_GROUPED, head_dim=8),
    "GPT (the first)": hf.OpenAIGPTConfig(**_OLD, n_embd=32, n_positions=32),
    "GPT-2": hf.GPT2Config(**_OLD, n_embd=32, n_positions=32),
    "GPT-BigCode": hf.GPTBigCodeConfig(**_OLD, n_embd=32, n_positions=32),
    "GPT-J": hf.GPTJConfig(**_OLD, n_embd=32, rotary_dim=4),
    "GPT-Neo": hf.GPTNeoConfig(
        **{"vocab_size": 61, "hidden_size": 32, "num_layers": BLOCKS, "num_heads": 4, **_TOKENS},
        attention_types=[[["global", "local"], 2]],
        window_size=4,
    ),
    "GPT-NeoX": hf.GPTNeoXConfig(**_PLAIN),
    "GPT-OSS": hf.GptOssConfig(**_GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "Granite": hf.GraniteConfig(**_GROUPED, embedding_multiplier=12.0, residual_multiplier=0.5, logits_scaling=7.0),
    "Granite-MoE": hf.GraniteMoeConfig(**_MIXED),
    "Granite-MoE, shared": hf.GraniteMoeSharedConfig(**_MIXED, shared_intermediate_size=16),
    "Helium": hf.HeliumConfig(**_GROUPED, head_dim=8),
    "Hunyuan": hf.HunYuanDenseV1Config(**_GROUPED, head_dim=8),
    "Hunyuan, mixture": hf.HunYuanMoEV1Config(**_GROUPED, head_dim=8, num_experts=4, moe_topk=2),
    "HyperCLOVA X": hf.HyperCLOVAXConfig(**_GROUPED, residual_multiplier=0.5, logits_scaling=7.0),
    "Jamba": hf.JambaConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1),
    "JetMoE": hf.JetMoeConfig(
        **_MAMBA,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=48,
        max_position_embeddings=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "LFM2": hf.Lfm2Config(**_GROUPED),
    "Llama": hf.LlamaConfig(**_GROUPED),
    "Mamba": hf.MambaConfig(**_MAMBA),
    "Mamba 2": hf.Mamba2Config(**_MAMBA, num_heads=8, head_dim=8, state_size=8, n_groups=1),
    "Ministral": hf.MinistralConfig(**_GROUPED, head_dim=8),
    "Mistral, sliding window": hf.MistralConfig(**_GROUPED, sliding_window=4),
    "Mixtral": hf.MixtralConfig(**_MIXED),
    "MPT": hf.MptConfig(vocab_size=61, d_model=32, n_layers=BLOCKS, n_heads=4, **_TOKENS),
    "Nemotron": hf.NemotronConfig(**_GROUPED),
    "OLMo": hf.OlmoConfig(**_GROUPED),
    "OLMo 2": hf.Olmo2Config(**_GROUPED),
    "OLMo 3": hf.Olmo3Config(**_GROUPED),
    "OLMoE": hf.OlmoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2),
    "OPT": hf.OPTConfig(**_PLAIN, ffn_dim=48, word_embed_proj_dim=32),
    "OPT, projected": hf.OPTConfig(**_PLAIN, ffn_dim=48, word_embed_proj_dim=16),
    "OPT, projected, norms behind": hf.OPTConfig(
        **_PLAIN, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "Persimmon": hf.PersimmonConfig(**_PLAIN),
    "Phi": hf.PhiConfig(**_PLAIN),
    "Phi-3": hf.Phi3Config(**_GROUPED),
    "Phi-3.5-MoE, without noise": hf.PhimoeConfig(**_MIXED, router_jitter_noise=0.0),
    "Qwen2": hf.Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "Qwen2-MoE": hf.Qwen2MoeConfig(**_GROUPED, **_EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3": hf.Qwen3Config(**_GROUPED, head_dim=8),
    "Qwen3-MoE": hf.Qwen3MoeConfig(**_GROUPED, **_EXPERTS, head_dim=8),
    "Qwen3-Next": hf.Qwen3NextConfig(**_GROUPED, **_EXPERTS, **_NEXT, head_dim=8, shared_expert_intermediate_size=16),
    "Seed-OSS": hf.SeedOssConfig(**_GROUPED, head_dim=8),
    "SmolLM3": hf.SmolLM3Config(**_GROUPED),
    "StableLM": hf.StableLmConfig(**_GROUPED),
    "StarCoder2": hf.Starcoder2Config(**_GROUPED),
    "VaultGemma": hf.VaultGemmaConfig(**_GROUPED, head_dim=8),
}
# Where position ids that begin again do not keep the documents of a window apart.
LEAKING = {
    "AFMoE",
    "Bamba",
    "BioGPT",
    "Bloom",
    "Falcon",
    "Falcon Mamba",
    "GPT (the first)",
    "GPT-OSS",
    "Jamba",
    "Mamba",
}
LEAKING |= {"Mamba 2", "MPT", "OPT", "OPT, projected", "OPT, projected, norms behind", "Qwen3-Next"}

REFUSED: dict[str, tuple[Any, str]] = {
    "Apertus": (hf.ApertusConfig(**_GROUPED), "kept with the weights, but is no weight that is trained"),
    "BART's decoder": (hf.BartConfig(**_BART, is_encoder_decoder=False), "does not take what its last block gives"),
    "BERT as a decoder": (hf.BertConfig(**_PLAIN, is_decoder=True), "is no part of its embedding, its blocks"),
    "CTRL": (
        hf.CTRLConfig(vocab_size=61, n_positions=32, n_embd=32, dff=48, n_layer=BLOCKS, n_head=4, **_TOKENS),
        "it does more than run its blocks",
    ),
    "DeepSeek-V3": (hf.DeepseekV3Config(**_LATENT), "kept with the weights, but is no weight that is trained"),
    "Falcon-H1": (
        hf.FalconH1Config(**_GROUPED, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8),
        "it fails where blocks are left out",
    ),
    "GLM-4-MoE": (
        hf.Glm4MoeConfig(**_GROUPED, **_EXPERTS, n_routed_experts=4, first_k_dense_replace=1, head_dim=8),
        "kept with the weights, but is no weight that is trained",
    ),
    "Llama with is_causal: false": (hf.LlamaConfig(**_GROUPED, is_causal=False), "it is not causal"),
    "MiniMax": (
        hf.MiniMaxConfig(**_GROUPED, head_dim=8, num_local_experts=4),
        "kept with the weights, but is no weight that is trained",
    ),
    "nanochat": (hf.NanoChatConfig(**_GROUPED), "it uses its final norm 2 times"),
    "RecurrentGemma": (hf.RecurrentGemmaConfig(**_GROUPED), "it does more than run its blocks"),
    "RWKV": (
        hf.RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=BLOCKS, context_length=32),
        "it fails where blocks are left out",
    ),
    "XGLM": (
        hf.XGLMConfig(
            vocab_size=61, d_model=32, ffn_dim=48, num_layers=BLOCKS, attention_heads=4, max_position_embeddings=32
        ),
        "it does more than run its blocks",
    ),
    "XLNet": (
        hf.XLNetConfig(vocab_size=61, d_model=32, n_layer=BLOCKS, n_head=4, d_inner=48),
        "is no part of its embedding, its blocks",
    ),
}

_HEAD = """\
# Families of Hugging Face models

Written by `tests/families.py` from the list that the tests try (`tests/models/test_family_check.py`), a tiny model of
each with the transformers of requirements.txt. **Trained** means: cut into two and into four pieces, with embedding and
readout tied and untied, and with positions that begin again within a window, it has the library's logits bit for bit;
loss and gradients of one backprop update are the library's to 1e-6 of the largest; the last token changes nothing
before it; the final norm takes what the last block gives. None of them misses that. **Apart**: position ids that begin
again keep the documents of a window apart, so that a document's logits do not depend on those before it.

Every start from a folder, and every evaluation of one, tries a part of this on a small model of the folder's own
configuration (`models/family_check`: two pieces, tied as the folder is, to 1e-5), so a family that is not here is tried
too, and refused where it fails.

Mixtures of experts train the library's router loss where `output_router_logits` is true in `config.json`, each stage
over its own layers: where the model is one stage that is the library's loss.

Refused besides: noise for routers in training (a `jitter` above 0 in `config.json`), encoder-decoders, models of more
than text (a folder of the text model can be trained), folders with
code of their own (`trust_remote_code`), and adapters without the model that they belong to.

| family | class | | apart |
|---|---|---|---|
"""


def page() -> str:
    def row(name: str, config: Any, what: str, apart: str) -> str:
        return f"| {name} | `{hf.AutoModelForCausalLM._model_mapping[type(config)].__name__}` | {what} | {apart} |"

    lines = [row(name, one, "trained", "no" if name in LEAKING else "yes") for name, one in TRAINED.items()]
    lines += [row(name, config, f"refused: {why}", "") for name, (config, why) in REFUSED.items()]
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
