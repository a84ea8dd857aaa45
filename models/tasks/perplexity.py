"""Perplexity: how well does a language model predict a text?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import GraphPruneError, first_line
from graphprune.models.data.tokenize import encoder
from graphprune.models.tasks.base import Progress, Task, TaskResult, silent
from graphprune.models.tasks.language import scorer
from graphprune.training.outcome import PerplexityOutcome

WINDOW = 512
# More at once is no faster on a CPU, and a row of logits is as wide as the vocabulary.
_TOKENS_AT_ONCE = 1024


def perplexity(
    model: Any,
    tokenizer_dir: Path,
    data: Path | None = None,
    *,
    window: int = WINDOW,
    windows: int = 0,
    batch: int = 0,
    progress: Progress = silent,
) -> TaskResult:
    """exp of the mean negative log-likelihood (in nats) of a text's tokens; lower is better.

    The protocol of GPTQ, Wanda and SliceGPT for WikiText-2: the whole text is tokenized at once,
    with the special tokens that the tokenizer adds by itself, and cut into windows that do not
    overlap. Every window is read by itself: its first token is given, the other `window - 1` are
    predicted. A rest shorter than a window is dropped. Figures of unlike windows do not compare.

    Args:
        model: a torch module, a Program or a session that gives logits [batch, tokens, vocabulary],
            those of a token from it and what is before it alone (not a masked language model).
        tokenizer_dir: where the tokenizer's files are.
        data: a text file in UTF-8, or a folder with test.raw.txt; else $GRAPHPRUNE_DATA's WikiText.
        window: tokens of a window, at least 2.
        windows: so many windows from the start of the text; 0 for all.
        batch: windows that run together, without effect on the result; 0: about 1024 tokens.
        progress: called with (done, total) windows.

    Returns:
        The perplexity; its count is the predicted tokens.

    Raises:
        GraphPruneError: the text is missing or too short, the tokenizer does not fit the model,
            the window is too long for it, or its logits are NaN or no logits.
    """
    if window < 2 or windows < 0 or batch < 0:
        raise GraphPruneError(
            f"a window has at least 2 tokens and the number of windows is 0 (all) or more, got "
            f"window={window}, windows={windows}, batch={batch}"
        )
    file = TASK.find_data(data)
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise GraphPruneError(f"{str(file)!r} is no UTF-8 text file") from e
    (ids,) = encoder(tokenizer_dir, special=True)([joined(text)])
    found = len(ids) // window
    if not found:
        raise GraphPruneError(
            f"{str(file)!r} has {len(ids)} tokens, fewer than one window of {window}: "
            "give a longer text or a smaller --window"
        )
    used = min(windows or found, found)
    rows = [ids[i * window : (i + 1) * window] for i in range(used)]
    score = scorer(model, tokenizer_dir, rows)
    losses: list[float] = []
    step = batch or max(1, _TOKENS_AT_ONCE // window)
    for start in range(0, used, step):
        part = rows[start : start + step]
        try:
            scored = score(part, [1] * len(part))
        except GraphPruneError:
            raise
        except Exception as e:
            # Of torch or ONNX Runtime, in one of many classes; a few tokens were no trouble.
            raise GraphPruneError(
                f"the model fails on windows of {window} tokens ({first_line(e)}): give a smaller "
                "--window"
            ) from e
        losses += (-s.log_probability for s in scored)
        progress(start + len(part), used)
    tokens = torch.full((used,), window - 1)
    return TASK.result(
        PerplexityOutcome(torch.tensor(losses, dtype=torch.float64), tokens),
        int(tokens.sum()),
        details=f"{'all' if used == found else f'the first {used:,} of'} {found:,} windows of "
        f"{window:,} tokens",
    )


def joined(text: str) -> str:
    """A text as it is tokenized: WikiText's lines with blank lines between, any other as it is.

    WikiText is recognized by its headings, ` = Title = ` on a line alone. That form is that of the
    data set on the hub, "\\n\\n".join(rows) with a newline in each row, which publications use.
    """
    if not re.search(r"^ = .+ = $", text, flags=re.MULTILINE):
        return text
    return "\n\n".join(line + "\n" if line.strip() else "" for line in text.split("\n"))


TASK = Task(
    name="perplexity",
    purpose="of a language model on a text, in windows (WikiText-2; needs --data)",
    metric="perplexity",
    run=lambda r: perplexity(r.model, r.tokenizer_dir, r.data, progress=r.progress, **r.options),
    higher_is_better=False,
    file="wikitext2/test.raw.txt",
    source="WikiText-2, or any text in UTF-8",
    options=("window", "windows"),
)
