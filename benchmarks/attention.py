"""Which dense export of MiniLM-L6 ONNX Runtime runs fastest: what the baseline is made from.

All are the same weights at 1 x 128 tokens on one thread, timed interleaved by CPU time:

- ours: Attention of opset 23 over undivided heads, one bias for all layers;
- MultiHeadAttention, Attention (com.microsoft): the same file with ORT's own operators instead;
- MatMul + Softmax: the same file with attention spelled out;
- the optimizer of onnxruntime.transformers on that, without SkipLayerNormalization;
- torch.onnx's own export, and the same with ORT's SkipLayerNormalization left on.

    python -m benchmarks.attention [--quick] [--json FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from benchmarks.common import Row, Settings, main
from graphprune.capture.capture import capture
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.onnx.names import input_names, output_names
from graphprune.exporters.runtime.session import feeds_of, open_session
from graphprune.exporters.runtime.timing import interleaved
from graphprune.ir.module import graph_module
from graphprune.ir.program import Program
from graphprune.models import load_model

MICROSOFT = "com.microsoft"


def measure(settings: Settings) -> Iterator[Row]:
    """One row a variant, the fastest first."""
    loaded = load_model("minilm")
    program = capture(loaded.module, dict(loaded.example_inputs))
    ids = torch.randint(1000, 30000, (1, 128))
    tokens = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    feeds = feeds_of(tokens, input_names(program.forward))
    with tempfile.TemporaryDirectory() as name:
        sessions = _sessions(program, Path(name))
        outputs = {k: s.run(None, feeds)[0] for k, s in sessions.items()}
        times = dict(
            zip(
                sessions,
                interleaved(list(sessions.values()), feeds, repeats=settings.repeats, clock="cpu"),
                strict=True,
            )
        )
    ours = times["ours"]
    for variant in sorted(times, key=lambda k: median(times[k])):
        ratios = [a / b for a, b in zip(times[variant], ours, strict=True)]
        yield {
            "export": variant,
            "ms": median(times[variant]),
            "ratio to ours": median(ratios),
            "spread": f"{np.quantile(ratios, 0.25):.2f}-{np.quantile(ratios, 0.75):.2f}",
            "rounds": len(ratios),
            "max difference": f"{np.abs(outputs[variant] - outputs['ours']).max():.0e}",
        }


def _sessions(program: Program, folder: Path) -> dict[str, Any]:
    ours = folder / "ours.onnx"
    save_onnx(to_onnx(program), ours)
    paths = {"ours": ours}
    for name, rewrite in {
        "MultiHeadAttention": _multi_head,
        "Attention (com.microsoft)": _contrib,
        "MatMul + Softmax": _spelled_out,
    }.items():
        model = onnx.load(ours)
        rewrite(model)
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        paths[name] = folder / f"{len(paths)}.onnx"
        onnx.save(model, paths[name])
    paths["transformers optimizer"] = _optimized(paths["MatMul + Softmax"], folder)
    paths["torch.onnx"] = _torch_onnx(program, folder / "torch.onnx")
    sessions = {name: open_session(path, 1) for name, path in paths.items()}
    sessions["torch.onnx with SkipLayerNormalization"] = _all_fusions(paths["torch.onnx"])
    return sessions


def _all_fusions(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _torch_onnx(program: Program, path: Path) -> Path:
    spec = program.forward
    dynamic = tuple(
        {d: torch.export.Dim.DYNAMIC for d in spec.dynamic[n]} for n in spec.input_names
    )
    exported = torch.export.export(graph_module(program), spec.example, dynamic_shapes=dynamic)
    converted = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=23,
        verbose=False,
        input_names=input_names(spec),
        output_names=output_names(spec),
    )
    assert converted is not None
    converted.save(path)
    return path


def _optimized(path: Path, folder: Path) -> Path:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.enable_skip_layer_norm = options.enable_bias_skip_layer_norm = False
    best = optimize_model(str(path), "bert", optimization_options=options, opt_level=0)
    best.save_model_to_file(str(folder / "optimized.onnx"))
    return folder / "optimized.onnx"


def _attentions(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, int, float]]:
    """(node, heads, scale) of every Attention; the caller removes the nodes that it replaces."""
    found = []
    for node in model.graph.node:
        if node.op_type == "Attention":
            values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            found.append((node, values["q_num_heads"], values["scale"]))
    return found


def _replace(model: onnx.ModelProto, old: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
    position = list(model.graph.node).index(old)
    model.graph.node.remove(old)
    for offset, node in enumerate(new):
        model.graph.node.insert(position + offset, node)


def _multi_head(model: onnx.ModelProto) -> None:
    for node, heads, scale in _attentions(model):
        query, key, value, bias = node.input
        _replace(model, node, [
            helper.make_node(
                "MultiHeadAttention", [query, key, value, "", "", bias], node.output,
                domain=MICROSOFT, num_heads=heads, scale=scale,
            )
        ])  # fmt: skip


def _contrib(model: onnx.ModelProto) -> None:
    """Attention (com.microsoft) multiplies by the three weights itself."""
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for node, heads, scale in _attentions(model):
        by_output = {o: n for n in model.graph.node for o in n.output}
        adds = [by_output[name] for name in node.input[:3]]
        products = [by_output[add.input[0]] for add in adds]
        parts = {"weight": [p.input[1] for p in products], "bias": [a.input[1] for a in adds]}
        names = [f"{node.name}_{kind}" for kind in parts]
        for name, sources in zip(names, parts.values(), strict=True):
            joined = np.concatenate([weights[s] for s in sources], axis=-1)
            model.graph.initializer.append(numpy_helper.from_array(joined, name))
        inputs = [products[0].input[0], *names, "", "", node.input[3]]
        sizes = [weights[s].shape[-1] for s in parts["bias"]]
        for gone in (*adds, *products):
            model.graph.node.remove(gone)
        _replace(model, node, [
            helper.make_node(
                "Attention", inputs, node.output,
                domain=MICROSOFT, num_heads=heads, scale=scale, qkv_hidden_sizes=sizes,
            )
        ])  # fmt: skip


def _spelled_out(model: onnx.ModelProto) -> None:
    for node, heads, scale in _attentions(model):
        _replace(model, node, list(_spelling(model, node, heads, scale)))


def _spelling(
    model: onnx.ModelProto, node: onnx.NodeProto, heads: int, scale: float
) -> Iterator[onnx.NodeProto]:
    def constant(name: str, value: Any) -> str:
        full = f"{node.name}_{name}"
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), full))
        return full

    def made(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=f"{output}_node", **attributes)

    t = node.name
    apart = constant("apart", [0, 0, heads, -1])
    orders = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
    for (letter, order), source in zip(orders.items(), node.input[:3], strict=True):
        yield made("Reshape", [source, apart], f"{t}_{letter}4")
        yield made("Transpose", [f"{t}_{letter}4"], f"{t}_{letter}", perm=order)
    yield made("Mul", [f"{t}_q", constant("scale", np.float32(scale))], f"{t}_qs")
    yield made("MatMul", [f"{t}_qs", f"{t}_k"], f"{t}_s")
    yield made("Add", [f"{t}_s", node.input[3]], f"{t}_b")
    yield made("Softmax", [f"{t}_b"], f"{t}_p", axis=-1)
    yield made("MatMul", [f"{t}_p", f"{t}_v"], f"{t}_o")
    yield made("Transpose", [f"{t}_o"], f"{t}_ot", perm=[0, 2, 1, 3])
    yield made("Reshape", [f"{t}_ot", constant("joined", [0, 0, -1])], node.output[0])


if __name__ == "__main__":
    main("attention", measure)
