"""WikiText's tokenized form as text."""

from __future__ import annotations

import pytest

from graphprune.models.data.wikitext import detokenize, is_tokenized, plain_text


@pytest.mark.parametrize(
    ("tokenized", "text"),
    [
        (" It was , then , over . ", "It was, then, over."),
        ("a 5 @-@ 1 win of 1 @,@ 200 or 0 @.@ 5 ( 3 % )", "a 5-1 win of 1,200 or 0.5 (3%)"),
        ("= = Early life = =", "== Early life =="),
        (" = Teddy 's = ", "= Teddy's ="),
        ("Teddy 's , I 'm , don 't , did n't , we 've", "Teddy's, I'm, don't, didn't, we've"),
        ('He said , " It is . " Then " go " .', 'He said, "It is." Then "go".'),
        ('the " [ big ] " one', 'the "[big]" one'),
        ("the players ' names", "the players' names"),
        ("sixteen ' fairly elderly ' residents", "sixteen 'fairly elderly' residents"),
        ("$ 5 ; 1957 \u2013 60 : x", "$5; 1957\u201360: x"),
        ("the episode ... was", "the episode... was"),
        ("nothing to do", "nothing to do"),
        ("= =", "= ="),
    ],
)
def test_a_line_reads_as_people_write_it(tokenized: str, text: str) -> None:
    assert detokenize(tokenized) == text


def test_sentences_with_unknown_words_go_and_a_line_that_loses_most_goes_whole() -> None:
    lines = [
        " = Title = ",
        " ",
        " One here . The <unk> is gone . Three @-@ fold . ",
        " = = Nothing left = = ",
        " The <unk> . A <unk> . This goes too . ",
        " = = More = = ",
        ' He said , " It is . A <unk> . " Fine . ',
        " = <unk> = ",
        " No stop at the end : ",
    ]
    assert plain_text("\n".join(lines)).split("\n") == [
        "= Title =",
        "One here. Three-fold.",
        "== More ==",
        # The quotation is one with its sentence.
        "Fine.",
        "No stop at the end:",
        "",
    ]


def test_only_its_own_form_is_taken_for_tokenized() -> None:
    assert is_tokenized("a 5 @-@ 1 win")
    assert not is_tokenized("mail me@example.org , @ - @")
