"""Language models that read from left to right."""

from __future__ import annotations

from typing import Any

from benchmarks.families.base import VOCABULARY, Domain, tokens
from benchmarks.families.text import ENCODER

DECODERS = Domain("Language models")
_PLAIN: dict[str, Any] = {
    **ENCODER,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
_GROUPED: dict[str, Any] = {**_PLAIN, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "use_cache": False,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def _lm(name: str, stem: str, **options: Any) -> None:
    DECODERS.hf(name, f"{stem}ForCausalLM", f"{stem}Config", options)


DECODERS.tiny("GPT-2", "tiny-gpt2")
_lm(
    "GPT-Neo",
    "GPTNeo",
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    intermediate_size=64,
    window_size=8,
    max_position_embeddings=64,
    use_cache=False,
)
_lm("GPT-J", "GPTJ", **{**_GPT, "rotary_dim": 4})
_lm("GPT-NeoX, Pythia", "GPTNeoX", **_PLAIN, rotary_pct=0.5)
_lm("GPT-BigCode", "GPTBigCode", **_GPT, multi_query=True)
DECODERS.tiny("OPT", "tiny-opt")
_lm("Bloom", "Bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, use_cache=False)
_lm(
    "Falcon",
    "Falcon",
    **_PLAIN,
    new_decoder_architecture=False,
    multi_query=True,
    parallel_attn=True,
    bias=False,
)
_lm(
    "MPT",
    "Mpt",
    vocab_size=VOCABULARY,
    d_model=32,
    n_layers=2,
    n_heads=4,
    expansion_ratio=2,
    max_seq_len=64,
    use_cache=False,
)
DECODERS.tiny("LLaMA", "tiny-llama")
DECODERS.tiny("Mistral", "tiny-mistral")
DECODERS.tiny("Mixtral", "tiny-mixtral")
DECODERS.tiny("Qwen2", "tiny-qwen2")
_lm("Qwen3", "Qwen3", **_GROUPED, head_dim=8)
_lm("Qwen3-MoE", "Qwen3Moe", **_GROUPED, **_EXPERTS, head_dim=8)
_lm("Gemma 2", "Gemma2", **_GROUPED, head_dim=8, sliding_window=8)
DECODERS.hf(
    "Gemma 3",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    {
        **_GROUPED,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
)
_lm("Phi-3", "Phi3", **_GROUPED)
_lm("Phi", "Phi", **_PLAIN, partial_rotary_factor=0.5)
_lm("OLMo 2", "Olmo2", **_GROUPED)
_lm("SmolLM3", "SmolLM3", **_GROUPED)
_lm("StableLM", "StableLm", **_GROUPED)
_lm("Cohere", "Cohere", **_GROUPED)
_lm("Granite", "Granite", **_GROUPED)
_lm(
    "GPT-OSS",
    "GptOss",
    **_GROUPED,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
)
_lm(
    "DeepSeek-V3",
    "DeepseekV3",
    **_PLAIN,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=2,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
_lm("LFM2", "Lfm2", **_GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=8)
_MAMBA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "use_cache": False,
}
DECODERS.hf("Mamba", "MambaForCausalLM", "MambaConfig", {**_MAMBA, "time_step_rank": 4}, tokens)
DECODERS.hf(
    "Mamba-2",
    "Mamba2ForCausalLM",
    "Mamba2Config",
    {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    tokens,
)
DECODERS.hf(
    "RWKV",
    "RwkvForCausalLM",
    "RwkvConfig",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "attention_hidden_size": 32,
        "intermediate_size": 64,
        "use_cache": False,
        "context_length": 64,
    },
    tokens,
)
