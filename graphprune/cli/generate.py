"""`graphprune generate`: a prompt in, text out, and how fast."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, final

import typer
from rich.console import Console

from graphprune.cli.app import ArtifactOrModel, Json, Pickle, Threads, print_json
from graphprune.cli.subject import Subject, opened
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from graphprune.exporters.runtime.generate import Decoder
    from graphprune.models.data.text import Text


def generate_command(
    model: ArtifactOrModel,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, above 0 one is drawn.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 for all.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn of a conversation.")
    ] = False,
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="For drawing.")] = 0,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Continue a text with a decoder that was compiled with --cache, on ONNX Runtime."""

    sampling = Sampling(max_new_tokens, temperature, top_k, seed, chat)
    with opened(model, allow_pickle) as (subject, display), display.step("open"):
        found = generated(subject, prompt, sampling, threads)
    for piece in found:
        if not as_json:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    if as_json:
        print_json({"model": model, **found.to_json()})
        return
    typer.echo()
    Console(stderr=True, highlight=False, emoji=False).print(found.speed(), style="dim")


@final
@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; the command line's options."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0
    chat: bool = False


@final
class Generation:
    """Iterating over it generates, piece by piece; afterwards it knows how long that took.

    Attributes:
        text: what has come so far.
        prompt_tokens: how many tokens the prompt has.
        new_tokens: how many have come, one that ends the text included.
        prefill_seconds: reading the prompt, the first new token included.
        decode_seconds: all further tokens.
    """

    def __init__(self, decoder: Decoder, text: Text, ids: list[int], sampling: Sampling) -> None:
        self.text = ""
        self.prompt_tokens, self.new_tokens = len(ids), 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self._decoder, self._text, self._ids, self._sampling = decoder, text, ids, sampling

    def __iter__(self) -> Iterator[str]:
        import numpy as np

        from graphprune.exporters.runtime.generate import generate

        options = self._sampling
        tokens = generate(
            self._decoder,
            np.array([self._ids], np.int64),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            stop=self._text.stop,
            seed=options.seed,
        )
        found: list[int] = []
        start = time.perf_counter()
        for token in tokens:
            now = time.perf_counter()
            if found:
                self.decode_seconds += now - start
            else:
                self.prefill_seconds = now - start
            found.append(int(token[0]))
            self.new_tokens = len(found)
            whole = self._text.decode(found)
            piece, self.text = whole[len(self.text) :], whole
            if piece:
                yield piece
            start = time.perf_counter()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "prefill_tokens_per_second": self.prompt_tokens / self.prefill_seconds,
            "decode_tokens_per_second": self._decode_rate(),
        }

    def speed(self) -> str:
        """One line about how fast it was."""
        line = (
            f"prompt {self.prompt_tokens} tokens, "
            f"{self.prompt_tokens / self.prefill_seconds:.1f} a second"
        )
        rate = self._decode_rate()
        return line + ("" if rate is None else f"; {self.new_tokens} new, {rate:.1f} a second")

    def _decode_rate(self) -> float | None:
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


def generated(subject: Subject, prompt: str, sampling: Sampling, threads: int) -> Generation:
    """A generation that is about to begin; a model that is no artifact is exported first.

    Raises:
        GraphPruneError: no cache, no tokenizer, one that is not the model's, or an empty prompt.
    """
    from graphprune.exporters.runtime.generate import Decoder, check_options
    from graphprune.models.data.text import Text

    check_options(sampling.max_new_tokens, sampling.temperature, sampling.top_k)
    if subject.tokenizer_dir is None:
        raise GraphPruneError(
            "the model comes without a tokenizer, so there is no text to read or write; in Python, "
            "graphprune.exporters.runtime.generate takes token ids"
        )
    text = Text(subject.tokenizer_dir)
    ids = text.chat(prompt) if sampling.chat else text.encode(prompt)
    with subject.exported(cache=True) as artifact:
        return Generation(Decoder(artifact.session(threads)), text, ids, sampling)
