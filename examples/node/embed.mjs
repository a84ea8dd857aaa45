// Use an artifact from Node: two packages and the folder that graphprune wrote, no Python.
//
//   npm install
//   node embed.mjs ../../out "A man is eating food." "Someone has a meal."
//
// The folder brings the tokenizer's files and, inside onnx/model.onnx, the pooling, so that ids go
// in and one embedding a sentence comes out. Make one with
// `graphprune compile minilm --recipe half -o out`.

import { readFile } from "node:fs/promises";
import path from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import ort from "onnxruntime-node";

const [folder = "out", ...given] = process.argv.slice(2);
const sentences = given.length
  ? given
  : ["A man is eating food.", "Someone has a meal.", "The stock market fell today."];
const readJson = async (...parts) => {
  const file = path.join(folder, ...parts);
  try {
    return JSON.parse(await readFile(file, "utf8"));
  } catch (error) {
    console.error(
      `${file} cannot be read (${error.code ?? error.message}): ` +
        "give the folder of a text model that graphprune wrote",
    );
    process.exit(1);
  }
};

const tokenizer = new Tokenizer(
  await readJson("tokenizer.json"),
  await readJson("tokenizer_config.json"),
);
const session = await ort.InferenceSession.create(path.join(folder, "onnx", "model.onnx"));

// Rows of one length: shorter sentences are filled up with zeros, which the mask hides; of longer
// ones than 128 tokens the end goes, but for the token that marks it.
const cut = (ids) => (ids.length > 128 ? [...ids.slice(0, 127), ids.at(-1)] : ids);
const rows = sentences.map((sentence) => cut(tokenizer.encode(sentence).ids));
const width = Math.max(...rows.map((ids) => ids.length));
const filled = (of) =>
  new ort.Tensor(
    "int64",
    BigInt64Array.from(
      rows.flatMap((ids) => Array.from({ length: width }, (_, i) => BigInt(of(ids, i)))),
    ),
    [rows.length, width],
  );
const made = {
  input_ids: filled((ids, i) => ids[i] ?? 0),
  attention_mask: filled((ids, i) => (i < ids.length ? 1 : 0)),
  token_type_ids: filled(() => 0),
};
const feeds = Object.fromEntries(session.inputNames.map((name) => [name, made[name]]));
const { data, dims } = (await session.run(feeds)).sentence_embedding;

const embedding = (row) => data.slice(row * dims[1], (row + 1) * dims[1]);
const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const cosine = (a, b) => dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
console.log(`${rows.length} embeddings of width ${dims[1]}; cosine with the first:`);
sentences.forEach((sentence, i) =>
  console.log(`  ${cosine(embedding(0), embedding(i)).toFixed(3)}  ${sentence}`),
);
