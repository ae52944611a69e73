from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.bundle.manifest import Bundle, decode_manifest, encode_manifest
from edge_llm.errors import BundleIntegrityError, BundleNotFoundError, EdgeLlmError, ManifestError

TINY = Path(__file__).parent.parent / "data" / "tiny_bundle"
RAW = (TINY / "manifest.json").read_bytes()


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "bundle"))


def changed(**fields) -> bytes:
    return json.dumps(json.loads(RAW) | fields).encode()


def test_round_trip():
    manifest = decode_manifest(RAW)
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_the_committed_bundle_verifies():
    Bundle.open(TINY).verify()


def test_a_changed_byte_is_found(copy):
    path = copy / "graphs" / "cpu-int8" / "model.onnx.data"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BundleIntegrityError, match=r"model\.onnx\.data does not match its SHA-256"):
        Bundle.open(copy).verify()


def test_a_truncated_file_is_found_by_its_size(copy):
    path = copy / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleIntegrityError, match="the manifest says"):
        Bundle.open(copy).verify()


def test_a_missing_file_is_named(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleNotFoundError, match=r"tokenizer\.json is missing"):
        Bundle.open(copy).verify()


def test_a_link_is_refused(copy, tmp_path):
    (copy / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (copy / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleIntegrityError, match="is a link"):
        Bundle.open(copy).verify()


def test_a_folder_that_is_a_link_is_refused(copy, tmp_path):
    (copy / "graphs" / "cpu-int8").rename(tmp_path / "elsewhere")
    (copy / "graphs" / "cpu-int8").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="is a link"):
        Bundle.open(copy).verify()


@pytest.mark.parametrize("name", ["no-such-folder", "tests"])
def test_what_is_no_bundle_says_so(tmp_path, name):
    (tmp_path / "tests").mkdir()
    with pytest.raises(BundleNotFoundError):
        Bundle.open(tmp_path / name)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid"),
        (b"{", "not valid"),
        (b"[1]", "not valid"),
        (b"\xff\xfe", "not valid"),
        (b"[" * 100_000, "not valid"),
        (changed(format=2), "format 2 is not supported"),
        (changed(surprise=1), "surprise"),
        (changed(graphs=[]), "graphs"),
        (changed(files=[]), "files"),
        (changed(model=json.loads(RAW)["model"] | {"num_kv_heads": 3}), "not a multiple of num_kv_heads"),
        (changed(prompt=json.loads(RAW)["prompt"] | {"stop_token_ids": [512]}), "outside the vocabulary"),
        (
            changed(
                graphs=[json.loads(RAW)["graphs"][0] | {"expectation": {"prompt_token_ids": [1], "token_ids": [512]}}]
            ),
            "outside the vocabulary",
        ),
        (changed(files=json.loads(RAW)["files"][1:]), "does not list it"),
        (changed(files=json.loads(RAW)["files"] * 2), "twice"),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(raw, message):
    with pytest.raises(ManifestError, match=message):
        decode_manifest(raw)


@pytest.mark.parametrize(
    "path",
    ["../evil", "/etc/passwd", "a/b", "graphs/../x", "graphs/cpu/x/y", ".hidden", "", "a\n", "graphs/cpu/..", "a..b"],
)
def test_only_flat_names_are_allowed(path):
    files = json.loads(RAW)["files"]
    files.append({"path": path, "size_bytes": 1, "sha256": "0" * 64})
    with pytest.raises(ManifestError, match="only flat names"):
        decode_manifest(changed(files=files))


@pytest.mark.parametrize("label", ["a\nExecStartPre=/bin/sh", "\x1b[2J", "a\u2028b", "x" * 201])
@pytest.mark.parametrize("field", ["name", "version", "target"])
def test_names_that_are_shown_are_short_and_printable(field, label):
    graphs = json.loads(RAW)["graphs"]
    raw = changed(graphs=[graphs[0] | {"target": label}]) if field == "target" else changed(**{field: label})
    with pytest.raises(ManifestError, match="short and printable"):
        decode_manifest(raw)


def test_an_unknown_target_names_the_known_ones():
    with pytest.raises(ManifestError, match="it has: cpu-int8, cpu-fp32"):
        decode_manifest(RAW).graph("cuda")


@settings(deadline=None)
@given(st.data())
def test_no_damage_to_the_manifest_gets_past_the_errors(data):
    raw = bytearray(RAW)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(EdgeLlmError):
        decode_manifest(bytes(raw))
