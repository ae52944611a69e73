"""The GPU's runner, cache and copies: the same calls, on tensors that ONNX Runtime keeps in the processor's memory.

What needs a GPU (that CUDA captures a step, what a copy costs) is not tested here, and never was on hardware.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_llm.bundle import graph_io
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.device.session import CUDA, TENSORRT, Device, Provider, make_session, session_options, tensor_device
from edge_llm.engine import device_runner, tensors
from edge_llm.engine.device_cache import DeviceKVCache
from edge_llm.engine.device_runner import DeviceRunner
from edge_llm.engine.engine import Engine
from edge_llm.engine.kv_cache import KVCache
from edge_llm.engine.loading import load_model, runner_maker
from edge_llm.engine.runner import Runner
from edge_llm.engine.sampler import SamplingParams
from edge_llm.engine.static_runner import StaticRunner
from edge_llm.engine.tensors import DeviceTensor
from edge_llm.errors import ContextOverflowError, ProviderError
from tests.engine.test_providers import FakeGpu
from tests.engine.test_runner import DIMS, GRAPH, TINY, greedy, prompt

CAPTURING = Provider(options={"enable_cuda_graph": "1"})


def make(slots: int = 4, provider: Provider | None = None) -> DeviceRunner:
    return DeviceRunner(GRAPH, DIMS, slots=slots, threads=1, provider=provider or Provider())


def reference(slots: int = 4) -> Runner:
    return Runner(GRAPH, DIMS, slots=slots, threads=1)


class Capturing:
    """Stands for a session whose provider captures: each graph replays what it saw first, if the test says so."""

    def __init__(self, session: Any, *, stale: bool = False, error: Exception | None = None) -> None:
        self._session, self._stale, self._error = session, stale, error
        self.graph_ids: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        graph_id = options.get_run_config_entry("gpu_graph_id")
        self.graph_ids.append(graph_id)
        if graph_id != "-1":
            if self._error is not None:
                raise self._error
            if self._stale and self.graph_ids.count(graph_id) > 1:
                return  # its inputs changed, its outputs did not
        self._session.run_with_iobinding(binding, options)


@pytest.mark.parametrize("provider", [Provider(), CAPTURING])
@pytest.mark.parametrize("slot", [0, 3])
def test_it_generates_the_same_tokens_and_bits_as_the_processors_runner(slot, provider):
    own, other = make(provider=provider), reference()
    token_ids = prompt(20)
    answers = [[runner.prefill(slot, token_ids, 0)] for runner in (own, other)]
    np.testing.assert_array_equal(own.logits(0), other.logits(0))
    for past_len in range(20, 60):
        for runner, answer in zip((own, other), answers, strict=True):
            answer.append(int(runner.decode(slot, answer[-1:], [past_len])[0]))
        np.testing.assert_array_equal(own.logits(0), other.logits(0))
    assert answers[0] == answers[1]
    np.testing.assert_array_equal(own.cache.read_rows(slot, 0, 60), other.cache.read_rows(slot, 0, 60))


def test_a_batch_has_the_same_bits_too():
    own, other = make(), reference()
    lengths = (10, 37, 64)
    for runner in (own, other):
        for row, length in enumerate(lengths):
            runner.prefill(1 + row, prompt(length, seed=length), 0)
    for step in range(10):
        past_lens = [length + step for length in lengths]
        next_ids = [runner.decode(1, [5, 6, 7], past_lens).tolist() for runner in (own, other)]
        assert next_ids[0] == next_ids[1]
        for row in range(3):
            np.testing.assert_array_equal(own.logits(row), other.logits(row))


def test_forward_and_limits_are_those_of_the_processors_runner():
    own, other = make(), reference()
    np.testing.assert_array_equal(*[runner.forward(0, prompt(12), 0, [2, 11]) for runner in (own, other)])
    with pytest.raises(ContextOverflowError, match="slot is full"):
        own.decode(0, [5], [DIMS.max_seq_len])


def test_sequences_move_between_rows_of_the_device():
    answers = []
    for runner in (make(3), reference(3)):
        engine = Engine(runner, [], prefill_chunk=16)
        states = [
            engine.start(prompt(length), SamplingParams(temperature=length % 3, seed=1), 24) for length in (20, 30, 40)
        ]
        for state in states:
            while not state.prefilled:
                engine.prefill(state)
        for _ in range(5):
            engine.decode(states)
        engine.release(states.pop(0))
        while not states[0].finished:
            engine.decode(states)
        answers.append([state.output_ids for state in states])
    assert answers[0] == answers[1]


@pytest.fixture
def copies(monkeypatch) -> Counter[str]:
    """Counts copies to and from the device, and the bytes of the latter."""
    counted: Counter[str] = Counter()
    update, read = DeviceTensor.update, DeviceTensor.read

    def counting_update(tensor: DeviceTensor, values: Any) -> None:
        counted["up"] += 1
        counted["bytes up"] += values.nbytes
        update(tensor, values)

    def counting_read(tensor: DeviceTensor) -> Any:
        values = read(tensor)
        counted["down"] += 1
        counted["bytes down"] += values.nbytes
        return values

    monkeypatch.setattr(DeviceTensor, "update", counting_update)
    monkeypatch.setattr(DeviceTensor, "read", counting_read)
    return counted


def test_a_token_costs_one_run_and_a_few_bytes(copies):
    runner = make(slots=2)
    token_id = runner.prefill(0, prompt(20), 0)
    session = runner.session = Capturing(runner.session)
    copies.clear()
    runner.decode(0, [token_id], [20])
    # Id, position and length of two rows up; two ids down. The run is the one thing that is waited for.
    assert copies == {"up": 3, "bytes up": 2 * (8 + 8 + 4), "down": 1, "bytes down": 2 * 8}
    assert len(session.graph_ids) == 1
    copies.clear()
    runner.logits(1)
    assert copies == {"down": 1, "bytes down": DIMS.vocab_size * 4}
    copies.clear()
    runner.prefill(0, prompt(20), 0)
    assert copies == {"down": 1, "bytes down": 2 * 8}


def test_nothing_of_the_processors_is_bound_but_the_constant_length():
    runner = make()
    bound: dict[str, list[tuple[Any, ...]]] = {"in": [], "out": []}
    session = runner.session
    runner.session = SimpleNamespace(
        io_binding=lambda: SimpleNamespace(
            bind_input=lambda *arguments: bound["in"].append(arguments),
            bind_output=lambda *arguments: bound["out"].append(arguments),
        ),
        get_inputs=session.get_inputs,
    )
    runner._bind_decode(1, 2)
    addresses = {name: address for name, _, _, _, _, address in bound["in"]}
    assert set(addresses) == {node.name for node in session.get_inputs()}
    assert addresses.pop(graph_io.TOTAL_SEQUENCE_LENGTH) == runner._longest_row.ctypes.data
    assert runner._longest_row == DIMS.max_seq_len
    host = [runner._input_ids, runner._position_ids, runner._seqlens_k, runner._logits, runner._next_ids]
    assert not {array.ctypes.data for array in host} & {*addresses.values(), *(output[-1] for output in bound["out"])}
    for layer in range(DIMS.num_layers):
        names = zip(graph_io.past_names(layer), graph_io.present_names(layer), strict=True)
        for past, present in names:
            assert (present, "cpu", 0, np.float32, (2, 4, 256, 8), addresses[past]) in bound["out"]


def test_addresses_stay(copies):
    runner = make()
    addresses = [tensor._value.data_ptr() for tensor in (*runner._inputs.values(), runner._device_next_ids)]
    greedy(runner, 0, prompt(20), 5)
    assert [tensor._value.data_ptr() for tensor in (*runner._inputs.values(), runner._device_next_ids)] == addresses


# Captured graphs.


def capturing_runner(monkeypatch, **fault: Any) -> DeviceRunner:
    make_real = make_session
    monkeypatch.setattr(
        "edge_llm.engine.runner.make_session", lambda *arguments: Capturing(make_real(*arguments), **fault)
    )
    return make(provider=CAPTURING)


def test_each_shape_and_place_is_a_graph_of_its_own_and_prefill_none(monkeypatch):
    runner = capturing_runner(monkeypatch)
    assert runner.session.graph_ids == ["-1", "-1", "1", "1"]  # seen to be right, before anything is answered
    runner.session.graph_ids.clear()
    runner.prefill(0, prompt(5), 0)
    runner.decode(0, [5], [5])
    runner.decode(1, [5], [0])
    runner.decode(0, [5, 6], [6, 1])
    runner.decode(1, [5], [1])
    runner.forward(0, prompt(5), 0, [4])
    assert runner.session.graph_ids == ["-1", "1", "2", "3", "2", "-1"]


def test_more_graphs_than_are_kept_run_without(monkeypatch):
    monkeypatch.setattr(device_runner, "_MAX_GRAPHS", 2)
    runner = capturing_runner(monkeypatch)
    runner.session.graph_ids.clear()
    for slot in (0, 1, 2, 3, 1):
        runner.decode(slot, [5], [0])
    assert runner.session.graph_ids == ["1", "2", "-1", "-1", "2"]


def test_a_graph_that_replays_old_inputs_is_refused(monkeypatch):
    with pytest.raises(ProviderError, match=r"captured decode steps answer otherwise.*enable_cuda_graph = false"):
        capturing_runner(monkeypatch, stale=True)


def test_a_step_that_cannot_be_captured_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(ProviderError, match="cannot be captured, set enable_cuda_graph = false: operation not perm"):
        capturing_runner(monkeypatch, error=RuntimeError("operation not permitted\nwhen stream is capturing"))


@pytest.mark.parametrize(("option", "captures"), [("1", True), ("0", False), (None, False)])
def test_capture_is_the_providers_own_option(option, captures):
    options = {} if option is None else {"enable_cuda_graph": option}
    assert Provider(CUDA, options).captures_graphs is captures


# The cache.


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_move_as_in_the_processors_cache(dtype):
    dims = msgspec.structs.replace(DIMS, max_seq_len=24)
    # An output of the element type is all that is asked of the session.
    path = GRAPH if dtype == "float32" else None
    session = make_session(path, session_options(1)) if path else half_session()
    caches = [KVCache(dims, 3, dtype), DeviceKVCache(session, Device(), dims, 3, dtype)]
    assert caches[0].nbytes == caches[1].nbytes
    assert caches[0].token_nbytes == caches[1].token_nbytes
    rows = np.random.default_rng(0).normal(size=(9, dims.num_layers, 2, 4, 8)).astype(dtype)
    for cache in caches:
        cache.write_rows(1, 3, rows)
        cache.copy_row(1, 2, 8)
        np.testing.assert_array_equal(cache.read_rows(1, 3, 12), rows)
        cache.copy_row(0, 0, 0)
    for slot in range(3):
        np.testing.assert_array_equal(*[cache.read_rows(slot, 0, 24) for cache in caches])
    assert not np.any(caches[1].read_rows(0, 0, 24))


def half_session() -> Any:
    """A session whose outputs are float16 as those of the ``cuda`` form are."""
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info
    shape = ["batch", 4, 24, 8]
    node = onnx.helper.make_node("Identity", ["past_key.0"], ["present_key.0"])
    graph = onnx.helper.make_graph(
        [node],
        "half",
        [value("past_key.0", onnx.TensorProto.FLOAT16, shape)],
        [value("present_key.0", onnx.TensorProto.FLOAT16, shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_only_the_positions_that_are_wanted_are_copied(copies):
    cache = make(slots=2).cache
    copies.clear()
    cache.read_rows(1, 10, 14)
    assert copies["bytes down"] == 4 * cache.token_nbytes
    cache.copy_row(0, 1, 3)
    assert copies["bytes up"] == 3 * cache.token_nbytes


def test_no_room_on_the_device_is_a_providers_error(monkeypatch):
    def refuse(*_arguments: Any) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer\nof size 1")

    monkeypatch.setattr(tensors.ort.OrtValue, "ortvalue_from_shape_and_type", refuse)
    with pytest.raises(ProviderError, match=r"bytes cannot be had on cpu: Failed to allocate memory for .* buffer$"):
        make()


# Which runner a provider gets, and where its tensors are.


@pytest.mark.parametrize(
    ("providers", "options", "device"),
    [
        (["CPUExecutionProvider"], {"device_id": "1"}, Device("cpu", 0)),
        ([CUDA, "CPUExecutionProvider"], {}, Device("cuda", 0)),
        ([TENSORRT, "CPUExecutionProvider"], {"device_id": "1"}, Device("cuda", 1)),
    ],
)
def test_tensors_are_where_the_session_really_runs(providers, options, device):
    session = SimpleNamespace(get_providers=lambda: providers)
    assert tensor_device(session, Provider(CUDA, options)) == device


def test_a_provider_other_than_the_processor_gets_it(monkeypatch, tmp_path):
    graph = TINY.manifest.graph("cpu-int8")
    assert type(runner_maker(graph, GRAPH)(DIMS)) is Runner
    FakeGpu(monkeypatch)
    engine = EngineConfig(
        providers=(CUDA,),
        targets={CUDA: ("cpu-int8",)},
        provider_options={CUDA: {"enable_cuda_graph": True}},
        threads=1,
        slots=1,
    )
    model = load_model(Bundle.open(TINY.path), Config(cache_dir=str(tmp_path), engine=engine))
    assert isinstance(model.engine.runner, DeviceRunner)
    expectation = TINY.manifest.expectation
    answer = list(model.engine.generate(expectation.prompt_token_ids, max_tokens=len(expectation.token_ids)))
    assert answer == list(expectation.token_ids)


@pytest.mark.parametrize("form", ["scatter", "primitive"])
def test_a_static_form_on_the_device_answers_as_on_the_processor(form, monkeypatch, tmp_path: Path):
    pytest.importorskip("onnx")
    from edge_llm.engine.static_runner import StaticPaths
    from export.graphs import build_graph
    from tests.engine.test_static_runner import FORMATS
    from tests.generate_tiny_bundle import tiny_checkpoint

    decode = build_graph(tiny_checkpoint(), FORMATS[form], DIMS, tmp_path / form)
    paths = StaticPaths(decode, decode.with_name("prefill.onnx"))
    monkeypatch.setattr(
        "edge_llm.engine.static_runner.make_session", lambda path, options, _provider: make_session(path, options)
    )
    own, other = (StaticRunner(paths, DIMS, slots=2, threads=1, provider=p) for p in (Provider(TENSORRT), Provider()))
    assert isinstance(own.cache, DeviceKVCache)
    assert not isinstance(other.cache, DeviceKVCache)
    token_ids = prompt(150)
    assert greedy(own, 1, token_ids, 24) == greedy(other, 1, token_ids, 24)
    np.testing.assert_array_equal(*[runner.cache.read_rows(1, 0, 173) for runner in (own, other)])
