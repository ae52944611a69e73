"""Everything that remembers, put together: built once at start, closed at the end."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec
import onnxruntime as ort

from edge_llm.bundle.prefix_file import read_prefix_file, shipped_prefix_key, snapshot_key
from edge_llm.cache.feedback_log import FeedbackLog, clear_feedback
from edge_llm.cache.popularity import Popularity, clear_popular
from edge_llm.cache.prefix_cache import PrefixCache
from edge_llm.cache.prefix_lint import PrefixLint, clear_findings
from edge_llm.cache.response_cache import ResponseCache, clear_responses
from edge_llm.cache.reuse import PrefixReuse
from edge_llm.cache.state_db import StateDb, state_path
from edge_llm.cache.state_file import remove_state
from edge_llm.cache.store import SNAPSHOT_FOLDER, SnapshotStore
from edge_llm.config import PowerConfig, PrefetchConfig, cache_dir, state_dir
from edge_llm.device.cpu import cpu_features
from edge_llm.device.energy import AnswerEnergy, find_meter
from edge_llm.device.power import PowerMonitor
from edge_llm.device.sensors import SensorThread
from edge_llm.engine.engine import MIN_CHUNK
from edge_llm.errors import ConfigError, EdgeLlmError
from edge_llm.metrics import Metrics
from edge_llm.serving.answers import Answers

if TYPE_CHECKING:
    from edge_llm.bundle.prefix_file import PrefixKV
    from edge_llm.cache.prefix_cache import Origin
    from edge_llm.config import Config
    from edge_llm.engine.engine import Engine
    from edge_llm.engine.loading import LoadedModel

_log = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S: Final = 5.0
# A start waits so long for the meter to be found; then energy is not counted.
_METER_TIMEOUT_S: Final = 2.0


@dataclass
class Caches:
    """What the scheduler and prefetch remember with. Every part but ``reuse`` may be absent."""

    reuse: PrefixReuse
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    answers: Answers | None = None
    popularity: Popularity | None = None
    lint: PrefixLint | None = None
    snapshots: SnapshotStore | None = None
    power: PowerMonitor = field(default_factory=lambda: PowerMonitor(PowerConfig(warm_c=None, hot_c=None)))
    energy: AnswerEnergy | None = None
    sensors: SensorThread | None = None
    db: StateDb | None = None
    feedback: FeedbackLog | None = None

    def forget_users(self) -> None:
        """Drop the users' words in memory; a file is emptied by who asks for it. Not for the engine's thread.

        Of all users: what a file still holds is read again, and the rest only costs time.
        """
        if self.db is not None and self.db.in_memory:
            for clear in (clear_responses, clear_popular, clear_findings, clear_feedback):
                clear(self.db)
        if self.popularity is not None:
            self.popularity.forget_mirrors()
        if self.lint is not None:
            self.lint.forget_heads()

    def close(self) -> None:
        """Write what is still waiting to be written, and read no more sensors."""
        if self.sensors is not None:
            self.sensors.close()
        if self.snapshots is not None:
            self.snapshots.close(_FLUSH_TIMEOUT_S)
        if self.db is not None:
            self.db.close()


def no_caches(engine: Engine) -> Caches:
    """Nothing is remembered; every prompt starts cold."""
    return Caches(PrefixReuse(engine, None, [], Metrics(), enabled=False))


def open_caches(model: LoadedModel, config: Config, metrics: Metrics) -> Caches:
    """Open what the configuration allows, and load the prefixes that are on disk or came with the bundle.

    Nothing on the disk can keep the daemon from starting: what is damaged or foreign is a miss.
    """
    settings = config.cache
    folder = cache_dir(config)
    engine = model.engine
    tree = PrefixCache(engine.runner.cache.token_nbytes, settings.max_bytes, settings.max_entries)
    heads = _shared_prefixes(model, config) if settings.prefix else []
    # First, for it may refuse the settings.
    db = _open_state(config)
    sensors = SensorThread()
    caches = Caches(
        PrefixReuse(engine, tree if settings.prefix else None, heads, metrics, enabled=settings.prefix),
        config.prefetch,
        power=PowerMonitor(config.power, config.prefetch.on_battery, post=sensors.post),
        sensors=sensors,
    )
    meter = sensors.ask(find_meter, _METER_TIMEOUT_S)
    if meter is not None:
        caches.energy = AnswerEnergy(meter, metrics, sensors.post)
    caches.db = db
    if config.feedback.enabled:
        caches.feedback = FeedbackLog(caches.db, config.feedback.max_entries)
    scope = _scope(model)
    if settings.responses:
        responses = ResponseCache(
            caches.db,
            # A query that names no max_tokens gets the bundle's, at most this.
            scope=snapshot_key(scope, str(config.serving.max_tokens)),
            max_entries=settings.max_responses,
            max_bytes=settings.max_response_bytes,
        )
        caches.answers = Answers(responses)
        metrics.gauge("responses_kept", lambda: responses.entries)
    if config.prefetch.popularity:
        caches.popularity = Popularity(caches.db)
    if settings.prefix:
        caches.lint = PrefixLint(caches.db, excerpts=config.privacy == "normal")
        metrics.gauge("prefix_cache_bytes", lambda: tree.nbytes)
        metrics.gauge("prefix_cache_entries", lambda: tree.entries)
        metrics.gauge("prefix_cache_evicted", lambda: tree.evicted)
        _load_shipped(model, caches)
        if settings.snapshots:
            manifest = model.bundle.manifest
            kv_dtype = manifest.graph(model.provider.target).kv_dtype
            key = snapshot_key(scope, kv_dtype, ort.__version__, cpu_features())
            caches.snapshots = SnapshotStore(
                folder / SNAPSHOT_FOLDER, key, manifest.model, kv_dtype, settings.max_bytes
            )
            for prefix in caches.snapshots.load_all():
                _pin(caches, prefix, "snapshot")
    return caches


def _open_state(config: Config) -> StateDb:
    """What holds the users' words: a file, or with strict privacy memory alone.

    Raises:
        ConfigError: a file of earlier times cannot be removed.
    """
    folder = state_dir(config)
    path = state_path(folder)
    if config.privacy == "normal":
        return StateDb.open(path)
    try:
        if remove_state(path):
            _log.warning("privacy is strict: what was kept of earlier queries is deleted", extra={"path": str(path)})
    except OSError as error:
        raise ConfigError(f'privacy = "strict", but {path} cannot be deleted: {error.strerror}') from None
    with contextlib.suppress(OSError):  # only `edge-llm forget` needs it, and no words are written there
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return StateDb.volatile()


def _scope(model: LoadedModel) -> str:
    """Names everything that a prompt's KV depends on, beside its tokens and what computes it."""
    template = model.renderer.template
    template_json = msgspec.json.encode(template).decode()
    return snapshot_key(model.bundle.digest, model.provider.target, template_json, str(model.engine.max_seq_len))


def _shared_prefixes(model: LoadedModel, config: Config) -> list[list[int]]:
    heads = [model.renderer.shared_prefix()]
    if model.renderer.supports_system:
        heads += [model.renderer.shared_prefix(system) for system in config.cache.pinned_system_prompts]
    elif config.cache.pinned_system_prompts:
        _log.warning("this model's template has no system message: cache.pinned_system_prompts is not used")
    # What is left out cannot be prefilled ahead: hardly any tokens, or no room for a question behind them.
    return [head for head in heads if MIN_CHUNK <= len(head) < model.engine.max_seq_len]


def _load_shipped(model: LoadedModel, caches: Caches) -> None:
    """The prefix that the bundle brings, if it is the one that is used here."""
    manifest = model.bundle.manifest
    graph = manifest.graph(model.provider.target)
    if graph.prefix_file is None:
        return
    try:
        path = model.bundle.verified_path(graph.prefix_file)
        key = shipped_prefix_key(manifest, graph.target)
        prefix = read_prefix_file(path, key, manifest.model, graph.kv_dtype)
    except (EdgeLlmError, OSError) as error:
        _log.warning("the bundle's prefix is not used: %s", error)
        return
    _pin(caches, prefix, "bundle")


def _pin(caches: Caches, prefix: PrefixKV, origin: Origin) -> None:
    """Put a prefix into the cache if it is still everybody's: the system prompt may have been changed."""
    tokens = list(prefix.token_ids)
    tree = caches.reuse.tree
    if tree is None or tokens not in caches.reuse.shared_prefixes:
        return
    tree.insert_prefix(None, tokens, len(tokens), lambda start, stop: prefix.kv[start:stop].copy(), origin=origin)
    caches.reuse.pin(tokens)
