"""WikiText's tokenized files as running text again."""

from __future__ import annotations

import re

UNKNOWN = "<unk>"
# A line that loses more than this fraction of its sentences to unknown words is left out whole.
MOST_LOST = 0.5

_MARK = re.compile(r" @([-,.])@ ")
# In this order: quotation marks pair up once what stands between them has closed up.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (_MARK.pattern, r"\1"),
        (r" ([.,:;!?%)\]}])(?= |$)", r"\1"),
        (r"(?<=\w) (\.{3,})(?= |$)", r"\1"),
        (r"(?<=[(\[{$£€]) ", ""),
        (r"(?<=\d) (\u2013) (?=\d)", r"\1"),
        # Teddy 's, don 't, did n't, I 'm
        (r" ('(?:s|t|m|d|re|ve|ll)|n't)\b", r"\1"),
        # the players ' names
        (r"(?<=s) '(?= |$)", "'"),
        (r"""(?<![^ ("])' ([^']*?) ?'(?=[ .,:;!?)"]|$)""", r"'\1'"),
        (r'" ([^"]*?) ?"', r'"\1"'),
    )
)
_END = frozenset(".!?")


def is_tokenized(text: str) -> bool:
    """Whether a text has WikiText's marks for separators inside of words, " @-@ " and the like."""
    return _MARK.search(text) is not None


def plain_text(text: str) -> str:
    """A tokenized file as text: sentences with unknown words left out, the others detokenized.

    A sentence with `<unk>` is dropped, because any word in its place, or none, makes it one that
    nobody writes. A line that so loses more than half of its sentences goes whole, and so does a
    heading with nothing left under it up to the next one. Paragraphs end in one newline.
    """
    lines: list[str] = []
    headings: list[str] = []
    for line in text.split("\n"):
        words = line.split()
        if not words:
            continue
        if words[0] == words[-1] == "=" and len(words) > 2:
            # A heading takes the place of those that stand no higher and had no text.
            depth = _depth(words)
            headings = [h for h in headings if _depth(h.split()) < depth]
            headings += [] if UNKNOWN in words else [" ".join(words)]
            continue
        sentences = _sentences(words)
        kept = [s for s in sentences if UNKNOWN not in s]
        if not kept or len(kept) < (1 - MOST_LOST) * len(sentences):
            continue
        lines += [detokenize(h) for h in headings]
        headings = []
        lines.append(detokenize(" ".join(word for s in kept for word in s)))
    return "".join(f"{line}\n" for line in lines)


def detokenize(line: str) -> str:
    """One line as people write it.

    `a 5 @-@ 1 win ( 1 @,@ 200 fans )` is `a 5-1 win (1,200 fans)`, `Teddy 's " Story " .` is
    `Teddy's "Story".`, and the heading `= = Early life = =` is `== Early life ==`.
    """
    found = " ".join(line.split())
    heading = re.fullmatch(r"((?:= )+)(.*?)((?: =)+)", found)
    if heading:
        marks = "=" * heading[1].count("=")
        return f"{marks} {detokenize(heading[2])} {marks}"
    for pattern, replacement in _RULES:
        found = pattern.sub(replacement, found)
    return found


def _depth(words: list[str]) -> int:
    return next(i for i, word in enumerate(words) if word != "=")


def _sentences(words: list[str]) -> list[list[str]]:
    """Words up to each full stop; a quotation belongs whole to the sentence that it begins in."""
    found: list[list[str]] = []
    current: list[str] = []
    quoted = False
    for word in words:
        current.append(word)
        if word == '"':
            quoted = not quoted
        stop = word in _END or (word == '"' and len(current) > 1 and current[-2] in _END)
        if stop and not quoted:
            found.append(current)
            current = []
    return [*found, current] if current else found
