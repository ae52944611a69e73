from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from benchmarks.files.cache import built, evict, remove_others, run_module, source_key

gpt2 = pytest.importorskip("benchmarks.files.gpt2", reason="safetensors is not installed")


def test_the_made_up_tokenizer_has_the_size_and_round_trips():
    tokenizer = Tokenizer.from_str(gpt2.tokenizer_json(3000).to_str())
    assert tokenizer.get_vocab_size(with_added_tokens=True) == 3000
    assert tokenizer.token_to_id(gpt2.END_OF_TEXT) == 2999
    text = "What is the range? Größe: 10 °C, 你好 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("the range of the battery").ids) < len("the range of the battery")


def test_what_is_built_is_whole_and_built_once(tmp_path):
    def build(path):
        path.write_text("whole")

    def fail(path):
        path.write_text("half")
        raise OSError("no space")

    assert built(tmp_path / "a" / "file", build).read_text() == "whole"
    assert built(tmp_path / "a" / "file", fail).read_text() == "whole"
    with pytest.raises(OSError, match="no space"):
        built(tmp_path / "b", fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_earlier_builds_are_removed(tmp_path):
    for name in ("bundle-1", "bundle-2", "checkpoint-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "bundle-3.gguf").touch()
    remove_others(tmp_path / "bundle-2", "bundle-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle-2", "checkpoint-1"]


def test_evicted_files_are_still_there(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").write_bytes(b"w" * 10_000)
    evict(tmp_path)
    assert (tmp_path / "folder" / "weights").read_bytes() == b"w" * 10_000


def test_source_key_follows_the_sources(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = source_key(tmp_path)
    assert source_key(tmp_path / "a.py") == first
    (tmp_path / "a.py").write_text("2")
    assert source_key(tmp_path) != first


def test_a_module_that_fails_says_why():
    with pytest.raises(RuntimeError, match="IndexError"):
        run_module("benchmarks.files.peers")
