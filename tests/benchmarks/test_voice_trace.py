from __future__ import annotations

import random
from itertools import islice, pairwise

import pytest

from benchmarks.voice.trace import (
    REPEATED_SHARE,
    REVISED_SHARE,
    WORDS_PER_MINUTE,
    fresh_queries,
    make_trace,
    normalised,
    repeats,
    spoken_s,
)
from benchmarks.voice.words import FILLERS, MAX_WORDS, MIN_WORDS, TEMPLATES, USERS, say

TRACE = make_trace(200)
REVISED = [utterance for utterance in TRACE if utterance.revision is not None]


def test_the_same_seed_says_the_same():
    assert make_trace(200) == TRACE
    assert make_trace(200, seed=1) != TRACE


def test_shares_of_repeated_and_revised_utterances():
    assert sum(utterance.asked_before for utterance in TRACE) == 200 * REPEATED_SHARE
    assert len(REVISED) == 200 * REVISED_SHARE
    assert {utterance.revision.kind for utterance in REVISED} == {"wrong", "merged", "split"}
    assert {utterance.revision.held for utterance in REVISED} == {1, 2}


def test_a_repeated_query_was_asked_by_the_same_user_before_and_a_new_one_by_nobody():
    asked = {}
    for utterance in TRACE:
        key = normalised(utterance.text)
        if utterance.asked_before:
            assert asked[key] == utterance.user
        else:
            assert key not in asked
        asked[key] = utterance.user
    assert set(asked.values()) == set(USERS)


def test_some_repeats_are_spelt_differently_and_some_are_not():
    texts = set()
    same = []
    for utterance in TRACE:
        if utterance.asked_before:
            same.append(utterance.text in texts)
        texts.add(utterance.text)
    assert 0.3 < sum(same) / len(same) < 0.9


def test_popular_queries_are_repeated_most():
    user = "driver"
    first, *_, last = [each.text for each in TRACE if each.user == user and not each.asked_before]
    drawn = [normalised(text) for who, text in islice(repeats(random.Random(0), TRACE), 4000) if who == user]
    assert drawn.count(normalised(first)) > 5 * drawn.count(normalised(last)) > 0


def test_the_query_is_the_last_transcript_and_is_right():
    for utterance in TRACE:
        words = utterance.text.split()
        assert MIN_WORDS <= len(words) <= MAX_WORDS
        assert len(utterance.transcripts) == len(words)
        assert utterance.text == utterance.transcripts[-1].text
        right = [" ".join(words[:count]) for count in range(1, len(words))]
        wrong = sum(partial.text != text for partial, text in zip(utterance.partials, right, strict=True))
        assert wrong == (utterance.revision.held if utterance.revision else 0)


def test_words_come_at_the_pace_of_speech():
    for utterance in TRACE:
        moments = [0.0, *(transcript.at_s for transcript in utterance.transcripts)]
        gaps = [after - before for before, after in pairwise(moments)]
        assert all(0.2 < gap < 0.6 for gap in gaps)
        assert utterance.duration_s == moments[-1]
    words = sum(len(utterance.transcripts) for utterance in TRACE)
    assert 60 * words / spoken_s(TRACE) == pytest.approx(WORDS_PER_MINUTE, rel=0.05)


def test_fresh_queries_are_enough_for_the_soak_and_never_repeat():
    keys = [normalised(text) for _, text in islice(fresh_queries(random.Random(3), TRACE), 5000)]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {normalised(utterance.text) for utterance in TRACE}


@pytest.mark.parametrize("count", [1, 2, 5, 6, 10])
def test_short_traces(count):
    assert len(make_trace(count)) == count


def test_normalised_text_ignores_case_blanks_and_closing_punctuation():
    assert normalised("  How FAR is it? ") == normalised("how far  is it") == "how far is it"
    assert normalised("how far is it") != normalised("how far is he")


@pytest.mark.parametrize("domain", TEMPLATES)
def test_every_filler_is_used_and_every_slot_is_filled(domain):
    rng = random.Random(0)
    assert not any("{" in say(rng, domain) for _ in range(500))
    every = " ".join(template for templates in TEMPLATES.values() for template in templates)
    assert all("{" + name + "}" in every for name in FILLERS)
