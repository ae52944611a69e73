"""The file of a prefix's keys and values: either exactly what was written, or an error."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_llm.bundle import prefix_file
from edge_llm.bundle.manifest import Bundle, ModelDims
from edge_llm.bundle.prefix_file import (
    MAX_HEADER_BYTES,
    PrefixKV,
    encode_prefix,
    read_prefix_file,
    remove_leftovers,
    shipped_prefix_key,
    snapshot_key,
    write_prefix_file,
)
from edge_llm.errors import ManifestError, PrefixFileError
from tests.paths import TINY_BUNDLE

KEY = snapshot_key("test")
DIMS = ModelDims(
    architecture="llama",
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    hidden_size=4,
    vocab_size=300,
    max_seq_len=4,
)


def make_prefix(token_ids=(7, 299), dtype="float32", dims=DIMS) -> PrefixKV:
    shape = (len(token_ids), dims.num_layers, 2, dims.num_kv_heads, dims.head_dim)
    return PrefixKV(tuple(token_ids), np.random.default_rng(1).standard_normal(shape).astype(dtype))


def encoded(prefix: PrefixKV, key: str = KEY) -> bytes:
    return b"".join(encode_prefix(prefix, key))


def assert_equal(left: PrefixKV, right: PrefixKV) -> None:
    assert left.token_ids == right.token_ids
    assert left.kv.dtype == right.kv.dtype
    assert left.kv.shape == right.kv.shape
    assert left.kv.tobytes() == right.kv.tobytes()  # bits: a NaN is one, too


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prefix.kv"


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_bit_for_bit(path, data):
    dtype = data.draw(st.sampled_from(["float32", "float16"]))
    layers, heads, head_dim, tokens = (data.draw(st.integers(1, 3)) for _ in range(4))
    dims = msgspec.structs.replace(DIMS, num_layers=layers, num_kv_heads=heads, head_dim=head_dim)
    token_ids = data.draw(st.lists(st.integers(0, DIMS.vocab_size - 1), min_size=tokens, max_size=tokens))
    shape = (tokens, layers, 2, heads, head_dim)
    width = 32 if dtype == "float32" else 16
    prefix = PrefixKV(tuple(token_ids), data.draw(hnp.arrays(dtype, shape, elements=st.floats(width=width))))
    write_prefix_file(path, prefix, KEY)
    assert_equal(read_prefix_file(path, KEY, dims, dtype), prefix)


def test_an_array_in_another_order_of_memory_is_written_as_it_reads(path):
    tokens_last = np.arange(2 * 2 * 2, dtype=np.float32).reshape(1, 2, 1, 2, 2)
    prefix = PrefixKV((1, 2), tokens_last.transpose(3, 0, 1, 2, 4))
    write_prefix_file(path, prefix, KEY)
    assert_equal(read_prefix_file(path, KEY, DIMS, "float32"), prefix)


def test_the_array_is_not_copied_on_the_way_out():
    prefix = make_prefix()
    pieces = [piece for piece in encode_prefix(prefix, KEY) if isinstance(piece, memoryview)]
    assert np.shares_memory(np.frombuffer(pieces[0], np.uint8), prefix.kv)


def test_what_was_read_cannot_be_changed(path):
    write_prefix_file(path, make_prefix(), KEY)
    with pytest.raises(ValueError, match="read-only"):
        read_prefix_file(path, KEY, DIMS, "float32").kv[0] = 0


def test_every_single_flipped_bit_is_found(path):
    raw = bytearray(encoded(make_prefix()))
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(PrefixFileError):
            read_prefix_file(path, KEY, DIMS, "float32")
        raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    assert_equal(read_prefix_file(path, KEY, DIMS, "float32"), make_prefix())


def test_every_truncation_is_found(path):
    raw = encoded(make_prefix())
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(PrefixFileError):
            read_prefix_file(path, KEY, DIMS, "float32")


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_gets_past_the_error(path, data):
    original = encoded(make_prefix())
    raw = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path.write_bytes(raw)
    if bytes(raw) == original:
        assert_equal(read_prefix_file(path, KEY, DIMS, "float32"), make_prefix())
    else:
        with pytest.raises(PrefixFileError):
            read_prefix_file(path, KEY, DIMS, "float32")


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_no_such_file_is_refused(path, raw):
    path.write_bytes(raw)
    with pytest.raises(PrefixFileError):
        read_prefix_file(path, KEY, DIMS, "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 2}, r"is for .* \(1, 1, 2, 'float32'\), this model has \(2, 1, 2, 'float32'\)"),
        ({"num_kv_heads": 2}, "this model has"),
        ({"head_dim": 4}, "this model has"),
        ({"max_seq_len": 1}, "holds 2 tokens, the context 1"),
        ({"vocab_size": 299}, "token id outside the vocabulary of 299"),
    ],
)
def test_another_model_is_refused_by_name(path, change, message):
    write_prefix_file(path, make_prefix(), KEY)
    with pytest.raises(PrefixFileError, match=message):
        read_prefix_file(path, KEY, msgspec.structs.replace(DIMS, **change), "float32")


def test_another_element_type_is_refused(path):
    # The same number of bytes, so only the header tells.
    write_prefix_file(path, make_prefix(dtype="float16"), KEY)
    with pytest.raises(PrefixFileError, match="float16"):
        read_prefix_file(path, KEY, msgspec.structs.replace(DIMS, head_dim=1), "float32")


def test_another_key_is_refused(path):
    write_prefix_file(path, make_prefix(), snapshot_key("another"))
    with pytest.raises(PrefixFileError, match="another bundle"):
        read_prefix_file(path, KEY, DIMS, "float32")


def test_another_format_is_refused_by_number(path):
    raw = bytearray(encoded(make_prefix()))
    struct.pack_into("<I", raw, 8, 2)
    path.write_bytes(raw)
    with pytest.raises(PrefixFileError, match="has format 2, this edge_llm reads format 1"):
        read_prefix_file(path, KEY, DIMS, "float32")


def test_a_huge_header_is_not_read(path):
    path.write_bytes(struct.pack("<8sII", b"EDGELLMP", 1, MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES + 1))
    with pytest.raises(PrefixFileError, match="at most 4096 are allowed"):
        read_prefix_file(path, KEY, DIMS, "float32")


def test_bytes_after_the_end_are_refused(path):
    path.write_bytes(encoded(make_prefix()) + b"\0")
    with pytest.raises(PrefixFileError, match="has bytes after its end"):
        read_prefix_file(path, KEY, DIMS, "float32")


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError):
        read_prefix_file(path, KEY, DIMS, "float32")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failing_write_leaves_nothing_behind(path, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_prefix_file(path, make_prefix(), KEY)
    assert list(path.parent.iterdir()) == []


def test_a_failing_write_leaves_the_file_that_was_there(path, monkeypatch):
    write_prefix_file(path, make_prefix(), KEY)
    with monkeypatch.context() as context:
        context.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            write_prefix_file(path, make_prefix((1, 2, 3)), KEY)
    assert_equal(read_prefix_file(path, KEY, DIMS, "float32"), make_prefix())
    assert list(path.parent.iterdir()) == [path]


def test_short_writes_are_continued(path, monkeypatch):
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:5]))
    write_prefix_file(path, make_prefix(), KEY)
    assert_equal(read_prefix_file(path, KEY, DIMS, "float32"), make_prefix())


def test_the_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        events.append("flush folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "flush file")
        real_fsync(descriptor)

    def replace(source, target):
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_prefix_file(path, make_prefix(), KEY)
    assert events == ["flush file", "rename", "flush folder"]


def test_a_shipped_file_is_as_readable_as_the_others_of_its_folder(path):
    write_prefix_file(path, make_prefix(), KEY)
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_leftovers_go_and_nothing_else(tmp_path):
    leftover = tmp_path / f".prefix.kv.{'0' * 16}.tmp"
    others = [tmp_path / name for name in ("prefix.kv", ".prefix.kv.tmp", "notes.tmp", ".hidden.0123456789abcdef.tmp")]
    for file in (leftover, *others):
        file.touch()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)
    remove_leftovers(tmp_path / "no such folder")


def test_a_living_writers_file_is_no_leftover(path, monkeypatch):
    seen = []
    real_fsync, real_replace = os.fsync, os.replace

    def tidy_and(real):
        def call(*arguments):
            remove_leftovers(path.parent)
            seen.append([entry.name for entry in path.parent.iterdir()])
            real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", tidy_and(real_fsync))
    monkeypatch.setattr(os, "replace", tidy_and(real_replace))
    write_prefix_file(path, make_prefix(), KEY)
    assert [len(names) for names in seen] == [1, 1, 1]
    assert_equal(read_prefix_file(path, KEY, DIMS, "float32"), make_prefix())


def test_tidying_between_creating_and_locking_costs_only_another_attempt(path, monkeypatch):
    real_flock = fcntl.flock
    hits = []

    def flock(descriptor, operation):
        if operation == fcntl.LOCK_EX and len(hits) < 3:
            hits.append(descriptor)
            remove_leftovers(path.parent)
        real_flock(descriptor, operation)

    monkeypatch.setattr(prefix_file.fcntl, "flock", flock)
    write_prefix_file(path, make_prefix(), KEY)
    assert len(hits) == 3
    assert_equal(read_prefix_file(path, KEY, DIMS, "float32"), make_prefix())
    assert list(path.parent.iterdir()) == [path]


def test_a_file_system_without_locks_will_do(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(prefix_file.fcntl, "flock", refuse)
    write_prefix_file(path, make_prefix(), KEY)
    (path.parent / f".prefix.kv.{'0' * 16}.tmp").touch()
    remove_leftovers(path.parent)  # it cannot know whether that one is in use
    assert len(list(path.parent.iterdir())) == 2


@given(st.lists(st.text(max_size=3), max_size=4), st.lists(st.text(max_size=3), max_size=4))
def test_a_key_is_of_these_parts_only(left, right):
    assert re.fullmatch("[0-9a-f]{64}", snapshot_key(*left))
    assert (snapshot_key(*left) == snapshot_key(*right)) == (left == right)


@pytest.mark.parametrize("parts", [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc")])
def test_a_key_knows_where_its_parts_end(parts):
    others = {("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc")} - {parts}
    assert snapshot_key(*parts) not in {snapshot_key(*other) for other in others}


class TestShippedPrefixKey:
    """It changes with what the values depend on, and with nothing that the prefix file itself changes."""

    manifest = Bundle.open(TINY_BUNDLE).manifest
    replace = staticmethod(msgspec.structs.replace)

    def test_targets_differ(self):
        assert shipped_prefix_key(self.manifest, "cpu-int8") != shipped_prefix_key(self.manifest, "cpu-fp32")

    def test_the_model_the_template_and_the_graph_count(self):
        entries = self.manifest.files
        changed = [
            self.replace(self.manifest, model=self.replace(self.manifest.model, max_seq_len=128)),
            self.replace(self.manifest, prompt=self.replace(self.manifest.prompt, default_system="You are another")),
        ]
        for name in ("graphs/cpu-int8/model.onnx", "graphs/cpu-int8/model.onnx.data"):
            files = tuple(self.replace(entry, sha256="0" * 64) if entry.path == name else entry for entry in entries)
            changed.append(self.replace(self.manifest, files=files))
        keys = [shipped_prefix_key(manifest, "cpu-int8") for manifest in (self.manifest, *changed)]
        assert len(set(keys)) == 5

    def test_the_name_and_the_prefix_file_do_not(self):
        graphs = tuple(self.replace(graph, prefix_file="graphs/cpu-int8/prefix.kv") for graph in self.manifest.graphs)
        entry = self.replace(self.manifest.files[0], path="graphs/cpu-int8/prefix.kv")
        shipped = self.replace(self.manifest, graphs=graphs, files=(*self.manifest.files, entry), name="another")
        assert shipped_prefix_key(shipped, "cpu-int8") == shipped_prefix_key(self.manifest, "cpu-int8")

    def test_an_unknown_target_is_an_error(self):
        with pytest.raises(ManifestError, match="no graph for target 'cuda'"):
            shipped_prefix_key(self.manifest, "cuda")
