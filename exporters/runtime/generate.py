"""Text generation with an exported decoder: ONNX Runtime and numpy, token by token."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, final

import numpy as np
import numpy.typing as npt

from graphprune.errors import GraphPruneError, first_line
from graphprune.exporters.runtime.kv_cache import optional_inputs, shapes_of
from graphprune.ir.decoding import IDS, KEEP, LOGITS, MASK, PAST, PRESENT, is_past, zero_pasts

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@final
class Decoder:
    """A session over a decoder with a cache, and the cache after what it has read.

    The cache stays inside ONNX Runtime: what one step gives the next takes; Python copies nothing.

    Attributes:
        vocabulary: number of token ids.
        mask: [batch, past]: what has been read, 0 for padding.
    """

    def __init__(self, session: Any) -> None:
        """Begin with an empty cache.

        Raises:
            GraphPruneError: the session's model has no cache, or gives no logits.
        """
        outputs = {o.name: o.shape for o in session.get_outputs()}
        self._shapes = shapes_of(session)
        self._pasts = [name for name in self._shapes if is_past(name)]
        if not self._pasts:
            raise GraphPruneError(
                "the model has no key/value cache to generate with: compile it with cache=True, on "
                "the command line with --cache"
            )
        if LOGITS not in outputs or not isinstance(outputs[LOGITS][-1], int):
            raise GraphPruneError(
                f"the model gives {next(iter(outputs))!r}, not logits over a vocabulary: only a "
                "language model generates text"
            )
        self.vocabulary = int(outputs[LOGITS][-1])
        self._session = session
        optional = {i.name for i in optional_inputs(session)}
        self._last = {KEEP: _value(np.array(1, np.int64))} if KEEP in optional else {}
        self._outputs = [LOGITS, *(name.replace(PAST, PRESENT, 1) for name in self._pasts)]
        self.mask: Ids = np.zeros((0, 0), np.int64)
        self._cache: dict[str, Any] = {}

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """Forget everything and read prompts; returns the logits after them, [batch, vocabulary].

        Args:
            ids: [batch, length]; shorter prompts are padded on the left.
            mask: of the same shape, 0 for padding; by default there is none.
        """
        self.mask = np.zeros((len(ids), 0), np.int64)
        zeros = zero_pasts(self._shapes, len(ids))
        self._cache = {name: _value(array) for name, array in zeros.items()}
        return self._read(ids, np.ones_like(ids) if mask is None else mask)

    def step(self, tokens: Ids) -> Logits:
        """Read one more token a sample, [batch]; returns the logits after it."""
        return self._read(tokens[:, None], np.ones((len(tokens), 1), np.int64))

    def _read(self, ids: Ids, mask: Ids) -> Logits:
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise GraphPruneError(
                f"token ids from {ids.min()} to {ids.max()} do not fit a model of "
                f"{self.vocabulary} tokens: the tokenizer is not the model's"
            )
        seen = np.concatenate([self.mask, mask.astype(np.int64)], 1)
        feeds = {IDS: _value(ids.astype(np.int64)), MASK: _value(seen), **self._cache}
        feeds.update(self._last)
        try:
            logits, *present = self._session.run_with_ort_values(self._outputs, feeds)
        except Exception as e:
            raise GraphPruneError(
                f"ONNX Runtime fails after {self.mask.shape[1]} tokens, perhaps more than the "
                f"model has positions for; generate fewer: {first_line(e)}"
            ) from e
        self.mask = seen
        self._cache = dict(zip(self._pasts, present, strict=True))
        last: Logits = logits.numpy()[:, -1]
        return last


def generate(
    decoder: Decoder,
    ids: Ids,
    mask: Ids | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[Ids]:
    """Continue prompts: one array of tokens [batch] after another, until all samples have stopped.

    Args:
        decoder: it forgets what it has read before.
        ids: [batch, length], padded on the left.
        mask: of the same shape, 0 for padding.
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token; above, one is drawn from softmax(logits / t).
        top_k: draw from the k likeliest only; 0 for all.
        stop: tokens that end a sample; from then on its tokens are that one.
        seed: for drawing.

    Raises:
        GraphPruneError: an empty prompt, an option without meaning, or the model fails.
    """
    if not ids.size:
        raise GraphPruneError("the prompt is empty: give at least one token to go on from")
    check_options(max_new_tokens, temperature, top_k)
    return _generated(
        decoder, ids, mask, max_new_tokens, temperature, top_k, stop, np.random.default_rng(seed)
    )


def check_options(max_new_tokens: int, temperature: float, top_k: int) -> None:
    """Raise GraphPruneError for options of `generate` without meaning."""
    if max_new_tokens < 1 or not temperature >= 0 or top_k < 0:
        raise GraphPruneError(
            "max_new_tokens is at least 1, temperature and top_k at least 0; got "
            f"{max_new_tokens}, {temperature:g} and {top_k}"
        )


def _generated(
    decoder: Decoder,
    ids: Ids,
    mask: Ids | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    stop: Collection[int],
    random: np.random.Generator,
) -> Iterator[Ids]:
    ends = np.array(sorted(stop), np.int64)
    logits = decoder.prefill(ids, mask)
    tokens: Ids = np.zeros(len(ids), np.int64)
    done = np.zeros(len(ids), bool)
    for number in range(max_new_tokens):
        if number:
            logits = decoder.step(tokens)
        tokens = np.where(done, tokens, choose(logits, temperature, top_k, random))
        yield tokens
        done |= np.isin(tokens, ends)
        if done.all():
            return


def choose(logits: Logits, temperature: float, top_k: int, random: np.random.Generator) -> Ids:
    """One token a sample from logits [batch, vocabulary]."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.astype(np.float64) / temperature
    if 0 < top_k < scaled.shape[-1]:
        least = np.partition(scaled, -top_k, -1)[:, -top_k, None]
        scaled = np.where(scaled < least, -np.inf, scaled)
    # The largest of logits with Gumbel noise is a draw from their softmax.
    return (scaled + random.gumbel(size=scaled.shape)).argmax(-1)


def _value(array: npt.NDArray[Any]) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
