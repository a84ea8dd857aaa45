"""One word a thing, the field's: former words stay out of code and documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WHERE = (
    "graphprune", "passes", "exporters", "models", "kernels", "benchmarks", "examples",
    "README.md", "CONTRIBUTING.md", "docs",
)  # fmt: skip
ENDINGS = (".py", ".md", ".yaml", ".toml", ".html", ".j2", ".css", ".js", ".cc", ".h")


@dataclass(frozen=True, slots=True)
class Rule:
    """A former word.

    Attributes:
        pattern: what is found, in lower case; texts count in any case.
        better: what to write instead.
        example: a phrase that it finds.
    """

    pattern: str
    better: str
    example: str

    def found(self, text: str) -> Iterator[re.Match[str]]:
        """Where the rule applies in a text."""
        return re.finditer(self.pattern, text.lower())  # faster than re.IGNORECASE


RULES = (
    Rule(r"\bproofs?\b", "verification", "without a proof"),
    Rule(r"\b(un)?prov(e|es|en|ed|ing)\b", "verify, verified", "proven equal"),
    Rule(r"\btwins?\b", "baseline, or dense model", "the dense twin"),
    Rule(r"\btold\b", "reported", "as it was told"),
    Rule(r"\b(mis)?judg(e|es|ed|ing|e?ments?)\b", "evaluate, evaluated", "judged by a task"),
    Rule(r"\bmend(s|ed|ing)?\b", "compensate, or repair", "mend the rest"),
    Rule(r"\bmak(e|es|ing)\s+up\b(?!\s+(a|the|its)\b)|\bmade\s+up\s+for\b",
         "compensate, error compensation", "the others make up for it"),
    Rule(r"\b(wish|lesson)(es|ed|s)?\b|\btaught\b", "options, labeled data, with_head",
         "if wished"),
    Rule(r"\b(leav(e|es|ing)|left)(\s+\S+){0,2}\s+away\b", "omit", "or leave it away"),
    Rule(r"\b(fault|error|bug|mistake)s?\s+of\s+ours\b", "internal error", "an error of ours"),
    Rule(r"\b(in|by)\s+turns\b", "interleaved, or alternately", "timed in turns"),
    Rule(r"(?<!left )(?<!leave )(?<!leaves )\bbehind\b", "after, or following",
         "one token behind 128 others"),
    Rule(r": so it is( not)?\b", "say when it is raised", "RecipeError: so it is."),
    Rule(r"\bsays\s+so\b", "reports it, or raises", "the report says so"),
    Rule(r"\banew\b", "again", "made anew"),
    Rule(r"\b(become|are|is) alike\b|\bhas died\b", "merged heads, equal, dead neurons",
         "heads that have become alike"),
    Rule(r"\bparts? of (all|the|each|a|its|every|their)( \w+){0,2}'?s? "
         r"(weights|units|steps|neurons|heads|parameters|channels|dims|features|mean)\b",
         "fraction of", "a part of all weights"),
    Rule(r"\bpattern(=|: ?)[\"']?single\b", "unstructured", 'pattern="single"'),
    Rule(r"\bof(=|: ?)[\"']?now\b", "current", "of: now"),
    Rule(r"\b(behavi|col|neighb|fav|hon|lab)our(s|ed|ing|able|hoods?)?\b", "-or", "behaviour"),
    Rule(r"(optim|normal|regular|quant|initial|serial|summar|minim|maxim|recogn|organ|"
         r"general|special|factor|parameter|penal|real|util|visual|token|vector|parallel|"
         r"approxim|categor|custom|final|local|material|synchron)"
         r"is(e|es|ed|er|ers|ing|ation|ations)\b", "-ize", "optimiser"),
    Rule(r"\banalys(e|ed|ing)\b", "analyze", "analysed"),
    Rule(r"\b(centred?|catalogues?|licences?|grey|artefacts?)\b", "US spelling", "the centre"),
    Rule(r"(label|model|cancel|travel|level|channel)l(ed|ing)\b", "one l", "labelled"),
)  # fmt: skip
# Names in file formats stay as they are.
ALLOWED = ("optimiser.safetensors",)


def test_former_words_stay_out() -> None:
    found = [problem for file in _files() for problem in _problems(file)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.example)
def test_every_rule_finds_its_example(rule: Rule) -> None:
    assert list(rule.found(rule.example))
    assert list(rule.found(rule.example.upper()))


@pytest.mark.parametrize(
    "line",
    [
        "improve, approved, provide and disprovable",
        "the axes that make up the dimension",
        "amend, recommend, commend",
        "heads that are aligned; wishbone",
        "the files left behind; an internal error",
        "a part of a tensor, the parts of a dimension",
        "rises, precise, concise, otherwise, promised, exercised",
        "analysis, analyses; generated, tokens; color, neighbor",
        "pattern='unstructured', of='current'",
    ],
)
def test_other_words_are_not_found(line: str) -> None:
    assert not [match[0] for rule in RULES for match in rule.found(line)]


def _files() -> Iterator[str]:
    """Text files to look at, by their path in the repository."""
    for where in WHERE:
        path = ROOT / where
        # rglob does not follow graphprune/passes and its like, links to the folders beside.
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = file.relative_to(ROOT).as_posix()
            if file.suffix in ENDINGS:
                yield name


def _problems(file: str) -> Iterator[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    for allowed in ALLOWED:
        text = text.replace(allowed, "")
    for rule in RULES:
        for match in rule.found(text):
            number = text.count("\n", 0, match.start()) + 1
            yield f"{file}:{number}: {match[0]!r}, write {rule.better}"
