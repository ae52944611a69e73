"""A model on TensorRT, faked: its engines are built ahead, and what is told of that meanwhile."""

from __future__ import annotations

import sys

import msgspec
import onnxruntime as ort
import pytest

from edge_llm.bundle import tensorrt_engines
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.device import session as session_module
from edge_llm.device.session import CPU, TENSORRT, PlacedNode, Placement
from edge_llm.engine import loading, runner, tensors
from edge_llm.engine.loading import load_model
from edge_llm.errors import ProviderError
from tests.bundle.test_tensorrt_engines import CRASHING_BUILDER, FAST_BUILDER
from tests.paths import TINY_BUNDLE


class FakeTensorrt:
    """Sessions run on the processor; ``refuses`` says how many of them cannot be made before."""

    def __init__(self, monkeypatch) -> None:
        self.refuses = 0
        self.builds = 0
        self.options: list[dict[str, str]] = []
        self._monkeypatch = monkeypatch
        make_session, run = session_module.make_session, tensorrt_engines.subprocess.Popen

        def make(path, options, provider=session_module.CPU_PROVIDER):
            if provider.name == TENSORRT:
                self.options.append(dict(provider.options))
                self.refuses -= 1
                if self.refuses >= 0:
                    raise ProviderError("TensorRT EP could not deserialize engine from cache")
            return make_session(path, options)

        def count(*arguments, **options):
            self.builds += 1
            return run(*arguments, **options)

        monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CPU])
        monkeypatch.setattr(runner, "make_session", make)
        monkeypatch.setattr(tensorrt_engines.subprocess, "Popen", count)
        placed = Placement([TENSORRT, CPU], [PlacedNode("MatMul", TENSORRT)])
        monkeypatch.setattr(loading, "placement", lambda _session: placed)
        self.set_builder(FAST_BUILDER)

    def set_builder(self, script: str) -> None:
        self._monkeypatch.setattr(tensorrt_engines, "_COMMAND", (sys.executable, "-c", script))


@pytest.fixture
def tensorrt(monkeypatch) -> FakeTensorrt:
    return FakeTensorrt(monkeypatch)


@pytest.fixture
def config(tmp_path) -> Config:
    engine = EngineConfig(
        providers=(TENSORRT, CPU),
        targets={TENSORRT: ("cpu-int8",), CPU: ("cpu-int8",)},
        provider_options={TENSORRT: {"trt_fp16_enable": True}},
        threads=1,
        slots=1,
        prepare=False,
    )
    return Config(cache_dir=str(tmp_path), engine=engine)


def test_preparing_is_told_with_what_is_known_and_ends(tensorrt, config):
    told = []
    model = load_model(Bundle.open(TINY_BUNDLE), config, lambda state, **detail: told.append((state, detail)))
    assert (model.provider.name, model.provider.refused) == (TENSORRT, {})
    (first, *_), (preparing, detail), *_, last = told
    assert (first, preparing, last) == ("loading", "preparing", ("loading", {}))
    assert detail == {"provider": TENSORRT, "elapsed_s": pytest.approx(0, abs=1), "engines": 0, "graphs": 1}
    assert tensorrt.options[0]["trt_engine_cache_path"].startswith(config.cache_dir)


def test_the_next_load_finds_the_engines(tensorrt, config):
    load_model(Bundle.open(TINY_BUNDLE), config)
    states = []
    load_model(Bundle.open(TINY_BUNDLE), config, states.append)
    assert (tensorrt.builds, states) == (1, ["loading"])


def test_engines_that_cannot_be_loaded_any_more_are_built_anew(tensorrt, config, caplog):
    load_model(Bundle.open(TINY_BUNDLE), config)
    tensorrt.refuses = 1
    model = load_model(Bundle.open(TINY_BUNDLE), config)
    assert (model.provider.name, tensorrt.builds) == (TENSORRT, 2)
    assert "built anew, as after an upgrade of TensorRT" in caplog.text


@pytest.mark.parametrize("kept", [False, True])
def test_engines_that_were_just_built_are_not_tried_twice(tensorrt, config, kept):
    if kept:
        load_model(Bundle.open(TINY_BUNDLE), config)
    builds, tensorrt.refuses = tensorrt.builds, 9
    model = load_model(Bundle.open(TINY_BUNDLE), config)
    assert "could not deserialize" in model.provider.refused[TENSORRT]
    assert (model.provider.name, tensorrt.builds - builds) == (CPU, 1)


def test_where_nothing_is_kept_a_session_is_tried_once(tensorrt, config):
    engine = msgspec.structs.replace(config.engine, provider_options={TENSORRT: {"trt_engine_cache_enable": False}})
    tensorrt.refuses = 9
    model = load_model(Bundle.open(TINY_BUNDLE), msgspec.structs.replace(config, engine=engine))
    assert (model.provider.name, tensorrt.builds, len(tensorrt.options)) == (CPU, 0, 1)


def test_a_builder_that_crashes_leaves_the_processor_serving(tensorrt, config):
    tensorrt.set_builder(CRASHING_BUILDER)
    model = load_model(Bundle.open(TINY_BUNDLE), config)
    assert model.provider.name == CPU
    assert "signal 6" in model.provider.refused[TENSORRT]
    assert not tensorrt.options


def test_after_a_provider_failed_no_other_graph_of_its_own_is_tried(tensorrt, config):
    engine = msgspec.structs.replace(config.engine, targets={TENSORRT: ("cpu-int8", "cpu-fp32"), CPU: ("cpu-int8",)})
    model = load_model(Bundle.open(TINY_BUNDLE), msgspec.structs.replace(config, engine=engine))
    assert (model.provider.name, tensorrt.builds) == (TENSORRT, 1)
    assert model.fall_back is not None
    next_one = model.fall_back()
    assert (next_one.provider.name, tensorrt.builds) == (CPU, 1)
    assert next_one.provider.refused == {TENSORRT: "it failed while it was serving"}


def test_inputs_that_stay_those_of_the_first_step_are_noticed(tensorrt, config, monkeypatch):
    """As on a device to which inputs are copied once, when they are bound."""
    monkeypatch.setattr(tensors.DeviceTensor, "update", lambda *_: None)
    model = load_model(Bundle.open(TINY_BUNDLE), config)
    assert model.provider.name == CPU
    assert "does not generate the token recorded at export" in model.provider.refused[TENSORRT]


def test_a_device_takes_the_graphs_whole_cache(config):
    bundle = Bundle.open(TINY_BUNDLE)
    (graph, *_) = bundle.manifest.graphs
    short = msgspec.structs.replace(config, engine=msgspec.structs.replace(config.engine, context=32))
    needs = {name: loading.memory_needs(bundle, short, graph, name) for name in (CPU, TENSORRT)}
    assert "1 slots of 32 tokens" in needs[CPU]
    assert needs[TENSORRT] == loading.memory_needs(bundle, config, graph)
