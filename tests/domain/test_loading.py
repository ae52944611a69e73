"""A bundle with a domain.json, loaded as it is on a device: random weights, and still nothing but valid actions."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec
import pytest

from edge_llm.bundle.manifest import Bundle, FileEntry, decode_manifest, encode_manifest
from edge_llm.config import Config, EngineConfig
from edge_llm.domain.sampler import DomainSampler
from edge_llm.domain.schema import DOMAIN_FILE, encode_domain
from edge_llm.engine.loading import LoadedModel, load_model
from edge_llm.engine.sampler import SamplingParams
from edge_llm.errors import BundleIntegrityError, BundleNotFoundError, ManifestError
from edge_llm.node import info_document
from tests.domain.pack import SCHEMA, prompt

TINY = Path(__file__).parent.parent / "data" / "tiny_bundle"


def domain_bundle(folder: Path) -> Path:
    """The tiny bundle, whose last tokens have become those of the schema."""
    path = Path(shutil.copytree(TINY, folder / "bundle"))
    tokenizer = msgspec.json.decode((path / "tokenizer.json").read_bytes())
    tokens = SCHEMA.special_tokens()
    model = tokenizer["model"]
    first_id = len(model["vocab"]) - len(tokens)
    model["vocab"] = {token: token_id for token, token_id in model["vocab"].items() if token_id < first_id}
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) in model["vocab"]]
    for token_id, token in enumerate(tokens, first_id):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": token_id, "content": token})
        model["vocab"][token] = token_id
    contents = {"tokenizer.json": msgspec.json.encode(tokenizer), DOMAIN_FILE: encode_domain(SCHEMA)}
    manifest = decode_manifest((path / "manifest.json").read_bytes())
    files = [entry for entry in manifest.files if entry.path not in contents]
    for name, content in contents.items():
        (path / name).write_bytes(content)
        files.append(FileEntry(path=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    changed = msgspec.structs.replace(manifest, files=tuple(files), domain_file=DOMAIN_FILE)
    (path / "manifest.json").write_bytes(encode_manifest(changed))
    return path


def load(path: Path, cache: Path) -> tuple[LoadedModel, Config]:
    config = Config(cache_dir=str(cache), engine=EngineConfig(threads=1, slots=1, prepare=False))
    return load_model(Bundle.open(path), config), config


def test_a_domain_bundle_is_loaded_with_its_grammar(tmp_path):
    model, config = load(domain_bundle(tmp_path), tmp_path)
    assert model.domain is not None
    assert model.domain.schema == SCHEMA
    for text in ("open the window", "take me to the coast", "?!"):
        prompt_ids = prompt(text, model.tokenizer)
        state = model.engine.start(prompt_ids, SamplingParams(temperature=3.0, seed=1), max_tokens=60)
        assert isinstance(state.sampler, DomainSampler)
        model.engine.prefill(state)
        while not state.finished:
            model.engine.decode([state])
        model.engine.release(state)
        answer = model.domain.answer(lambda state=state: state.sampler, [])
        answer.push(state.output_ids)
        answer.finish()
        assert answer.kind == model.domain.grammar.kinds[state.output_ids[0]]
        assert answer.dropped_actions == 0
    info = info_document(model, config)
    assert info["domain"]["actions"]["window.move"] == ["which", "action"]
    assert (info["domain"]["name"], info["domain"]["state"]) == ("car", ["range_km", "place_now"])
    assert "actions" in info["features"]
    assert "session" not in info["features"]
    assert msgspec.json.encode(info)


def test_a_bundle_that_just_writes_has_none(tmp_path):
    model, config = load(TINY, tmp_path)
    assert model.domain is None
    info = info_document(model, config)
    assert info["domain"] is None
    assert "session" in info["features"]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b" "), BundleIntegrityError),
        (lambda path: path.write_bytes(b"{}"), BundleIntegrityError),
        (Path.unlink, BundleNotFoundError),
    ],
)
def test_a_damaged_domain_is_not_loaded(tmp_path, damage, error):
    path = domain_bundle(tmp_path)
    damage(path / DOMAIN_FILE)
    with pytest.raises(error, match=r"domain\.json"):
        load(path, tmp_path)


def test_a_domain_that_the_manifest_does_not_vouch_for_is_refused(tmp_path):
    path = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    manifest = decode_manifest((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, domain_file=DOMAIN_FILE)))
    with pytest.raises(ManifestError, match=r"domain\.json"):
        Bundle.open(path)
