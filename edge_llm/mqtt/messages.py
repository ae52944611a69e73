"""What comes over the wire: strict, frozen, and refused with an error that names the field.

Parsing has two steps, because an error must still find its way back: ``decode_fields`` turns a payload into a plain
object, from which ``claimed_id`` and ``claimed_reply_to`` read what they can, and ``Query.parse`` and its like check
it.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from edge_llm.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edge_llm.mqtt.acks import Delivery

MAX_ID_LENGTH: Final = 64
_FIELD_PATH: Final = re.compile(r" - at `\$\.?(.*?)`$")

Fields = dict[str, Any]
ShortText = Annotated[str, Meta(min_length=1, max_length=MAX_ID_LENGTH)]
StopString = Annotated[str, Meta(min_length=1, max_length=128)]
ParsedT = TypeVar("ParsedT", bound="_Strict")


@dataclass(frozen=True)
class Incoming:
    """One message as it was read from the socket, with the MQTT 5 properties that carry meaning here.

    ``received_at`` is ``time.monotonic()`` seconds; ``dup`` says that the broker sends it again.
    """

    topic: str
    payload: bytes
    received_at: float
    qos: int = 0
    retain: bool = False
    dup: bool = False
    content_type: str | None = None
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    delivery: Delivery | None = None


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen, and an unknown field is an error."""


class RoleMessage(_Strict, frozen=True, kw_only=True):
    """One turn of a conversation that the client keeps itself."""

    role: Literal["system", "user", "assistant"]
    content: str


class Query(_Strict, frozen=True, kw_only=True):
    """A question. A field that is null is absent."""

    id: ShortText | None = None
    text: str | None = None
    messages: Annotated[tuple[RoleMessage, ...], Meta(min_length=1, max_length=256)] | None = None
    session: ShortText | None = None
    utterance: ShortText | None = None
    supersedes: ShortText | None = None
    stream: bool = True
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=5)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: Annotated[tuple[StopString, ...], Meta(max_length=4)] = ()
    deadline_ms: Annotated[int, Meta(ge=1, le=86_400_000)] | None = None
    priority: Literal["interactive", "background"] = "interactive"
    reply_to: str | None = None
    cache: Literal["use", "bypass"] = "use"

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Query:
        """Check the fields of a query. Raises ``RequestError`` 400 naming the field that is wrong."""
        query = _convert(fields, cls)
        for name in ("id", "session", "utterance", "supersedes"):
            _require_printable(name, getattr(query, name))
        if (query.text is None) == (query.messages is None):
            raise RequestError(400, "give exactly one of `text` and `messages`")
        if query.messages is not None:
            if query.session is not None:
                raise RequestError(
                    400, "`session` keeps the conversation on the device: give `text` with it, not `messages`"
                )
            _check_conversation(query.messages)
        elif not (query.text or "").strip():
            raise RequestError(400, "`text` is empty")
        return query

    @property
    def last_words(self) -> str:
        """What is asked: the text, or the last message's."""
        return (self.text or "") if self.messages is None else self.messages[-1].content


class Partial(_Strict, frozen=True, kw_only=True):
    """A transcript that is still growing: ``text`` is all of it so far."""

    utterance: ShortText
    seq: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    text: str
    session: ShortText | None = None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Partial:
        """Check the fields of a partial. Raises ``RequestError`` 400."""
        partial = _convert(fields, cls)
        _require_printable("utterance", partial.utterance)
        _require_printable("session", partial.session)
        return partial


class Cancel(_Strict, frozen=True, kw_only=True):
    """Stop one query of the user that sends this."""

    id: ShortText
    reply_to: str | None = None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Cancel:
        """Check the fields of a cancel. Raises ``RequestError`` 400."""
        cancel = _convert(fields, cls)
        _require_printable("id", cancel.id)
        return cancel


class Feedback(_Strict, frozen=True, kw_only=True):
    """What the user thought of a finished answer."""

    id: ShortText
    rating: Literal[-1, 0, 1]
    correction: str | None = None
    reply_to: str | None = None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Feedback:
        """Check the fields of a feedback. Raises ``RequestError`` 400."""
        feedback = _convert(fields, cls)
        _require_printable("id", feedback.id)
        return feedback


def decode_fields(incoming: Incoming, *, max_payload_bytes: int, bare_field: str | None) -> Fields:
    """The payload as an object whose fields have not been checked yet.

    The ContentType decides between JSON and text; without one, a payload that begins with ``{`` is JSON.

    Args:
        incoming: the message.
        max_payload_bytes: a longer payload is not looked at.
        bare_field: the field that a payload of bare text stands for; None if there is none.

    Raises:
        RequestError: 413 too long, 415 neither JSON nor text, 400 not UTF-8, not JSON, too deep, not an object.
    """
    if len(incoming.payload) > max_payload_bytes:
        raise RequestError(413, f"the payload has {len(incoming.payload)} bytes; at most {max_payload_bytes} are taken")
    media_type = _media_type(incoming.content_type)
    payload = incoming.payload.removeprefix(codecs.BOM_UTF8)
    is_json = media_type == "application/json" if media_type else payload.lstrip()[:1] == b"{"
    try:
        if not is_json:
            text = payload.decode("utf-8")
            if bare_field is None:
                raise RequestError(400, "the payload must be a JSON object")
            return {bare_field: text}
        fields = msgspec.json.decode(payload)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the payload is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise RequestError(400, "the JSON is nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise RequestError(400, f"the payload is not valid JSON: {_readable(error)}") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "the payload must be a JSON object")
    # Clients in typed languages send null for what they leave out.
    return {name: value for name, value in fields.items() if value is not None}


def claimed_id(fields: Mapping[str, Any], correlation: bytes | None) -> str | None:
    """The id that a message goes by, if it has a usable one: its ``id``, else its CorrelationData."""
    named = fields.get("id")
    if isinstance(named, str) and 0 < len(named) <= MAX_ID_LENGTH and named.isprintable():
        return named
    return id_from_correlation(correlation)


def id_from_correlation(correlation: bytes | None) -> str | None:
    """CorrelationData as an id: its text if that is printable and short, else its first 32 bytes in hex."""
    if not correlation:
        return None
    try:
        text = correlation.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if 0 < len(text) <= MAX_ID_LENGTH and text.isprintable():
        return text
    return correlation.hex()[:MAX_ID_LENGTH]


def claimed_reply_to(fields: Mapping[str, Any], response_topic: str | None) -> str | None:
    """The place that a message asks to be answered at: its ``reply_to``, else its ResponseTopic."""
    named = fields.get("reply_to")
    return named if isinstance(named, str) else response_topic


def _media_type(content_type: str | None) -> str | None:
    """``application/json``, ``text`` or, without a ContentType, None. Raises ``RequestError`` 415 for others."""
    if not content_type:
        return None
    media_type, *parameters = [part.strip().lower() for part in content_type.split(";")]
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise RequestError(415, "the charset of the ContentType must be utf-8")
    if media_type == "application/json":
        return media_type
    if media_type.startswith("text/"):
        return "text"
    raise RequestError(415, f"ContentType {content_type[:80]!r} is neither application/json nor text")


def _convert(fields: Mapping[str, Any], kind: type[ParsedT]) -> ParsedT:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise RequestError(400, _readable(error)) from None
    except RecursionError:
        raise RequestError(400, "the JSON is nested too deeply") from None


def _readable(error: msgspec.MsgspecError) -> str:
    """msgspec's message with the path as people write it."""
    return _FIELD_PATH.sub(r" (at `\1`)", str(error)).replace(" (at ``)", "")[:300]


def _require_printable(name: str, value: str | None) -> None:
    # An id goes into logs and back onto the wire: a line break in it would forge a log line.
    if value is not None and not value.isprintable():
        raise RequestError(400, f"`{name}` holds a control or other unprintable character")


def _check_conversation(messages: tuple[RoleMessage, ...]) -> None:
    for index, message in enumerate(messages):
        if not message.content.strip():
            raise RequestError(400, f"`messages[{index}].content` is empty")
        if message.role == "system" and index:
            raise RequestError(400, f"`messages[{index}]`: a system message comes first or not at all")
    if messages[-1].role != "user":
        raise RequestError(400, "the last of `messages` must be the user's")
