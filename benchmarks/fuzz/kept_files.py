"""Subjects: what the daemon itself keeps on disk, after a fault of the disk or in somebody else's hands."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from benchmarks.fuzz.bundle_files import SMALL_BUNDLE
from benchmarks.fuzz.mutation import NUMBERS, TEXTS, damaged, restated_json, restated_toml
from benchmarks.fuzz.subject import require
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.prefix_file import PrefixKV, encode_prefix, read_prefix_file
from edge_llm.bundle.prepare import DATA_FILE, MODEL_FILE, SEAL_FILE, _intact
from edge_llm.cache.erasure import ERASURE_FILE, ErasureNotices, announce_erasure
from edge_llm.cache.feedback_log import FeedbackEntry, FeedbackLog, feedback_count, stored_feedback
from edge_llm.cache.popularity import Popularity, popular_counts
from edge_llm.cache.prefix_lint import stored_findings
from edge_llm.cache.response_cache import CachedResponse, ResponseCache, response_stats
from edge_llm.cache.state_db import StateDb, state_path
from edge_llm.config import load_config
from edge_llm.device.profile import TUNED_FILE, tuned_layer, write_tuned
from edge_llm.feedback_command import format_feedback

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

_KEY: Final = "k" * 64
_CHECKSUM_BYTES: Final = 32
_RESPONSE_KEY: Final = bytes(32)
_ANSWER: Final = CachedResponse("At the coast.", "stop", 5, 3)
_TABLES: Final = ("generation", "responses", "popular", "findings", "feedback")
_FLUSH_TIMEOUT_S: Final = 10.0


class Prefixes:
    """A ``.kv`` file: in half of the cases the checksum is made right again."""

    def __init__(self, folder: Path) -> None:
        self._dims = Bundle.open(SMALL_BUNDLE).manifest.model
        shape = (6, self._dims.num_layers, 2, self._dims.num_kv_heads, self._dims.head_dim)
        self._prefix = PrefixKV(tuple(range(6)), np.random.default_rng(0).random(shape, np.float32))
        self._raw = b"".join(bytes(piece) for piece in encode_prefix(self._prefix, _KEY))
        self._path = folder / "prefix.kv"

    def make(self, rng: Random) -> bytes:
        """A file."""
        head_bytes = len(self._raw) - _CHECKSUM_BYTES - self._prefix.kv.nbytes
        body = self._raw[:-_CHECKSUM_BYTES]
        if rng.random() < 0.5:
            return damaged(self._raw, rng)
        # Most of the file is numbers, of which any will do: what comes before them decides.
        body = damaged(body[:head_bytes], rng) + body[head_bytes:] if rng.random() < 0.8 else damaged(body, rng)
        return body + hashlib.sha256(body).digest()

    def take(self, case: bytes) -> str:
        """Read it."""
        self._path.write_bytes(case)
        prefix = read_prefix_file(self._path, _KEY, self._dims, "float32")
        require(prefix.kv.shape[1:] == self._prefix.kv.shape[1:], "its shape is not the model's")
        require(len(prefix.token_ids) == len(prefix.kv) <= self._dims.max_seq_len, "its length is not the model's")
        require(max(prefix.token_ids) < self._dims.vocab_size, "a token is not in the vocabulary")
        return "read"


class States:
    """``state.sqlite3``, read by SQLite: damaged pages, and good pages with other values. It is never refused."""

    def __init__(self, folder: Path) -> None:
        self._path = state_path(folder)
        self._scratch = folder / "scratch.sqlite3"
        with contextlib.closing(StateDb.open(self._path)) as db:
            self._use(db)
        self._raw = self._path.read_bytes()

    def make(self, rng: Random) -> bytes:
        """A database."""
        if rng.random() < 0.5:
            return damaged(self._raw, rng)
        self._scratch.write_bytes(self._raw)
        with contextlib.closing(sqlite3.connect(self._scratch)) as connection:
            for _ in range(rng.choice((1, 1, 2, 4))):
                table = rng.choice(_TABLES)
                column = rng.choice([row[1] for row in connection.execute(f"PRAGMA table_info({table})")])
                value = rng.choice((*TEXTS, *NUMBERS, None, rng.randbytes(rng.randrange(60))))
                with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
                    connection.execute(f"UPDATE {table} SET {column} = ?", (value,))
            connection.commit()
        return self._scratch.read_bytes()

    def take(self, case: bytes) -> str:
        """Open it, and use all that is kept in it."""
        for path in self._path.parent.glob(f"{self._path.name}*"):
            path.unlink()
        self._path.write_bytes(case)
        with contextlib.closing(StateDb.open(self._path)) as db:
            require(not db.in_memory, "the file is not used any more")
            found = self._use(db)
        return "used, with what was in it" if found else "used, made anew or in part"

    @staticmethod
    def _use(db: StateDb) -> bool:
        responses = ResponseCache(db, scope="s", max_entries=16, max_bytes=1 << 16)
        answer = responses.find("ann", _RESPONSE_KEY)
        require(answer in (None, _ANSWER), "another answer than was given")
        popularity, log = Popularity(db), FeedbackLog(db, 16)
        popularity.predict("ann", "how far")
        entries = stored_feedback(db)
        format_feedback(entries)
        stored_findings(db)
        response_stats(db), popular_counts(db), feedback_count(db), popularity.users(), popularity.top("ann", 5)
        responses.put("ann", _RESPONSE_KEY, _ANSWER)
        for text in ("How far is it?", "How far is Rome?"):
            popularity.record("ann", text)
        log.record(FeedbackEntry("ann", "rated", "a", "chat", "[]", "b", -1, "c"))
        require(db.flush(_FLUSH_TIMEOUT_S) and db.failed == 0, "it does not write")
        return answer is not None and bool(entries)


class Copies:
    """Small files beside the prepared copy and the state: the copy's seal, ``tuned.toml``, ``erasures``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in (MODEL_FILE, DATA_FILE):
            (folder / name).write_bytes(name.encode())
        hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in (MODEL_FILE, DATA_FILE)}
        write_tuned(folder, "x86-64", {"threads": 2, "slots": 4, "prefill_chunk": 64}, "measured")
        announce_erasure(folder, "ann")
        announce_erasure(folder, None)
        seal = {"name": "tiny", "target": "cpu-int8", "sha256": hashes}
        self._files = {
            SEAL_FILE: msgspec.json.encode(seal),
            TUNED_FILE: (folder / TUNED_FILE).read_bytes(),
            ERASURE_FILE: (folder / ERASURE_FILE).read_bytes(),
        }
        self._hashes = hashes

    def make(self, rng: Random) -> bytes:
        """One of the files, with its name before it."""
        name = rng.choice(list(self._files))
        change = {SEAL_FILE: restated_json, TUNED_FILE: restated_toml, ERASURE_FILE: damaged}[name]
        return msgspec.msgpack.encode((name, change(self._files[name], rng)))

    def take(self, case: bytes) -> str:
        """Read it."""
        name, content = msgspec.msgpack.decode(case, type=tuple[str, bytes])
        path = self._folder / name
        if name == ERASURE_FILE:
            path.unlink(missing_ok=True)
            notices = ErasureNotices(self._folder)
            path.write_bytes(content)
            erasures = notices.poll()
            require(len(erasures) == len(content.splitlines()), "an erasure was passed over")
            return f"{name}: read"
        path.write_bytes(content)
        if name == TUNED_FILE:
            load_config(device_layer=tuned_layer(self._folder, "x86-64"))
            return f"{name}: taken"
        return f"{name}: {'taken' if _intact(self._folder) else 'not taken, built anew'}"
