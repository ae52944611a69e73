"""Settings: defaults < device file < config file < ``EDGE_LLM_*`` environment < flags.

Every layer is a nested mapping with the shape of ``Config``; a key that ``Config`` does not have is refused by name.
``EDGE_LLM_MQTT__HOST=broker`` sets ``mqtt.host``: two underscores stand for the dot.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from edge_llm.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_PREFIX: Final = "EDGE_LLM_"
# Names of systemd credentials; see credentials(7).
PASSWORD_CREDENTIAL: Final = "mqtt-password"
KEY_CREDENTIAL: Final = "mqtt-key"
NAME_PATTERN: Final = "^[A-Za-z0-9_-]{1,64}$"

Count = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
# At most a year: no clock takes infinity.
Seconds = Annotated[float, Meta(gt=0, le=366 * 86_400)]
Name = Annotated[str, Meta(pattern=NAME_PATTERN)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen, and an unknown key is an error."""


# The graphs that each provider runs, the best first (export/graph/).
_TARGETS: Final[dict[str, tuple[str, ...]]] = {
    "CPUExecutionProvider": ("cpu-int8", "cpu-fp32"),
    "CUDAExecutionProvider": ("cuda",),
    "TensorrtExecutionProvider": ("tensorrt-int8", "tensorrt", "tensorrt-primitive"),
}


class TlsConfig(_Strict, frozen=True):
    """TLS towards the broker. The host name is always checked."""

    enabled: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class MqttConfig(_Strict, frozen=True):
    """Where the broker is and how to talk to it.

    ``node`` names this device in every topic. ``protocol`` auto tries MQTT 5 and falls back to 3.1.1. A ``pool`` makes
    the device take queries from a shared subscription too. The broker keeps the session ``session_expiry_s`` seconds
    after a crash, so that unanswered queries come again.
    """

    host: str = "127.0.0.1"
    port: Port = 1883
    node: Name = "edge"
    pool: Name | None = None
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    client_id: str | None = None
    username: str | None = None
    password_file: str | None = None
    tls: TlsConfig = msgspec.field(default_factory=TlsConfig)
    keepalive_s: Annotated[int, Meta(ge=2, le=65535)] = 15
    reconnect_min_s: Seconds = 0.25
    reconnect_max_s: Seconds = 4.0
    session_expiry_s: Annotated[int, Meta(ge=0)] = 86_400
    max_outgoing: Count = 1000


class EngineConfig(_Strict, frozen=True):
    """How the model runs.

    ``providers`` are tried in order, each with those of its ``targets`` that the bundle has; the first that answers
    right serves. ``target`` names the one graph that is tried instead. ``provider_options`` go to ONNX Runtime as they
    are. ``threads`` 0 is one per physical core in ``affinity``, which is all of them if it is empty. ``context``
    bounds prompt and answer below what the bundle allows, and with them the memory of a slot. ``prepare`` False serves
    the bundle's own graph.
    """

    providers: Annotated[tuple[str, ...], Meta(min_length=1)] = ("CPUExecutionProvider",)
    targets: dict[str, tuple[str, ...]] = msgspec.field(default_factory=lambda: dict(_TARGETS))
    target: str | None = None
    provider_options: dict[str, dict[str, bool | int | str]] = {}
    threads: Annotated[int, Meta(ge=0, le=256)] = 0
    affinity: tuple[Annotated[int, Meta(ge=0, le=4095)], ...] = ()
    slots: Annotated[int, Meta(ge=1, le=64)] = 4
    context: Annotated[int, Meta(ge=64)] | None = None
    prefill_chunk: Annotated[int, Meta(ge=4, le=4096)] = 64
    prepare: bool = True


class ServingConfig(_Strict, frozen=True):
    """Bounds on what is accepted and kept. ``system_prompt`` replaces the bundle's own."""

    max_queued: Annotated[int, Meta(ge=1, le=65535)] = 64
    max_queued_per_user: Count = 16
    max_payload_bytes: Annotated[int, Meta(ge=256)] = 16_384
    max_tokens: Annotated[int, Meta(ge=1)] = 1024
    dedupe_window_s: Seconds = 600.0
    delta_interval_ms: Annotated[float, Meta(ge=0)] = 40.0
    metrics_interval_s: Seconds = 30.0
    drain_timeout_s: Seconds = 10.0
    session_idle_s: Seconds = 900.0
    max_sessions: Count = 256
    system_prompt: Annotated[str, Meta(min_length=1, max_length=16_384)] | None = None


class CacheConfig(_Strict, frozen=True):
    """What is kept of earlier work. Each part can be switched off.

    ``prefix`` keeps the KV of prompts in memory, at most ``max_bytes`` in at most ``max_entries`` pieces, beside the
    slots. ``snapshots`` keeps the KV of the system prompt and of ``pinned_system_prompts`` on disk, so that they are
    warm after a restart. ``responses`` keeps whole answers of deterministic queries on disk.
    """

    prefix: bool = True
    max_bytes: Annotated[int, Meta(ge=1 << 20)] = 128 << 20
    max_entries: Count = 4096
    snapshots: bool = True
    pinned_system_prompts: tuple[Annotated[str, Meta(min_length=1, max_length=16_384)], ...] = ()
    responses: bool = True
    max_responses: Count = 4096
    max_response_bytes: Annotated[int, Meta(ge=4096)] = 8 << 20


class FeedbackConfig(_Strict, frozen=True):
    """Whether refused, failed and rated answers are kept for the people who write the pack, the oldest go first."""

    enabled: bool = False
    max_entries: Annotated[int, Meta(ge=1, le=100_000)] = 2000


class PrefetchConfig(_Strict, frozen=True):
    """Work that is done before a query has come, only while nothing else runs.

    ``partials`` prefills what has been said so far. ``speculation`` answers ahead: at most ``max_speculative_tokens``
    tokens a time and ``max_tries`` times an utterance, for a guess with at least ``min_confidence``. ``popularity``
    remembers what each user asks often. The last word of a partial is prefilled only when nothing new has come for
    ``settle_ms``. A warm slot is given up ``warm_s`` seconds after its last partial.

    While somebody speaks, a step is run every ``keep_awake_ms`` (0: never), so that the processor neither sleeps nor
    loses the weights from its caches just before the query.

    ``max_tokens_per_s`` bounds what prefetch computes, on average; a real query waits at most ``max_pause_ms`` for it.
    On battery it stops if ``on_battery`` is false, and in heat ([power]).
    """

    partials: bool = True
    speculation: bool = True
    popularity: bool = True
    max_speculative_tokens: Count = 48
    max_tries: Count = 3
    min_confidence: Annotated[float, Meta(gt=0, le=1)] = 0.6
    settle_ms: Annotated[float, Meta(ge=0)] = 150.0
    keep_awake_ms: Annotated[float, Meta(ge=0)] = 100.0
    warm_s: Seconds = 15.0
    max_tokens_per_s: Annotated[float, Meta(gt=0)] = 100.0
    max_pause_ms: Annotated[float, Meta(ge=5)] = 25.0
    on_battery: bool = True


class PowerConfig(_Strict, frozen=True):
    """What gives way when the machine is hot. Queries are always answered.

    At ``warm_c`` degrees Celsius, or while the system throttles the processor, nothing is prefetched. At ``hot_c`` one
    query is answered at a time, and one that names no ``max_tokens`` gets at most ``hot_max_tokens``. A level ends
    ``hysteresis_c`` below where it began. Sensors are read every ``interval_s`` seconds. ``nvpmodel`` is the power mode
    that a Jetson should be in; ``edge-llm doctor`` compares.
    """

    warm_c: float | None = 75.0
    hot_c: float | None = 85.0
    hysteresis_c: Annotated[float, Meta(ge=0)] = 5.0
    hot_max_tokens: Count = 64
    interval_s: Seconds = 5.0
    nvpmodel: str | None = None


class Config(_Strict, frozen=True):
    """Everything that can be set. ``device`` auto detects the board.

    ``cache_dir`` holds what can be made again (prepared copies, prefixes), ``state_dir`` the users' words and answers.
    ``bundle_keys`` are PEM files of Ed25519 public keys: if there are any, a bundle is used only if one of them has
    signed it. ``privacy`` strict keeps nothing that users say on disk or in the log.

    Without ``bundle`` the current one of ``bundle_store`` is served (default: ``bundles`` under the state folder); a
    bundle that is activated there has to answer its health prompt within ``activation_timeout_s``. With
    ``bundle_downgrade`` refuse, none is activated that is older than one of its name that has been served, but the
    one before.
    """

    bundle: str | None = None
    bundle_keys: tuple[str, ...] = ()
    bundle_store: str | None = None
    bundle_downgrade: Literal["allow", "refuse"] = "allow"
    activation_timeout_s: Seconds = 600.0
    privacy: Literal["normal", "strict"] = "normal"
    cache_dir: str | None = None
    state_dir: str | None = None
    device: str = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "text"] = "json"
    mqtt: MqttConfig = msgspec.field(default_factory=MqttConfig)
    engine: EngineConfig = msgspec.field(default_factory=EngineConfig)
    serving: ServingConfig = msgspec.field(default_factory=ServingConfig)
    cache: CacheConfig = msgspec.field(default_factory=CacheConfig)
    prefetch: PrefetchConfig = msgspec.field(default_factory=PrefetchConfig)
    power: PowerConfig = msgspec.field(default_factory=PowerConfig)
    feedback: FeedbackConfig = msgspec.field(default_factory=FeedbackConfig)


def load_config(
    *,
    device_layer: Mapping[str, Any] | None = None,
    config_file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Merge the layers, lowest first, and check each as it is added so that an error names its source.

    Args:
        device_layer: a parsed device file (device/profile.py).
        config_file: a TOML file, if the user named one.
        environ: the environment; only ``EDGE_LLM_*`` is read, and where systemd has put credentials.
        flags: settings from the command line, nested like ``Config``.

    Raises:
        ConfigError: a key is unknown or a value is wrong; the message names both and the source.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [("device file", device_layer or {})]
    layers.append(("credentials", _credentials_layer(environ or {})))
    if config_file is not None:
        layers.append((str(config_file), read_toml(Path(config_file))))
    layers.append(("environment", _environ_layer(environ or {})))
    layers.append(("command line", flags or {}))
    merged: dict[str, Any] = {}
    config = Config()
    for source, layer in layers:
        merged = merge(merged, layer)
        # Only strings come from the environment, so numbers may be spelled out there and nowhere else.
        config = _convert(merged, source, strict=source != "environment")
        merged = msgspec.to_builtins(config)
    if config.privacy == "strict" and config.feedback.enabled:
        raise ConfigError('feedback.enabled keeps what users say on disk, which privacy = "strict" forbids')
    return config


def refuse_if_open_to_all(what: str, path: str | Path) -> None:
    """See that a secret is for its owner, or a group. A file that is not there is left to whoever opens it.

    Raises:
        ConfigError: every user of the machine may open it.
    """
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & stat.S_IRWXO:
            raise ConfigError(f"{what} {path} is open to every user here (mode {mode:04o}): chmod 600 {path}")


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises ``ConfigError`` if it is missing or malformed."""
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, not UTF-8, a number too long, nested too deeply
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return table


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, table by table."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def cache_dir(config: Config) -> Path:
    """Where device-local copies live: the setting, systemd's CacheDirectory, or the user's cache folder."""
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    if systemd_dir := os.environ.get("CACHE_DIRECTORY"):
        return Path(systemd_dir.split(":")[0])
    return user_cache_dir()


def state_dir(config: Config) -> Path:
    """Where the user's words are kept: the setting, systemd's StateDirectory, or the folder of ``cache_dir``."""
    if config.state_dir is not None:
        return Path(config.state_dir)
    if systemd_dir := os.environ.get("STATE_DIRECTORY"):
        return Path(systemd_dir.split(":")[0])
    return cache_dir(config)


def bundle_store_dir(config: Config) -> Path:
    """Where installed bundles lie side by side: the setting, or a folder under the state folder."""
    return state_dir(config) / "bundles" if config.bundle_store is None else Path(config.bundle_store)


def user_cache_dir() -> Path:
    """The user's cache folder for this program (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "edge-llm"


def _credentials_layer(environ: Mapping[str, str]) -> dict[str, Any]:
    """The secrets that systemd hands over (LoadCredential= of the unit)."""
    mqtt: dict[str, Any] = {}
    if (folder := environ.get("CREDENTIALS_DIRECTORY")) is not None:
        if (password := _credential(Path(folder, PASSWORD_CREDENTIAL))) is not None:
            mqtt["password_file"] = password
        if (key := _credential(Path(folder, KEY_CREDENTIAL))) is not None:
            mqtt["tls"] = {"key_file": key}
    return {"mqtt": mqtt} if mqtt else {}


def _credential(path: Path) -> str | None:
    """Its path; None if it is missing or blank, which is how the unit says that there is none."""
    try:
        return str(path) if path.read_bytes().strip() else None
    except OSError:
        return None


def _environ_layer(environ: Mapping[str, str]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        *tables, key = variable[len(ENV_PREFIX) :].lower().split("__")
        table = layer
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"environment variable {variable}: {name} is a setting, not a table")
        # A list is written with commas, as in EDGE_LLM_ENGINE__PROVIDERS=A,B.
        table[key] = value.split(",") if key in ("providers", "bundle_keys") else value
    return layer


def _convert(merged: Mapping[str, Any], source: str, *, strict: bool) -> Config:
    try:
        return msgspec.convert(merged, Config, strict=strict)
    except msgspec.ValidationError as error:
        message = re.sub(r" - at `\$\.?(.*?)`$", r" (at \1)", str(error)).replace(" (at )", "")
        raise ConfigError(f"{source}: {message}") from None
