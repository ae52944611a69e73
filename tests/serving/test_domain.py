"""A domain bundle in the scheduler: queries stand alone, and actions leave once, with the final event."""

from __future__ import annotations

import time

import pytest

from edge_llm.bundle.manifest import PromptTemplate, RolePieces
from edge_llm.domain.answer import ActionCall
from edge_llm.domain.domain import Domain
from edge_llm.engine.engine import Engine
from edge_llm.engine.loading import LoadedModel
from edge_llm.engine.prompt import Message, PromptRenderer
from edge_llm.engine.sampler import SamplingParams
from edge_llm.serving.request import Failed
from tests.domain.pack import SCHEMA, TOKENIZER, ids
from tests.fakes import ScriptedRunner
from tests.serving.driver import Driver

STOP_ID = TOKENIZER.token_id("<|end|>")
TEMPLATE = PromptTemplate(
    prefix="",
    system=None,
    user=RolePieces(before="<|user|>", after=""),
    assistant=RolePieces(before="<|reply|>", after="<|end|>"),
    generation_prompt="<|reply|>",
    default_system=None,
    strip_content=False,
    special_tokens=("<|user|>", "<|reply|>", "<|end|>"),
    stop_token_ids=(STOP_ID,),
    stop_strings=(),
)
WARMER = ["<|action climate.set|>", "<|slot degrees|>", "21"]
ANSWERS = {
    "what is it": ["<|fact|>", "<|say|>", "A heat pump."],
    "make it 21": ["<|command|>", *WARMER, "<|say|>", "Set to ", "<|value degrees|>", "."],
    "open the trunk": ["<|command|>", "<|action trunk.open|>", "<|say|>", "Opening."],
    "how far": ["<|command|>", "<|action status.range|>", "<|say|>", "You have ", "<|value range_km|>", " km."],
    "to Bonn": [
        "<|command|>",
        "<|action go.to|>",
        "<|slot place|>",
        " Rome",
        "<|say|>",
        "Off to ",
        "<|value place|>",
        ".",
    ],
    "make it 45": ["<|command|>", "<|action climate.set|>", "<|slot degrees|>", "45", "<|say|>", "Set."],
    "both": ["<|command|>", *WARMER, "<|action trunk.open|>", "<|say|>", "Set.", "<|say|>", "Opening."],
    "what ever": ["<|command|>", "<|action go.to|>", "<|slot degrees|>", "45", "<|say|>", "Ok."],
}
SET_21 = ("climate.set", {"degrees": 21})


def model(*, constrained: bool = True) -> LoadedModel:
    """A domain bundle whose model answers as ``ANSWERS`` say, as far as the grammar lets it."""
    runner = ScriptedRunner({text: ids(*parts) for text, parts in ANSWERS.items()}, TOKENIZER)
    domain = Domain(SCHEMA, TOKENIZER, constrained=constrained)
    engine = Engine(runner, [STOP_ID], 16, domain.sampler)
    renderer = PromptRenderer(TEMPLATE, TOKENIZER)
    return LoadedModel(None, engine, TOKENIZER, renderer, None, False, 0.0, domain)  # type: ignore[arg-type]


@pytest.fixture
def make_driver(tmp_path):
    made = []

    def make(*, constrained: bool = True, **fields) -> Driver:
        driver = Driver(tmp_path, model=model(constrained=constrained), **fields)
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver.check()
        driver.close()


def values(driver: Driver):
    return driver.scheduler._domain.values


def done(actions: tuple[ActionCall, ...]) -> list[tuple[str, dict]]:
    return [(action.name, action.slots) for action in actions]


# --- events ----------------------------------------------------------------------------------------------------------


def test_words_stream_and_say_of_what_kind_they_are(make_driver):
    asked = make_driver().ask("what is it", max_tokens=100)
    assert (asked.final.kind, asked.final.actions, asked.final.finish_reason) == ("fact", (), "stop")
    assert asked.final.text == "".join(asked.deltas) == "A heat pump."
    assert len(asked.deltas) == len("A heat pump.")


def test_a_command_comes_with_its_actions(make_driver):
    driver = make_driver()
    asked = driver.ask("make it 21", max_tokens=100)
    assert (asked.final.kind, done(asked.final.actions)) == ("command", [SET_21])
    assert (asked.final.text, asked.deltas) == ("Set to 21.", ["Set to 21."])
    assert 0.0 < asked.final.actions[0].confidence <= 1.0
    assert driver.metrics.counter("actions") == 1
    assert driver.metrics.counter("actions_dropped") == 0


def test_queries_of_a_batch_keep_their_own_actions(make_driver):
    driver = make_driver()
    asked = [
        driver.submit(text, f"u{n}", max_tokens=100) for n, text in enumerate(["make it 21", "both", "what is it"])
    ]
    driver.run()
    assert [done(one.final.actions) for one in asked] == [[SET_21], [SET_21, ("trunk.open", {})], []]
    assert [one.final.text for one in asked] == ["Set to 21.", "Set. Opening.", "A heat pump."]
    assert ("decode", 3) in driver.runner.runs


def test_the_grammar_holds_for_whatever_the_query_asks_for(make_driver):
    final = make_driver().ask("to Bonn", max_tokens=100, sampling=SamplingParams(temperature=9.0, seed=1)).final
    assert final.actions[0].name == "go.to"
    assert final.actions[0].slots["place"] in ("Bonn", "to", "to Bonn")


def test_without_the_grammar_what_is_not_allowed_is_dropped_and_counted(make_driver):
    driver = make_driver(constrained=False)
    final = driver.ask("make it 45", max_tokens=100).final
    assert (final.kind, final.actions, final.text) == ("command", (), SCHEMA.failure)
    assert driver.metrics.counter("actions_dropped") == 1
    assert driver.metrics.counter("actions") == 0


def test_an_answer_cut_among_its_actions_does_nothing(make_driver):
    final = make_driver().ask("make it 21", max_tokens=4).final
    assert (final.finish_reason, final.actions, final.text) == ("length", (), SCHEMA.failure)


def test_an_answer_cut_in_its_text_keeps_its_actions(make_driver):
    final = make_driver().ask("make it 21", max_tokens=9).final
    assert (final.finish_reason, done(final.actions), final.text) == ("length", [SET_21], "Set")


def test_a_text_without_words_is_answered(make_driver):
    driver = make_driver()
    driver.runner.answers["?!"] = ids("<|command|>", "<|action go.to|>", "<|slot place|>", " Rome", "<|say|>", "Ok.")
    assert driver.ask("?!", max_tokens=100).final.actions != ()


# --- alone -----------------------------------------------------------------------------------------------------------


def test_a_query_is_answered_alone_whatever_its_session(make_driver):
    driver = make_driver()
    cold = driver.ask("what is it", cache="bypass", max_tokens=100).final
    driver.ask("make it 21", session="s", max_tokens=100)
    final = driver.ask("what is it", session="s", cache="bypass", max_tokens=100).final
    assert (final.text, final.usage.prompt_tokens) == (cold.text, cold.usage.prompt_tokens)
    assert driver.scheduler.load["sessions"] == 0


def test_the_turns_that_a_client_sends_are_left_out(make_driver):
    messages = (Message("user", "hello"), Message("assistant", "hi"), Message("user", "make it 21"))
    assert done(make_driver().ask("", messages=messages, max_tokens=100).final.actions) == [SET_21]


def test_queries_of_one_session_need_not_wait_for_each_other(make_driver):
    driver = make_driver()
    for text in ("make it 21", "open the trunk"):
        driver.submit(text, session="s", max_tokens=100)
    driver.step()
    assert driver.scheduler.load["active"] == 2
    driver.run()


def test_a_system_message_is_refused_not_ignored(make_driver):
    driver = make_driver()
    asked = driver.submit("", messages=(Message("system", "Be rude."), Message("user", "make it 21")))
    driver.run()
    (failed,) = asked.terminal
    assert isinstance(failed, Failed)
    assert failed.error.code == 400


# --- cancelled -------------------------------------------------------------------------------------------------------


def run_until(driver: Driver, condition) -> None:
    for _ in range(200):
        if condition():
            return
        driver.step()
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("tokens", [1, 5, 7, 9])
def test_a_command_that_is_taken_back_has_no_actions(make_driver, tokens):
    driver = make_driver()
    asked = driver.submit("make it 21", name="q", max_tokens=100)
    run_until(
        driver, lambda: any(len(a.state.output_ids) >= tokens for a in driver.scheduler._running.active if a.state)
    )
    assert driver.scheduler.cancel("ann", "q")
    driver.run()
    assert (asked.final.finish_reason, asked.final.actions, asked.final.text) == ("cancelled", (), "")
    assert driver.metrics.counter("actions") == 0
    # It is not kept either.
    assert driver.ask("make it 21", max_tokens=100).final.source == "model"


def test_what_was_said_of_a_command_before_it_was_taken_back_stays(make_driver):
    driver = make_driver()
    asked = driver.submit("both", name="q", max_tokens=100)
    run_until(driver, lambda: asked.deltas)
    driver.scheduler.cancel("ann", "q")
    driver.run()
    assert (asked.final.text, asked.final.actions) == ("Set.", ())


def test_a_command_that_comes_too_late_has_no_actions(make_driver):
    driver = make_driver()
    asked = driver.submit("make it 21", deadline_at=time.monotonic() + 1e6, max_tokens=100)
    run_until(driver, lambda: any(len(a.state.output_ids) >= 8 for a in driver.scheduler._running.active if a.state))
    (active,) = driver.scheduler._running.active
    object.__setattr__(active.request, "deadline_at", 0.0)
    driver.run()
    assert (asked.final.finish_reason, asked.final.actions) == ("deadline", ())


# --- remembered ------------------------------------------------------------------------------------------------------


def test_a_command_is_kept_and_given_again_with_its_actions(make_driver):
    driver = make_driver()
    first = driver.ask("make it 21", session="s", max_tokens=100).final
    driver.runner.runs.clear()
    again = driver.submit("  Make it 21! ", max_tokens=100).final
    assert again.source == "response_cache"
    assert (again.text, again.kind, again.actions) == (first.text, "command", first.actions)
    assert driver.runner.runs == []


def test_a_kept_command_survives_a_restart(make_driver):
    before = make_driver()
    first = before.ask("both", max_tokens=100).final
    assert before.caches.db.flush(10)
    assert make_driver().submit("both", max_tokens=100).final.actions == first.actions


def test_another_user_is_not_given_the_command(make_driver):
    driver = make_driver()
    driver.ask("make it 21", max_tokens=100)
    assert driver.ask("make it 21", "bob", max_tokens=100).final.source == "model"


@pytest.mark.parametrize("published", [b"312", b""])
def test_an_answer_with_a_value_of_the_moment_is_not_kept(make_driver, published):
    driver = make_driver()
    values(driver).update("range_km", published)
    first = driver.ask("how far", max_tokens=100).final
    assert first.is_volatile
    assert first.text == ("You have 312 km." if published else "I do not know the range.")
    values(driver).update("range_km", b"311")
    again = driver.ask("how far", max_tokens=100).final
    assert (again.source, again.text) == ("model", "You have 311 km.")


# --- ahead of the query ----------------------------------------------------------------------------------------------


def test_an_answer_ahead_is_released_with_its_actions(make_driver):
    driver = make_driver()
    cold = driver.ask("both", cache="bypass", max_tokens=100).final
    driver.partial("both", session="s")
    driver.partial("both", session="s")
    driver.idle()
    assert driver.metrics.counter("actions") == 2, "a guess does nothing"
    final = driver.ask("both", session="s", utterance="u", max_tokens=100).final
    assert final.source == "prefetch"
    assert (final.text, final.kind, final.actions) == (cold.text, cold.kind, cold.actions)
    assert driver.metrics.counter("actions") == 4


def test_an_answer_ahead_says_the_value_of_the_moment_in_which_it_is_asked_for(make_driver):
    driver = make_driver()
    values(driver).update("range_km", b"312")
    driver.partial("how far")
    driver.partial("how far")
    driver.idle()
    values(driver).update("range_km", b"311")
    final = driver.ask("how far", utterance="u", max_tokens=100).final
    assert (final.source, final.text) == ("prefetch", "You have 311 km.")


def test_a_guess_that_nobody_asks_for_does_nothing(make_driver):
    driver = make_driver()
    driver.partial("open the trunk")
    driver.partial("open the trunk")
    driver.idle()
    assert driver.metrics.counter("speculations_started") == 1
    assert done(driver.ask("make it 21", utterance="u", max_tokens=100).final.actions) == [SET_21]
    assert driver.metrics.counter("actions") == 1
