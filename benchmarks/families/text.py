"""Encoders of text, and encoders with decoders."""

from __future__ import annotations

from typing import Any

from benchmarks.families.base import VOCABULARY, Domain, translated

TEXT = Domain("Text encoders, encoder-decoders")
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_BOTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "use_cache": False,
}


def _classifier(name: str, stem: str, **options: Any) -> None:
    model = f"{stem}ForSequenceClassification"
    TEXT.hf(name, model, f"{stem}Config", {**ENCODER, **options})


_classifier("BERT", "Bert")
TEXT.tiny("RoBERTa", "tiny-roberta")
TEXT.tiny("DistilBERT", "tiny-distilbert")
TEXT.tiny("ELECTRA", "tiny-electra")
TEXT.tiny("ALBERT", "tiny-albert")
_classifier("ConvBERT", "ConvBert", head_ratio=2, embedding_size=32, conv_kernel_size=3)
_classifier(
    "DeBERTa-v2/v3",
    "DebertaV2",
    relative_attention=True,
    position_buckets=8,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    type_vocab_size=0,
)
_classifier(
    "ModernBERT",
    "ModernBert",
    local_attention=8,
    global_attn_every_n_layers=2,
    pad_token_id=0,
    cls_token_id=1,
    sep_token_id=2,
    bos_token_id=1,
    eos_token_id=2,
)
_classifier("MPNet", "MPNet")
_classifier("RoFormer", "RoFormer", embedding_size=32)
_classifier("SqueezeBERT", "SqueezeBert", embedding_size=32)
_classifier(
    "MobileBERT",
    "MobileBert",
    embedding_size=16,
    intra_bottleneck_size=32,
    true_hidden_size=32,
    num_feedforward_networks=2,
)
_classifier("FNet", "FNet", tpu_short_seq_length=12)
TEXT.hf(
    "Funnel",
    "FunnelForSequenceClassification",
    "FunnelConfig",
    {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 64,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    },
)
_classifier("Longformer", "Longformer", attention_window=[4, 4])
_classifier("BigBird", "BigBird", attention_type="original_full")
TEXT.hf(
    "XLNet",
    "XLNetForSequenceClassification",
    "XLNetConfig",
    {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
)
TEXT.tiny("nn.TransformerEncoder", "tiny-encoder")
TEXT.tiny("T5", "tiny-t5")
TEXT.hf("UMT5", "UMT5ForConditionalGeneration", "UMT5Config", _T5, translated)
TEXT.hf("BART", "BartForConditionalGeneration", "BartConfig", _BOTH, translated)
TEXT.hf("Marian", "MarianMTModel", "MarianConfig", _BOTH, translated)
TEXT.hf("Pegasus", "PegasusForConditionalGeneration", "PegasusConfig", _BOTH, translated)
TEXT.hf("M2M-100, NLLB", "M2M100ForConditionalGeneration", "M2M100Config", _BOTH, translated)
