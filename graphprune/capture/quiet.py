"""A user's model while it is traced and run: quiet, and afterwards as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no key/value cache and no fused fast path, while inside.

    The model is left as it was, see `state_kept`.
    """
    modes = {module: module.training for module in model.modules()}
    cached = []
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True and config not in cached:
            cached.append(config)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for config in cached:
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), state_kept(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in cached:
            config.use_cache = True
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Give buffers and plain attributes back afterwards: a forward may count, or keep a tensor."""
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = {name: b.clone() for name, b in model.named_buffers()}
    try:
        with attributes_kept(model):
            yield
    finally:
        for module, before in buffers.items():
            module._buffers.clear()
            module._buffers.update(before)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(values[name])


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its plain attributes and its hooks back afterwards.

    A tensor that forward keeps for next time would be one that torch.export traced with. A hook
    that the first call installs would be there twice if the attribute that marks it went alone.
    """
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    hooks = [
        (kept, dict(kept))
        for before in attributes.values()
        for name, kept in before.items()
        if isinstance(kept, dict) and "hooks" in name
    ]
    try:
        yield
    finally:
        for module, before in attributes.items():
            module.__dict__.clear()
            module.__dict__.update(before)
        for kept, installed in hooks:
            kept.clear()
            kept.update(installed)
