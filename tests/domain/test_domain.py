"""The domain of a bundle: read with its file's checks, and what it makes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_llm.domain.domain import Domain, read_schema
from edge_llm.domain.schema import MAX_DOMAIN_BYTES, encode_domain
from edge_llm.engine.sampler import Sampler, SamplingParams
from edge_llm.errors import ManifestError
from tests.domain.pack import SCHEMA, TOKENIZER, domain, ids, prompt
from tests.fakes import byte_tokenizer


def bundle(folder: Path, content: bytes | None) -> Any:
    """As far as a domain looks at it."""
    if content is None:
        return SimpleNamespace(manifest=SimpleNamespace(domain_file=None))
    (folder / "domain.json").write_bytes(content)
    return SimpleNamespace(
        manifest=SimpleNamespace(domain_file="domain.json"), verified_path=lambda name: folder / name
    )


def test_a_bundle_without_a_domain_just_writes(tmp_path):
    assert Domain.from_bundle(bundle(tmp_path, None), TOKENIZER) is None
    assert read_schema(bundle(tmp_path, None)) is None


def test_a_bundles_domain_is_read(tmp_path):
    found = Domain.from_bundle(bundle(tmp_path, encode_domain(SCHEMA)), TOKENIZER)
    assert found is not None
    assert found.schema == SCHEMA


@pytest.mark.parametrize("content", [b"{}", b"\xff", b" " * (MAX_DOMAIN_BYTES + 1)])
def test_a_damaged_domain_is_refused(tmp_path, content):
    with pytest.raises(ManifestError, match=r"domain\.json"):
        Domain.from_bundle(bundle(tmp_path, content), TOKENIZER)


def test_a_domain_for_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"tokenizer\.json"):
        Domain.from_bundle(bundle(tmp_path, encode_domain(SCHEMA)), byte_tokenizer())


def test_what_it_makes_belongs_together():
    car = domain()
    sampler = car.sampler(SamplingParams(), prompt("open"))
    sampler.probabilities = [1.0, 0.25, 1.0]
    answer = car.answer(lambda: sampler, [])
    answer.push(ids("<|command|>", "<|action trunk.open|>", "<|say|>"))
    assert answer.actions[0].confidence == 0.25


def test_a_sampler_of_another_kind_knows_no_confidence():
    car = domain()
    answer = car.answer(lambda: Sampler(SamplingParams(), []), [])
    answer.push(ids("<|command|>", "<|action trunk.open|>", "<|say|>"))
    assert len(answer.actions) == 1


def test_values_that_the_host_publishes_reach_answers_that_begin_later():
    car = domain()
    car.values.update("range_km", b"80")
    answer = car.answer(lambda: None, [])
    assert answer.push(ids("<|chat|>", "<|say|>", "<|value range_km|>")) == "80"
