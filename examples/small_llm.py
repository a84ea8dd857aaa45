# %% [markdown]
# # A small language model
#
# SmolLM2-135M with a fifth of its feed-forward neurons removed, in one ONNX file that reads a
# prompt and then token after token. Nothing is trained. It takes about seven minutes of one core.

# %%
from pathlib import Path

import numpy as np

import graphprune as gp
from graphprune.exporters.runtime.generate import Decoder, generate
from graphprune.models import load_model
from graphprune.models.data.calibration import token_batches
from graphprune.models.data.text import Text
from graphprune.models.tasks.neighbors import python_sentences
from graphprune.passes import PruneNeurons

loaded = load_model("smollm2")  # or transformers' AutoModelForCausalLM.from_pretrained(...)
batch = dict(loaded.example_inputs)

# %% [markdown]
# ## Calibrate on running text
#
# Python's help topics again, so that no download is needed. A model for prose wants prose.

# %%
text = Path("text.txt")
text.write_text("\n".join(python_sentences(2000)), encoding="utf-8")
batches = token_batches(text, list(batch), loaded.tokenizer_dir, segments=8, length=256)

# %% [markdown]
# ## Prune
#
# `score="obs"` removes, one after another, the neurons whose loss the remaining weights can best
# compensate, and refits those. `cache=True` also captures the form with a key/value cache.

# %%
compiled = gp.compile(
    loaded.module,
    [PruneNeurons(0.2, score="obs")],
    example_inputs=batch,
    calibration=batches,
    cache=True,
)
print(compiled.report)

# %% [markdown]
# ## Generate, in ONNX Runtime
#
# A fifth of the neurons is much for so small a model, calibrated on 2,048 tokens of other text and
# not trained: it writes sentences, and gets facts wrong. `graphprune eval --task perplexity`
# measures that.

# %%
compiled.files |= loaded.files()
artifact = compiled.export("small-llm", baseline=False)
tokenizer = Text(loaded.tokenizer_dir)
prompt = np.array([tokenizer.encode("The capital of France is")])
tokens = generate(Decoder(artifact.session(threads=1)), prompt, max_new_tokens=16)
print(tokenizer.decode([int(token[0]) for token in tokens]))
