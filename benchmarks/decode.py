"""SmolLM2-135M, token by token after a 128-token prompt: ONNX Runtime against transformers.

All are float32 and greedy, and run interleaved: the prompt, then single tokens, whose rate in
tokens per second is reported. With one thread the clock is that thread's CPU time, so that other
programs do not count; with more it is wall time.

- ours: one ONNX file, Attention of opset 23 with the past as its input;
- torch: the same model of the transformers library with its own cache, eager.

Without --quick, one thread also times the same file with attention in other forms, a step each:

- cache outside: Attention, the cache appended before it by Concat;
- MatMul + Softmax: keys and values repeated for the queries that share them, or not;
- GroupQueryAttention, MultiHeadAttention (com.microsoft). The former refuses several new tokens on
  top of a past in a batch above one; the latter wants keys and values repeated.

    python -m benchmarks.decode [--quick] [--json FILE]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import graphprune
from benchmarks.common import Row, Settings, main
from graphprune.exporters.runtime.generate import Decoder
from graphprune.exporters.runtime.kv_cache import Feeds, filled, shapes_of
from graphprune.exporters.runtime.session import open_session
from graphprune.exporters.runtime.timing import interleaved
from graphprune.models import load_model

MODEL, PROMPT = "smollm2", 128
Contestant = Callable[[np.ndarray[Any, Any], int], tuple[list[int], float]]


def measure(settings: Settings) -> Iterator[Row]:
    """Rows of tokens per second by thread count, then one a form of attention."""
    loaded = load_model(MODEL)
    compiled = graphprune.compile(
        loaded.module, [], example_inputs=dict(loaded.example_inputs), cache=True
    )
    prompt = np.random.default_rng(0).integers(5, 40000, (1, PROMPT))
    with tempfile.TemporaryDirectory() as folder:
        path = compiled.export(Path(folder) / "out", baseline=False).model_path
        for threads in (1,) if settings.quick else (1, 2):
            yield from _rates(path, loaded.module, prompt, threads, settings)
        if not settings.quick:
            yield from _forms(path, Path(folder), settings)


def _rates(path: Path, module: Any, prompt: Any, threads: int, settings: Settings) -> Iterator[Row]:
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    decoder = Decoder(open_session(path, threads))
    both = {"ours": _ours(decoder, clock), "torch": _torch(module, clock)}
    tokens, rounds = (8, 3) if settings.quick else (32, 10)
    rates: dict[str, list[float]] = {name: [] for name in both}
    written = {name: run(prompt, 4)[0] for name, run in both.items()}
    for _ in range(rounds):
        for name, run in both.items():
            rates[name].append(tokens / run(prompt, tokens)[1])
    ratios = [a / b for a, b in zip(rates["ours"], rates["torch"], strict=True)]
    yield {
        "what": f"tokens after {PROMPT}",
        "threads": threads,
        "tokens/s": median(rates["ours"]),
        "torch tokens/s": median(rates["torch"]),
        "ratio": median(ratios),
        "spread": f"{np.quantile(ratios, 0.25):.2f}-{np.quantile(ratios, 0.75):.2f}",
        "rounds": rounds,
        "same tokens": str(written["ours"] == written["torch"]),
    }


def _ours(decoder: Decoder, clock: Callable[[], float]) -> Contestant:
    def run(prompt: np.ndarray[Any, Any], tokens: int) -> tuple[list[int], float]:
        found = [int(decoder.prefill(prompt).argmax())]
        start = clock()
        for _ in range(tokens):
            found.append(int(decoder.step(np.array(found[-1:])).argmax()))
        return found, clock() - start

    return run


def compared(session: Any, against: Any, prompt: Any, settings: Settings) -> Row:
    """Tokens per second of a session of one thread, and the ratio to another's, interleaved.

    The clock is the thread's CPU time; `spread` has the quartiles of the ratio.
    """
    both = [_ours(Decoder(s), time.thread_time) for s in (session, against)]
    tokens, rounds = (8, 3) if settings.quick else (32, 10)
    rates = [[tokens / run(prompt, tokens)[1] for run in both] for _ in range(rounds)]
    ratios = [mine / other for mine, other in rates]
    return {
        "tokens/s": median(mine for mine, _ in rates),
        "faster": median(ratios),
        "spread": f"{np.quantile(ratios, 0.25):.2f}-{np.quantile(ratios, 0.75):.2f}",
    }


def _torch(module: Any, clock: Callable[[], float]) -> Contestant:
    def run(prompt: np.ndarray[Any, Any], tokens: int) -> tuple[list[int], float]:
        with torch.no_grad():
            output = module(torch.from_numpy(prompt), use_cache=True)
            found = [int(output.logits[0, -1].argmax())]
            start = clock()
            for _ in range(tokens):
                output = module(
                    torch.tensor([found[-1:]]),
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
                found.append(int(output.logits[0, -1].argmax()))
            return found, clock() - start

    return run


def _forms(path: Path, folder: Path, settings: Settings) -> Iterator[Row]:
    ours = open_session(path, 1)
    feeds = _step(ours)
    expected = ours.run(None, feeds)[0]
    for name, rewrite in FORMS.items():
        model = ir.load(path)
        for node in [n for n in model.graph if n.op_type == "Attention"]:
            _replace(model, node, rewrite)
        model.opset_imports["com.microsoft"] = 1
        other = folder / "form.onnx"
        ir.save(model, other)
        session = open_session(other, 1)
        actual = session.run(None, feeds)[0]
        first, second = interleaved(
            [ours, session], feeds, repeats=settings.repeats // 2, clock="cpu"
        )
        ratios = [b / a for a, b in zip(first, second, strict=True)]
        yield {
            "what": name,
            "threads": 1,
            "ms a token": median(second),
            "ours ms": median(first),
            "ratio": median(ratios),
            "spread": f"{np.quantile(ratios, 0.25):.2f}-{np.quantile(ratios, 0.75):.2f}",
            "rounds": len(ratios),
            "max difference": f"{np.abs(actual - expected).max() / np.abs(expected).max():.0e}",
        }


def _step(session: Any) -> Feeds:
    """One token after a past of random keys and values."""
    random = np.random.default_rng(0)
    feeds: Feeds = {
        "input_ids": np.array([[42]]),
        "attention_mask": np.ones((1, PROMPT + 1), np.int64),
    }
    full = filled(shapes_of(session), feeds)
    for name in full.keys() - feeds.keys():
        full[name] = random.standard_normal(full[name].shape).astype(np.float32)
    return full


class _Nodes:
    """Nodes that take the place of one Attention."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.model, self.made = model, list[ir.Node]()
        self.query, self.key, self.value, self.bias, self.past_key, self.past_value = node.inputs
        shapes = [v.shape for v in (self.query, self.past_key) if v is not None]
        self.heads, self.kv_heads = (int(str(s[1])) for s in shapes if s is not None)
        self.width = int(str(shapes[0][3])) if shapes[0] is not None else 0
        self.scale = node.attributes["scale"].as_float()

    def __call__(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        domain = "com.microsoft" if kind in ("GroupQueryAttention", "MultiHeadAttention") else ""
        node = ir.node(kind, inputs, attributes, num_outputs=outputs, domain=domain)
        self.made.append(node)
        return node.outputs if outputs > 1 else node.outputs[0]

    def constant(self, value: Any, kind: type) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(np.array(value, kind))})
        self.made.append(node)
        return node.outputs[0]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(values, np.int64)

    def appended(self) -> tuple[Any, Any]:
        return (
            self("Concat", self.past_key, self.key, axis=2),
            self("Concat", self.past_value, self.value, axis=2),
        )

    def repeated(self, x: Any) -> Any:
        times = self.heads // self.kv_heads
        wide = self("Expand", self("Unsqueeze", x, self.ints(2)), self.ints(1, 1, times, 1, 1))
        return self("Reshape", wide, self.ints(0, self.heads, -1, self.width))

    def together(self, x: Any) -> Any:
        return self("Reshape", self("Transpose", x, perm=[0, 2, 1, 3]), self.ints(0, 0, -1))

    def apart(self, x: Any) -> Any:
        split = self("Reshape", x, self.ints(0, 0, self.heads, self.width))
        return self("Transpose", split, perm=[0, 2, 1, 3])

    def weights(self, products: Any) -> Any:
        scaled = self("Mul", products, self.constant(self.scale, np.float32))
        return self("Softmax", self("Add", scaled, self.bias), axis=-1)


def _outside(op: _Nodes) -> tuple[Any, Any, Any]:
    key, value = op.appended()
    return op("Attention", op.query, key, value, op.bias, scale=op.scale), key, value


def _repeated_products(op: _Nodes) -> tuple[Any, Any, Any]:
    key, value = op.appended()
    turned = op("Transpose", op.repeated(key), perm=[0, 1, 3, 2])
    weights = op.weights(op("MatMul", op.query, turned))
    return op("MatMul", weights, op.repeated(value)), key, value


def _grouped_products(op: _Nodes) -> tuple[Any, Any, Any]:
    key, value = op.appended()
    query = op("Reshape", op.query, op.ints(0, op.kv_heads, -1, op.width))
    products = op("MatMul", query, op("Transpose", key, perm=[0, 1, 3, 2]))
    length = op("Shape", key, start=2, end=3)
    apart = op("Concat", op("Shape", op.query, start=0, end=3), length, axis=0)
    weights = op.weights(op("Reshape", products, apart))
    grouped = op("Concat", op("Shape", key, start=0, end=2), op.ints(-1), length, axis=0)
    result = op("MatMul", op("Reshape", weights, grouped), value)
    return op("Reshape", result, op.ints(0, op.heads, -1, op.width)), key, value


def _group_query(op: _Nodes) -> tuple[Any, Any, Any]:
    length = op("Cast", op("Shape", op.bias, start=3, end=4), to=6)
    last = op("Sub", length, op.constant([1], np.int32))
    each = op("Expand", last, op("Shape", op.query, start=0, end=1))
    new = [op.together(x) for x in (op.query, op.key, op.value)]
    result, key, value = op(
        "GroupQueryAttention",
        *(*new, op.past_key, op.past_value, each, op("Squeeze", length), None, None, None, op.bias),
        outputs=3,
        num_heads=op.heads,
        kv_num_heads=op.kv_heads,
        scale=op.scale,
    )
    return op.apart(result), key, value


def _multi_head(op: _Nodes) -> tuple[Any, Any, Any]:
    key, value = op.appended()
    operands = [op.together(x) for x in (op.query, op.repeated(key), op.repeated(value))]
    result = op(
        "MultiHeadAttention",
        *(*operands, None, None, op.bias),
        num_heads=op.heads,
        scale=op.scale,
    )
    return op.apart(result), key, value


FORMS = {
    "cache outside": _outside,
    "MatMul + Softmax, repeated": _repeated_products,
    "MatMul + Softmax, grouped": _grouped_products,
    "GroupQueryAttention": _group_query,
    "MultiHeadAttention": _multi_head,
}


def _replace(
    model: ir.Model, node: ir.Node, rewrite: Callable[[_Nodes], tuple[Any, Any, Any]]
) -> None:
    nodes = _Nodes(model, node)
    results = rewrite(nodes)
    model.graph.insert_before(node, nodes.made)
    for old, new in zip(node.outputs, results, strict=False):
        new.shape, new.type = old.shape, old.type
        name, old.name = old.name, f"{old.name}_old"
        new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


if __name__ == "__main__":
    main("decode", measure)
