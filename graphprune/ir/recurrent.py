"""Shapes of recurrent layers, without the loop over time that torch runs to find them.

torch computes an LSTM on fake tensors step by step, which makes a constant of the length. What it
gives has the length of what it reads, whatever that is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
_OPERATORS = tuple(getattr(torch.ops.aten, n) for n in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


@contextlib.contextmanager
def any_length() -> Iterator[None]:
    """Give recurrent layers on fake tensors their shapes alone, while inside.

    Values of real tensors are computed as ever. The kernels that torch has for its Python
    dispatcher are back afterwards.
    """
    kept: list[tuple[Any, Any, Callable[..., Any]]] = []
    overloads = [packet.input for packet in _OPERATORS]
    try:
        for overload in overloads:
            for key in (
                torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd
            ):  # fmt: skip
                kernel = overload.py_kernels.get(key)
                if kernel is not None:
                    kept.append((overload, key, kernel))
                    overload.py_kernels[key] = _shaped(kernel)
            overload._dispatch_cache.clear()
        yield
    finally:
        for overload, key, kernel in kept:
            overload.py_kernels[key] = kernel
        for overload in overloads:
            overload._dispatch_cache.clear()


def _shaped(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def shape(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        if type(input) in _PLAIN or train:
            result: tuple[Tensor, ...] = kernel(
                input, hx, params, has_biases, num_layers, dropout, train, bidirectional,
                batch_first,
            )  # fmt: skip
            return result
        states = [hx] if isinstance(hx, Tensor) else list(hx)
        _check(input, states, params, num_layers * (2 if bidirectional else 1), batch_first)
        width = states[0].shape[-1] * (2 if bidirectional else 1)
        return (
            input.new_empty(*input.shape[:-1], width),
            *(state.new_empty(state.shape) for state in states),
        )

    return shape


def _check(
    input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], count: int, batch_first: bool
) -> None:
    """Refuse what torch refuses: weights and states that do not fit what is read."""
    hidden = states[-1].shape[-1]
    gates = params[0].shape[0]
    if input.dim() != 3:
        raise ValueError(f"a recurrent layer reads three dimensions, got {input.dim()}")
    if input.shape[-1] != params[0].shape[1]:
        raise ValueError(f"input of {input.shape[-1]} features, weights {tuple(params[0].shape)}")
    if gates % hidden or gates != params[1].shape[0]:
        raise ValueError(f"states of {hidden} units, weights {tuple(params[0].shape)}")
    if params[1].shape[1] != states[0].shape[-1]:
        raise ValueError(f"states of {states[0].shape[-1]} units, {tuple(params[1].shape)} weights")
    batch = input.shape[0 if batch_first else 1]
    for state in states:
        if state.dim() != 3 or state.shape[0] != count or state.shape[1] != batch:
            raise ValueError(f"states {tuple(state.shape)} for {count} layers and batch {batch}")
