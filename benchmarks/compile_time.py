"""How long compiling takes: capture, axes, passes with their rewrites and verification.

1. MiniLM-L6 (22.7 M parameters).
2. A decoder of 30 layers and 135 M parameters: grouped queries, gated FFN, tied head, random
   weights. `--quick` gives it four layers.

    python -m benchmarks.compile_time [--quick] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

import graphprune
from benchmarks.common import Row, Settings, main
from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.models import load_model
from graphprune.models.loading.inputs import text_batch
from graphprune.passes import PruneHeads, PruneNeurons


def measure(settings: Settings) -> Iterator[Row]:
    """One row a model."""
    loaded = load_model("minilm")
    yield _row("MiniLM-L6", loaded.module, loaded.example_inputs, 15.0)
    layers = 4 if settings.quick else 30
    module = decoder(layers)
    yield _row(f"{layers}-layer decoder", module, text_batch(49152, 32), 60.0)


def decoder(layers: int) -> nn.Module:
    """A language model with grouped-query attention and random weights, 135 M at 30 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    module: nn.Module = LlamaForCausalLM(config)
    return module.eval()


def _row(name: str, module: nn.Module, inputs: Mapping[str, Tensor], limit: float) -> Row:
    start = time.perf_counter()
    program = capture(module, dict(inputs))
    captured = time.perf_counter()
    groups = len(axis_groups(program))
    analyzed = time.perf_counter()
    compiled = graphprune.compile(program, [PruneHeads(1 / 3), PruneNeurons(0.5)])
    done = time.perf_counter()
    return {
        "model": name,
        "parameters": program.num_parameters(),
        "left": compiled.program.num_parameters(),
        "groups": groups,
        "capture s": captured - start,
        "axes s": analyzed - captured,
        "passes and verification s": done - analyzed,
        "total s": done - start,
        "limit s": limit,
    }


if __name__ == "__main__":
    main("compile_time", measure)
