"""What counts as the same question."""

# ruff: noqa: RUF001 - look-alike characters are what this is about

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cache.normalise import normalise

# Plain text, and strings of what is stripped, folded and composed.
TEXTS = st.text() | st.text(alphabet=" .?!…。？！,;:\"'’”»」\t\u00a0\u0301aAßİſﬁ\u0345ΐ")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("How far is it?", "how far is it"),
        ("  how\tfar \n is it  ", "how far is it"),
        ("HOW FAR IS IT ?!…", "how far is it"),
        ("电量还有多少？", "电量还有多少"),
        ("次の充電所は。", "次の充電所は"),
        ("Is it far？", "is it far"),
        ('he said "stop."', 'he said "stop'),
        ("«Où ?»", "«où"),
        ("Straße", "straße"),
        ("at 14:05, left.", "at 14:05, left"),
        ("U.S.A.", "u.s.a"),
        ("it's 5.5", "it's 5.5"),
        ("?!…", ""),
        ("", ""),
    ],
)
def test_spellings(text, normal):
    assert normalise(text) == normal


@given(TEXTS)
def test_normal_text_stays(text):
    normal = normalise(text)
    assert normalise(normal) == normal


@given(TEXTS, st.sampled_from(["", " ", "?", " !", "…", ". ", "”", "？"]))
def test_case_spaces_and_closing_punctuation_do_not_count(text, closing):
    assert normalise(f"  {text}{closing}") == normalise(normalise(text) + closing)


def test_every_character_becomes_normal():
    for code in range(sys.maxunicode + 1):
        for text in (chr(code), f"a{chr(code)}b"):
            normal = normalise(text)
            assert normalise(normal) == normal, hex(code)


@pytest.mark.parametrize(
    ("one", "other"), [("What is 5²?", "What is 52?"), ("x₁", "x1"), ("Maße", "Masse"), ("½", "1/2")]
)
def test_what_asks_something_else_stays_apart(one, other):
    assert normalise(one) != normalise(other)
