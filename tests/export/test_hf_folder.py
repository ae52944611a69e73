"""Hugging Face folders: every way weights are stored, and what the small files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_llm.bundle.manifest import GenerationDefaults
from export.checkpoints import load_checkpoint
from export.errors import ExportError
from tests.export.models import gpt2_config, llama_config, random_model, save


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def save_bin(model: Any, folder: Path, **options: Any) -> Path:
    """As transformers saved until safetensors came."""
    import torch

    save(model, folder, **options)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_pytorch_model_bin(tmp_path: Path) -> None:
    model = random_model(gpt2_config())
    checkpoint = load_checkpoint(str(save_bin(model, tmp_path / "m")))
    np.testing.assert_array_equal(checkpoint.tensors.read("wte.weight"), model.transformer.wte.weight.detach().numpy())
    assert checkpoint.reference == "float32 weights"


def test_pytorch_model_bin_without_the_head_prefix(tmp_path: Path) -> None:
    import torch

    model = random_model(gpt2_config())
    folder = save_bin(model, tmp_path / "m")
    torch.save(model.transformer.state_dict(), folder / "pytorch_model.bin")
    assert load_checkpoint(str(folder)).tensors.read("h.0.ln_1.bias").shape == (48,)


def test_pytorch_model_bin_runs_no_code(tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = save_bin(random_model(gpt2_config()), tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Bomb()}))
    with pytest.raises(ExportError, match="not plain weights"):
        load_checkpoint(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_stored_types(dtype: str, tmp_path: Path) -> None:
    import torch

    model = random_model(llama_config()).to(getattr(torch, dtype))
    checkpoint = load_checkpoint(str(save(model, tmp_path / "m")))
    values = model.state_dict()["model.layers.1.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_array_equal(checkpoint.tensors.read("layers.1.mlp.up_proj.weight"), values)
    assert checkpoint.reference == f"{dtype} weights"


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = random_model(llama_config())
    folder = save(model, tmp_path / "m", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    checkpoint = load_checkpoint(str(folder))
    np.testing.assert_array_equal(checkpoint.tensors.read("norm.weight"), model.model.norm.weight.detach().numpy())
    sorted(folder.glob("*-of-*.safetensors"))[1].unlink()
    with pytest.raises(ExportError, match="lacks model-00002-of"):
        load_checkpoint(str(folder))


def test_index_may_only_name_its_neighbours(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2_folder, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../secret.safetensors"}}')
    with pytest.raises(ExportError, match="not beside it"):
        load_checkpoint(str(folder))


def test_licence_and_generation_defaults(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2_folder, tmp_path / "m")
    assert load_checkpoint(str(folder)).license == "unknown"
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\nlicense: other\n")
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "eos_token_id": [2, 7]}
    edit_json(folder / "generation_config.json", **settings)
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint.license == "mit"
    assert checkpoint.generation == GenerationDefaults(temperature=0.7, top_p=0.9, top_k=40)
    assert checkpoint.eos_token_ids == (2, 7, 0)
    edit_json(folder / "generation_config.json", do_sample=False)
    assert load_checkpoint(str(folder)).generation == GenerationDefaults()
    edit_json(folder / "generation_config.json", do_sample=True, temperature=-1)
    with pytest.raises(ExportError, match=r"generation_config.json: .*temperature"):
        load_checkpoint(str(folder))


def test_vocab_and_merges_without_tokenizer_json(gpt2_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = shutil.copytree(gpt2_folder, tmp_path / "m")
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    original.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    made = Tokenizer.from_str(load_checkpoint(str(folder)).tokenizer_json)
    text = "Hello, Größe 123!"
    assert made.encode(text).ids == original.encode(text).ids
    assert made.encode("a<|endoftext|>").ids[-1] == 0
    (folder / "merges.txt").write_text("#version: 0.2\nno-pair\n")
    with pytest.raises(ExportError, match="malformed"):
        load_checkpoint(str(folder))


def test_truncation_and_padding_are_dropped(gpt2_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = shutil.copytree(gpt2_folder, tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    made = Tokenizer.from_str(load_checkpoint(str(folder)).tokenizer_json)
    assert 4 < len(made.encode("one two three four five six").ids) < 64


def test_chat_template_file_comes_first(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2_folder, tmp_path / "m")
    (folder / "chat_template.jinja").write_text("from the file")
    edit_json(folder / "tokenizer_config.json", chat_template="from the config")
    assert load_checkpoint(str(folder)).chat.template == "from the file"
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert load_checkpoint(str(folder)).chat.template == "b"


def test_sliding_window_bounds_the_context(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "m")
    edit_json(folder / "config.json", model_type="mistral", sliding_window=40)
    assert load_checkpoint(str(folder)).architecture.context_length == 40
    edit_json(folder / "config.json", sliding_window=None)
    assert load_checkpoint(str(folder)).architecture.context_length == 96


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {"model_type": "bloom"}, "architecture 'bloom' is not supported, only: gpt2"),
        ("gpt2", {"model_type": None, "architectures": ["Odd"]}, "is not supported"),
        ("gpt2", {"activation_function": "mish"}, "'mish' is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_layer": None}, "lacks n_layer"),
        ("gpt2", {"n_layer": "two"}, "n_layer is 'two'"),
        ("gpt2", {"n_layer": 3}, "lacks the weight 'h.2.attn.c_attn.weight' and 11 more"),
        ("gpt2", {"n_head": 5}, "not a multiple of n_head"),
        ("gpt2", {"n_inner": 64}, "'h.0.mlp.c_fc.weight' has shape"),
        ("gpt2", {"vocab_size": 500}, r"'wte.weight' has shape \[400, 48\], its config says \[500, 48\]"),
        ("gpt2", {"tie_word_embeddings": False}, "lacks the weight 'lm_head.weight'"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "already quantised"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn' is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ("llama", {"rope_scaling": [1]}, "not a table"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"num_key_value_heads": 3}, "cannot share"),
        ("llama", {"attention_bias": True}, "lacks the weight 'layers.0.self_attn.q_proj.bias'"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps"),
    ],
)
def test_unsupported_configurations_are_named(
    family: str, changes: dict[str, Any], words: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = shutil.copytree(request.getfixturevalue(f"{family}_folder"), tmp_path / "m")
    edit_json(folder / "config.json", **changes)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(ExportError, match=words):
        load_checkpoint(str(folder))


def test_a_layer_that_the_config_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = save(random_model(gpt2_config()), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["n_layer"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="belongs to a layer that its config does not have"):
        load_checkpoint(str(folder))
