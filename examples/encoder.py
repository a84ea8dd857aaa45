# %% [markdown]
# # A sentence encoder, twice as fast
#
# all-MiniLM-L6-v2 turns a sentence into a vector. We make it twice as fast in ONNX Runtime,
# calibrated on plain text: no labels, nothing is trained. It takes about six minutes, most of
# them measuring.

# %%
from pathlib import Path

import graphprune as gp
from graphprune.models import load_model
from graphprune.models.data.calibration import calibration_batches
from graphprune.models.tasks.base import embed
from graphprune.models.tasks.neighbors import python_sentences
from graphprune.passes import Budget

loaded = load_model("minilm")  # any nn.Module would do, with example inputs of your own
batch = dict(loaded.example_inputs)

# %% [markdown]
# ## What can be removed
#
# An axis group is one dimension with every tensor that has it: a head is its rows of query, key
# and value and its columns of the output projection.

# %%
print(gp.inspect(loaded.module, example_inputs=batch))

# %% [markdown]
# ## Prune
#
# Each attention and feed-forward layer is timed at a grid of sizes; a search then finds the
# sizes that are fast enough and cost least. The text is Python's help topics, which every Python
# has. Use text like yours instead.

# %%
text = Path("sentences.txt")
text.write_text("\n".join(python_sentences(512)), encoding="utf-8")
batches = calibration_batches(text, list(batch), loaded.tokenizer_dir)
compiled = gp.compile(
    loaded.module,
    [Budget(speedup=2, batch=(1, 128))],
    example_inputs=batch,
    calibration=batches,
)
print(compiled.report)

# %% [markdown]
# ## Export and run
#
# The folder is laid out as on the hub, tokenizer included, and needs nothing but ONNX Runtime.

# %%
compiled.files |= loaded.files()
artifact = compiled.export("encoder")
session = artifact.session(threads=1)  # an onnxruntime.InferenceSession
sentences = ["A man is eating food.", "Someone has a meal.", "The stock market fell today."]
vectors = embed(session, loaded.tokenizer_dir, sentences)
for other in (1, 2):
    print(f"{float(vectors[0] @ vectors[other]):.3f}  {sentences[0]} | {sentences[other]}")

# %%
timing = artifact.benchmark(batch, against="dense")
print(
    f"{timing.against.ms:.1f} ms dense, {timing.model.ms:.1f} ms pruned: {timing.ratio:.2f}x faster"
)
