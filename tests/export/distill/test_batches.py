"""The corpus, and the order in which it is trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from edge_llm.engine.tokenizer import Tokenizer
from export.distill.batches import BatchOrder, make_batch
from export.distill.corpus import Corpus, example_corpus, text_corpus
from export.errors import ExportError
from export.packs.encode import EncodedExample, ExampleEncoder
from export.packs.examples import ExampleMaker
from export.packs.pack import Pack, load_pack
from tests.export.distill.tiny_corpus import make_corpus
from tests.export.models import tokenizer_json
from tests.export.packs.small_pack import tokenizer_for, write_pack

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=80)


def corpus_of(lengths: list[int]) -> Corpus:
    return Corpus.from_sequences(EncodedExample(list(range(length)), 1) for length in lengths)


def epochs(order: BatchOrder, count: int) -> Iterator[list[int]]:
    """The sequences of each epoch, by counting: a step never crosses from one into the next."""
    steps = itertools.count()
    while True:
        seen: list[int] = []
        while len(seen) < count:
            seen += order.indices(next(steps)).tolist()
        yield seen


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, batch_tokens=st.integers(1, 200), seed=st.integers(0, 99))
def test_every_epoch_has_every_sequence_once(lengths: list[int], batch_tokens: int, seed: int) -> None:
    order = BatchOrder(corpus_of(lengths), batch_tokens, seed)
    for epoch in itertools.islice(epochs(order, len(lengths)), 3):
        assert sorted(epoch) == list(range(len(lengths)))


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, batch_tokens=st.integers(1, 200), steps=st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_steps_batch_depends_on_seed_and_step_alone(lengths: list[int], batch_tokens: int, steps: list[int]) -> None:
    corpus = corpus_of(lengths)
    in_order = BatchOrder(corpus, batch_tokens, 7)
    expected = [in_order.indices(step).tolist() for step in range(max(steps) + 1)]
    resumed = BatchOrder(corpus, batch_tokens, 7)
    for step in steps:
        assert resumed.indices(step).tolist() == expected[step]


def test_epochs_and_seeds_differ() -> None:
    corpus = corpus_of([5, 9] * 40)
    first, second = itertools.islice(epochs(BatchOrder(corpus, 40, 0), len(corpus)), 2)
    assert first != second
    assert first != next(epochs(BatchOrder(corpus, 40, 1), len(corpus)))


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, batch_tokens=st.integers(1, 200))
def test_a_batch_stays_within_the_bound_with_its_padding(lengths: list[int], batch_tokens: int) -> None:
    corpus = corpus_of(lengths)
    order = BatchOrder(corpus, batch_tokens, 0)
    for step in range(20):
        indices = order.indices(step)
        assert indices.size * corpus.lengths[indices].max() <= batch_tokens or indices.size == 1


def test_a_batch_predicts_each_next_token_of_each_sequence() -> None:
    corpus = Corpus.from_sequences(
        [EncodedExample([5, 6, 7], 2), EncodedExample([8, 9], 1), EncodedExample([4] * 4, 0)]
    )
    batch = make_batch(corpus, np.array([1, 0]))
    assert batch.input_ids.tolist() == [[8, 9, 0], [5, 6, 7]]
    assert batch.predicting.tolist() == [0, 3, 4]
    assert batch.targets.tolist() == [9, 6, 7]
    assert batch.is_answer.tolist() == [True, False, True]
    assert batch.corpus_positions.tolist() == [3, 0, 1]
    assert corpus.token_ids[batch.corpus_positions].tolist() == [8, 5, 6]
    assert make_batch(corpus, np.array([2])).is_answer.all()


def test_a_corpus_comes_back_from_the_disk(tmp_path: Path) -> None:
    corpus = make_corpus()
    corpus.save(tmp_path / "corpus.npz")
    loaded = Corpus.load(tmp_path / "corpus.npz")
    assert loaded.digest == corpus.digest
    assert [loaded.sequence(index).tolist() for index in range(len(loaded))] == [
        corpus.sequence(index).tolist() for index in range(len(corpus))
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.npz"]


def test_another_corpus_has_another_digest() -> None:
    sequences = [EncodedExample([1, 2, 3], 1), EncodedExample([4, 5], 1)]
    others = [
        sequences[::-1],
        [EncodedExample([1, 2, 3], 2), sequences[1]],
        [EncodedExample([1, 2], 1), EncodedExample([3, 4, 5], 1)],
        [EncodedExample([1, 2, 9], 1), sequences[1]],
    ]
    digests = {Corpus.from_sequences(one).digest for one in (sequences, *others)}
    assert len(digests) == 5
    assert Corpus.from_sequences(list(sequences)).digest in digests


def test_a_corpus_of_nothing_is_refused() -> None:
    with pytest.raises(ExportError, match="the corpus is empty"):
        Corpus.from_sequences([])


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pack, ExampleEncoder]:
    pack = load_pack(write_pack(tmp_path_factory.mktemp("packs") / "kitchen"))
    return pack, ExampleEncoder(pack.schema, tokenizer_for(pack.schema))


def test_examples_that_are_too_long_are_left_out(kitchen: tuple[Pack, ExampleEncoder]) -> None:
    pack, encoder = kitchen
    corpus = example_corpus(map(encoder.encode, ExampleMaker(pack, 0)), 50, 60)
    assert len(corpus) == 50
    assert 40 < corpus.lengths.max() <= 60
    fitting = (one for one in map(encoder.encode, ExampleMaker(pack, 0)) if len(one.token_ids) <= 60)
    for index, encoded in enumerate(itertools.islice(fitting, 50)):
        assert corpus.sequence(index).tolist() == encoded.token_ids
        assert corpus.answer_starts[index] == encoded.answer_start


def test_a_context_that_hardly_any_example_fits_is_refused(kitchen: tuple[Pack, ExampleEncoder]) -> None:
    pack, encoder = kitchen
    with pytest.raises(ExportError, match="most examples have more than 12 tokens"):
        example_corpus(map(encoder.encode, ExampleMaker(pack, 0)), 500, 12)


def test_a_text_is_cut_into_windows_that_begin_with_its_end_token() -> None:
    tokenizer = Tokenizer(Backend.from_str(tokenizer_json()))
    text = "A small text about small machines. " * 9
    corpus = text_corpus(text, tokenizer, 0, 16)
    assert corpus.lengths.max() == 16
    assert {int(corpus.sequence(index)[0]) for index in range(len(corpus))} == {0}
    inside = [token_id for index in range(len(corpus)) for token_id in corpus.sequence(index)[1:].tolist()]
    assert inside == tokenizer.encode(text)[: len(inside)]
    assert len(inside) > len(tokenizer.encode(text)) - 8
    assert not corpus.answer_starts.any()
    with pytest.raises(ExportError, match="almost no text"):
        text_corpus("hi", tokenizer, 0, 16)
