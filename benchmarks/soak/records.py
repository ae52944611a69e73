"""What a soak notes while it runs, one JSON object a line: the report is made of these and of nothing else.

Times are ``time.monotonic()`` seconds, which all processes of one machine share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class RecordError(ValueError):
    """A file of records cannot be read; the message names the line."""


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    pass


class Start(_Record, frozen=True, tag="start"):
    """The load begins. ``counts_writes``: Linux counts what is written to the daemon's folder (not on a tmpfs)."""

    at: float
    minutes: float
    warm_up_minutes: float
    queries_per_second: float
    users: int
    restart_minutes: float
    bundle: str
    broker: str
    counts_writes: bool
    machine: dict[str, Any]


class Sample(_Record, frozen=True, tag="sample"):
    """The daemon's process at one moment.

    Attributes:
        rss_anon_mb, rss_file_mb: resident memory in decimal megabytes.
        descriptors, threads: how many are open, and run.
        written_bytes: to the disk, since the process began.
        others_cpu: share of the busy processor time since the last sample that programs outside of the soak took.
        gauges: the latest that the daemon has published.
    """

    at: float
    rss_anon_mb: float
    rss_file_mb: float
    descriptors: int
    threads: int
    written_bytes: int
    others_cpu: float
    gauges: dict[str, float | None] = {}


class Restart(_Record, frozen=True, tag="restart"):
    """The broker was killed and started again; ``back_at``: the first query that was answered afterwards."""

    killed_at: float
    back_at: float


class Done(_Record, frozen=True, tag="query"):
    """A query with its terminal event. ``outcome`` is ``final_REASON`` or ``error_CODE``.

    ``first_ms`` and ``answer_ms`` run from the first publication at the client to the first text (the terminal event,
    if there was none before it) and to the terminal event; ``sends`` counts the publications.
    """

    id: str
    kind: str
    sent_at: float
    first_ms: float
    answer_ms: float
    outcome: str
    sends: int = 1


class Again(_Record, frozen=True, tag="again"):
    """A terminal event of a query that had one already.

    Attributes:
        same: byte for byte.
        asked_for: the query was published at least as often as terminal events have come, which by the contract gives
            the same event again.
        refused: this event or the first is a refusal that may be retried, as the copy then did.
    """

    id: str
    kind: str
    at: float
    same: bool
    asked_for: bool
    refused: bool


class Lost(_Record, frozen=True, tag="lost"):
    """A query that was still without a terminal event when the load had ended and waited."""

    id: str
    kind: str
    sent_at: float


class Counts(_Record, frozen=True, tag="counts"):
    """What one load process has done so far."""

    process: int
    counts: dict[str, int]


class End(_Record, frozen=True, tag="end"):
    """The load has ended; ``counters`` are the daemon's own, ``log_bytes`` what it has logged (to the same disk)."""

    at: float
    counters: dict[str, int]
    log_bytes: int


Record = Start | Sample | Restart | Done | Again | Lost | Counts | End
DECODER: Final[msgspec.json.Decoder[Record]] = msgspec.json.Decoder(Record)


def to_line(record: Record) -> bytes:
    """One line of JSON."""
    return msgspec.json.encode(record) + b"\n"


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file. A last line that was cut off is left out.

    Raises:
        RecordError: a line is no record.
        OSError: the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    # What follows the last line break was being written when the run was killed, or is empty.
    for number, line in enumerate(lines[:-1], 1):
        try:
            yield DECODER.decode(line)
        except msgspec.MsgspecError as error:
            raise RecordError(f"{path}:{number}: {error}") from None
