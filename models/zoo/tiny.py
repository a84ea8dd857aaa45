"""Models of a few thousand random weights, one per architecture or hard case."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.models.loading.inputs import text_batch
from graphprune.models.zoo.vit import VisionTransformer

Built = tuple[nn.Module, dict[str, Tensor]]

_VOCABULARY = 99
_ENCODER = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "use_cache": False}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}

# name -> (model class, configuration class, its arguments), all of transformers
_HUGGING_FACE: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "tiny-bert": ("BertModel", "BertConfig", _ENCODER),
    "tiny-roberta": ("RobertaForSequenceClassification", "RobertaConfig", _ENCODER),
    "tiny-distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": _VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    "tiny-electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_ENCODER, "embedding_size": 16},
    ),
    "tiny-albert": ("AlbertModel", "AlbertConfig", {**_ENCODER, "embedding_size": 16}),
    "tiny-gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": _VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "use_cache": False,
        },
    ),
    "tiny-opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": _VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "use_cache": False,
        },
    ),
    "tiny-llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "tiny-mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "tiny-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "tiny-t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": _VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
        },
    ),
    "tiny-vit": ("ViTForImageClassification", "ViTConfig", _VISION),
    "tiny-deit": ("DeiTForImageClassification", "DeiTConfig", _VISION),
    "tiny-mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


@final
class Mlp(nn.Module):
    """Three linear layers with neurons between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@final
class Cnn(nn.Module):
    """Convolution, batch norm and ReLU with a residual connection, then a classifier."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.inner = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(2 * channels)
        self.outer = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        self.outer_norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        inner = F.relu(self.inner_norm(self.inner(x)))
        x = F.relu(x + self.outer_norm(self.outer(inner)))
        return self.head(x.mean(dim=(2, 3)))


@final
class Encoder(nn.Module):
    """PyTorch's own nn.TransformerEncoder over token ids, with a padding mask."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(hidden[:, 0])


def _mlp() -> Built:
    return Mlp(), {"x": torch.randn(3, 12)}


def _cnn() -> Built:
    return Cnn(), {"x": torch.randn(3, 3, 8, 8)}


def _encoder() -> Built:
    return Encoder(), text_batch(_VOCABULARY, 12)


def _fused_vit() -> Built:
    model = VisionTransformer(image=16, patch=4, channels=3, width=32, neurons=64, layers=2)
    return model, {"pixel_values": torch.randn(3, 3, 16, 16)}


_PLAIN: Mapping[str, Callable[[], Built]] = {
    "tiny-mlp": _mlp,
    "tiny-cnn": _cnn,
    "tiny-encoder": _encoder,
    "tiny-fused-vit": _fused_vit,
}


def tiny_names() -> list[str]:
    """Names of all tiny models."""
    return sorted([*_HUGGING_FACE, *_PLAIN])


def tiny(name: str, seed: int = 0) -> Built:
    """A tiny model with every parameter and running statistic random, and its example inputs.

    Default initialization is not used: its zero biases and unit norms hide wrong rewrites.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, inputs = _PLAIN[name]() if name in _PLAIN else _hugging_face(name)
        randomize(model)
    return model.eval(), inputs


def randomize(model: nn.Module) -> None:
    """Give every parameter and batch-norm statistic a random value, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm scales stay around one; a matrix keeps the size of what it multiplies.
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 0
            if fan_in:
                parameter.normal_(0.0, fan_in**-0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)


def _hugging_face(name: str) -> Built:
    transformers = importlib.import_module("transformers")
    model_class, config_class, options = _HUGGING_FACE[name]
    config = getattr(transformers, config_class)(**options)
    model: nn.Module = getattr(transformers, model_class)(config)
    if "image_size" in options:
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs = text_batch(_VOCABULARY, 12)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(5, _VOCABULARY, (2, 7))
    return model, inputs
