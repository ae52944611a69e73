from __future__ import annotations

from collections import Counter

import pytest

from edge_llm.errors import RequestError
from edge_llm.serving.queue import FairQueue
from edge_llm.serving.request import Message, Request


def request(user: str, name: str, priority="interactive") -> Request:
    return Request(user, name, (Message("user", "?"),), lambda event: None, 0.0, priority=priority)


def drain(queue: FairQueue, running: Counter[str] | None = None) -> list[str]:
    order = []
    while (taken := queue.pop(running or Counter(), lambda request: True)) is not None:
        order.append(taken.id)
    return order


def fill(queue: FairQueue, *names: str) -> None:
    for name in names:
        queue.push(request(name[0], name))


def test_users_take_turns_and_keep_their_own_order():
    queue = FairQueue(10, 10)
    fill(queue, "a1", "a2", "a3", "b1", "c1", "c2")
    assert drain(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_the_user_with_the_fewest_running_comes_first():
    queue = FairQueue(10, 10)
    fill(queue, "a1", "b1")
    assert drain(queue, Counter(a=2, b=1)) == ["b1", "a1"]


def test_interactive_goes_before_background():
    queue = FairQueue(10, 10)
    queue.push(request("a", "late", "background"))
    queue.push(request("a", "now"))
    assert drain(queue) == ["now", "late"]


def test_the_whole_queue_is_bounded():
    queue = FairQueue(2, 2)
    fill(queue, "a1", "b1")
    with pytest.raises(RequestError, match="queue of 2 is full") as caught:
        queue.push(request("c", "c1"))
    assert (caught.value.code, caught.value.retriable) == (429, True)
    assert caught.value.retry_after_ms
    assert len(queue) == 2


def test_one_user_cannot_fill_the_queue():
    queue = FairQueue(10, 2)
    queue.push(request("a", "a1"))
    queue.push(request("a", "a2", "background"))
    with pytest.raises(RequestError, match="user a are waiting"):
        queue.push(request("a", "a3"))
    fill(queue, "b1")


def test_what_is_not_eligible_stays():
    queue = FairQueue(10, 10)
    fill(queue, "a1", "a2", "b1")
    taken = queue.pop(Counter(), lambda candidate: candidate.id == "a2")
    assert taken is not None
    assert taken.id == "a2"
    assert drain(queue) == ["b1", "a1"]


def test_remove_where_takes_out_only_those():
    queue = FairQueue(10, 10)
    fill(queue, "a1", "a2", "b1")
    assert [removed.id for removed in queue.remove_where(lambda candidate: candidate.user == "a")] == ["a1", "a2"]
    assert drain(queue) == ["b1"]
