"""Between the wire and the scheduler: every query that is read gets exactly one terminal event.

on_message ─► decode ─► address ─► parse ─► seen before? ─► ready? ─► supersede ─► scheduler.submit
                └──────────┴────────┴──────────┴──────────────┴──── error event ─► reply topic
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edge_llm.domain.state_values import StateValues
from edge_llm.errors import RequestError
from edge_llm.mqtt.admission import Admitted, Scheduler
from edge_llm.mqtt.client import MqttLink
from edge_llm.mqtt.connection import Outgoing, Session
from edge_llm.mqtt.dedupe import DedupeTable, MadeIds, body_hash
from edge_llm.mqtt.events import CONTENT_TYPE, encode_error
from edge_llm.mqtt.messages import (
    Cancel,
    Feedback,
    Fields,
    Incoming,
    Partial,
    Query,
    claimed_id,
    decode_fields,
    id_from_correlation,
)
from edge_llm.mqtt.presence import Presence, State, last_will
from edge_llm.mqtt.replies import Address, Reply, ReplySettings, address_of
from edge_llm.mqtt.topics import Topics
from edge_llm.serving.request import Failed
from edge_llm.serving.request import Final as FinalAnswer

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import GenerationDefaults
    from edge_llm.cache.erasure import Erasure
    from edge_llm.config import Config
    from edge_llm.device.power import PowerLevel
    from edge_llm.metrics import Metrics
    from edge_llm.mqtt.dedupe import Key
    from edge_llm.mqtt.feedback import FeedbackRecorder
    from edge_llm.mqtt.topics import Route

log = logging.getLogger(__name__)

_RETRY_AFTER_MS: Final[dict[State, int]] = {"preparing": 10_000, "loading": 1_000, "draining": 5_000}
_MIN_PACKET_BYTES: Final = 1 << 20
_UNROUTABLE_LOG_INTERVAL_S: Final = 10.0


class Gateway:
    """Serves one node, and its pool, over one link.

    ``start`` connects; queries are refused with 503 until ``bind`` and ``set_state("online")``. ``set_state``,
    ``publish_info`` and ``close`` may be called from any thread.

    Raises:
        ConfigError: the names, the password file or the TLS files cannot be used.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self.topics = Topics(config.mqtt.node, config.mqtt.pool)
        self._node = config.mqtt.node
        self._seen = DedupeTable(config.serving.dedupe_window_s)
        self._made_ids = MadeIds()
        # From the first connection on: the broker sends the retained ones long before a model is loaded.
        self.state_values = StateValues()
        self._scheduler: Scheduler | None = None
        self._defaults: GenerationDefaults | None = None
        self._recorder: FeedbackRecorder | None = None
        # Guards the state, and what is held until it is online.
        self._lock = threading.Lock()
        self._state: State = "loading"
        self._held: dict[Key, Admitted] = {}
        self._unroutable_logged_at = -_UNROUTABLE_LOG_INTERVAL_S
        session = Session(
            client_id=config.mqtt.client_id or f"edge_llm-{self._node}",
            subscriptions=self.topics.subscriptions(),
            will=last_will(self._node, self.topics),
            expiry_s=config.mqtt.session_expiry_s,
            receive_maximum=config.serving.max_queued,
            max_packet_bytes=max(_MIN_PACKET_BYTES, 4 * config.serving.max_payload_bytes),
        )
        self.link = MqttLink(config.mqtt, session, self._on_message, self._on_connected, metrics)
        self._presence = Presence(self._node, self.topics, self.link, metrics)
        metrics.gauge("outgoing_waiting", lambda: self.link.backlog)
        metrics.gauge("queries_remembered", lambda: len(self._seen))

    # -- for the daemon -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect in the background and stay connected."""
        self.link.start()
        self._presence.start(self._config.serving.metrics_interval_s)

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the broker has accepted us; False if it has not within ``timeout_s``."""
        return self.link.wait_connected(timeout_s)

    def bind(
        self, scheduler: Scheduler, defaults: GenerationDefaults, recorder: FeedbackRecorder | None = None
    ) -> None:
        """Say who answers queries, what a query that sets nothing is answered with, and who keeps feedback."""
        self._defaults = defaults
        self._recorder = recorder
        self._scheduler = scheduler

    def set_state(self, state: State, **detail: Any) -> None:
        """Publish the retained status ``{"state": state, **detail}`` and behave accordingly.

        ``online`` (after ``bind``) lets queries through, first those that waited for it.
        """
        if state == "online" and self._scheduler is None:
            raise RuntimeError("bind a scheduler before going online")
        with self._lock:
            self._state = state
            self._presence.set_state(state, detail)
            if state == "online":
                # Under the lock: a cancel finds each of them either here or with the scheduler.
                for admitted in self._held.values():
                    self._submit(admitted)
                self._held.clear()

    def set_power(self, level: PowerLevel) -> None:
        """Add the level of heat to the retained status, from now on."""
        self._presence.set_power(level)

    def publish_info(self, info: dict[str, Any]) -> None:
        """Publish what this node serves, retained, now and on every connection."""
        self._presence.set_info(info)

    def forget(self, erasure: Erasure) -> None:
        """Drop the answers that are kept for repeated queries, and for ratings."""
        self._seen.forget(erasure.concerns)
        if self._recorder is not None:
            self._recorder.forget(erasure.concerns)

    def close(self, timeout_s: float) -> None:
        """Publish that we are offline, wait at most ``timeout_s`` for the broker to take what is owed, disconnect.

        A query that has no terminal event by then stays unacknowledged: the broker keeps it for the next start.
        """
        self.set_state("offline")
        self._presence.close()
        self.link.close(timeout_s)

    # -- from the link's thread ---------------------------------------------------------------------------------------

    def _on_connected(self) -> None:
        self._presence.on_connected()

    def _on_message(self, incoming: Incoming) -> None:
        if self._state == "offline":
            return  # unacknowledged, so that the broker keeps it for the next start
        route = self.topics.parse(incoming.topic)
        if route is not None and route.kind == "state":
            self._on_state_value(incoming, route)
        elif incoming.retain or route is None:
            self._ignore(incoming, "retained_ignored" if incoming.retain else "messages_ignored")
        elif not route.has_valid_user:
            self._ignore(incoming, "unroutable")
            self._log_unroutable(incoming)
        elif incoming.qos == 0 and self.link.backlog >= self._config.mqtt.max_outgoing:
            # QoS 1 is slowed down by its acknowledgements; this is what bounds the answers to QoS 0.
            self._ignore(incoming, "overload_dropped")
        else:
            self._dispatch(incoming, route)

    def _dispatch(self, incoming: Incoming, route: Route) -> None:
        self._metrics.count(f"{route.kind}_messages")
        fields: Fields = {}
        error: RequestError | None = None
        try:
            fields = self._decode(incoming, route)
        except RequestError as decode_error:
            error = decode_error
        address, forbidden = address_of(incoming, route, fields)
        message_id = claimed_id(fields, incoming.correlation) or self._made_ids.make(incoming)
        try:
            if error is not None or forbidden is not None:
                raise error or forbidden or AssertionError
            if route.kind == "query":
                self._on_query(Query.parse(fields), message_id, address, incoming, route)
                return
            if route.kind == "cancel":
                self._on_cancel(Cancel.parse(fields), route)
            elif route.kind == "feedback":
                self._on_feedback(Feedback.parse(fields), route)
            else:
                self._on_partial(Partial.parse(fields), route)
        except RequestError as refusal:
            self._refuse(message_id, address, incoming, route, refusal)
        except Exception:  # a fault of ours costs this one message
            log.exception("a message to %s failed", incoming.topic)
            fault = RequestError(500, "the daemon failed on this message; its log says why")
            self._refuse(message_id, address, incoming, route, fault)
        else:
            self.link.acknowledge(incoming.delivery)

    def _decode(self, incoming: Incoming, route: Route) -> Fields:
        bare_fields = {"query": "text", "cancel": "id"}
        fields = decode_fields(
            incoming,
            max_payload_bytes=self._config.serving.max_payload_bytes,
            bare_field=bare_fields.get(route.kind),
        )
        if route.kind == "cancel":
            # A bare id may end with a line break; CorrelationData serves if there is none, as in a query.
            named = fields.get("id", "")
            named = named.strip() if isinstance(named, str) else named
            fields["id"] = named or id_from_correlation(incoming.correlation) or named
        return fields

    # -- queries ------------------------------------------------------------------------------------------------------

    def _on_query(self, query: Query, query_id: str, address: Address, incoming: Incoming, route: Route) -> None:
        key = (route.user, query_id)
        body = body_hash(incoming.payload)
        if (seen := self._seen.find(key)) is not None:
            if seen.body != body:
                raise RequestError(409, f"id {query_id!r} was used for another query: give each query its own id")
            self._metrics.count("queries_repeated")
            seen.reply.attach(address, incoming.delivery)
            return
        if query.max_tokens is not None and query.max_tokens > self._config.serving.max_tokens:
            raise RequestError(400, f"`max_tokens` may be {self._config.serving.max_tokens} at most")
        hold = self._check_ready(incoming)
        self._supersede(query, query_id, route)
        admitted = self._admit(query, query_id, address, incoming, route)
        self._seen.add(key, body, admitted.reply)
        if hold:
            with self._lock:
                # It may have become online since it was looked at.
                if self._state != "online":
                    self._held[key] = admitted
                    return
        self._submit(admitted)

    def _check_ready(self, incoming: Incoming) -> bool:
        """True if the query has to wait for the model. Raises ``RequestError`` 503 if it is refused.

        A query that the broker delivers again was taken before a crash or a lost connection: it is not refused while
        the model loads, but waits.
        """
        state = self._state
        if state == "online":
            return False
        if incoming.dup and state in ("preparing", "loading"):
            return True
        raise RequestError(503, f"this node is {state}: ask again later", retry_after_ms=_RETRY_AFTER_MS.get(state))

    def _supersede(self, query: Query, query_id: str, route: Route) -> None:
        old_id = query.supersedes
        if old_id is None:
            return
        if old_id == query_id:
            raise RequestError(400, "a query cannot supersede itself")
        if self._cancel(route.user, old_id):
            return
        if route.scope.pool is None:
            raise RequestError(404, f"`supersedes` names {old_id!r}, which this user has not asked here")
        # Another device of the pool may have it.
        cancel = msgspec.json.encode({"id": old_id})
        self.link.publish(Outgoing(route.scope.cancel(route.user), cancel, qos=1, content_type=CONTENT_TYPE))

    def _admit(self, query: Query, query_id: str, address: Address, incoming: Incoming, route: Route) -> Admitted:
        key = (route.user, query_id)
        settings = ReplySettings(self._node, query.stream, self._config.serving.delta_interval_ms)
        reply = Reply(
            query_id,
            settings,
            self.link,
            on_delta=lambda sent: self._metrics.count("deltas_sent" if sent else "deltas_deferred"),
            on_terminal=lambda event: self._on_terminal(key, event, query.last_words),
        )
        reply.attach(address, incoming.delivery)
        deadline_s = incoming.expiry_s if query.deadline_ms is None else query.deadline_ms / 1000
        deadline_at = None if deadline_s is None else incoming.received_at + deadline_s
        return Admitted(route.user, query_id, query, reply, incoming.received_at, deadline_at)

    def _submit(self, admitted: Admitted) -> None:
        scheduler, defaults = self._scheduler, self._defaults
        assert scheduler is not None
        assert defaults is not None
        try:
            scheduler.submit(admitted.request(defaults))
        except Exception:  # the promise of a terminal event holds even against a faulty scheduler
            log.exception("query %s could not be submitted", admitted.id)
            admitted.reply.on_event(Failed(RequestError(500, "the daemon failed on this query; its log says why")))

    def _on_terminal(self, key: Key, event: FinalAnswer | Failed, asked: str) -> None:
        """Account for a terminal event. A refusal that may be retried is forgotten, so that the retry runs."""
        if isinstance(event, Failed):
            self._metrics.count(f"errors_{event.error.code}")
            self._seen.finish(key, keep=not event.error.retriable)
            return
        if self._recorder is not None:
            self._recorder.note_answer(key, asked, event)
        self._metrics.count(f"finals_{event.finish_reason}")
        self._metrics.count(f"source_{event.source}")
        if event.usage.cached_from is not None:
            self._metrics.count(f"cached_from_{event.usage.cached_from}")
        self._metrics.count("prompt_tokens", event.usage.prompt_tokens)
        self._metrics.count("cached_tokens", event.usage.cached_tokens)
        self._metrics.observe("queue_ms", event.timing.queue_ms)
        self._metrics.observe("prefill_ms", event.timing.prefill_ms)
        if event.timing.ttft_ms is not None:
            self._metrics.observe("ttft_ms", event.timing.ttft_ms)
        self._metrics.observe("total_ms", event.timing.total_ms)
        self._seen.finish(key, keep=True)

    # -- partials, cancel, feedback and state --------------------------------------------------------------------------

    def _on_partial(self, partial: Partial, route: Route) -> None:
        scheduler = self._scheduler
        if scheduler is None or self._state != "online":
            self._metrics.count("partials_dropped")
            return
        taken = scheduler.partial(route.user, partial.utterance, partial.seq, partial.text, partial.session)
        self._metrics.count("partials_accepted" if taken else "partials_stale")

    def _on_cancel(self, cancel: Cancel, route: Route) -> None:
        # In a pool the owner acts and the others know nothing of the query, so nobody says 404.
        if not self._cancel(route.user, cancel.id) and route.scope.pool is None:
            raise RequestError(404, f"no query {cancel.id!r} of this user is known here")

    def _cancel(self, user: str, query_id: str) -> bool:
        """End a query as cancelled. True if it is this user's, even if it has just finished."""
        with self._lock:
            held = self._held.pop((user, query_id), None)
        if held is not None:
            held.reply.on_event(held.cancelled(time.monotonic()))
            return True
        if self._scheduler is not None and self._scheduler.cancel(user, query_id):
            return True
        return self._seen.find((user, query_id)) is not None

    def _on_state_value(self, incoming: Incoming, route: Route) -> None:
        taken = route.has_valid_user and self.state_values.update(route.user, incoming.payload)
        self._metrics.count("state_values" if taken else "state_values_refused")
        self.link.acknowledge(incoming.delivery)

    def _on_feedback(self, feedback: Feedback, route: Route) -> None:
        seen = self._seen.find((route.user, feedback.id))
        if seen is None or seen.finished_at is None:
            raise RequestError(404, f"no finished answer {feedback.id!r} of this user is known here")
        if self._recorder is not None:
            self._recorder.note_rating((route.user, feedback.id), feedback)
        self._metrics.count({1: "feedback_good", 0: "feedback_neutral", -1: "feedback_bad"}[feedback.rating])

    # -- what is not answered, and errors -----------------------------------------------------------------------------

    def _ignore(self, incoming: Incoming, counter: str) -> None:
        self._metrics.count(counter)
        self.link.acknowledge(incoming.delivery)

    def _log_unroutable(self, incoming: Incoming) -> None:
        now = time.monotonic()
        if now - self._unroutable_logged_at >= _UNROUTABLE_LOG_INTERVAL_S:
            self._unroutable_logged_at = now
            log.warning("a message to %.200r cannot be answered: its last level is no user's name", incoming.topic)

    def _refuse(self, message_id: str, address: Address, incoming: Incoming, route: Route, error: RequestError) -> None:
        if route.kind == "partial":
            # Never answered: the next one replaces it anyway.
            self._ignore(incoming, "partials_refused")
            return
        self._metrics.count(f"errors_{error.code}")
        self.link.publish(
            Outgoing(
                address.topic,
                encode_error(message_id, self._node, 0, error),
                qos=1,
                content_type=CONTENT_TYPE,
                correlation=address.correlation,
                on_done=lambda _delivered: self.link.acknowledge(incoming.delivery),
            )
        )
