"""Every error that edge_llm raises on purpose.

    EdgeLlmError
    ├── ConfigError               a setting is unknown, of the wrong type or out of range
    ├── BundleError               a bundle cannot be used
    │   ├── BundleNotFoundError
    │   ├── ManifestError         manifest.json is missing, malformed or of another format version
    │   ├── BundleIntegrityError  a file's size or hash is not the manifest's, or it asks for files of others
    │   ├── BundleSignatureError  it is not signed, or not by a trusted key
    │   ├── BundleHealthError     it does not answer its health prompt, or not in time
    │   ├── BundleDowngradeError  it is older than what has been served, and bundle_downgrade is "refuse"
    │   └── UnsupportedBundleError  this runtime or machine lacks what the bundle needs
    │       └── ProviderError     an execution provider cannot run a graph here
    ├── MemoryPlanError           the machine has less memory than the settings need
    ├── PrefixFileError           a file of keys and values is damaged, or of another model (bundle/prefix_file.py)
    ├── EngineError
    │   ├── ContextOverflowError  more tokens than the context holds
    │   ├── NoFreeSlotError       every KV-cache slot is taken
    │   └── CacheIntegrityError   the prefix cache contradicts itself; it is thrown away
    ├── AskError                  a question could not be asked, or was not answered (mqtt/asking.py)
    ├── ExportError               a checkpoint cannot become a bundle (export/errors.py)
    └── RequestError              one client's request is answered with a wire error (docs/contract.md)

Outside input never raises anything else; ``assert`` states only what the code itself guarantees.
"""

from __future__ import annotations

from typing import Final


class EdgeLlmError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(EdgeLlmError, ValueError):
    """A setting is unknown, of the wrong type or out of range. The message names the setting and its source."""


class BundleError(EdgeLlmError):
    """A bundle cannot be used."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """The bundle folder, or a file that its manifest names, is not there."""


class ManifestError(BundleError, ValueError):
    """manifest.json is missing, malformed or of another format version."""


class BundleIntegrityError(BundleError):
    """A file's size or SHA-256 is not the one in the manifest, or it is no plain file, or it asks for other files."""


class BundleSignatureError(BundleError):
    """The bundle is not signed, or the signature is of none of the trusted keys."""


class BundleHealthError(BundleError):
    """The bundle does not answer its health prompt: loading it ends the process, or takes too long."""


class BundleDowngradeError(BundleError):
    """The bundle is older than one of its name that has been served here, and the settings refuse to go back."""


class UnsupportedBundleError(BundleError):
    """This runtime or this machine lacks something that the bundle needs."""


class ProviderError(UnsupportedBundleError):
    """An execution provider cannot run a graph here; another one may."""


class MemoryPlanError(EdgeLlmError):
    """The machine has less memory left than bundle and settings need."""


class PrefixFileError(EdgeLlmError):
    """A file of cached keys and values is damaged, or belongs to another model or other settings."""


class EngineError(EdgeLlmError):
    """The engine cannot do what was asked."""


class ContextOverflowError(EngineError, ValueError):
    """More tokens than the context holds."""


class NoFreeSlotError(EngineError):
    """Every KV-cache slot is taken."""


class CacheIntegrityError(EngineError):
    """The prefix cache contradicts itself: a fault of ours. Its content must not be used."""


WIRE_ERROR_NAMES: Final[dict[int, str]] = {
    400: "bad_request",
    403: "forbidden_reply_topic",
    404: "unknown_query",
    408: "deadline_exceeded",
    409: "duplicate_id",
    413: "too_long",
    415: "unsupported_content_type",
    429: "busy",
    500: "internal",
    503: "not_ready",
}
_RETRIABLE_CODES: Final = frozenset({429, 500, 503})


class RequestError(EdgeLlmError):
    """One request is refused or failed; it becomes an ``error`` event on the wire.

    Args:
        code: one of ``WIRE_ERROR_NAMES``.
        message: what is wrong and what to change.
        retry_after_ms: when a retry is likely to succeed, if that is known.
    """

    def __init__(self, code: int, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.name = WIRE_ERROR_NAMES[code]
        self.message = message
        self.retriable = code in _RETRIABLE_CODES
        self.retry_after_ms = retry_after_ms
