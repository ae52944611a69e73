"""--ship-prefix: the bundle brings what its engine would compute for the head of every prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_llm.bundle import prefix_file
from edge_llm.bundle.manifest import TOKENIZER_FILE, Bundle, Manifest, decode_manifest, encode_manifest
from edge_llm.bundle.prefix_file import PrefixKV, read_prefix_file, shipped_prefix_key
from edge_llm.engine.engine import Engine
from edge_llm.engine.prompt import Message, PromptRenderer
from edge_llm.engine.runner import Runner
from edge_llm.engine.sampler import SamplingParams
from edge_llm.engine.tokenizer import Tokenizer
from edge_llm.errors import BundleIntegrityError, ManifestError
from export.graph.weights import CPU_FP32, cpu_int8
from export.pipeline import ExportOptions, export_checkpoint
from export.verify import DEFAULT_TEXT
from tests.generate_tiny_bundle import tiny_checkpoint
from tests.paths import TINY_BUNDLE

Command = Callable[..., tuple[int, Path]]
TARGETS = ("cpu-int8", "cpu-fp32")


def export_tiny(out: Path, template: str | None = None, context: int | None = None) -> Bundle:
    checkpoint = tiny_checkpoint()
    if template is not None:
        checkpoint = replace(checkpoint, chat=replace(checkpoint.chat, template=template))
    options = ExportOptions(
        out=out,
        targets=(cpu_int8(), CPU_FP32),
        verify_text=DEFAULT_TEXT,
        max_perplexity_ratio=1.05,
        context=context,
        ship_prefix=True,
    )
    export_checkpoint(checkpoint, options)
    return Bundle.open(out)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle, with its prefix."""
    return export_tiny(tmp_path_factory.mktemp("shipped") / "bundle")


def renderer(bundle: Bundle) -> PromptRenderer:
    tokenizer = Tokenizer.from_file(bundle.verified_path(TOKENIZER_FILE))
    return PromptRenderer(bundle.manifest.prompt, tokenizer)


def shipped(bundle: Bundle, target: str) -> PrefixKV:
    """As a device reads it."""
    graph = bundle.manifest.graph(target)
    assert graph.prefix_file is not None
    path = bundle.verified_path(graph.prefix_file)
    return read_prefix_file(path, shipped_prefix_key(bundle.manifest, target), bundle.manifest.model, graph.kv_dtype)


def computed(bundle: Bundle, target: str, prompt: list[int], chunk: int) -> NDArray[np.floating]:
    """``(tokens, layers, 2, kv_heads, head_dim)``, read from the cache's own buffers."""
    runner = Runner(bundle.path / bundle.manifest.graph(target).file, bundle.manifest.model)
    engine = Engine(runner, [], prefill_chunk=chunk)
    state = engine.start(prompt, SamplingParams(), max_tokens=1)
    while not state.prefilled:
        engine.prefill(state)
    layers = [[part[state.slot, :, : len(prompt)] for part in pair] for pair in runner.cache.layers]
    return np.asarray(layers).transpose(3, 0, 1, 2, 4)


@pytest.mark.parametrize("target", TARGETS)
def test_it_holds_the_head_of_every_prompt(bundle: Bundle, target: str) -> None:
    bundle.verify()
    prefix = shipped(bundle, target)
    prompts = renderer(bundle)
    assert list(prefix.token_ids) == prompts.shared_prefix()
    assert len(prefix.token_ids) > 10
    for words in ("Where am I?", "you are", " ", "\n\n", "1234", "Grüße", "<|im_end|>"):
        prompt = prompts.encode([Message("user", words)])
        assert tuple(prompt[: len(prefix.token_ids)]) == prefix.token_ids


@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.parametrize("target", TARGETS)
def test_its_values_are_bit_for_bit_those_of_a_prompt_that_goes_on(bundle: Bundle, target: str, chunk: int) -> None:
    prefix = shipped(bundle, target)
    prompt = renderer(bundle).encode([Message("user", "What is the range of the car at 20 °C?")])
    cold = computed(bundle, target, prompt, chunk)[: len(prefix.token_ids)]
    assert prefix.kv.dtype == np.float32
    np.testing.assert_array_equal(prefix.kv, cold)
    assert np.abs(prefix.kv).max() > 0.1


@pytest.mark.parametrize("target", TARGETS)
def test_an_answer_after_it_is_the_cold_one(bundle: Bundle, target: str) -> None:
    prefix = shipped(bundle, target)
    prompt = renderer(bundle).encode([Message("user", "Tell me about the museum.")])
    runner = Runner(bundle.path / bundle.manifest.graph(target).file, bundle.manifest.model)
    cold = list(Engine(runner, []).generate(prompt, max_tokens=24))
    warm_runner = Runner(bundle.path / bundle.manifest.graph(target).file, bundle.manifest.model)
    for layer, pair in enumerate(warm_runner.cache.layers):
        for part, buffer in enumerate(pair):
            buffer[0, :, : len(prefix.token_ids)] = prefix.kv[:, layer, part].transpose(1, 0, 2)
    engine = Engine(warm_runner, [])
    state = engine.start(prompt, SamplingParams(), max_tokens=24)
    state.cached_len = len(prefix.token_ids)
    while not state.prefilled:
        engine.prefill(state)
    while not state.finished:
        engine.decode([state])
    assert state.output_ids == cold


def test_each_target_has_its_own_file_listed_with_its_hash(bundle: Bundle) -> None:
    paths = [entry.path for entry in bundle.manifest.files]
    assert paths[-2:] == [f"graphs/{target}/prefix.kv" for target in TARGETS]
    files = {str(path.relative_to(bundle.path)) for path in bundle.path.rglob("*") if path.is_file()}
    assert files == {*paths, "manifest.json"}
    assert shipped(bundle, "cpu-int8").kv.tobytes() != shipped(bundle, "cpu-fp32").kv.tobytes()


def test_a_damaged_file_is_found_like_every_other(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy"))
    path = copy.path / "graphs/cpu-int8/prefix.kv"
    raw = bytearray(path.read_bytes())
    raw[-50] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BundleIntegrityError, match=r"prefix\.kv does not match"):
        copy.verify()


def test_the_command_ships_it_for_both_families(
    gpt2_folder: Path, llama_folder: Path, export_command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, heads in ((gpt2_folder, 3), (llama_folder, 2)):
        status, out = export_command(folder, "--ship-prefix", "--context", "64")
        assert status == 0
        opened = Bundle.open(out)
        opened.verify()
        assert shipped(opened, "cpu-int8").kv.shape[1:] == (2, 2, heads, 16)
        assert "prefix" not in capsys.readouterr().err
        for file in sorted(out.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()


def test_without_the_flag_there_is_none(gpt2_folder: Path, export_command: Command) -> None:
    status, out = export_command(gpt2_folder)
    assert status == 0
    assert not list(out.rglob("prefix.kv"))
    # Devices that do not know the field read such a manifest, too.
    assert "prefix_file" not in (out / "manifest.json").read_text()


def test_prompts_without_a_common_head_get_a_note_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{{ '<|im_end|>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    )
    bundle = export_tiny(tmp_path / "bundle", template)
    assert renderer(bundle).shared_prefix() == []
    assert bundle.manifest.graph("cpu-int8").prefix_file is None
    assert not list(bundle.path.rglob("prefix.kv"))
    notes = [line for line in capsys.readouterr().err.splitlines() if "note:" in line]
    assert notes == ["note: the prompts of this template have no head in common, so no prefix is shipped"]


def test_a_head_that_does_not_fit_gets_a_note_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = export_tiny(tmp_path / "bundle", context=16)
    assert not list(bundle.path.rglob("prefix.kv"))
    assert "the context 16: no prefix is shipped" in capsys.readouterr().err


def test_a_disk_that_is_full_at_that_moment_leaves_nothing(
    gpt2_folder: Path, export_command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_file.os, "write", no_space)
    status, out = export_command(gpt2_folder, "--ship-prefix")
    assert status == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert not out.parent.exists()


class TestManifest:
    """``Graph.prefix_file`` is optional, and a file like every other."""

    old: Manifest = Bundle.open(TINY_BUNDLE).manifest

    def test_an_old_manifest_loads_and_is_written_as_it_was(self) -> None:
        raw = (TINY_BUNDLE / "manifest.json").read_bytes()
        assert [graph.prefix_file for graph in self.old.graphs] == [None, None]
        assert encode_manifest(self.old) == raw

    def test_it_is_kept(self, bundle: Bundle) -> None:
        assert decode_manifest(encode_manifest(bundle.manifest)) == bundle.manifest

    def test_a_file_that_is_not_listed_is_refused(self) -> None:
        raw = json.loads(msgspec.json.encode(self.old))
        raw["graphs"][0]["prefix_file"] = "graphs/cpu-int8/prefix.kv"
        with pytest.raises(ManifestError, match=r"uses the file 'graphs/cpu-int8/prefix\.kv' but does not list it"):
            decode_manifest(json.dumps(raw).encode())
