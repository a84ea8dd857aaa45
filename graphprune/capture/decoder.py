"""The second entry of a decoder: `decode`, which reads and extends a key/value cache.

    input_ids [batch, sequence], attention_mask [batch, past + sequence],
    past_key_values.{i}.key and .value [batch, heads, past, width], by layer
    -> logits [batch, sequence, vocabulary], present.{i}.key and .value, past + sequence long

A past of length zero reads a prompt. Every layer keeps all positions, also under a sliding window:
the mask hides what a window no longer sees. Positions follow from the mask, so that padding on
either side does not shift a text. They are no input: what is declared has to be fed by every
runtime, and those that feed position_ids count them off the same mask.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphprune.capture.agreement import tolerance, with_second_batch
from graphprune.capture.capture import exported_program, program_of
from graphprune.capture.quiet import quiet
from graphprune.errors import CaptureError, first_line
from graphprune.ir.decoding import IDS, MASK, PAST, PRESENT, empty_cache, step
from graphprune.ir.graph import flat_outputs
from graphprune.ir.program import Entry, Program
from graphprune.verify.error import relative_error

_Pasts = Sequence[Mapping[str, Tensor]]

_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")  # layers that keep keys and values


def with_decode(model: nn.Module, program: Program, *, check: bool = True) -> Program:
    """A captured decoder with the entry `decode` beside `forward`, over the same tensors.

    Args:
        model: the decoder that the program was captured from, of the transformers library.
        program: of the entry `forward`, captured with input_ids.
        check: compare the new entry with the model, and token by token with `forward`.

    Raises:
        CaptureError: the model has no cache that grows by keys and values, takes other inputs than
            token ids and their mask, or decodes otherwise than it reads.
    """
    name = type(model).__name__
    ids, mask = _text(name, program.forward)
    _check_decoder(model)
    with quiet(model):
        past = _split(name, ids)
        pasts = _run(model, ids[:, :past], mask[:, :past])
        key = _main_output(model, ids, mask)
        kwargs = {
            IDS: ids[:, past:].contiguous(),
            MASK: mask,
            PAST: [{k: v.clone().contiguous() for k, v in layer.items()} for layer in pasts],
        }
        dynamic = _dynamic(len(pasts))
        auto = torch.export.Dim.AUTO
        shapes = pytree.tree_map(lambda sizes: dict.fromkeys(sizes, auto), dynamic, is_leaf=_sizes)
        with _decoding(model, key):
            exported = exported_program(model, (), kwargs, shapes)
            flat = pytree.tree_leaves(dynamic, is_leaf=_sizes)
            inputs = [n for n in exported.graph_signature.user_inputs if isinstance(n, str)]
            found = program_of(model, exported, (), kwargs, dict(zip(inputs, flat, strict=True)))
            _check_dynamic(name, found.forward)
            merged = _merged(program, _with_cache(found))
            entry = with_second_batch(model, merged, "decode", check)
    result = replace(merged, entries={**merged.entries, "decode": entry})
    if check:
        _check_agreement(name, result, ids, mask)
    return result


def _text(name: str, entry: Entry) -> tuple[Tensor, Tensor]:
    given = dict(zip(entry.input_names, entry.example, strict=True))
    strange = sorted(given.keys() - {IDS, MASK, "position_ids"})
    if IDS not in given or strange:
        raise CaptureError(
            f"cache=True is for decoders of text, which take {IDS} and {MASK}; {name} was captured "
            f"with {list(given)}; compile it without cache"
        )
    ids = given[IDS]
    return ids, given.get(MASK, torch.ones_like(ids))


def _check_decoder(model: nn.Module) -> None:
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    missing = [n for n in (PAST, MASK, "use_cache") if n not in accepted]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    if PAST in missing or (missing and not open_ended):
        raise CaptureError(
            f"{name} has no key/value cache: its forward takes no {', '.join(missing)}; compile it "
            "without cache"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CaptureError(
            f"{name} is an encoder with a decoder, whose cache also holds the encoder's output; "
            "cache=True is for decoders alone, compile it without cache"
        )


def _split(name: str, ids: Tensor) -> int:
    """How many of the example's tokens are past, so that batch, past and new tokens all differ.

    About three fifths, and at least two on either side.
    """
    batch, length = ids.shape
    fitting = [
        past for past in range(2, length - 1) if len({batch, past, length - past, length}) == 4
    ]
    if not fitting:
        raise CaptureError(
            f"the example inputs of {name} are {batch} x {length} tokens, too few to tell a past "
            "from what is new: pass example_inputs of two samples and eight tokens or more"
        )
    return min(fitting, key=lambda past: abs(past - 0.6 * length))


def _run(model: nn.Module, ids: Tensor, mask: Tensor) -> list[dict[str, Tensor]]:
    """Keys and values by layer, [batch, heads, length, width], after reading these tokens."""
    name = type(model).__name__
    inputs = {IDS: ids, MASK: mask, "use_cache": True}
    try:
        layers = list(model(**inputs).past_key_values.layers)
    except Exception as e:
        raise CaptureError(
            f"{name} gives no key/value cache that graphprune can read "
            f"({first_line(e)}); compile it without cache"
        ) from e
    for i, layer in enumerate(layers):
        if type(layer).__name__ not in _GROWING:
            raise CaptureError(
                f"layer {i} of {name} keeps a {type(layer).__name__} between tokens, not keys and "
                "values that grow with them; compile it without cache"
            )
    # Once more, with a cache that drops nothing outside a sliding window.
    cache = _filled([])
    model(**inputs, past_key_values=cache)
    if not cache.layers:
        raise CaptureError(f"the cache of {name} stays empty; compile it without cache")
    return [_held(layer) for layer in cache.layers]


def _held(layer: Any) -> dict[str, Tensor]:
    return {"key": layer.keys, "value": layer.values}


def _main_output(model: nn.Module, ids: Tensor, mask: Tensor) -> str:
    """The name of the model's first output: logits, or the last hidden state."""
    output = model(input_ids=ids, attention_mask=mask, use_cache=False)
    return str(next(iter(output.keys())))


def _dynamic(layers: int) -> dict[str, Any]:
    held = {0: "batch", 2: "past"}
    return {
        IDS: {0: "batch", 1: "sequence"},
        MASK: {0: "batch", 1: "past+sequence"},
        PAST: [{"key": held, "value": held} for _ in range(layers)],
    }


def _check_dynamic(name: str, entry: Entry) -> None:
    """Refuse a decoder that fixes a size which changes from token to token."""
    for place, dims in entry.fixed.items():
        for dim, line in dims.items():
            raise CaptureError(
                f"{name} with a cache takes one size alone in dimension {dim} of {place!r}"
                f"{line and f', because of {line}'}; compile it without cache"
            )


def _sizes(node: Any) -> bool:
    """Whether a part of `_dynamic` holds the sizes of one tensor."""
    return isinstance(node, dict) and 0 in node


@contextlib.contextmanager
def _decoding(model: nn.Module, key: str) -> Iterator[None]:
    """Give the model a forward that takes and returns the cache as plain tensors, while inside.

    On the model itself, so that its tensors keep their names.
    """
    forward = model.forward
    takes_positions = "position_ids" in inspect.signature(forward).parameters
    own = "forward" in model.__dict__

    def decode(input_ids: Tensor, attention_mask: Tensor, past_key_values: _Pasts) -> Any:
        past = past_key_values[0]["key"].shape[2]
        check: Any = torch._check
        check(attention_mask.shape[1] == past + input_ids.shape[1])
        more = {}
        if takes_positions:
            # Padding on the left must not shift a sentence.
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            more["position_ids"] = positions[:, past:]
        cache = _filled(past_key_values)
        outputs = forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **more,
        )
        present = [_held(layer) for layer in cache.layers]
        return {key: outputs[key], PRESENT: present}

    try:
        model.__dict__["forward"] = decode
        yield
    finally:
        if own:
            model.__dict__["forward"] = forward
        else:
            del model.__dict__["forward"]


def _filled(pasts: _Pasts) -> Any:
    """The library's cache with these keys and values in it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for past in pasts:
        layer = cast(Any, DynamicLayer)()
        layer.lazy_initialization(past["key"], past["value"])
        layer.keys, layer.values = past["key"], past["value"]
        cache.layers.append(layer)
    return cache


def _with_cache(program: Program) -> Program:
    """Record which output continues which input: both are in one order."""
    entry = program.forward
    inputs = [
        leaf
        for argument in entry.arguments
        if argument.name == PAST
        for leaf in argument.leaves
        if isinstance(leaf, str)
    ]
    first = len(flat_outputs(entry.graph)) - len(inputs)
    cache = {name: first + i for i, name in enumerate(inputs)}
    return replace(program, entries={"forward": replace(entry, cache=cache)})


def _merged(program: Program, decode: Program) -> Program:
    """One program of both: tensors of the model once; constants of the graphs where they differ."""
    tensors = dict(program.tensors)
    renamed: dict[str, str] = {}
    for name, tensor in decode.tensors.items():
        known = program.aliases.get(name, name)
        if known in tensors and _equal(tensors[known], tensor):
            renamed[name] = known
            continue
        if same := _same_constant(name, tensor, program, {*decode.tensors, *renamed.values()}):
            renamed[name] = same
            continue
        new = name
        while new in tensors or new in program.aliases:
            new = f"decode_{new}"
        renamed[name] = new
        tensors[new] = tensor
    graphs = decode.fork_graphs()
    for node in graphs["forward"].nodes:
        if node.op == "get_attr":
            node.target = renamed[str(node.target)]
    entry = replace(decode.forward, graph=graphs["forward"])
    return replace(
        program,
        tensors=tensors,
        entries={**program.entries, "decode": entry},
        overlapping=program.overlapping | decode.overlapping,
    )


def _same_constant(
    name: str, tensor: Tensor, program: Program, taken: Collection[str]
) -> str | None:
    """The name of a graph's own constant in the other graph, which numbers nodes otherwise."""
    stem = name.rstrip("_0123456789")
    return next(
        (
            other
            for other, found in program.tensors.items()
            if other not in taken
            and other not in program.parameters
            and other.rstrip("_0123456789") == stem
            and _equal(found, tensor)
        ),
        None,
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(a, b)


def _check_agreement(name: str, program: Program, ids: Tensor, mask: Tensor) -> None:
    """Reading at once, and reading a prompt and then single tokens, give the same."""
    given = {IDS: ids, MASK: mask, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    forward = program.forward
    (whole, *_) = program.run([given[n] for n in forward.input_names])
    prompt = ids.shape[1] // 2
    cache = empty_cache(program.entries["decode"], ids.shape[0])
    first, cache = step(program, ids[:, :prompt], mask[:, :prompt], cache)
    parts = [first]
    for i in range(prompt, ids.shape[1]):
        logits, cache = step(program, ids[:, i : i + 1], mask[:, : i + 1], cache)
        parts.append(logits)
    seen = mask.bool()
    error = relative_error(whole[seen], torch.cat(parts, 1)[seen])
    if not error <= tolerance(whole):
        raise CaptureError(
            f"{name} computes something else with a cache than without ({error:.1e} of its largest "
            "output): its past cannot be replayed token by token; compile it without cache"
        )
