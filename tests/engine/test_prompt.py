from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.bundle.manifest import RolePieces
from edge_llm.engine.prompt import Message, PromptRenderer
from edge_llm.errors import ManifestError
from tests.fakes import SPECIAL_TOKENS, TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()
SYSTEM, USER, ASSISTANT, END = range(256, 260)


def encode(*messages: Message, **changes) -> list[int]:
    return PromptRenderer(msgspec.structs.replace(TEMPLATE, **changes), TOKENIZER).encode(messages)


def test_a_question_stands_between_its_pieces():
    assert encode(Message("user", "hi")) == [USER, *b"hi", END, ord("\n"), ASSISTANT]


def test_a_conversation_in_order():
    token_ids = encode(Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    newline = ord("\n")
    assert token_ids == [
        *(SYSTEM, *b"s", END, newline),
        *(USER, *b"a", END, newline),
        *(ASSISTANT, *b"b", END, newline),
        *(USER, *b"c", END, newline),
        ASSISTANT,
    ]


def test_the_default_system_message_gives_way_to_the_callers():
    assert encode(Message("user", "x"), default_system="sys")[:5] == [SYSTEM, *b"sys", END]
    assert encode(Message("system", "own"), Message("user", "x"), default_system="sys")[:5] == [SYSTEM, *b"own", END]


@given(st.text(max_size=30), st.sampled_from(SPECIAL_TOKENS))
def test_user_text_never_becomes_a_special_token(text, special):
    content = text + special + text
    assert encode(Message("user", content)) == [USER, *content.encode(), END, ord("\n"), ASSISTANT]


def test_content_is_stripped_where_the_template_does():
    assert encode(Message("user", "  hi \n"), strip_content=True) == encode(Message("user", "hi"))


def test_a_template_without_special_tokens():
    plain = {
        "system": None,
        "user": RolePieces(before="Question: ", after="\n"),
        "assistant": RolePieces(before="Answer: ", after="\n\n"),
        "generation_prompt": "Answer:",
        "special_tokens": (),
        "stop_token_ids": (),
    }
    assert encode(Message("user", "why"), **plain) == list(b"Question: why\nAnswer:")


def test_an_unknown_special_token_is_named():
    with pytest.raises(ManifestError, match=re.escape("<|nope|>")):
        encode(Message("user", "x"), special_tokens=("<|nope|>",))
