"""Whole exports through the command, and what stands in the bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.engine.runner import Runner
from tests.export.gguf_files import Q8_0, write_gguf
from tests.export.models import gpt2_config, llama_config, random_model

Command = Callable[..., tuple[int, Path]]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bundle_is_complete_and_keeps_its_promise(
    family: str, request: pytest.FixtureRequest, export_command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    flags = ("--target", "cpu-int8,cpu-fp32", "--context", "64", "--verify", "hf", "--bundle-version", "2.1")
    status, out = export_command(folder, *flags)
    assert status == 0
    assert f"edge-llm serve --bundle {out}" in capsys.readouterr().out
    bundle = Bundle.open(out)
    bundle.verify()
    manifest = bundle.manifest
    assert manifest.name == f"little-{family}"
    assert manifest.version == "2.1"
    assert manifest.model.max_seq_len == 64
    assert [graph.target for graph in manifest.graphs] == ["cpu-int8", "cpu-fp32"]
    assert manifest.prompt.special_tokens == ("<|im_start|>", "<|im_end|>")
    # Nothing but what the manifest names.
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {entry.path for entry in manifest.files} | {"manifest.json"}
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    report = json.loads((out / "quality.json").read_text())
    assert report["reference"] == "cpu-fp32 graph, float32 weights"
    assert report["text"].keys() == {"file", "sha256", "tokens"}
    assert report["text"]["file"] == "text.txt"
    assert report["text"]["tokens"] > 100
    assert report["transformers"]["greedy_tokens_equal"] >= 32
    quality = report["graphs"][0]
    assert quality["perplexity_ratio"] == manifest.quality[0].perplexity_ratio
    assert 0.9 < quality["perplexity_ratio"] < 1.1
    assert quality["top1_agreement"] > 0.8
    assert 0 < quality["mean_kl"] < 0.05

    runner = Runner(out / manifest.graphs[0].file, manifest.model)
    prompt = list(manifest.expectation.prompt_token_ids)
    answer = [runner.prefill(0, prompt, 0)]
    while len(answer) < len(manifest.expectation.token_ids):
        answer.append(int(runner.decode(0, answer[-1:], [len(prompt) + len(answer) - 1])[0]))
    assert tuple(answer) == manifest.expectation.token_ids


def test_graph_explains_itself(gpt2_folder: Path, export_command: Command) -> None:
    _, out = export_command(gpt2_folder, "--context", "32")
    model = onnx.load(str(out / "graphs/cpu-int8/model.onnx"))
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["exporter"].startswith("edge_llm ")
    assert properties["target"] == "cpu-int8"
    assert properties["source"] == "folder little-gpt2"
    assert model.ir_version == 10
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", 21), ("com.microsoft", 1)}
    assert model.graph.doc_string
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes["past_key.0"] == shapes["present_value.1"] == ["batch", 3, 32, 16]
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch", "seq"]
    assert shapes["logit_indices"] == ["n"]
    assert shapes["logits"] == ["batch", "n", 400]
    assert shapes["next_token_ids"] == ["batch", "n"]
    operators = {node.op_type for node in model.graph.node}
    assert {
        "MatMulNBits",
        "GroupQueryAttention",
        "SkipLayerNormalization",
        "FastGelu",
        "GatherBlockQuantized",
    } < operators
    assert "MatMul" not in operators


def test_tied_embedding_is_stored_once(gpt2_folder: Path, export_command: Command) -> None:
    _, out = export_command(gpt2_folder, "--target", "cpu-int8", "--target", "cpu-fp32")
    for target in ("cpu-int8", "cpu-fp32"):
        model = onnx.load(str(out / f"graphs/{target}/model.onnx"), load_external_data=False)
        large = [tensor.name for tensor in model.graph.initializer if np.prod(tensor.dims) == 400 * 48]
        assert len(large) == 1


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_four_bits_need_a_looser_limit_and_say_so(
    source: str, llama_folder: Path, export_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama_folder
    if source == "gguf":
        model = write_gguf(tmp_path / "m.gguf", random_model(llama_config()), "llama", matrix_type=Q8_0)
    status, out = export_command(model, "--bits", "4", "--max-perplexity-ratio", "0.9")
    assert status == 2
    assert "accept it with --max-perplexity-ratio" in capsys.readouterr().err
    assert not out.exists()
    status, _ = export_command(model, "--bits", "4", "--block", "16", "--max-perplexity-ratio", "3")
    assert status == 0
    manifest = Bundle.open(out).manifest
    assert manifest.graphs[0].bits == 4
    assert manifest.graphs[0].block_size == 16
    assert manifest.quality[0].max_perplexity_ratio == 3
    assert manifest.reference == ("dequantised from Q8_0" if source == "gguf" else "float32 weights")


def test_gguf_is_verified_against_transformers(export_command: Command, tmp_path: Path) -> None:
    for architecture, config in (("llama", llama_config()), ("gpt2", gpt2_config(n_head=4, n_embd=64))):
        path = write_gguf(tmp_path / f"{architecture}.gguf", random_model(config), architecture, matrix_type=Q8_0)
        status, out = export_command(path, "--target", "cpu-fp32", "--verify", "hf")
        assert status == 0
        assert json.loads((out / "quality.json").read_text())["transformers"]["greedy_tokens_equal"] >= 32
        for file in sorted(out.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()


def test_a_wrong_graph_fails_the_comparison_with_transformers(
    gpt2_folder: Path, export_command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.architectures.gpt2.Gpt2Config._attention_scale", lambda *_: 0.3)
    status, out = export_command(gpt2_folder, "--verify", "hf")
    assert status == 2
    assert "differ from transformers'" in capsys.readouterr().err
    assert not out.parent.exists()


def test_neither_torch_nor_transformers_for_safetensors_and_gguf(llama_folder: Path, tmp_path: Path) -> None:
    gguf_path = write_gguf(tmp_path / "m.gguf", random_model(llama_config()), "llama")
    text = tmp_path / "text.txt"
    text.write_text("Enough words to compare with. " * 20)
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'optimum'): sys.modules[name] = None\n"
        "from export.cli import main\n"
        f"for number, model in enumerate([{str(llama_folder)!r}, {str(gguf_path)!r}]):\n"
        f"    arguments = ['bundle', model, '--out', {str(tmp_path)!r} + '/out' + str(number)]\n"
        f"    status = main([*arguments, '--verify-text', {str(text)!r}, '--max-perplexity-ratio', '1.1'])\n"
        "    if status: sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
