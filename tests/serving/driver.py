"""A scheduler without its thread: the test says when it steps, when it is idle, and what time it is."""

from __future__ import annotations

import time
from pathlib import Path

from edge_llm.bundle.manifest import GenerationDefaults
from edge_llm.cache.popularity import Popularity
from edge_llm.cache.prefix_cache import PrefixCache
from edge_llm.cache.prefix_lint import PrefixLint
from edge_llm.cache.response_cache import ResponseCache
from edge_llm.cache.reuse import PrefixReuse
from edge_llm.cache.state_db import StateDb
from edge_llm.cache.store import SnapshotStore
from edge_llm.config import PrefetchConfig, ServingConfig
from edge_llm.engine.loading import LoadedModel
from edge_llm.engine.prompt import Message
from edge_llm.metrics import Metrics
from edge_llm.serving.answers import Answers
from edge_llm.serving.caches import Caches
from edge_llm.serving.request import Delta, Final, Request
from edge_llm.serving.scheduler import Scheduler
from tests.fakes import FakeRunner, byte_tokenizer, fake_engine, renderer

TOKENIZER = byte_tokenizer()
DEFAULTS = GenerationDefaults(max_tokens=6)
SYSTEM = "You are a car."


class Asked:
    """One query's events."""

    def __init__(self) -> None:
        self.deltas: list[str] = []
        self.terminal: list = []

    def __call__(self, event) -> None:
        assert not self.terminal, "an event after the terminal one"
        if isinstance(event, Delta):
            self.deltas.append(event.text)
        else:
            self.terminal.append(event)

    @property
    def final(self) -> Final:
        (final,) = self.terminal
        assert isinstance(final, Final), final
        return final


class Driver:
    """Steps a scheduler by hand.

    Args:
        folder: where state is kept; None keeps none, and every query is answered cold.
        model: a loaded bundle in place of the fakes.
        caches: made elsewhere, with their ``metrics``.
        fields: of ``PrefetchConfig``.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        slots: int = 3,
        max_bytes: int = 1 << 20,
        stop_after: int | None = None,
        session_idle_s: float = 1e6,
        model: LoadedModel | None = None,
        caches: Caches | None = None,
        metrics: Metrics | None = None,
        **fields,
    ) -> None:
        self.engine = model.engine if model else fake_engine(FakeRunner(slots, 256, stop_after))
        tokenizer = model.tokenizer if model else TOKENIZER
        self.runner = self.engine.runner
        self.metrics = metrics or Metrics()
        self.renderer = model.renderer if model else renderer(TOKENIZER)
        self.caches = caches
        if folder is not None:
            self.caches = self._open(folder, max_bytes, fields)
        self.scheduler = Scheduler(
            self.engine,
            tokenizer,
            self.renderer,
            DEFAULTS,
            ServingConfig(session_idle_s=session_idle_s),
            caches=self.caches,
            domain=model.domain if model else None,
        )
        self.asked: dict[str, Asked] = {}
        self._count = 0

    def _open(self, folder: Path, max_bytes: int, fields) -> Caches:
        tree = PrefixCache(self.runner.cache.token_nbytes, max_bytes, 1000)
        head = self.renderer.shared_prefix(SYSTEM if self.renderer.supports_system else None)
        reuse = PrefixReuse(self.engine, tree, [self.renderer.shared_prefix(), head], self.metrics)
        db = StateDb.open(folder / "state.sqlite3")
        responses = ResponseCache(db, scope="00", max_entries=100, max_bytes=100_000)
        config = PrefetchConfig(
            **{"max_tokens_per_s": 1e9, "warm_s": 1e6, "settle_ms": 1e6, "keep_awake_ms": 0.0, **fields}
        )
        snapshots = SnapshotStore(folder / "prefixes", "0" * 64, self.runner.dims, "float32", 1 << 20)
        return Caches(
            reuse,
            config,
            Answers(responses),
            Popularity(db) if config.popularity else None,
            PrefixLint(db),
            snapshots,
            db=db,
        )

    def submit(self, text: str, user: str = "ann", name: str | None = None, **fields) -> Asked:
        self._count += 1
        asked = Asked()
        messages = fields.pop("messages", None) or (Message("user", text),)
        self.scheduler.submit(Request(user, name or f"q{self._count}", messages, asked, time.monotonic(), **fields))
        return asked

    def ask(self, text: str, user: str = "ann", **fields) -> Asked:
        asked = self.submit(text, user, **fields)
        self.run()
        return asked

    def run(self) -> None:
        """Until every query has been answered."""
        for _ in range(2000):
            if not (self.scheduler.load["queued"] or self.scheduler.load["active"]):
                return
            self.step()
        raise AssertionError("the queries never end")

    def step(self) -> None:
        self.scheduler._step()

    def idle(self, units: int = 500) -> int:
        """So many units of prefetch, or until there is nothing to do; returns how many were done."""
        for done in range(units):
            if not self.scheduler._prefetch_step():
                return done
        return units

    def partial(self, text: str, user: str = "ann", utterance: str = "u", seq: int | None = None, session=None) -> bool:
        self._count += 1
        return self.scheduler.partial(user, utterance, self._count if seq is None else seq, text, session)

    def close(self) -> None:
        """As at the end of the daemon: everything is written, every slot comes back."""
        self.scheduler._prefetch.close()
        assert self.engine.free_slots == self.engine.slots.count, "a slot was lost"
        if self.caches is not None:
            self.caches.close()

    def check(self) -> None:
        """What must hold at any moment."""
        assert self.metrics.counter("prefetch_faults") == 0
        if self.caches is None:
            return
        tree = self.caches.reuse.tree
        tree.check_integrity()
        for slot in self.engine.slots.free_slots:
            content = self.engine.slots.content(slot)
            if content is not None:
                held = self.runner.rows[slot, : len(content.token_ids)].tolist()
                assert held == content.token_ids, f"slot {slot} does not hold what is booked"
