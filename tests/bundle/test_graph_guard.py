"""Graphs that name files of others are refused before ONNX Runtime sees them."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_llm.bundle import graph_guard
from edge_llm.bundle.graph_guard import check_graph_file
from edge_llm.bundle.manifest import Bundle
from edge_llm.engine.runner import Runner
from edge_llm.errors import BundleIntegrityError, BundleNotFoundError, ManifestError
from tests.bundle.sealing import reseal
from tests.paths import TINY_BUNDLE

DATA = "model.onnx.data"


def tensor(location: str = DATA, **entries: str) -> TensorProto:
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "16", **entries}.items():
        made.external_data.add(key=key, value=value)
    return made


def in_initializer(weight: TensorProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "g", [], [], [weight]))


def in_sparse_initializer(weight: TensorProto) -> onnx.ModelProto:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    model.graph.sparse_initializer.add().values.CopyFrom(weight)
    return model


def in_attribute(weight: TensorProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([helper.make_node("Constant", [], ["w"], value=weight)], "g", [], []))


def in_attributes(weight: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Custom", [], ["w"])
    node.attribute.add(name="all", type=onnx.AttributeProto.TENSORS).tensors.append(weight)
    return helper.make_model(helper.make_graph([node], "g", [], []))


def in_branch(weight: TensorProto) -> onnx.ModelProto:
    branch = helper.make_graph([], "branch", [], [], [weight])
    node = helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
    return helper.make_model(helper.make_graph([node], "g", [], []))


def in_function(weight: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["w"], value=weight)
    function = helper.make_function("own", "F", [], ["w"], [node], [helper.make_opsetid("", 17)])
    return helper.make_model(helper.make_graph([], "g", [], []), functions=[function])


PLACES = (in_initializer, in_sparse_initializer, in_attribute, in_attributes, in_branch, in_function)
# The last is what ONNX Runtime takes for an address in its own memory.
FOREIGN = ("other.bin", "../secret", "/etc/passwd", f"./{DATA}", f"{DATA}\0", "", "*/_ORT_MEM_ADDR_/*")


@pytest.mark.parametrize("place", PLACES)
def test_only_the_named_data_file_is_read(place, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(place(tensor()).SerializeToString())
    check_graph_file(path, DATA)
    for foreign in FOREIGN:
        path.write_bytes(place(tensor(foreign)).SerializeToString())
        with pytest.raises(BundleIntegrityError, match="reads the file"):
            check_graph_file(path, DATA)


def test_a_graph_without_a_data_file_reads_none(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(in_initializer(tensor()).SerializeToString())
    with pytest.raises(BundleIntegrityError, match="the manifest allows none"):
        check_graph_file(path, None)


def test_the_last_of_two_locations_counts_and_so_both_are_checked(tmp_path):
    weight = tensor("../secret")
    weight.external_data.add(key="location", value=DATA)
    path = tmp_path / "model.onnx"
    path.write_bytes(in_initializer(weight).SerializeToString())
    with pytest.raises(BundleIntegrityError, match="secret"):
        check_graph_file(path, DATA)


def test_a_second_piece_of_the_graph_is_looked_at_too(tmp_path):
    """Protocol buffers that are joined are merged when they are read."""
    path = tmp_path / "model.onnx"
    good, bad = (in_initializer(tensor(location)).SerializeToString() for location in (DATA, "../secret"))
    path.write_bytes(good + bad)
    with pytest.raises(BundleIntegrityError, match="secret"):
        check_graph_file(path, DATA)


def test_a_compiled_engine_is_refused(tmp_path):
    node = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context="/tmp/engine")
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(helper.make_graph([node], "g", [], [])).SerializeToString())
    with pytest.raises(BundleIntegrityError, match="EPContext"):
        check_graph_file(path, DATA)


@pytest.mark.parametrize(
    "raw", [b"", b"not a graph", b"\xff" * 100, b"\x3a\x7f", b"\x3a" + b"\xff" * 9 + b"\x7f", b"\0" * 64]
)
def test_what_is_no_graph_is_refused(raw, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(raw)
    with pytest.raises(BundleIntegrityError, match="is not used"):
        check_graph_file(path, DATA)


def test_deep_nesting_and_many_parts_end(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    raw = b""
    for _ in range(3000):  # a graph in an attribute of a node of a graph …
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            raw = tag + varint(len(raw)) + raw
    path.write_bytes(b"\x3a" + varint(len(raw)) + raw)
    check_graph_file(path, DATA)
    monkeypatch.setattr(graph_guard, "MAX_FIELDS", 1000)
    with pytest.raises(BundleIntegrityError, match="more than 1000 parts"):
        check_graph_file(path, DATA)


def test_every_place_of_a_tensor_in_the_format_is_known():
    """Against onnx's own description of the format, so that a new place does not go unnoticed."""
    found: dict[str, dict[int, str]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.name in found:
            continue
        fields = [field for field in message.fields if field.message_type is not None]
        found[message.name] = {field.number: field.message_type.name for field in fields}
        waiting += [field.message_type for field in fields]

    def leads_to_tensor(name: str, seen: frozenset[str] = frozenset()) -> bool:
        return name == "TensorProto" or any(
            leads_to_tensor(child, seen | {name}) for child in found[name].values() if child not in seen
        )

    for name, fields in found.items():
        expected = {number: child for number, child in fields.items() if leads_to_tensor(child)}
        if name == "TensorProto":
            expected = {13: "StringStringEntryProto"}
        assert graph_guard._FIELDS.get(name, {}) == expected, name


@pytest.mark.parametrize("graph", ["cpu-int8", "cpu-fp32"])
def test_the_committed_graphs_pass(graph):
    check_graph_file(TINY_BUNDLE / "graphs" / graph / "model.onnx", DATA)


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(TINY_BUNDLE, tmp_path / "bundle")


def test_a_malicious_bundle_reads_nothing(bundle, tmp_path):
    """A whole model whose weights are to come from a file outside: no session is made."""
    (tmp_path / "secret").write_bytes(np.arange(100_000, dtype=np.float32).tobytes())
    path = bundle / "graphs" / "cpu-int8" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = "../../../secret"
    path.write_bytes(model.SerializeToString())
    reseal(bundle)
    opened = Bundle.open(bundle)
    with pytest.raises(BundleIntegrityError, match=r"reads the file b'\.\./\.\./\.\./secret'"):
        Runner(opened.verified_path("graphs/cpu-int8/model.onnx"), opened.manifest.model)
    with pytest.raises(BundleIntegrityError, match="secret"):
        opened.verify()


@pytest.mark.parametrize("name", ["graphs/cpu-int8/model.ort", "graphs/other/model.onnx", "model.onnx"])
def test_a_graph_of_another_name_or_place_is_refused(bundle, name):
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["graphs"][0]["file"] = name
    manifest["files"].append({"path": name, "size_bytes": 0, "sha256": "0" * 64})
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"\.onnx files with their data in the same folder"):
        Bundle.open(bundle)


def test_a_pipe_does_not_hang(bundle):
    (bundle / "quality.json").unlink()
    os.mkfifo(bundle / "quality.json")
    with pytest.raises(BundleIntegrityError, match="no plain file"):
        Bundle.open(bundle).verify()
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    with pytest.raises(BundleIntegrityError, match="no plain file"):
        Bundle.open(bundle)


def test_a_manifest_that_is_a_link_a_folder_or_too_large_is_refused(bundle, tmp_path):
    manifest = bundle / "manifest.json"
    manifest.rename(tmp_path / "elsewhere")
    manifest.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="is a link"):
        Bundle.open(bundle)
    manifest.unlink()
    manifest.write_bytes(b" " * (5 << 20))
    with pytest.raises(BundleIntegrityError, match="larger than"):
        Bundle.open(bundle)
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(BundleIntegrityError, match="no plain file"):
        Bundle.open(bundle)


def test_a_tokenizer_of_many_gigabytes_is_refused_before_it_is_read(bundle):
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    next(entry for entry in manifest["files"] if entry["path"] == "tokenizer.json")["size_bytes"] = 8 << 30
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="may have"):
        Bundle.open(bundle)


def test_a_folder_in_place_of_a_file_is_refused(bundle):
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(BundleNotFoundError, match="missing"):
        Bundle.open(bundle).verify()
    (bundle / "tokenizer.json").mkdir()
    with pytest.raises(BundleIntegrityError, match="no plain file"):
        Bundle.open(bundle).verify()


def varint(value: int) -> bytes:
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])
