from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from edge_llm.bundle.manifest import Bundle, decode_manifest, encode_manifest
from edge_llm.config import Config, EngineConfig
from edge_llm.device import memory
from edge_llm.device.memory import available_memory
from edge_llm.engine import loading, runner
from edge_llm.engine.loading import load_model
from edge_llm.errors import ConfigError, ContextOverflowError, ManifestError, MemoryPlanError, UnsupportedBundleError

TINY = Path(__file__).parent.parent / "data" / "tiny_bundle"


@pytest.fixture
def config(tmp_path):
    return Config(cache_dir=str(tmp_path / "cache"), engine=EngineConfig(threads=1, slots=2))


def rewritten(tmp_path, **fields) -> Bundle:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    manifest = msgspec.structs.replace(decode_manifest((folder / "manifest.json").read_bytes()), **fields)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return Bundle.open(folder)


def test_the_first_load_prepares_and_says_so(config):
    states = []
    model = load_model(Bundle.open(TINY), config, states.append)
    assert model.prepared
    assert states == ["preparing", "loading"]
    answer = list(model.engine.generate(model.bundle.manifest.expectation.prompt_token_ids, max_tokens=16))
    assert answer == list(model.bundle.manifest.expectation.token_ids)


def test_without_room_for_a_copy_the_bundle_itself_serves(config, tmp_path, caplog):
    (tmp_path / "cache").write_text("in the way")
    assert not load_model(Bundle.open(TINY), config).prepared
    assert "no prepared copy" in caplog.text


@pytest.mark.parametrize("name", ["SEGV", "KILL"])
def test_a_graph_whose_packing_crashes_is_not_loaded_in_this_process(config, tmp_path, monkeypatch, name):
    packer = tmp_path / "python"
    packer.write_text(f"#!/bin/sh\nkill -{name} $$\n")
    packer.chmod(0o755)
    monkeypatch.setattr("edge_llm.bundle.prepare.sys.executable", str(packer))
    monkeypatch.setattr(runner, "make_session", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UnsupportedBundleError, match=rf"CPUExecutionProvider: .*is not used: .* by SIG{name}"):
        load_model(Bundle.open(TINY), config)


def test_a_copy_that_answers_wrongly_is_not_used(config, monkeypatch, caplog):
    verdicts = iter([False, True])
    monkeypatch.setattr(loading, "self_test", lambda model: next(verdicts))
    assert not load_model(Bundle.open(TINY), config).prepared
    assert "answers wrongly" in caplog.text


def test_a_bundle_that_answers_wrongly_is_refused(config, tmp_path):
    manifest = Bundle.open(TINY).manifest
    wrong = msgspec.structs.replace(manifest.expectation, token_ids=(7,))
    assert manifest.expectation.token_ids[0] != 7
    with pytest.raises(UnsupportedBundleError, match="would answer wrongly here"):
        load_model(rewritten(tmp_path, expectation=wrong), config)


def test_an_older_onnxruntime_is_refused_by_name(config, tmp_path):
    graphs = [msgspec.structs.replace(graph, min_onnxruntime="99.1") for graph in Bundle.open(TINY).manifest.graphs]
    with pytest.raises(UnsupportedBundleError, match=r"needs onnxruntime 99\.1 or newer"):
        load_model(rewritten(tmp_path, graphs=tuple(graphs)), config)


def test_an_unknown_target_is_refused_by_name(config):
    other = msgspec.structs.replace(config, engine=EngineConfig(target="cuda"))
    with pytest.raises(ManifestError, match="no graph for target 'cuda'"):
        load_model(Bundle.open(TINY), other)


def test_a_provider_that_is_not_there_is_noted_and_the_next_one_used(config):
    providers = ("NoSuchExecutionProvider", "CPUExecutionProvider")
    model = load_model(Bundle.open(TINY), msgspec.structs.replace(config, engine=EngineConfig(providers=providers)))
    assert model.provider.name == "CPUExecutionProvider"
    assert "built without it" in model.provider.refused["NoSuchExecutionProvider"]


def test_no_provider_at_all_names_what_there_is(config):
    only = msgspec.structs.replace(config, engine=EngineConfig(providers=("NoSuchExecutionProvider",)))
    with pytest.raises(UnsupportedBundleError, match=r"has: .*CPUExecutionProvider"):
        load_model(Bundle.open(TINY), only)


def test_a_machine_without_room_refuses_before_it_loads(config, tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 150000 kB\n")
    monkeypatch.setattr(memory, "available_memory", lambda _root: real_available(tmp_path))
    real_available = available_memory
    monkeypatch.setattr(runner, "make_session", lambda *_: pytest.fail("loaded"))
    with pytest.raises(MemoryPlanError, match=r"prefix cache 134 \+ program 64\), and 154 MB are left"):
        load_model(Bundle.open(TINY), config)


def test_the_context_can_be_bounded_below_the_bundles(config):
    limited = msgspec.structs.replace(config.engine, context=64)
    model = load_model(Bundle.open(TINY), msgspec.structs.replace(config, engine=limited))
    assert model.engine.max_seq_len == 64 <= model.bundle.manifest.model.max_seq_len
    with pytest.raises(ContextOverflowError, match="the context of 64"):
        model.engine.check_fits([1] * 60, 6)


def test_processors_that_are_not_there_are_refused(config):
    pinned = msgspec.structs.replace(config.engine, affinity=(4000,))
    with pytest.raises(ConfigError, match=r"engine\.affinity: cannot use the processors \[4000\]"):
        load_model(Bundle.open(TINY), msgspec.structs.replace(config, engine=pinned))
