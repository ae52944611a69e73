"""A Jinja chat template as the fixed pieces of ``PromptTemplate``, checked against the template itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import tokenizers

from edge_llm.bundle.manifest import PromptTemplate, RolePieces
from edge_llm.engine.prompt import Message, PromptRenderer
from edge_llm.engine.tokenizer import Tokenizer
from export.chat_template import ChatTemplate, TemplateRefusal
from export.errors import ExportError
from export.tokenizer_files import added_tokens, token_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.checkpoint import Checkpoint

# Words that no template treats specially, and that no template contains.
_SYSTEM, _USER, _ASSISTANT, _SECOND_USER = "Sysqzx", "Usrqzx", "Astqzx", "Secqzx"

# Tokens that end a text in some model family; a model that generates one has nothing more to say.
_END_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|end|>",
    "</s>",
    "<eos>",
    "<end_of_turn>",
)

_CONTENTS: Final = (
    "What is artificial intelligence?",
    "  two  spaces, and a tail ",
    "\nA leading newline,\n\n\nthree in the middle, one at the end\n",
    "Größe: 10 °C → 50 °F, 你好, 🙂; a <b> & {{c}} {% d %}",
    "x",
    "\t12345 + 678 = ?\r\n",
)


class _Pieces(NamedTuple):
    prefix: str
    system: RolePieces | None
    user: RolePieces
    assistant: RolePieces
    generation_prompt: str
    default_system: str | None


def make_prompt_template(checkpoint: Checkpoint) -> PromptTemplate:
    """The bundle's prompt template: the checkpoint's own chat template, or plain question and answer without one.

    Raises:
        ExportError: the chat template cannot be expressed as fixed pieces; the message says where it departs.
    """
    chat = checkpoint.chat
    if chat.template is None:
        pieces = _plain_pieces(chat.bos_token if chat.adds_bos else "")
        return _finish(checkpoint, pieces, strip_content=True, stop_strings=("\nQuestion:",))
    template = ChatTemplate(chat.template, chat.bos_token, chat.eos_token)
    try:
        pieces = _extract(template, chat.bos_token)
        strip_content = _strips(template)
    except TemplateRefusal as error:
        raise _inexpressible(f"it refuses a plain conversation ({error})") from None
    prompt = _finish(checkpoint, pieces, strip_content=strip_content, stop_strings=())
    if not token_ids(checkpoint.tokenizer_json, _specials_in(pieces.assistant.after, prompt.special_tokens)):
        # Without an end token, the next question's opening is what ends an answer.
        opening = pieces.user.before.strip()
        prompt = _finish(
            checkpoint, pieces, strip_content=strip_content, stop_strings=(f"\n{opening}",) if opening else ()
        )
    _check(prompt, template, checkpoint.tokenizer_json)
    return prompt


def render(prompt: PromptTemplate, messages: Sequence[Message]) -> str:
    """The prompt of a conversation as text."""
    roles = {"system": prompt.system, "user": prompt.user, "assistant": prompt.assistant}
    if prompt.default_system is not None and messages[0].role != "system":
        messages = [Message("system", prompt.default_system), *messages]
    text = prompt.prefix
    for message in messages:
        pieces = roles[message.role]
        assert pieces is not None
        content = message.content.strip() if prompt.strip_content else message.content
        text += pieces.before + content + pieces.after
    return text + prompt.generation_prompt


def _plain_pieces(bos_token: str) -> _Pieces:
    # A model of GPT-2's kind puts the space before a word into the word, so the prompt must not end with one.
    return _Pieces(
        prefix=bos_token,
        system=RolePieces(before="", after="\n\n"),
        user=RolePieces(before="Question: ", after="\n"),
        assistant=RolePieces(before="Answer: ", after="\n\n"),
        generation_prompt="Answer:",
        default_system=None,
    )


def _finish(
    checkpoint: Checkpoint, pieces: _Pieces, *, strip_content: bool, stop_strings: tuple[str, ...]
) -> PromptTemplate:
    roles = [role for role in (pieces.system, pieces.user, pieces.assistant) if role is not None]
    texts = [pieces.prefix, pieces.generation_prompt, pieces.default_system or ""]
    texts += [text for role in roles for text in (role.before, role.after)]
    specials = tuple(token for token in added_tokens(checkpoint.tokenizer_json) if any(token in text for text in texts))
    ends = [*_specials_in(pieces.assistant.after, specials)[:1], *_END_TOKENS]
    stop_ids = (*checkpoint.eos_token_ids, *token_ids(checkpoint.tokenizer_json, ends))
    return PromptTemplate(
        prefix=pieces.prefix,
        system=pieces.system,
        user=pieces.user,
        assistant=pieces.assistant,
        generation_prompt=pieces.generation_prompt,
        default_system=pieces.default_system,
        strip_content=strip_content,
        special_tokens=specials,
        stop_token_ids=tuple(dict.fromkeys(stop_ids)),
        stop_strings=stop_strings,
    )


def _specials_in(text: str, specials: Sequence[str]) -> list[str]:
    """The special tokens in a text, first one first."""
    return sorted((token for token in specials if token in text), key=text.index)


def _extract(template: ChatTemplate, bos_token: str) -> _Pieces:
    """Find the pieces between sentinel contents. What they cannot express shows up in ``_check``."""
    alone = template.render([("user", _USER)])
    head, user_after = _split(alone, _USER)
    _, middle, assistant_after = _split(
        template.render([("user", _USER), ("assistant", _ASSISTANT)]), _USER, _ASSISTANT
    )
    three = [("user", _USER), ("assistant", _ASSISTANT), ("user", _SECOND_USER)]
    _, _, between, _ = _split(template.render(three), _USER, _ASSISTANT, _SECOND_USER)
    assistant_before = _after(middle, user_after, "the end of a user message depends on what follows")
    user_before = _after(between, assistant_after, "the end of an assistant message depends on what follows")
    user = RolePieces(before=user_before, after=user_after)
    assistant = RolePieces(before=assistant_before, after=assistant_after)
    prompted = template.render([("user", _USER)], generation_prompt=True)
    generation_prompt = _after(prompted, alone, "the generation prompt changes the text before it")
    opening = _before(head, user_before, "the first user message begins unlike the later ones")
    prefix, system, default_system = _extract_system(template, opening, user_before, bos_token)
    return _Pieces(prefix, system, user, assistant, generation_prompt, default_system)


def _extract_system(
    template: ChatTemplate, opening: str, user_before: str, bos_token: str
) -> tuple[str, RolePieces | None, str | None]:
    """Prefix, system pieces and default system message.

    Args:
        template: the chat template.
        opening: what comes before the first user message's pieces when there is no system message.
        user_before: what comes before a user message's content.
        bos_token: tells the prefix from the system piece where both always come together.
    """
    try:
        text = template.render([("system", _SYSTEM), ("user", _USER)])
    except TemplateRefusal:
        return opening, None, None
    if _SYSTEM not in text:
        return opening, None, None
    before, after, _ = _split(text, _SYSTEM, _USER)
    after = _before(after, user_before, "the system message is part of the first user message")
    if before.startswith(opening):
        return opening, RolePieces(before=before.removeprefix(opening), after=after), None
    # A token that opens every message (SmolLM2 names it as its bos_token) is not a prefix of the whole.
    prefix = bos_token if before.startswith(bos_token) and not user_before.startswith(bos_token) else ""
    reason = "without a system message it opens in another way than with one"
    default_system = _before(_after(opening, before, reason), after, reason)
    return prefix, RolePieces(before=before.removeprefix(prefix), after=after), default_system


def _strips(template: ChatTemplate) -> bool:
    return f"  {_USER} \n" not in template.render([("user", f"  {_USER} \n")])


def _check(prompt: PromptTemplate, template: ChatTemplate, tokenizer_json: str) -> None:
    """Compare pieces and template over conversations, as text and as tokens. Raises ``ExportError``."""
    own = tokenizers.Tokenizer.from_str(tokenizer_json)
    renderer = PromptRenderer(prompt, Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json)))
    for conversation in _conversations(has_system=prompt.system is not None):
        described = " + ".join(role for role, _ in conversation)
        try:
            expected = template.render(conversation, generation_prompt=True)
        except TemplateRefusal as error:
            raise _inexpressible(f"it refuses the conversation {described} ({error})") from None
        messages = [Message(role, content) for role, content in conversation]  # type: ignore[arg-type]
        if render(prompt, messages) != expected:
            raise _inexpressible(f"it renders {described} differently, for example {_excerpt(expected)}")
        if renderer.encode(messages) != own.encode(expected, add_special_tokens=False).ids:
            raise _inexpressible(f"the tokens of {described} depend on more than the pieces")


def _conversations(*, has_system: bool) -> list[list[tuple[str, str]]]:
    """Conversations that end with a user message: every content in every role, up to three turns."""
    conversations = []
    for index, content in enumerate(_CONTENTS):
        other, third = _CONTENTS[(index + 1) % len(_CONTENTS)], _CONTENTS[(index + 2) % len(_CONTENTS)]
        turns = [("user", content), ("assistant", other), ("user", third)]
        long = [*turns, ("assistant", content), ("user", other)]
        conversations += [turns[:1], turns, long]
        if has_system:
            conversations += [[("system", third), *part] for part in (turns[:1], turns, long)]
    return conversations


def _split(text: str, *sentinels: str) -> list[str]:
    """The text around each sentinel, in order. Raises ``ExportError`` unless each is there exactly once."""
    parts = []
    for sentinel in sentinels:
        if text.count(sentinel) != 1:
            raise _inexpressible("it drops, repeats or changes a message's content")
        before, text = text.split(sentinel)
        parts.append(before)
    return [*parts, text]


def _after(text: str, start: str, reason: str) -> str:
    if not text.startswith(start):
        raise _inexpressible(reason)
    return text.removeprefix(start)


def _before(text: str, end: str, reason: str) -> str:
    if not text.endswith(end):
        raise _inexpressible(reason)
    return text.removesuffix(end)


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _inexpressible(reason: str) -> ExportError:
    return ExportError(
        f"the chat template cannot be expressed as fixed pieces: {reason}; give the checkpoint a simpler "
        f"chat_template, or remove it to get plain question and answer"
    )
