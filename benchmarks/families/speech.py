"""Speech and sound: from waveforms or spectrograms."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.families.base import VOCABULARY, Domain, wave

SPEECH = Domain("Speech and sound")
_WAVE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 3,
}
_WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 24,
    "max_target_positions": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": [],
}


def _whisper() -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 16, 48),
        "decoder_input_ids": torch.randint(5, VOCABULARY, (2, 7)),
    }


def _frames() -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 40, 16),
        "decoder_input_ids": torch.randint(5, VOCABULARY, (2, 7)),
    }


SPEECH.hf("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER, _whisper)
SPEECH.hf("wav2vec 2.0", "Wav2Vec2ForCTC", "Wav2Vec2Config", _WAVE, wave)
SPEECH.hf(
    "wav2vec 2.0, layer norm first",
    "Wav2Vec2ForCTC",
    "Wav2Vec2Config",
    {**_WAVE, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    wave,
)
SPEECH.hf("HuBERT", "HubertForCTC", "HubertConfig", _WAVE, wave)
SPEECH.hf(
    "WavLM",
    "WavLMForCTC",
    "WavLMConfig",
    {**_WAVE, "num_buckets": 16, "max_bucket_distance": 32},
    wave,
)
SPEECH.hf(
    "Conformer (wav2vec 2.0)",
    "Wav2Vec2ConformerForCTC",
    "Wav2Vec2ConformerConfig",
    {**_WAVE, "conv_depthwise_kernel_size": 7},
    wave,
)
SPEECH.hf(
    "Speech2Text",
    "Speech2TextForConditionalGeneration",
    "Speech2TextConfig",
    {
        **{k: v for k, v in _WHISPER.items() if k != "num_mel_bins"},
        "input_feat_per_channel": 16,
        "max_source_positions": 64,
        "conv_channels": 32,
        "input_channels": 1,
        "num_conv_layers": 2,
    },
    _frames,
)
SPEECH.hf(
    "AST",
    "ASTForAudioClassification",
    "ASTConfig",
    {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "patch_size": 4,
        "frequency_stride": 4,
        "time_stride": 4,
        "max_length": 32,
        "num_mel_bins": 16,
    },
    lambda: {"input_values": torch.randn(2, 32, 16)},
)
SPEECH.hf(
    "EnCodec",
    "EncodecModel",
    "EncodecConfig",
    {
        "num_filters": 4,
        "hidden_size": 16,
        "codebook_size": 16,
        "codebook_dim": 16,
        "num_lstm_layers": 1,
        "upsampling_ratios": [4, 2],
        "sampling_rate": 800,
        "target_bandwidths": [0.4],
        "use_causal_conv": False,
    },
    lambda: {"input_values": torch.randn(2, 1, 64)},
)
SPEECH.hf(
    "HiFi-GAN",
    "SpeechT5HifiGan",
    "SpeechT5HifiGanConfig",
    {
        "model_in_dim": 8,
        "upsample_initial_channel": 32,
        "upsample_rates": [4, 2],
        "upsample_kernel_sizes": [8, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "normalize_before": False,
    },
    lambda: {"spectrogram": torch.randn(2, 12, 8)},
)
