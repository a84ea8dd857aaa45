"""What the bytes of an ONNX file are for: tables, attention, feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from graphprune.axes import axis_groups
from graphprune.exporters.onnx.files import file_bytes
from graphprune.ir.graph import is_op, op_name, tensor_nodes
from graphprune.ir.program import Program

EMBEDDINGS, CONVOLUTIONS, RECURRENT = "embeddings", "convolutions", "recurrent"
OTHER = "other"
# What a tensor is for, by the roles of its axes; the first that fits.
_BY_ROLE: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"head", "kv_group", "queries_per_group", "qk_dim", "v_dim"}),
    "feed-forward": frozenset({"neuron", "expert"}),
}


def tensor_roles(program: Program) -> dict[str, str]:
    """What each tensor of a program is for, read off the operators that use it.

    1. "embeddings": a table that `embedding` looks up, tied to an output projection or not.
    2. "convolutions": the weight of a convolution.
    3. "recurrent": what an LSTM, GRU or RNN layer reads.
    4. "attention" and "feed-forward": what has an axis of heads or of neurons.

    What is not named, norms and a classifier's last layer among it, is neither.
    """
    found: dict[str, str] = {}
    for entry in program.entries.values():
        for read in tensor_nodes(entry.graph):
            for user in read.users:
                if is_op(user, "embedding"):
                    found[str(read.target)] = EMBEDDINGS
                elif is_op(user, "lstm", "gru", "rnn_tanh", "rnn_relu"):
                    found.setdefault(str(read.target), RECURRENT)
                elif "conv" in op_name(user) and read is user.args[1]:
                    found.setdefault(str(read.target), CONVOLUTIONS)
    groups = axis_groups(program)
    for role, members in _BY_ROLE.items():
        for group in groups.with_role(*members):
            for tensor in group.tensors:
                found.setdefault(tensor, role)
    return found


def bytes_by_role(file: Path, roles: Mapping[str, str]) -> dict[str, int]:
    """Bytes of an ONNX file and the weights beside it by what they are for, the most first.

    An initializer is called after the tensor that it was made of: `w`, or `w_quantized`. What the
    file has beside initializers counts as "other".

    Args:
        file: the ONNX file.
        roles: of tensors by name, as `tensor_roles` has them.
    """
    import onnx_ir as ir

    model = ir.load(file)
    known = sorted(roles, key=len, reverse=True)
    found: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            source = next((n for n in known if _made_of(name, n)), "")
            role = roles.get(source, OTHER)
            found[role] = found.get(role, 0) + int(value.const_value.nbytes)
    rest = file_bytes(file) - sum(found.values())
    found[OTHER] = found.get(OTHER, 0) + max(rest, 0)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _made_of(initializer: str, tensor: str) -> bool:
    return initializer == tensor or initializer.startswith(
        (f"{tensor}_", f"{tensor}.", f"{tensor}@")
    )
