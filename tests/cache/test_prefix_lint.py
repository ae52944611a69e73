"""Prompts that vary near their head are found; those that are merely different are not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cache import prefix_lint
from edge_llm.cache.prefix_lint import MAX_FINDINGS, Finding, PrefixLint, clear_findings
from edge_llm.cache.state_db import StateDb, state_path
from edge_llm.cache.state_file import open_memory
from tests.cache.conftest import Clock

FLUSH_S = 10
HEAD = "You are the voice of a car. It is {}. Answer in one short sentence, and never guess a number."


@pytest.fixture
def lint(db: StateDb, clock: Clock) -> PrefixLint:
    return PrefixLint(db, clock=clock)


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def observe(lint: PrefixLint, *heads: str, user: str = "ann") -> list[Finding]:
    """A character is a token."""
    for head in heads:
        lint.observe(user, [ord(character) for character in head], decode)
    assert lint._db.flush(FLUSH_S)
    return lint.findings()


def test_a_clock_is_found(lint, clock, caplog):
    heads = [HEAD.format(time) for time in ("14:05", "14:06", "14:07")]
    findings = observe(lint, *heads)
    position = HEAD.index("{}") + 4
    assert findings == [Finding("ann", position, len(heads[0]) - position, "7", 2, clock.now)]
    assert caplog.messages == [
        f'the prompt varies from token {position} on ("7"): {len(heads[0]) - position} tokens a query are prefilled '
        "again; put what varies behind what stays the same"
    ]


def test_one_change_is_an_edit_and_no_warning(lint, caplog):
    (finding,) = observe(lint, *[HEAD.format(name) for name in ("Monday", "Tuesday")])
    assert finding.count == 1
    assert not finding.is_habit(finding.last_seen)
    assert not caplog.messages


def test_one_warning_a_user_and_interval(lint, clock, caplog):
    numbers = iter(range(100, 200))

    def vary(user: str, times: int) -> int:
        caplog.clear()
        observe(lint, *(HEAD.format(next(numbers)) for _ in range(times)), user=user)
        return len(caplog.messages)

    assert vary("ann", 5) == 1
    assert vary("ann", 5) == 0
    assert vary("bob", 5) == 1
    clock.now += 3600.0
    assert vary("ann", 5) == 1
    clock.now -= 1e6  # a clock that was corrected silences nothing for days
    assert vary("ann", 1) == 1


def test_different_and_alternating_prompts_are_fine(lint, caplog):
    other = "Speak like a pirate who has never seen a car, and tell a joke with each answer that you give."
    assert observe(lint, *[HEAD.format("noon"), other] * 6) == []
    many = [f"{name} " * 20 for name in ("alpha", "beta", "gamma", "delta", "kappa", "omega", "sigma", "theta")]
    assert observe(lint, *many * 3, user="bob") == []
    assert not caplog.messages


def test_alternating_prompts_that_each_hold_a_clock_are_found(lint):
    other = "Speak like a pirate. The time aboard is {}. Tell a joke with each answer that you give, arr."
    findings = observe(lint, *(head.format(100 + n) for n in range(3) for head in (HEAD, other)))
    assert findings[0].count == 4


def test_a_prompt_that_goes_on_where_it_ended_is_fine(lint):
    head = HEAD.format("noon")
    assert observe(lint, head, head + " And be quick.", head + " And be kind, please.") == []


def test_a_clock_at_the_end_is_where_it_belongs(lint):
    head = HEAD.format("a day")
    assert observe(lint, *(f"{head} It is {n}.\n" for n in range(100, 110))) == []


def test_short_and_giant_heads_are_left_alone(lint):
    assert observe(lint, *("ab" + str(n) + "cdefghijk" for n in range(9))) == []
    assert observe(lint, *("a" * 5000 + str(n) + "b" * 5000 for n in range(9))) == []


def test_what_was_left_out_is_shown(lint):
    (finding,) = observe(lint, HEAD.format("Ann's car"), HEAD.format(""))
    assert finding.excerpt == "Ann's car"


def test_the_excerpt_is_printable_and_short(lint):
    (finding,) = observe(lint, HEAD.format("x\n\x1b[31m\u202e" + "q" * 50), HEAD.format("\x07y" * 30))
    assert finding.excerpt.isprintable()
    assert len(finding.excerpt) == 40


def test_users_are_compared_with_themselves_only(lint):
    for user in ("ann", "bob", "eve"):
        assert observe(lint, HEAD.format(user), user=user) == []


def test_a_finding_is_forgotten_after_a_week(lint, clock):
    (finding,) = observe(lint, *(HEAD.format(n) for n in range(100, 103)))
    assert finding.is_habit(clock.now)
    clock.now += 8 * 86_400
    assert not finding.is_habit(clock.now)
    (finding,) = observe(lint, HEAD.format(200))
    assert finding.count == 1


def test_another_process_reads_the_findings_and_erases_them(tmp_path, lint):
    observe(lint, HEAD.format("Ann"), HEAD.format("Bob"))
    with contextlib.closing(StateDb.open(state_path(tmp_path))) as other:
        (finding,) = PrefixLint(other).findings()
        assert finding.excerpt == "Bob"
        assert clear_findings(other, "bob") == 0
        assert clear_findings(other) == 1
    assert lint.findings() == []
    assert observe(lint, HEAD.format("Cyd")) == []  # what it was compared with has gone too


def test_rows_and_memory_are_bounded(lint, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(prefix_lint, "_MAX_HEAD_BYTES", 20_000)
    for index in range(MAX_FINDINGS + 50):
        for number in range(2):
            lint.observe(f"user{index}", [ord(c) for c in HEAD.format(number)], decode)
        if index % 100 == 0:
            lint._db.flush(FLUSH_S)
    assert lint._db.flush(FLUSH_S)
    assert len(lint.findings()) == MAX_FINDINGS
    assert lint._nbytes <= 20_000
    assert lint._nbytes == sum(user.nbytes for user in lint._users.values())


@given(
    st.lists(st.integers(0, 5), min_size=16, max_size=40),
    st.lists(st.integers(0, 5), min_size=16, max_size=40),
)
def test_positions_are_true_for_any_two_heads(first, second):
    db = StateDb(None, open_memory())
    lint = PrefixLint(db)
    lint.observe("ann", first, lambda ids: " ".join(map(str, ids)))
    lint.observe("ann", second, lambda ids: " ".join(map(str, ids)))
    db.flush(FLUSH_S)
    for finding in lint.findings():
        assert first[: finding.position] == second[: finding.position]
        assert first[finding.position] != second[finding.position]
        assert finding.lost_tokens == len(second) - finding.position
        assert first[-8:] == second[-8:]
    if first == second:
        assert lint.findings() == []
    db.close()
