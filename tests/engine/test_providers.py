"""Each way in which a provider can fail, faked at the session factory: the next one serves, and the reason is kept."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnxruntime as ort
import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.device import session as session_module
from edge_llm.device.session import PlacedNode, Placement
from edge_llm.engine import loading, runner
from edge_llm.engine.loading import load_model
from edge_llm.errors import ProviderError, UnsupportedBundleError

TINY = Path(__file__).parent.parent / "data" / "tiny_bundle"
CPU = "CPUExecutionProvider"
GPU = "CUDAExecutionProvider"


class FakeGpu:
    """Stands for CUDA: sessions run on the processor, and say whatever the test wants them to say."""

    def __init__(self, monkeypatch) -> None:
        self.made: list[session_module.Provider] = []
        self.make_error: Exception | None = None
        self.unsuitable = ""  # part of the path of the graph that the error is about
        self.placement = Placement([GPU, CPU], [PlacedNode("MatMulNBits", GPU)])
        self.answers_right = True
        make_session, self_test = session_module.make_session, loading.self_test

        def make(path, options, provider=session_module.CPU_PROVIDER):
            self.made.append(provider)
            if provider.name == GPU and self.make_error is not None and self.unsuitable in str(path):
                raise self.make_error
            return make_session(path, options)

        def test(model):
            return self_test(model) and (model.provider.name == CPU or self.answers_right)

        real_placement = session_module.placement
        monkeypatch.setattr(ort, "get_available_providers", lambda: [GPU, CPU])
        monkeypatch.setattr(runner, "make_session", make)
        monkeypatch.setattr(loading, "self_test", test)
        monkeypatch.setattr(
            loading, "placement", lambda s: self.placement if self.made[-1].name == GPU else real_placement(s)
        )


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


@pytest.fixture
def config(tmp_path) -> Config:
    # The tiny bundle has no graph for CUDA; its cpu-fp32 graph stands for one.
    engine = EngineConfig(
        providers=(GPU, CPU),
        targets={GPU: ("cpu-int8",), CPU: ("cpu-int8",)},
        provider_options={GPU: {"device_id": 0, "use_tf32": False}},
        threads=1,
        slots=1,
    )
    return Config(cache_dir=str(tmp_path / "cache"), engine=engine)


def test_a_provider_that_serves_is_used(gpu, config):
    model = load_model(Bundle.open(TINY), config)
    assert (model.provider.name, model.provider.target, model.provider.refused) == (GPU, "cpu-int8", {})
    assert gpu.made == [session_module.Provider(GPU, {"device_id": "0", "use_tf32": "0"})]


def refused(config) -> str:
    model = load_model(Bundle.open(TINY), config)
    assert model.provider.name == CPU
    assert list(model.provider.refused) == [GPU]
    expectation = model.bundle.manifest.expectation
    answer = list(model.engine.generate(expectation.prompt_token_ids, max_tokens=len(expectation.token_ids)))
    assert answer == list(expectation.token_ids)
    return model.provider.refused[GPU]


def test_a_session_that_cannot_be_made(gpu, config, caplog):
    gpu.make_error = ProviderError("onnxruntime 1.99 cannot load it: no CUDA driver")
    assert "no CUDA driver" in refused(config)
    assert "the cpu-int8 graph on CUDAExecutionProvider does not serve" in caplog.text


def test_a_library_that_is_missing_without_an_error(gpu, config):
    gpu.placement = Placement([CPU], None)
    assert "could not load it" in refused(config)


def test_nodes_that_run_elsewhere(gpu, config):
    nodes = [PlacedNode("MatMulNBits", GPU)] * 5 + [PlacedNode("GroupQueryAttention", CPU)] * 2
    gpu.placement = Placement([GPU, CPU], nodes)
    assert refused(config) == ("2 of 7 nodes would run elsewhere: 2 GroupQueryAttention on CPUExecutionProvider")


def test_a_wrong_first_token(gpu, config):
    gpu.answers_right = False
    assert "would answer wrongly here" in refused(config)


def test_a_bundle_without_its_graph(gpu, config):
    engine = msgspec.structs.replace(config.engine, targets={GPU: ("cuda",), CPU: ("cpu-int8",)})
    assert refused(msgspec.structs.replace(config, engine=engine)) == "the bundle has no graph for it (cuda)"
    assert [provider.name for provider in gpu.made] == [CPU]


def test_a_provider_that_is_not_built_in(gpu, config, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    assert "was built without it" in refused(config)


def test_the_next_graph_of_a_provider_may_serve(gpu, config):
    gpu.make_error, gpu.unsuitable = ProviderError("no such operator"), "cpu-fp32"
    two_graphs = msgspec.structs.replace(config.engine, targets={GPU: ("cpu-fp32", "cpu-int8"), CPU: ()})
    model = load_model(Bundle.open(TINY), msgspec.structs.replace(config, engine=two_graphs))
    assert (model.provider.name, model.provider.target, model.provider.refused) == (GPU, "cpu-int8", {})


def test_when_all_are_refused_every_reason_is_given(gpu, config):
    gpu.make_error = ProviderError("no CUDA driver")
    only = msgspec.structs.replace(config.engine, providers=(GPU, "ROCMExecutionProvider"))
    with pytest.raises(UnsupportedBundleError) as raised:
        load_model(Bundle.open(TINY), msgspec.structs.replace(config, engine=only))
    assert "CUDAExecutionProvider: no CUDA driver" in str(raised.value)
    assert "ROCMExecutionProvider: onnxruntime" in str(raised.value)


def test_what_serves_can_be_left_for_the_next_one(gpu, config):
    model = load_model(Bundle.open(TINY), config)
    assert model.fall_back is not None
    next_one = model.fall_back()
    assert (next_one.provider.name, next_one.provider.refused) == (CPU, {GPU: "it failed while it was serving"})
    assert next_one.fall_back is None
