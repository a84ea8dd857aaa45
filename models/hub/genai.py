"""genai_config.json, by which onnxruntime-genai runs an exported decoder.

The runtime (0.18) makes the cache of every layer from the shapes of the graph's inputs, so that
layers may keep different numbers of heads; the numbers of heads in the file are defaults alone.
What it cannot read is refused here, because there it fails inside the first step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graphprune.errors import ExportError
from graphprune.ir.decoding import IDS, MASK, PAST, PRESENT

FILE = "genai_config.json"
# What model.type may be where onnxruntime-genai 0.18 runs one graph whose cache is keys and values.
# Not gpt2, whose keys and values it wants in one tensor; lfm2 and qwen3_5_text, which have another
# cache beside; phi3, phi3small and phimoe, whose texts it recomputes after 4,096 tokens or 8,192.
# All of these are "decoder".
_TYPES = (
    "chatglm", "decoder", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gptoss",
    "granite", "hunyuandensev1", "internlm2", "llama", "mistral", "nemotron", "olmo", "phi",
    "qwen2", "qwen3", "smollm3",
)  # fmt: skip
# Where a configuration may have a number, by what genai calls it.
_KEYS = {
    "context_length": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
}
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")

Described = Iterable[Mapping[str, Any]]
_Shapes = Mapping[str, Sequence[Any]]


def genai_config(
    config: Any,
    inputs: Described,
    outputs: Described,
    *,
    shared: bool,
    generation: Any = None,
    filename: str = "onnx/model.onnx",
) -> bytes:
    """The content of genai_config.json for an exported decoder.

    Args:
        config: the model's configuration, an object or a mapping.
        inputs: those of the ONNX file, each with `name`, `type` and `shape`, as the manifest has
            them; those that are optional may be left out.
        outputs: likewise.
        shared: whether past and present may be one buffer, so that no step copies the cache: true
            for graphs of target "genai", which take the length of the past from the mask.
        generation: the model's generation configuration, whose ids of tokens and ways to sample
            count before those of `config`.
        filename: the ONNX file, from the folder that genai_config.json lies in.

    Raises:
        ExportError: the runtime cannot drive this graph, or the configuration does not say how long
            a text may be; the reason is named.
    """
    config = _text_part(config)
    given = [i for i in inputs if not i.get("optional")]
    taken, made = _shapes(given), _shapes(outputs)
    layers = _layers(taken, made)
    _check_types(given)
    length = _number(config, "context_length")
    if length is None:
        raise ExportError(
            f"the configuration has none of {list(_KEYS['context_length'])}, which {FILE} takes "
            "as the longest text: set the first"
        )
    vocabulary = made["logits"][-1]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": max(shape[3] for shape in layers),
        "hidden_size": _number(config, "hidden_size"),
        "num_attention_heads": _number(config, "num_attention_heads"),
        "num_hidden_layers": len(layers),
        "num_key_value_heads": max(shape[1] for shape in layers),
        "inputs": {
            **{name: name for name in taken if not name.startswith(f"{PAST}.")},
            "past_key_names": f"{PAST}.%d.key",
            "past_value_names": f"{PAST}.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}.%d.key",
            "present_value_names": f"{PRESENT}.%d.value",
        },
    }
    model = {
        "type": _type(config),
        **_tokens(config, generation, vocabulary),
        "vocab_size": vocabulary,
        "context_length": length,
        "decoder": {key: value for key, value in decoder.items() if value is not None},
    }
    search = {"max_length": length, "past_present_share_buffer": shared, "num_beams": 1}
    for key in _SEARCH:
        if (value := _get(generation, key)) is not None:
            search[key] = value
    return json.dumps({"model": model, "search": search}, indent=2).encode()


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _text_part(config: Any) -> Any:
    """The configuration of the language model, where others are beside it."""
    inner = _get(config, "text_config")
    return config if inner is None else inner


def _number(config: Any, name: str) -> int | None:
    found = (_get(config, key) for key in _KEYS[name])
    return next((value for value in found if value is not None), None)


def _type(config: Any) -> str:
    found = _get(config, "model_type")
    return found if found in _TYPES else "decoder"


def _tokens(config: Any, generation: Any, vocabulary: int) -> dict[str, Any]:
    """Ids of the special tokens; the runtime refuses those that the vocabulary does not reach.

    Shorter prompts of a batch are padded by pad_token_id, on the right: the runtime hides it there
    and nowhere else. Without one, it is what ends a text.
    """

    def ids(name: str) -> list[int]:
        found = _get(generation, name)
        found = _get(config, name) if found is None else found
        listed = found if isinstance(found, list | tuple) else [found]
        return [i for i in listed if i is not None and 0 <= i < vocabulary]

    end, begin, pad = (ids(f"{name}_token_id") for name in ("eos", "bos", "pad"))
    found = {"bos_token_id": begin[:1], "pad_token_id": (pad or end)[:1]}
    single = {name: value[0] for name, value in found.items() if value}
    return {**single, "eos_token_id": end[0] if len(end) == 1 else end}


def _shapes(values: Described) -> _Shapes:
    return {value["name"]: value["shape"] for value in values}


def _layers(inputs: _Shapes, outputs: _Shapes) -> list[Sequence[Any]]:
    """The shape of each layer's keys, [batch, heads, past, width]; refuse what cannot be driven."""
    for name in (IDS, MASK):
        if name not in inputs:
            raise ExportError(f"onnxruntime-genai feeds {name!r}, which the graph does not have")
    if not isinstance(outputs.get("logits", [None])[-1], int):
        raise ExportError(
            f"onnxruntime-genai reads 'logits' over a vocabulary, the graph gives {list(outputs)}: "
            "only a language model generates text"
        )
    pasts = {name: shape for name, shape in inputs.items() if name.startswith(f"{PAST}.")}
    if not pasts:
        raise ExportError(
            "onnxruntime-genai needs a key/value cache, which the graph lacks: compile it with "
            "cache=True, on the command line with --cache"
        )
    known = {IDS, MASK, "position_ids", *pasts}
    if strange := sorted(inputs.keys() - known):
        raise ExportError(f"onnxruntime-genai does not feed {strange}")
    count = (len(pasts) + 1) // 2
    wanted = {f"{PAST}.{i}.{part}" for i in range(count) for part in ("key", "value")}
    if wanted != pasts.keys():
        raise ExportError(
            f"onnxruntime-genai takes {PAST}.0.key and .value and so on without gaps; the graph "
            f"lacks {sorted(wanted - pasts.keys())} and has {sorted(pasts.keys() - wanted)}"
        )
    missing = sorted(n for n in pasts if n.replace(PAST, PRESENT, 1) not in outputs)
    if missing:
        raise ExportError(f"the graph does not give back {missing[0]!r} with the new token")
    return [_layer(pasts, i) for i in range(count)]


def _layer(pasts: _Shapes, number: int) -> Sequence[Any]:
    key, value = (pasts[f"{PAST}.{number}.{part}"] for part in ("key", "value"))
    if len(key) != 4 or not all(isinstance(key[i], int) for i in (1, 3)):
        raise ExportError(
            f"onnxruntime-genai takes caches of [batch, heads, past, width] with numbers for heads "
            f"and width; layer {number} has {list(key)}"
        )
    if list(key) != list(value):
        raise ExportError(
            f"onnxruntime-genai gives keys and values of a layer one shape; layer {number} has "
            f"{list(key)} and {list(value)}: prune the widths of both alike"
        )
    return key


def _check_types(inputs: Described) -> None:
    kinds = {i["name"]: i["type"] for i in inputs if i["name"] in (MASK, "position_ids")}
    if len(set(kinds.values())) > 1:
        raise ExportError(f"onnxruntime-genai feeds inputs of one type, the graph has {kinds}")
