"""Use an artifact without graphprune, torch or transformers: two small packages and the folder.

pip install onnxruntime tokenizers numpy
python examples/artifact_alone.py out "A man is eating food." "Someone has a meal."

The folder brings the tokenizer and, inside onnx/model.onnx, the pooling, so that ids go in and one
embedding a sentence comes out. Make one with `graphprune compile minilm --recipe half -o out`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

SENTENCES = ["A man is eating food.", "Someone has a meal.", "The stock market fell today."]


def main(folder: Path, sentences: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]") or 0)
    tokenizer.enable_truncation(128)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")

    encoded = tokenizer.encode_batch(sentences)
    made = {
        "input_ids": [e.ids for e in encoded],
        "attention_mask": [e.attention_mask for e in encoded],
        "token_type_ids": [e.type_ids for e in encoded],
    }
    feeds = {i.name: np.array(made[i.name], dtype=np.int64) for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    if "logits" in outputs:  # a classifier: config.json names its classes
        names = json.loads((folder / "config.json").read_text("utf-8"))["id2label"]
        (output,) = session.run(["logits"], feeds)
        for sentence, scores in zip(sentences, output, strict=True):
            print(f"{names[str(int(scores.argmax()))]}  {sentence}")
        return
    (output,) = session.run(["sentence_embedding"], feeds)
    embeddings = output / np.linalg.norm(output, axis=-1, keepdims=True)
    print(f"{len(sentences)} embeddings of width {embeddings.shape[-1]}; cosine with the first:")
    for sentence, cosine in zip(sentences, embeddings @ embeddings[0], strict=True):
        print(f"  {cosine:.3f}  {sentence}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"), sys.argv[2:] or SENTENCES)
