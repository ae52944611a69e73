"""The runner of the static forms, on the tiny bundle's model: it keeps to ``Runner``'s contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

# The graphs are built here: the runtime's own environment has no onnx, and needs none.
pytest.importorskip("onnx")

from edge_llm.bundle import graph_io
from edge_llm.device.session import session_options
from edge_llm.engine import static_runner
from edge_llm.engine.engine import Engine
from edge_llm.engine.runner import Runner
from edge_llm.engine.sampler import SamplingParams
from edge_llm.engine.static_runner import StaticPaths, StaticRunner
from edge_llm.errors import ContextOverflowError, ProviderError
from export.graph.weights import tensorrt, tensorrt_primitive
from export.graphs import build_graph
from tests.engine.test_runner import DIMS, TINY, greedy, prompt
from tests.generate_tiny_bundle import tiny_checkpoint

FORMATS = {"scatter": tensorrt("float32"), "primitive": tensorrt_primitive("float32")}
CHUNK = 64


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> dict[str, StaticPaths]:
    folder, checkpoint = tmp_path_factory.mktemp("static"), tiny_checkpoint()
    paths = {}
    for form, weights in FORMATS.items():
        decode = build_graph(checkpoint, weights, DIMS, folder / form)
        paths[form] = StaticPaths(decode, decode.with_name("prefill.onnx"))
    return paths


@pytest.fixture(params=FORMATS)
def paths(request, graphs) -> StaticPaths:
    return graphs[request.param]


def make(paths: StaticPaths, **settings: Any) -> StaticRunner:
    return StaticRunner(paths, DIMS, threads=1, **settings)


def reference() -> Runner:
    return Runner(TINY.path / TINY.manifest.graph("cpu-fp32").file, DIMS, threads=1)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 150])
def test_prompts_of_every_length_are_answered_as_the_other_form_answers(paths, length):
    assert greedy(make(paths), 0, prompt(length), 24) == greedy(reference(), 0, prompt(length), 24)


@pytest.mark.parametrize("chunk", [2, 5, 64, 100])
def test_chunked_prefill_equals_one_run(paths, chunk):
    runner, token_ids = make(paths, slots=2), prompt(150)
    whole = runner.forward(0, token_ids, 0, [149])[0]
    for start in range(0, 150, chunk):
        part = token_ids[start : start + chunk]
        last = runner.forward(1, part, start, [len(part) - 1])[0]
    np.testing.assert_allclose(last, whole, atol=1e-4)


def test_forward_returns_the_chosen_rows(paths):
    runner, token_ids = make(paths), prompt(150)
    expected = reference().forward(0, token_ids, 0, range(150))
    for wanted in (range(150), [149, 2, 64, 63, 2], []):
        rows = runner.forward(0, token_ids, 0, wanted)
        assert rows.shape == (len(wanted), DIMS.vocab_size)
        np.testing.assert_allclose(rows, expected[list(wanted)], atol=1e-4)


def test_padding_is_never_seen_again(paths):
    """What a padded chunk leaves behind the valid positions makes no difference to the bits of what follows."""
    clean, dirty = (make(paths) for _ in range(2))
    token_ids = prompt(10)
    clean.prefill(0, token_ids, 0)
    dirty.prefill(0, prompt(50, seed=7), 0)  # longer, so that its rows and its padding lie where the next ones go
    dirty.prefill(0, token_ids, 0)
    for pair in clean.cache.layers:
        for buffer in pair:
            buffer[0, :, 10:] = 0
    for pair in dirty.cache.layers:
        for buffer in pair:
            buffer[0, :, 10:] = 50.0
    for past_len in range(10, 40):
        clean.decode(0, [5], [past_len])
        dirty.decode(0, [5], [past_len])
        np.testing.assert_array_equal(clean.logits(0), dirty.logits(0))
    np.testing.assert_array_equal(*(one.forward(0, prompt(20, seed=3), 40, range(20)) for one in (clean, dirty)))


def test_a_primitive_graph_leaves_nothing_but_valid_rows(graphs):
    runner = make(graphs["primitive"])
    runner.prefill(0, prompt(10), 0)
    for pair in runner.cache.layers:
        for buffer in pair:
            assert np.all(buffer[0, :, :10] != 0)
            assert not np.any(buffer[0, :, 10:])


def test_a_slot_touches_no_other(paths):
    runner = make(paths, slots=3)
    for pair in runner.cache.layers:
        for buffer in pair:
            buffer[:] = 7.0
    assert greedy(runner, 1, prompt(20), 10) == greedy(reference(), 0, prompt(20), 10)
    for pair in runner.cache.layers:
        for buffer in pair:
            assert np.all(buffer[[0, 2]] == 7.0)


def test_neighbouring_slots_decode_as_each_alone(paths):
    lengths = (10, 37, 64)
    solo = [greedy(make(paths), 0, prompt(length, seed=length), 16) for length in lengths]
    runner = make(paths, slots=4)
    answers = [[runner.prefill(slot + 1, prompt(length, seed=length), 0)] for slot, length in enumerate(lengths)]
    for step in range(15):
        past_lens = [length + step for length in lengths]
        for answer, token_id in zip(answers, runner.decode(1, [a[-1] for a in answers], past_lens), strict=True):
            answer.append(int(token_id))
        assert [int(runner.logits(row).argmax()) for row in range(3)] == [answer[-1] for answer in answers]
    assert answers == solo


def test_the_context_can_be_filled_to_its_end(paths):
    """A padded chunk has no room there: the last tokens go one by one."""
    runner, token_ids = make(paths), prompt(DIMS.max_seq_len)
    last = runner.forward(0, token_ids, 0, [DIMS.max_seq_len - 1])[0]
    np.testing.assert_allclose(last, reference().forward(0, token_ids, 0, [DIMS.max_seq_len - 1])[0], atol=1e-4)
    assert runner.prefill(0, token_ids[200:], 200) == last.argmax()
    assert runner.decode(0, token_ids[-1:], [DIMS.max_seq_len - 1])[0] == last.argmax()


def test_a_full_slot_is_an_error_before_anything_runs(paths):
    runner = make(paths, context=100)
    with pytest.raises(ContextOverflowError, match="slot is full: 100 of 100"):
        runner.decode(0, [5], [100])
    for call in (runner.prefill, lambda *arguments: runner.forward(*arguments, [0])):
        with pytest.raises(ContextOverflowError, match="91 \\+ 10 tokens do not fit into 100"):
            call(0, prompt(10), 91)
    assert not any(np.any(buffer) for pair in runner.cache.layers for buffer in pair)


def test_a_step_of_scatter_writes_in_place(graphs):
    runner = make(graphs["scatter"])
    runner.prefill(0, prompt(100), 0)
    addresses = [buffer.ctypes.data for pair in runner.cache.layers for buffer in pair]
    before = [buffer[0, :, :100].copy() for pair in runner.cache.layers for buffer in pair]
    runner.decode(0, [5], [100])
    after = [buffer for pair in runner.cache.layers for buffer in pair]
    assert [buffer.ctypes.data for buffer in after] == addresses
    for old, buffer in zip(before, after, strict=True):
        np.testing.assert_array_equal(buffer[0, :, :100], old)
        assert np.any(buffer[0, :, 100])


def test_no_step_of_scatter_copies_the_cache(graphs, monkeypatch, capfd):
    """ONNX Runtime warns of each copy, if it is let."""

    def talkative(threads: int) -> Any:
        options = session_options(threads)
        options.log_severity_level = 2
        return options

    monkeypatch.setattr(static_runner, "session_options", talkative)
    runner = make(graphs["scatter"], slots=2)
    runner.decode(1, [runner.prefill(1, prompt(20), 0)], [20])
    assert "in-place" not in capfd.readouterr().err


def test_the_engine_runs_it(paths):
    engine = Engine(make(paths, slots=3), [], prefill_chunk=48)
    prompts = [prompt(length, seed=length) for length in (20, 70, 40)]
    solo = [list(engine.generate(token_ids, max_tokens=20)) for token_ids in prompts]
    states = [engine.start(token_ids, SamplingParams(), 20) for token_ids in prompts]
    for state in states:
        while not state.prefilled:
            engine.prefill(state)
    for _ in range(5):
        engine.decode(states)
    engine.release(states.pop(0))
    while not states[0].finished:
        engine.decode(states)
    assert [state.output_ids for state in states] == solo[1:]


def test_it_tells_its_chunk_and_sessions(paths):
    runner = make(paths)
    assert runner.prefill_chunk == CHUNK
    assert runner.session is runner.sessions[0]
    shapes = [{node.name: node.shape for node in session.get_inputs()} for session in runner.sessions]
    assert [shape[graph_io.INPUT_IDS] for shape in shapes] == [[1, 1], [1, CHUNK]]


def test_a_missing_prefill_graph_is_refused(paths, tmp_path: Path):
    with pytest.raises(ProviderError, match="cannot load"):
        make(StaticPaths(paths.decode, tmp_path / "prefill.onnx"))
