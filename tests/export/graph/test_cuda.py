"""The ``cuda`` form on the CPU provider: float16 around the integers of ``cpu-int8``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from edge_llm.bundle import graph_io
from edge_llm.engine.runner import Runner
from export.checkpoints import load_checkpoint
from export.errors import ExportError
from export.graph.weights import cpu_int8, cuda
from export.graphs import build_graph, describe_graph, estimated_bytes
from export.quantize import dequantize, pad_rows, quantize
from export.tensors import MemoryTensors
from tests.export.graph.conftest import CONFIGS, Built
from tests.export.models import gpt2_config, random_ids, random_model, save
from tests.export.test_parity import expected_logits, relative_error

Get = Callable[[str], Built]
PROMPT = random_ids(23)
VOCAB_SIZE = 400
PADDED = 448


def runner(graphs: Built, slots: int = 1) -> Runner:
    return Runner(graphs.path("cuda"), graphs.dims, slots=slots, kv_dtype="float16")


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_close_to_transformers(kind: str, built: Get) -> None:
    graphs = built(kind)
    expected = expected_logits(graphs.model, PROMPT)
    own = runner(graphs)
    whole = own.forward(0, PROMPT, 0, range(len(PROMPT)))
    assert whole.dtype == np.float32
    assert whole.shape == (len(PROMPT), VOCAB_SIZE)
    assert relative_error(whole, expected) < 0.03
    for start, end in ((0, 5), (5, 6), (6, len(PROMPT))):
        chunk = own.forward(0, PROMPT[start:end], start, [end - start - 1])
        assert relative_error(chunk[0], expected[end - 1]) < 0.04
    token_id = own.prefill(0, PROMPT, 0)
    own.decode(0, [token_id], [len(PROMPT)])
    assert relative_error(own.logits(0), expected_logits(graphs.model, [*PROMPT, token_id])[-1]) < 0.04


def loaded(path: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_holds_the_integers_of_cpu_int8(kind: str, built: Get) -> None:
    graphs = built(kind)
    int8, own = loaded(graphs.path("cpu-int8")), loaded(graphs.path("cuda"))
    table = "lm_head" if "untied" in kind else {"gpt2": "wte", "llama": "embed_tokens"}[kind]
    linear = [
        name for name in int8 if name.endswith(".blocks") and "lm_head" not in name and name[:3] not in ("wte", "emb")
    ]
    assert len(linear) == 8
    for name in linear:
        np.testing.assert_array_equal(own[name], int8[name])
        scales = name.replace(".blocks", ".scales")
        assert own[scales].dtype == np.float16
        np.testing.assert_allclose(own[scales], int8[scales], rtol=2**-10)
    head = own["lm_head.blocks"]
    assert len(head) == PADDED
    np.testing.assert_array_equal(head[:VOCAB_SIZE], int8[f"{table}.blocks"])
    assert (head[VOCAB_SIZE:] == 128).all()
    assert not [name for name, array in own.items() if array.dtype == np.float32]


def test_a_vocabulary_that_fits_is_not_cut(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(save(random_model(gpt2_config(vocab_size=PADDED)), tmp_path / "model")))
    dims = checkpoint.architecture.dims(32)
    path = build_graph(checkpoint, cuda(), dims, tmp_path / "graph")
    assert "Slice" not in {node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node}
    assert Runner(path, dims, kv_dtype="float16").forward(0, PROMPT, 0, [3, 4]).shape == (2, PADDED)


def test_padding_never_wins(tmp_path: Path) -> None:
    """Where every real logit is negative, a row of zeros would be the best."""
    model = random_model(gpt2_config())
    model.transformer.ln_f.weight.data[:] = 0
    model.transformer.ln_f.bias.data[:] = 1
    model.transformer.wte.weight.data.abs_().neg_()
    checkpoint = load_checkpoint(str(save(model, tmp_path / "model")))
    dims = checkpoint.architecture.dims(32)
    own = Runner(build_graph(checkpoint, cuda(), dims, tmp_path / "graph"), dims, kv_dtype="float16")
    token_id = own.prefill(0, PROMPT, 0)
    assert own.logits(0).max() < 0
    assert token_id == own.logits(0).argmax()


class ConstantTotal(Runner):
    """Feeds ``total_sequence_length`` as a CUDA graph needs it: always the maximum."""

    def _bind_prefill(self, slot: int, token_ids: Sequence[int], past_len: int, logit_indices: Sequence[int]) -> Any:
        binding = super()._bind_prefill(slot, token_ids, past_len, logit_indices)
        binding.bind_cpu_input(graph_io.TOTAL_SEQUENCE_LENGTH, np.asarray(self.dims.max_seq_len, np.int32))
        return binding

    def _bind_decode(self, first_slot: int, batch: int) -> Any:
        binding = super()._bind_decode(first_slot, batch)
        binding.bind_cpu_input(graph_io.TOTAL_SEQUENCE_LENGTH, np.asarray(self.dims.max_seq_len, np.int32))
        return binding


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_constant_total_changes_no_bit(kind: str, built: Get) -> None:
    """First and later chunks of a prefill, a single token into an empty cache, and a batch of unequal rows."""
    graphs = built(kind)
    own = [made(graphs.path("cuda"), graphs.dims, slots=3, kv_dtype="float16") for made in (Runner, ConstantTotal)]
    for start, end in ((0, 6), (6, 7), (7, len(PROMPT))):
        chunk = [one.forward(1, PROMPT[start:end], start, range(end - start)) for one in own]
        np.testing.assert_array_equal(*chunk)
    np.testing.assert_array_equal(*[one.forward(0, PROMPT[:1], 0, [0]) for one in own])
    for step in range(12):
        lengths = [1 + step, len(PROMPT) + step]
        tokens = [one.decode(0, PROMPT[step : step + 2], lengths).tolist() for one in own]
        assert tokens[0] == tokens[1]
        for row in range(2):
            np.testing.assert_array_equal(*[one.logits(row) for one in own])
    for ours, theirs in zip(own[0].cache.layers, own[1].cache.layers, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("total", "fails"), [(6, False), (64, True)])
def test_several_tokens_of_several_rows_need_the_true_total(total: int, fails: bool, built: Get) -> None:
    """The one call that a constant total spoils; the engine prefills one row at a time."""
    graphs = built("llama")
    session = onnxruntime.InferenceSession(str(graphs.path("cuda")), providers=["CPUExecutionProvider"])
    empty = np.zeros((2, 2, 64, 16), np.float16)
    feed = {name: empty for layer in range(2) for name in graph_io.past_names(layer)} | {
        graph_io.INPUT_IDS: np.asarray([PROMPT[:6]] * 2),
        graph_io.SEQLENS_K: np.asarray([5, 5], np.int32),
        graph_io.TOTAL_SEQUENCE_LENGTH: np.asarray(total, np.int32),
        graph_io.LOGIT_INDICES: np.asarray([5]),
    }
    if fails:
        with pytest.raises(Exception, match="batch_size must be 1"):
            session.run([graph_io.NEXT_TOKEN_IDS], feed)
    else:
        assert len(set(session.run([graph_io.NEXT_TOKEN_IDS], feed)[0].ravel())) == 1


def test_the_cache_is_float16_and_appended_in_place(built: Get) -> None:
    own = runner(built("llama"), slots=2)
    own.prefill(1, PROMPT, 0)
    for pair in own.cache.layers:
        for buffer in pair:
            assert buffer.dtype == np.float16
            assert np.any(buffer[1, :, len(PROMPT) - 1])
            assert not np.any(buffer[0])
            assert not np.any(buffer[1, :, len(PROMPT) :])


def test_a_weight_that_float16_cannot_hold_is_named(built: Get, tmp_path: Path) -> None:
    graphs = built("gpt2")
    arrays = {name: graphs.checkpoint.tensors.read(name) for name in graphs.checkpoint.tensors.shapes}
    arrays["h.1.ln_2.bias"] = arrays["h.1.ln_2.bias"] + np.float32(7e4)
    checkpoint = replace(graphs.checkpoint, tensors=MemoryTensors(arrays))
    with pytest.raises(ExportError, match=r"'h\.1\.ln_2\.bias' has values up to 7e\+04"):
        build_graph(checkpoint, cuda(), graphs.dims, tmp_path / "graph")


def test_the_manifest_says_what_it_is(built: Get) -> None:
    dims = built("gpt2").dims
    described = describe_graph(cuda(block_size=32), dims)
    assert (described.target, described.bits, described.block_size) == ("cuda", 8, 32)
    assert (described.kv_dtype, described.opset) == ("float16", 20)
    assert describe_graph(cpu_int8(), dims).opset == 21


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_estimate_covers_the_file(kind: str, built: Get) -> None:
    graphs = built(kind)
    size = graphs.path("cuda").with_name("model.onnx.data").stat().st_size
    pages = 4096 * len(onnx.load(str(graphs.path("cuda")), load_external_data=False).graph.initializer)
    assert estimated_bytes(graphs.checkpoint, cuda(), graphs.dims) + pages > size


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_padding_are_zeros(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    quantized = quantize(weight, bits, 16)
    padded = pad_rows(quantized, 8)
    np.testing.assert_array_equal(dequantize(padded)[:5], dequantize(quantized))
    assert not dequantize(padded)[5:].any()
    assert pad_rows(quantized, 5) is quantized
