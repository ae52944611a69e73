"""Logging to stderr: one JSON object a line, or plain text for people."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any, Final

import msgspec

# Attributes that every record has; what a call adds with ``extra=`` is the rest.
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    """Args: ``private``: exceptions show where they came from, not their message, which may quote what a user said."""

    def __init__(self, *, private: bool = False) -> None:
        super().__init__()
        self._private = private

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        if not self._private:
            return super().formatException(ei)
        frames = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(ei[2])]
        return "\n".join([*frames, "" if ei[0] is None else ei[0].__name__])


class JsonFormatter(_Formatter):
    """``{"ts", "level", "logger", "message", …extra, "exception"?}`` on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object."""
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, tz=timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _extra(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class TextFormatter(_Formatter):
    """``12:00:00 warning  message  key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback if there is one."""
        clock = datetime.fromtimestamp(record.created, tz=timezone.utc).astimezone().strftime("%H:%M:%S")
        extra = "".join(f"  {key}={value}" for key, value in _extra(record).items())
        line = f"{clock} {record.levelname.lower():<8} {record.getMessage()}{extra}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(level: str, log_format: str, *, private: bool = False) -> None:
    """Send every log record to stderr as ``json`` or ``text``; with ``private``, without the messages of exceptions."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    handler.setFormatter(formatter(private=private))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
