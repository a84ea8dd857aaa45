"""The batches that programs are compared on, made from the examples of an entry.

The examples; a cropped and padded one; one of fresh values; and one at each finite bound of a size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from graphprune.errors import GraphPruneError
from graphprune.ir.graph import bound_arguments, is_op, op_name, terms
from graphprune.ir.program import Entry
from graphprune.ir.sizes import Bounds

LARGEST_BOUND = 1024  # a batch at a larger bound would take longer than all others together
BEFORE_BOUNDS = 3  # batches of `batches` that are at no bound
_SEED = 0x5EED
# What hands the elements of its first input on.
_MOVES = {"view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "contiguous", "to",
          "clone", "slice", "alias", "transpose", "permute"}  # fmt: skip


def batches(entry: Entry) -> list[list[Tensor]]:
    """The flat inputs that everything is compared on, the examples first."""
    at_bounds = [resized(entry, sizes) for sizes in _bound_sizes(entry)]
    return [list(entry.example), second_inputs(entry), fresh_inputs(entry), *at_bounds]


def second_inputs(entry: Entry) -> list[Tensor]:
    """Other flat inputs for an entry: another number of samples, another length, and padding.

    Made from the examples by cropping and repeating to `entry.second`. In masks (tensors of zeros
    and ones along a dynamic last dimension) the last sample's tail is padded; with a cache its
    head, as decoders are padded.
    """
    tables = _table_sizes(entry.graph)
    return [
        _padded(entry, tensor, [tensor.shape[-1] * 2 // 3])
        if name not in tables and _is_mask(tensor, entry.dynamic.get(name, {}))
        else tensor
        for name, tensor in zip(entry.input_names, resized(entry, entry.second), strict=True)
    ]


def fresh_inputs(entry: Entry) -> list[Tensor]:
    """Flat inputs of the examples' sizes and other values, the same ones every time.

    1. Numbers of rows of a table are drawn over all of its rows.
    2. Masks get padding of random lengths; one sample stays whole.
    3. Other whole numbers, and floats of two values, are the examples' own in another order; those
       of one dimension (lengths, offsets) stay, for they may have to rise.
    4. Floats are drawn at the examples' mean and deviation, and of one sign where those are.
    5. A cache is the example's in another order.
    """
    generator = torch.Generator().manual_seed(_SEED)
    tables = _table_sizes(entry.graph)
    result = []
    for name, tensor in zip(entry.input_names, entry.example, strict=True):
        if name in entry.cache:
            # Its samples and positions in another order: what has lost heads gets the same ones.
            for dim in (0, 2):
                order = torch.randperm(tensor.shape[dim], generator=generator)
                tensor = tensor.index_select(dim, order.to(tensor.device))
            result.append(tensor)
        elif name in tables:
            drawn = torch.randint(0, tables[name], tensor.shape, generator=generator)
            result.append(drawn.to(tensor))
        elif _is_mask(tensor, entry.dynamic.get(name, {})):
            length = tensor.shape[-1]
            # What is new after a cache is no padding.
            least = max(1, length * 2 // 3 if entry.cache else 1)
            shape = (tensor.shape[0],)
            real = torch.randint(least, length + 1, shape, generator=generator).tolist()
            result.append(_padded(entry, tensor, [length, *real[1:]]))
        elif tensor.is_floating_point() and tensor.numel() and not _has_two_values(tensor):
            result.append(_drawn(tensor, generator))
        else:
            result.append(_shuffled(tensor, generator))
    return result


def second_sizes(
    names: tuple[str, ...],
    example: tuple[Tensor, ...],
    dynamic: Mapping[str, Mapping[int, str]],
    bounds: Bounds | None = None,
) -> list[dict[str, int]]:
    """Sizes that a second batch may have, the most different from the examples first.

    One more sample and two thirds of every length; then the same lengths, for models that need a
    least length or a multiple; then the examples' own sizes. All within the bounds.
    """
    own = _own_sizes(names, example, dynamic)
    leading = _leading(dynamic)
    more = {s: n + 1 if s in leading else n for s, n in own.items()}
    shorter = {s: n + 1 if s in leading else max(2, n * 2 // 3) for s, n in own.items()}
    within = [
        {s: _within(n, (bounds or {}).get(s, (0, None))) for s, n in sizes.items()}
        for sizes in (shorter, more)
    ]
    return [*within, own]


def bounds_not_run(entry: Entry) -> list[str]:
    """Finite bounds too large to run at, as "sequence <= 131072"."""
    return [
        f"{symbol} <= {high}"
        for symbol, (_, high) in entry.bounds.items()
        if high is not None and high > LARGEST_BOUND
    ]


def _bound_sizes(entry: Entry) -> list[dict[str, int]]:
    """Sizes with one symbol at a finite bound, the number of samples small, others as they are."""
    own = _own_sizes(entry.input_names, entry.example, entry.dynamic)
    leading = _leading(entry.dynamic)
    result = []
    for symbol, (low, high) in entry.bounds.items():
        for bound in dict.fromkeys([low, high]):
            # torch.export calls 2 the least of every size, to tell it from 1.
            if bound is None or not 2 < bound <= LARGEST_BOUND or bound == own.get(symbol):
                continue
            few = {
                s: _within(1, entry.bounds.get(s, (0, None))) if s in leading else n
                for s, n in own.items()
            }
            result.append({**few, symbol: bound})
    return [sizes for sizes in result if _is_allowed(entry, resized(entry, sizes))]


def _is_allowed(entry: Entry, inputs: list[Tensor]) -> bool:
    """Whether sizes hold to what they have to do with each other."""
    try:
        entry.check_sizes(inputs)
    except GraphPruneError:
        return False
    return True


def _own_sizes(
    names: tuple[str, ...],
    example: tuple[Tensor, ...],
    dynamic: Mapping[str, Mapping[int, str]],
) -> dict[str, int]:
    return {
        symbol: int(tensor.shape[dim])
        for name, tensor in zip(names, example, strict=True)
        for dim, symbol in dynamic.get(name, {}).items()
        if len(terms(symbol)) == 1
    }


def _leading(dynamic: Mapping[str, Mapping[int, str]]) -> set[str]:
    return {symbol for dims in dynamic.values() for dim, symbol in dims.items() if dim == 0}


def _within(size: int, bounds: tuple[int, int | None]) -> int:
    low, high = bounds
    return max(low, size if high is None else min(size, high))


def resized(entry: Entry, sizes: Mapping[str, int]) -> list[Tensor]:
    """The examples cropped and repeated to these sizes; others stay as they are."""
    sizes = {**_own_sizes(entry.input_names, entry.example, entry.dynamic), **sizes}
    result = []
    for name, tensor in zip(entry.input_names, entry.example, strict=True):
        for dim, symbol in entry.dynamic.get(name, {}).items():
            size = sum(sizes[term] for term in terms(symbol))
            repeats = -(-size // tensor.shape[dim])
            tensor = torch.cat([tensor] * repeats, dim).narrow(dim, 0, size)
        result.append(tensor.contiguous())
    return result


def sized(entry: Entry, sizes: Sequence[int]) -> list[Tensor]:
    """The examples at so many samples and tokens, all of which count: masks hold ones.

    Args:
        entry: with a cache, one token comes in and `sizes` counts those of the past.
        sizes: samples, and tokens of each.
    """
    names = ("batch", "past" if entry.cache else "sequence")
    wanted = dict(zip(names, sizes, strict=False)) | ({"sequence": 1} if entry.cache else {})
    tensors = resized(entry, wanted)
    return [
        t.new_ones(t.shape)
        if not t.is_floating_point() and bool(((t == 0) | (t == 1)).all())
        else t
        for t in tensors
    ]


def _is_mask(tensor: Tensor, dims: Mapping[int, str]) -> bool:
    """Whether a tensor holds zeros and ones along samples and a length that may change."""
    last = tensor.dim() - 1
    if last < 1 or last not in dims or 0 not in dims or not tensor.numel():
        return False
    return not bool(((tensor != 0) & (tensor != 1)).any())


def _padded(entry: Entry, mask: Tensor, real: list[int]) -> Tensor:
    """A mask whose last samples keep so many positions; what pads is the other of 0 and 1.

    Args:
        entry: padded on the left where it has a cache.
        mask: [batch, …, length].
        real: positions that stay of the last sample, or of each sample.
    """
    left = bool(entry.cache)
    length = mask.shape[-1]
    # Some masks say what to attend to, others what to leave out: a first token is no padding.
    padding = 1 - int(mask.reshape(-1, length)[0, -1 if left else 0])
    padded = mask.clone()
    for sample, kept in zip(range(len(mask) - len(real), len(mask)), real, strict=True):
        padded[sample, ..., slice(length - kept) if left else slice(kept, None)] = padding
    return padded


def _table_sizes(graph: fx.Graph) -> dict[str, int]:
    """Rows of the smallest table whose rows an input numbers, by placeholder."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if not is_op(node, "embedding"):
            continue
        bound = bound_arguments(node)
        source, rows = bound["indices"], bound["weight"].meta["val"].shape[0]
        while op_name(source) in _MOVES:
            source = source.args[0]
        if source.op == "placeholder" and isinstance(rows, int):
            found[source.name] = min(rows, found.get(source.name, rows))
    return found


def _has_two_values(tensor: Tensor) -> bool:
    """Whether floats look like a mask: two values, or infinity."""
    low, high = tensor.min(), tensor.max()
    return bool(tensor.isinf().any()) or bool(
        (low < high) & ((tensor == low) | (tensor == high)).all()
    )


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    finite = tensor[tensor.isfinite()].double()
    mean = float(finite.mean()) if finite.numel() else 0.0
    spread = float(finite.std()) if finite.numel() > 1 else 0.0
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    drawn = mean + noise * (spread or abs(mean) or 1.0)
    if finite.numel() and bool((finite >= 0).all()) and bool((finite > 0).any()):
        drawn = drawn.abs()  # a logarithm or a root may follow
    return drawn.to(tensor)


def _shuffled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Rows over the first two dimensions, drawn from the tensor's own; the others stay."""
    if not tensor.numel() or tensor.dim() < 2:
        return tensor
    rows = tensor.reshape(-1, *tensor.shape[2:])
    at = torch.randint(0, len(rows), (len(rows),), generator=generator)
    return rows[at.to(tensor.device)].reshape(tensor.shape)
