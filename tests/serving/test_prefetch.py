from __future__ import annotations

import time

import pytest

from edge_llm.engine.prompt import Message
from edge_llm.engine.sampler import SamplingParams
from edge_llm.serving.pacing import ChunkPacer, TokenBudget
from edge_llm.serving.utterances import Utterances
from tests.serving.driver import SYSTEM, Driver


@pytest.fixture
def make_driver(tmp_path):
    made = []

    def make(**fields) -> Driver:
        driver = Driver(tmp_path, **fields)
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver.check()
        driver.close()


def speak(driver: Driver, text: str, **fields) -> None:
    """One partial a word, but for the last one, with time to work after each."""
    words = text.split()
    for end in range(1, len(words)):
        driver.partial(" ".join(words[:end]), **fields)
        driver.idle()


# --- partials --------------------------------------------------------------------------------------------------------


def test_what_was_said_is_prefilled_before_the_query_comes(make_driver):
    driver = make_driver()
    text = "how far is it to the coast"
    speak(driver, text)
    driver.runner.runs.clear()
    final = driver.ask(text, utterance="u").final
    assert final.usage.cached_from == "partial"
    # What was held back: the last two words, the end of the message, the start of the answer.
    rest = len("the coast") + len(["<|end|>", "\n", "<|assistant|>"])
    assert final.usage.cached_tokens >= final.usage.prompt_tokens - rest - 1
    assert driver.runner.runs[0] == ("prefill", final.usage.prompt_tokens - final.usage.cached_tokens)
    assert final.text == Driver().ask(text).final.text


def test_the_last_word_is_held_back(make_driver):
    driver = make_driver(speculation=False)
    driver.partial("how far is")
    driver.idle()
    (content,) = [content for slot in range(3) if (content := driver.engine.slots.content(slot)) and content.owner]
    assert driver.renderer.decode(content.token_ids).endswith("how far ")


def test_the_last_word_settles_after_a_while(make_driver):
    driver = make_driver(speculation=False, settle_ms=300.0)
    driver.partial("how far is")
    driver.idle()
    assert 0 < driver.scheduler._prefetch.due_in_s(1.0) <= 0.3
    time.sleep(0.3)
    driver.idle()
    (content,) = [content for slot in range(3) if (content := driver.engine.slots.content(slot)) and content.owner]
    assert driver.renderer.decode(content.token_ids).endswith("how far is ")
    driver.partial("how far isolated")
    driver.idle()
    assert driver.ask("how far isolated", utterance="u").final.text == Driver().ask("how far isolated").final.text
    assert driver.metrics.counter("prefetch_tokens_wasted") > 0


def test_the_recogniser_revises_itself(make_driver):
    driver = make_driver(speculation=False)
    for text in ("how far is", "how far is it two miles", "how far is it to the", "how far is it to the coast"):
        driver.partial(text)
        driver.idle()
    final = driver.ask("how far is it to the coast", utterance="u").final
    assert final.usage.cached_from == "partial"
    assert final.text == Driver().ask("how far is it to the coast").final.text
    assert driver.metrics.counter("prefetch_tokens_wasted") > 0


def test_the_processor_is_kept_awake_while_somebody_speaks(make_driver):
    driver = make_driver(keep_awake_ms=300.0, speculation=False)
    driver.partial("how far is it")
    driver.idle()
    driver.check()
    assert driver.metrics.counter("awake_steps") == 0  # something has just run
    assert driver.scheduler._prefetch.due_in_s(1.0) <= 0.3
    time.sleep(0.3)
    assert driver.idle() == 1
    driver.check()
    assert driver.metrics.counter("awake_steps") == 1
    final = driver.ask("how far is it to the coast", utterance="u").final
    assert final.text == Driver().ask("how far is it to the coast").final.text
    time.sleep(0.3)
    driver.idle()
    assert driver.metrics.counter("awake_steps") == 1  # the query has come


def test_a_stale_partial_is_dropped(make_driver):
    driver = make_driver()
    assert driver.partial("how far", seq=5)
    assert not driver.partial("how", seq=4)
    assert driver.partial("how far is", seq=6)


def test_a_partial_after_its_query_is_too_late(make_driver):
    driver = make_driver()
    driver.partial("how far", seq=1)
    driver.ask("how far", utterance="u")
    assert not driver.partial("how far is", seq=2)
    assert driver.partial("how far is", utterance="v", seq=0)


def test_a_name_may_be_used_again_from_the_start(make_driver):
    driver = make_driver()
    driver.partial("how far", seq=7)
    driver.ask("how far", utterance="u")
    assert driver.partial("and where is", seq=0)
    driver.idle()
    assert driver.ask("and where is it", utterance="u").final.usage.cached_from == "partial"


def test_a_prefetch_whose_query_never_comes_frees_everything(make_driver):
    driver = make_driver(warm_s=1.0, speculation=True)
    speak(driver, "one two three four five")
    driver.partial("one two three four five")
    driver.partial("one two three four five")
    driver.idle()
    assert len(driver.scheduler._prefetch._speculator) == 1
    deadline = time.monotonic() + 10
    while len(driver.scheduler._prefetch._speculator) or driver.caches.reuse.next_expiry() is not None:
        driver.scheduler._prefetch_step()
        assert time.monotonic() < deadline
    assert driver.engine.free_slots == 3
    contents = [driver.engine.slots.content(slot) for slot in range(3)]
    assert all(content is None or content.origin != "partial" for content in contents)
    assert len(driver.scheduler._prefetch._utterances.growing(time.monotonic())) == 0


def test_a_revision_storm_neither_grows_nor_breaks_anything(make_driver):
    driver = make_driver(max_bytes=60_000)
    for n in range(300):
        driver.partial(f"word{n % 7} " * (n % 11 + 1), user=f"user{n % 5}", utterance=f"u{n % 3}")
        driver.idle(2)
        driver.check()
    assert len(driver.scheduler._prefetch._utterances) <= 15
    assert driver.ask("how far is it").final.text == Driver().ask("how far is it").final.text


def test_partials_of_one_user_are_nothing_to_another(make_driver):
    driver = make_driver()
    text = "how far is it to the coast"
    speak(driver, text, user="ann")
    head = len(driver.renderer.shared_prefix())
    assert driver.ask(text, user="bob", utterance="u").final.usage.cached_tokens <= head
    # The positive half.
    assert driver.ask(text, user="ann", utterance="u").final.usage.cached_from == "partial"


def test_partials_in_a_session_are_warmed_behind_its_turns(make_driver):
    driver, cold = make_driver(), Driver()
    for each in (driver, cold):
        each.ask("hello there", session="s")
    driver.idle()
    speak(driver, "and how far is it", session="s")
    warm = driver.ask("and how far is it", session="s", utterance="u").final
    assert warm.usage.cached_from == "partial"
    assert warm.text == cold.ask("and how far is it", session="s").final.text


def test_the_next_turn_of_a_session_needs_its_own_words_only(make_driver):
    driver, cold = make_driver(partials=False), Driver()
    first = driver.ask("hello there", session="s").final
    cold.ask("hello there", session="s")
    driver.idle()
    second = driver.ask("and now", session="s").final
    assert second.usage.cached_tokens > first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.text == cold.ask("and now", session="s").final.text


def test_a_query_comes_before_prefetch(make_driver):
    driver = make_driver()
    driver.partial("a very long transcript " * 5)
    asked = driver.submit("hello")
    driver.run()  # no idle unit is needed in between
    assert asked.final.usage.cached_from is None


# --- speculation -----------------------------------------------------------------------------------------------------


def test_a_pause_is_answered_ahead_and_released_to_its_query(make_driver):
    driver = make_driver()
    driver.partial("how far is it")
    driver.partial("how far is it")
    driver.idle()
    driver.runner.runs.clear()
    asked = driver.ask("How far is it?", utterance="u")
    assert asked.final.source == "prefetch"
    assert asked.final.text == "".join(asked.deltas) == Driver().ask("how far is it").final.text
    assert driver.runner.runs == []
    assert driver.metrics.counter("speculations_released") == 1


def test_another_question_gets_its_own_answer(make_driver):
    driver = make_driver()
    driver.partial("how far is it")
    driver.partial("how far is it")
    driver.idle()
    final = driver.ask("how far is that", utterance="u").final
    assert final.source == "model"
    assert final.text == Driver().ask("how far is that").final.text
    assert driver.metrics.counter("speculations_dropped") == 1
    assert driver.engine.free_slots == 3


def test_the_same_partial_delivered_twice_is_no_pause(make_driver):
    driver = make_driver()
    driver.partial("how far is it", seq=3)
    driver.partial("how far is it", seq=3)
    driver.idle()
    assert driver.metrics.counter("speculations_started") == 0


def test_a_known_query_is_answered_ahead_when_its_answer_is_not_kept(make_driver):
    driver = make_driver()
    driver.ask("hello", session="s")
    driver.ask("what is my range", session="s")  # known now, but after other turns the answer is another one
    driver.idle()
    driver.partial("what is my range", session="s")
    driver.idle()
    assert driver.metrics.counter("speculations_started") == 1
    assert driver.ask("what is my range", session="s", utterance="u").final.source == "prefetch"


def test_what_the_response_cache_has_is_not_answered_ahead(make_driver):
    driver = make_driver()
    driver.ask("what is my range")
    driver.partial("what is my range")
    driver.idle()
    assert driver.metrics.counter("speculations_started") == 0
    assert driver.ask("what is my range", utterance="u").final.source == "response_cache"


def test_a_likely_completion_is_answered_ahead(make_driver):
    driver = make_driver()
    for _ in range(3):
        driver.ask("what is my range today", cache="use", max_tokens=3)
    driver.ask("what is my range today", max_tokens=5)
    driver.caches.answers._responses.clear()
    driver.partial("what is my")
    driver.idle()
    assert driver.metrics.counter("speculations_started") == 1
    final = driver.ask("what is my range today", max_tokens=5, utterance="u").final
    assert final.source == "prefetch"
    assert final.usage.completion_tokens == 5
    assert final.text == Driver().ask("what is my range today", max_tokens=5).final.text


def test_a_guess_stays_while_it_may_still_be_right(make_driver):
    driver = make_driver()
    driver.partial("how far is it")
    driver.partial("how far is it")
    driver.idle()
    driver.partial("how far is it today")
    driver.idle()
    assert driver.metrics.counter("speculations_dropped") == 1
    assert driver.metrics.counter("speculations_started") == 1


def test_tries_are_bounded(make_driver):
    driver = make_driver(max_tries=2)
    for word in ("one", "two", "three", "four"):
        driver.partial(f"tell me {word}")
        driver.partial(f"tell me {word}")
        driver.idle()
    assert driver.metrics.counter("speculations_started") == 2


def test_no_more_tokens_than_allowed_are_generated_ahead(make_driver):
    driver = make_driver(max_speculative_tokens=2)
    driver.partial("how far is it")
    driver.partial("how far is it")
    driver.idle()
    asked = driver.ask("how far is it", utterance="u", max_tokens=6)
    assert asked.final.source == "prefetch"
    assert asked.final.usage.completion_tokens == 6
    assert asked.final.text == Driver().ask("how far is it", max_tokens=6).final.text


def test_a_shorter_limit_cuts_what_was_generated_ahead(make_driver):
    driver = make_driver()
    driver.partial("how far is it")
    driver.partial("how far is it")
    driver.idle()
    final = driver.ask("how far is it", utterance="u", max_tokens=2).final
    assert (final.source, final.finish_reason, final.usage.completion_tokens) == ("prefetch", "length", 2)
    assert final.text == Driver().ask("how far is it", max_tokens=2).final.text


def test_other_settings_get_their_own_answer(make_driver):
    driver = make_driver()
    driver.partial("how far is it")
    driver.partial("how far is it")
    driver.idle()
    sampling = SamplingParams(temperature=0.9, seed=7)
    assert driver.ask("how far is it", utterance="u", sampling=sampling).final.source == "model"


def test_a_guess_gives_up_its_slot_to_a_query(make_driver):
    driver = make_driver(slots=2)
    driver.partial("how far is it")
    driver.partial("how far is it")
    driver.idle()
    assert driver.engine.free_slots == 1
    asked = [driver.submit(text, user) for text, user in (("one", "bob"), ("two", "cid"))]
    driver.step()
    assert driver.engine.free_slots == 0
    driver.run()
    assert all(one.final.source == "model" for one in asked)


def test_another_users_guess_is_never_released(make_driver):
    driver = make_driver()
    driver.partial("how far is it", user="ann")
    driver.partial("how far is it", user="ann")
    driver.idle()
    assert driver.ask("how far is it", user="bob", utterance="u").final.source == "model"
    assert driver.ask("how far is it", user="ann", utterance="u").final.source == "prefetch"


def test_one_slot_is_never_kept_by_a_guess(make_driver):
    driver = make_driver(slots=1)
    driver.partial("how far is it")
    driver.partial("how far is it")
    driver.idle()
    assert driver.engine.free_slots == 1


def pause(driver: Driver, text: str, **fields) -> None:
    """The speaker has said it and paused; there is time to answer ahead."""
    for _ in range(2):
        driver.partial(text, **fields)
    driver.idle()


def test_background_queries_are_answered_while_guesses_hold_the_other_slots(make_driver):
    driver = make_driver(slots=2)
    pause(driver, "how far is it")
    assert driver.engine.free_slots == 1
    assert driver.ask("hello", user="bob", priority="background").final.source == "model"


def test_a_guess_is_released_even_when_every_other_slot_is_taken(make_driver):
    driver = make_driver(slots=2)
    pause(driver, "how far is it")
    other = driver.submit("hello", user="bob")
    driver.step()
    mine = driver.submit("how far is it", utterance="u")
    driver.run()
    assert (mine.final.source, other.final.source) == ("prefetch", "model")


def test_a_stop_string_ends_a_guess_where_it_would_have_ended_the_answer(make_driver):
    driver, cold = make_driver(), Driver()
    text = cold.ask("how far is it").final.text
    for stop in ((text[2],), (text[1:4], text[2]), (text[3:5], text[4])):
        driver.caches.answers._responses.clear()
        name = "".join(stop)
        pause(driver, "how far is it", utterance=name)
        warm = driver.ask("how far is it", utterance=name, stop=stop).final
        expected = cold.ask("how far is it", stop=stop).final
        assert warm.source == "prefetch"
        assert (warm.text, warm.finish_reason) == (expected.text, expected.finish_reason)
        assert warm.usage.completion_tokens == expected.usage.completion_tokens


def test_a_guess_that_stopped_at_the_limit_ends_as_a_cold_answer_does(make_driver):
    for tokens in (3, 4, 5):
        driver = make_driver(stop_after=4)
        driver.caches.answers._responses.clear()
        pause(driver, "how far is it")
        warm = driver.ask("how far is it", utterance="u", max_tokens=tokens).final
        expected = Driver(stop_after=4).ask("how far is it", max_tokens=tokens).final
        assert warm.source == "prefetch"
        assert (warm.text, warm.finish_reason) == (expected.text, expected.finish_reason)


def test_a_guess_that_has_only_begun_says_how_much_was_ready(make_driver):
    driver = make_driver(max_pause_ms=5.0)
    text = "how far is it to the coast and where can I charge the car"
    for _ in range(2):
        driver.partial(text)
    while not len(driver.scheduler._prefetch._speculator):
        driver.idle(1)
    final = driver.ask(text, utterance="u").final
    assert final.source == "prefetch"
    assert final.usage.cached_tokens < final.usage.prompt_tokens


def test_an_abandoned_guess_leaves_nothing(make_driver):
    driver = make_driver(warm_s=0.05)
    pause(driver, "my secret pin is four two")
    time.sleep(0.06)
    driver.idle()
    contents = [driver.engine.slots.content(slot) for slot in range(3)]
    held = [driver.renderer.decode(content.token_ids) for content in contents if content is not None]
    assert not any("secret" in text for text in held)
    prompt_ids = driver.renderer.encode([Message("user", "my secret pin is four two")])
    assert driver.caches.reuse.saved_len("ann", prompt_ids) <= len(driver.renderer.shared_prefix())


def test_a_transcript_that_contradicts_a_guess_goes_on_from_its_words(make_driver):
    driver = make_driver(popularity=False)
    pause(driver, "how far is it")
    before = driver.metrics.counter("prefetch_tokens_computed")
    driver.partial("how far is that place over there")
    driver.idle()
    new = len("that place over ")
    assert driver.metrics.counter("prefetch_tokens_computed") - before <= new + 2


def test_an_expired_session_does_not_file_its_answer_under_the_old_turns(make_driver):
    driver = make_driver(session_idle_s=0.5)
    driver.ask("hello", session="s")
    time.sleep(0.6)
    fresh = driver.ask("and now", session="s").final
    driver.ask("hello", session="t")
    later = driver.ask("and now", session="t").final
    assert later.source == "model"
    assert later.usage.prompt_tokens > fresh.usage.prompt_tokens


def test_an_explicit_limit_is_not_the_default_of_the_same_size(make_driver):
    driver = make_driver()
    text = "x" * (256 - 3 - 3)  # room for three tokens
    assert driver.ask(text).final.finish_reason == "length"
    (refusal,) = driver.ask(text, max_tokens=6).terminal
    assert refusal.error.code == 413


def test_nothing_polls_when_it_may_not_or_cannot_work(make_driver):
    driver = make_driver()
    driver.idle()
    driver.scheduler._prefetch._rewarming._popular_due = 0.0
    driver.caches.reuse.tree, tree = None, driver.caches.reuse.tree
    assert driver.scheduler._prefetch.due_in_s(1.0) > 0.5
    driver.caches.reuse.tree = tree

    class Hot:
        def allows_prefetch(self):
            return False

    driver = make_driver(settle_ms=1.0)
    driver.scheduler._prefetch._pace._power = Hot()
    driver.partial("how far is it")
    time.sleep(0.002)
    assert driver.idle() == 0
    assert driver.scheduler._prefetch.due_in_s(1.0) > 0.5


def test_what_is_erased_on_the_disk_is_forgotten_in_memory(make_driver):
    driver = make_driver()
    driver.ask("my secret pin is four two")
    driver.idle()
    prompt_ids = driver.renderer.encode([Message("user", "my secret pin is four two")])
    assert driver.caches.reuse.saved_len("ann", prompt_ids) == len(prompt_ids)
    driver.caches.popularity.clear("ann")
    driver.scheduler._prefetch._erasure_due = 0.0
    driver.idle()
    assert driver.caches.reuse.saved_len("ann", prompt_ids) <= len(driver.renderer.shared_prefix())
    final = driver.ask("my secret pin is four two", max_tokens=3).final
    assert final.usage.cached_tokens <= len(driver.renderer.shared_prefix())


def test_learning_that_fails_costs_no_answer(make_driver, caplog):
    driver = make_driver()

    def fail(*_args, **_fields):
        raise RuntimeError("boom")

    driver.caches.popularity.record = fail
    driver.caches.answers.keep = fail
    assert driver.ask("how far is it").final.text == Driver().ask("how far is it").final.text
    assert "boom" in caplog.text


def test_a_unit_of_prefetch_is_short_whatever_there_is_to_do(make_driver):
    driver = make_driver(max_bytes=1 << 22, max_pause_ms=25.0)
    for n in range(6):
        driver.ask(f"question {n} " * 12, session=f"s{n % 2}")
    driver.partial("word " * 4000)  # longer than any prompt
    before = driver.metrics.counter("rewarmed_tokens")
    driver.runner.runs.clear()
    while driver.scheduler._prefetch_step():
        assert len(driver.runner.runs) <= 1
        driver.runner.runs.clear()
    assert driver.metrics.counter("rewarmed_tokens") > before


# --- what is asked often, heads, faults ------------------------------------------------------------------------------


def test_popular_queries_are_warm_after_a_restart(make_driver):
    first = make_driver(partials=False)
    for _ in range(3):
        first.ask("how far is it to the coast", max_tokens=2, user="ann")
    first.caches.answers._responses.clear()
    first.close()
    second = make_driver(partials=False)
    second.idle()
    final = second.ask("how far is it to the coast", max_tokens=3, user="ann").final
    assert final.usage.cached_tokens == final.usage.prompt_tokens - 2
    assert second.ask("how far is it to the coast", user="bob").final.usage.cached_tokens <= len(
        second.renderer.shared_prefix()
    )


def test_popularity_can_be_switched_off(make_driver):
    driver = make_driver(popularity=False)
    driver.ask("how far is it")
    driver.close()
    again = make_driver()
    assert again.caches.popularity.users() == []


def test_heads_are_warmed_when_idle_and_saved_for_the_next_start(make_driver):
    driver = make_driver()
    driver.idle()
    driver.caches.snapshots.flush(10)
    messages = (Message("system", SYSTEM), Message("user", "hello"))
    final = driver.ask("", messages=messages).final
    head = driver.renderer.shared_prefix(SYSTEM)
    assert final.usage.cached_tokens >= len(head)
    saved = driver.caches.snapshots.load_all()
    assert [list(prefix.token_ids) for prefix in saved] == [head]
    driver.caches.reuse.tree.clear()
    assert driver.caches.reuse.saved_len("bob", head) == len(head)


def test_a_varying_head_is_noticed(make_driver, caplog):
    driver = make_driver()
    for minute in range(4):
        system = f"It is 14:0{minute}. You are the voice of a car, and you answer in one short sentence."
        driver.ask("", messages=(Message("system", system), Message("user", "hello")))
        driver.idle()
    driver.caches.db.flush(10)
    (finding,) = driver.caches.lint.findings()
    assert finding.user == "ann"
    assert finding.lost_tokens > 50
    assert "tokens a query" in caplog.text


def test_a_fault_in_prefetch_costs_only_what_was_warm(make_driver):
    driver = make_driver()
    driver.idle()
    driver.partial("how far is it to the coast")
    driver.runner.fail_next = RuntimeError("boom")
    assert not driver.scheduler._prefetch_step()
    assert driver.metrics.counter("prefetch_faults") == 1
    driver.partial("how far is it to the coast today")
    assert driver.idle() == 0  # not at once again
    assert driver.scheduler._prefetch.due_in_s(1.0) > 0.5
    assert driver.ask("how far is it", utterance="u").final.text == Driver().ask("how far is it").final.text
    driver.metrics._counters.clear()


def test_heat_and_battery_stop_it(make_driver):
    class Hot:
        def allows_prefetch(self):
            return False

    driver = make_driver()
    driver.scheduler._prefetch._pace._power = Hot()
    driver.partial("how far is it to the coast")
    assert driver.idle() == 0
    assert driver.scheduler._prefetch.due_in_s(1.0) > 0.5
    assert driver.ask("how far is it", utterance="u").final.usage.cached_from is None


def test_what_prefetch_computes_is_bounded(make_driver):
    driver = make_driver(max_tokens_per_s=1.0)
    driver.partial("a transcript that is much longer than a burst of five tokens allows")
    driver.idle()
    assert 0 < driver.metrics.counter("prefetch_tokens_computed") < 30
    assert 0 < driver.scheduler._prefetch.due_in_s(100.0) < 60


# --- response cache --------------------------------------------------------------------------------------------------


def test_an_answer_is_given_again_without_the_engine(make_driver):
    driver = make_driver()
    first = driver.ask("How far is it?", max_tokens=4).final
    driver.runner.runs.clear()
    asked = driver.submit("  how far   is it ", max_tokens=4)  # at once, on the caller's thread
    assert asked.final.source == "response_cache"
    assert asked.final.text == "".join(asked.deltas) == first.text
    assert asked.final.finish_reason == first.finish_reason
    assert driver.runner.runs == []


@pytest.mark.parametrize(
    "other",
    [
        {"max_tokens": 5},
        {"sampling": SamplingParams(repetition_penalty=1.2)},
        {"sampling": SamplingParams(seed=3, temperature=0.5)},
        {"stop": ("x",)},
        {"user": "bob"},
        {"session": "s"},
        {"cache": "bypass"},
    ],
)
def test_another_setting_user_or_session_is_another_question(make_driver, other):
    driver = make_driver()
    driver.ask("how far is it", max_tokens=4)
    assert driver.ask("how far is it", **{"max_tokens": 4, **other}).final.source == "model"
    assert driver.ask("how far is it", max_tokens=4).final.source == "response_cache"


def test_random_answers_are_not_kept(make_driver):
    driver = make_driver()
    for _ in range(2):
        assert driver.ask("how far is it", sampling=SamplingParams(temperature=0.9)).final.source == "model"


def test_cut_answers_are_not_kept(make_driver):
    driver = make_driver()
    asked = driver.submit("how far is it", name="cut")
    driver.step()
    driver.scheduler.cancel("ann", "cut")
    driver.run()
    assert asked.final.finish_reason == "cancelled"
    assert driver.ask("how far is it").final.source == "model"


def test_a_session_hits_only_in_the_same_state_and_remembers_the_turn(make_driver):
    driver = make_driver()
    driver.ask("hello", session="s")
    driver.ask("hello", session="t")
    assert driver.ask("and now", session="s").final.source == "model"
    assert driver.ask("and now", session="t").final.source == "response_cache"
    assert driver.ask("and now", session="t").final.source == "model"  # one turn later


# --- parts -----------------------------------------------------------------------------------------------------------


def test_utterances_are_bounded_and_expire():
    utterances = Utterances(warm_s=10.0)
    for n in range(100):
        utterances.update(f"user{n % 30}", f"u{n}", 0, "hello", None, now=float(n) / 100)
    assert len(utterances) <= 64
    for n in range(10):
        utterances.update("ann", f"u{n}", 0, "hello", None, now=2.0)
    growing = utterances.growing(2.0)
    assert [said.name for said in growing if said.user == "ann"] == ["u9", "u8", "u7", "u6"]
    assert utterances.growing(12.0) == []


@pytest.mark.parametrize(
    ("text", "stable"), [("", ""), ("one", ""), ("one two", "one"), ("one  two three ", "one  two"), (" one", "")]
)
def test_the_last_word_is_not_stable(text, stable):
    utterances = Utterances(10.0)
    utterances.update("ann", "u", 0, text, None, 0.0)
    assert utterances.growing(0.0)[0].stable_text == stable


def test_chunks_adapt_to_the_time_they_take():
    pacer = ChunkPacer(64, max_ms=25.0)
    for _ in range(100):
        pacer.observe(pacer.tokens, 6.0 + 0.9 * pacer.tokens)
    assert 12 <= pacer.tokens <= 21
    assert 6.0 + 0.9 * pacer.tokens <= 25.0
    for _ in range(100):
        pacer.observe(pacer.tokens, 10.0 * pacer.tokens)
    assert pacer.tokens == 4
    for _ in range(100):
        pacer.observe(pacer.tokens, 0.01)
    assert pacer.tokens == 64


def test_a_budget_allows_bursts_and_no_more_on_average():
    now = [0.0]
    budget = TokenBudget(10.0, clock=lambda: now[0])
    spent = 0
    for tick in range(1000):
        now[0] = tick * 0.1
        if budget.ready_in_s() == 0:
            budget.spend(20)
            spent += 20
    assert 1000 <= spent <= 1000 + 50 + 20
