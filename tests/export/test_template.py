"""Chat templates as pieces: what can be expressed is exact, what cannot is refused."""

from __future__ import annotations

from typing import Any

import pytest

from edge_llm.bundle.manifest import GenerationDefaults, PromptTemplate, RolePieces
from edge_llm.engine.prompt import Message
from export.architectures.gpt2 import Gpt2Config
from export.chat_template import ChatTemplate
from export.checkpoint import ChatSettings, Checkpoint
from export.errors import ExportError
from export.template import make_prompt_template, render
from export.tensors import MemoryTensors
from tests.export.models import tokenizer_json
from tests.generate_tiny_bundle import CHAT_TEMPLATE

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPING = CHATML.replace("message['content']", "message['content'] | trim")
LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|im_start|>system\n\nDate: {% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}"
    "26 Jul 2024{% endif %}\n\n{{ system }}<|im_end|>"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\n{{ message['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}<start>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
PLAIN_TURNS = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
GENERATION_TAG = CHATML.replace(
    "{{ message['content'] }}<|im_end|>", "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
)
FOLDED_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}<<SYS>>{{ messages[0]['content'] }}<</SYS>>"
    "{% endif %}{{ message['content'] }} [/INST]{% elif message['role'] == 'assistant' %}{{ message['content'] }}"
    "<|im_end|>{% endif %}{% endfor %}"
)
ONLY_LAST_TURN = "<|im_start|>user\n{{ messages[-1]['content'] }}<|im_end|>\n"
COUNTS_TURNS = CHATML.replace("<|im_start|>{{ message['role'] }}", "<|im_start|>{{ loop.index }} {{ message['role'] }}")
UPPER = CHATML.replace("message['content']", "message['content'] | upper")
LENGTH = CHATML.replace("<|im_end|>", "{{ message['content'] | length }}<|im_end|>")
BY_CONTENT = CHATML.replace("<|im_end|>", "{% if '你好' in message['content'] %} (Chinese){% endif %}<|im_end|>")


def checkpoint(template: str | None, **chat: Any) -> Checkpoint:
    settings: dict[str, Any] = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    config = Gpt2Config(1, 1, 8, 8, 400, 32, 1e-5, "relu", True, False, True)
    return Checkpoint(
        name="t",
        source="t",
        reference="t",
        license="t",
        architecture=config,
        tensors=MemoryTensors({}),
        tokenizer_json=tokenizer_json(),
        chat=ChatSettings(template=template, **(settings | chat)),
        eos_token_ids=(2,),
        generation=GenerationDefaults(),
    )


def made_from(template: str | None, **chat: Any) -> PromptTemplate:
    return make_prompt_template(checkpoint(template, **chat))


@pytest.mark.parametrize("template", [CHATML, STRIPPING, LLAMA3, NO_SYSTEM, PLAIN_TURNS, GENERATION_TAG, CHAT_TEMPLATE])
def test_pieces_render_as_the_template(template: str) -> None:
    prompt = made_from(template)
    conversation = [("user", "Hi {{ x }}"), ("assistant", " yes\n"), ("user", "\nand?")]
    if prompt.system is not None:
        conversation.insert(0, ("system", "Be brief. "))
    messages = [Message(role, content) for role, content in conversation]  # type: ignore[arg-type]
    expected = ChatTemplate(template, "<|endoftext|>", "<|im_end|>").render(conversation, generation_prompt=True)
    assert render(prompt, messages) == expected


def test_pieces_of_chatml() -> None:
    prompt = made_from(CHATML)
    assert prompt.user == RolePieces(before="<|im_start|>user\n", after="<|im_end|>\n")
    assert prompt.system == RolePieces(before="<|im_start|>system\n", after="<|im_end|>\n")
    assert prompt.generation_prompt == "<|im_start|>assistant\n"
    assert prompt.default_system is None
    assert prompt.special_tokens == ("<|im_start|>", "<|im_end|>")
    assert prompt.stop_token_ids == (2, 0)
    assert prompt.stop_strings == ()
    assert not prompt.strip_content


def test_default_system_message_is_kept() -> None:
    assert made_from(CHAT_TEMPLATE).default_system == "You are a tiny test model"
    llama3 = made_from(LLAMA3)
    assert llama3.default_system == ""
    assert llama3.strip_content
    assert llama3.prefix == "<|endoftext|>"
    # The day of the export must not become part of every prompt.
    assert llama3.system is not None
    assert "26 Jul 2024" in llama3.system.before


def test_token_that_opens_every_message_is_no_prefix() -> None:
    prompt = made_from(CHAT_TEMPLATE, bos_token="<|im_start|>")
    assert prompt.prefix == ""
    assert prompt.system == RolePieces(before="<|im_start|>system\n", after="<|im_end|>\n")


def test_template_that_refuses_system_messages_has_no_system_piece() -> None:
    prompt = made_from(NO_SYSTEM)
    assert prompt.system is None
    assert prompt.prefix == "<|endoftext|>"


def test_without_an_end_token_the_next_turn_ends_the_answer() -> None:
    assert made_from(PLAIN_TURNS).stop_strings == ("\n### User:",)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (FOLDED_SYSTEM, "system message is part of the first user message|opens in another way"),
        (ONLY_LAST_TURN, "drops, repeats or changes"),
        (COUNTS_TURNS, "renders|begins unlike"),
        (UPPER, "drops, repeats or changes"),
        (LENGTH, "renders|depends"),
        (BY_CONTENT, "renders"),
        ("{{ messages[0]['nope']['nothing'] }}", "refuses"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_what_pieces_cannot_express_is_refused(template: str, words: str) -> None:
    with pytest.raises(ExportError, match="cannot be expressed as fixed pieces") as caught:
        made_from(template)
    assert __import__("re").search(words, str(caught.value))


def test_invalid_jinja_is_named() -> None:
    with pytest.raises(ExportError, match="not valid Jinja"):
        made_from("{% for %}")


def test_template_cannot_leave_the_sandbox() -> None:
    with pytest.raises(ExportError):
        made_from("{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML)


def test_base_model_gets_question_and_answer() -> None:
    prompt = made_from(None)
    messages = [
        Message("system", "Facts."),
        Message("user", "Why? "),
        Message("assistant", " Because."),
        Message("user", "So?"),
    ]
    assert render(prompt, messages) == "Facts.\n\nQuestion: Why?\nAnswer: Because.\n\nQuestion: So?\nAnswer:"
    assert prompt.stop_strings == ("\nQuestion:",)
    assert made_from(None, adds_bos=True).prefix == "<|endoftext|>"


def test_environment_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for template in (CHATML, STRIPPING, CHAT_TEMPLATE, NO_SYSTEM, PLAIN_TURNS, GENERATION_TAG):
        from tokenizers import Tokenizer

        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer_json()), bos_token="<|endoftext|>", eos_token="<|im_end|>"
        )
        tokenizer.chat_template = template
        conversation = [("user", "  one "), ("assistant", "<two>"), ("user", "\nthree")]
        theirs = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in conversation],
            tokenize=False,
            add_generation_prompt=True,
        )
        ours = ChatTemplate(template, "<|endoftext|>", "<|im_end|>").render(conversation, generation_prompt=True)
        assert ours == theirs
