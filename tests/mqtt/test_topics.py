"""Topics, without a broker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import ConfigError
from edge_llm.mqtt.topics import Topics, is_name

TOPICS = Topics("edge", "hall")


def test_what_a_node_listens_to():
    assert Topics("edge").subscriptions() == (
        ("edge_llm/v1/edge/query/+", 1),
        ("edge_llm/v1/edge/partial/+", 0),
        ("edge_llm/v1/edge/cancel/+", 1),
        ("edge_llm/v1/edge/feedback/+", 1),
        ("edge_llm/v1/edge/state/+", 1),
    )
    assert TOPICS.subscriptions()[5:] == (
        ("$share/hall/edge_llm/v1/pool/hall/query/+", 1),
        ("edge_llm/v1/pool/hall/cancel/+", 1),
    )


@pytest.mark.parametrize(
    ("topic", "kind", "user", "pool"),
    [
        ("edge_llm/v1/edge/query/ann", "query", "ann", None),
        ("edge_llm/v1/edge/partial/ann", "partial", "ann", None),
        ("edge_llm/v1/edge/cancel/ann", "cancel", "ann", None),
        ("edge_llm/v1/edge/feedback/ann", "feedback", "ann", None),
        ("edge_llm/v1/edge/state/range_km", "state", "range_km", None),
        ("edge_llm/v1/pool/hall/query/ann", "query", "ann", "hall"),
        ("edge_llm/v1/pool/hall/cancel/ann", "cancel", "ann", "hall"),
    ],
)
def test_what_a_topic_means(topic, kind, user, pool):
    route = TOPICS.parse(topic)
    assert route is not None
    assert (route.kind, route.user, route.scope.pool) == (kind, user, pool)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "edge_llm/v1/edge",
        "edge_llm/v1/edge/query",
        "edge_llm/v1/edge/query/ann/more",
        "edge_llm/v1/edge/reply/ann",
        "edge_llm/v1/other/query/ann",
        "edge_llm/v1/edgelong/query/ann",
        "edge_llm/v2/edge/query/ann",
        "edge_llm/v1/pool/hall/feedback/ann",
        "edge_llm/v1/edge/state",
        "edge_llm/v1/edge/state/car/range_km",
        "edge_llm/v1/pool/hall/state/range_km",
        "edge_llm/v1/pool/other/query/ann",
    ],
)
def test_other_topics_mean_nothing(topic):
    assert TOPICS.parse(topic) is None


def test_values_of_the_host_are_heard_where_they_are_published():
    route = TOPICS.parse(TOPICS.state_value("range_km"))
    assert route is not None
    assert (route.kind, route.user) == ("state", "range_km")


def test_a_user_without_a_name_has_no_reply_topic():
    for user in ("", "a b", "é", "a" * 65):
        route = TOPICS.parse(f"edge_llm/v1/edge/query/{user}")
        assert route is not None
        assert not route.has_valid_user


@pytest.mark.parametrize(
    ("topic", "allowed"),
    [
        ("edge_llm/v1/edge/reply/ann/default", True),
        ("edge_llm/v1/edge/reply/ann/phone/1", True),
        ("edge_llm/v1/edge/reply/ann", False),
        ("edge_llm/v1/edge/reply/ann/", False),
        ("edge_llm/v1/edge/reply/ann//x", False),
        ("edge_llm/v1/edge/reply/ann/x/", False),
        ("edge_llm/v1/edge/reply/ann/+", False),
        ("edge_llm/v1/edge/reply/ann/#", False),
        ("edge_llm/v1/edge/reply/ann/\0", False),
        ("edge_llm/v1/edge/reply/ann/\u0085", False),
        ("edge_llm/v1/edge/reply/ann/\ufdd0", False),
        ("edge_llm/v1/edge/reply/ann/a b~", True),
        ("edge_llm/v1/edge/reply/ann/" + "/".join("a" * 20), True),
        ("edge_llm/v1/edge/reply/ann/" + "/".join("a" * 100), False),
        ("edge_llm/v1/edge/reply/anna/x", False),
        ("edge_llm/v1/edge/reply/bob/x", False),
        ("edge_llm/v1/pool/hall/reply/ann/x", False),
        ("edge_llm/v1/edge/status", False),
        ("edge_llm/v1/edge/reply/ann/" + "x" * 600, False),
    ],
)
def test_replies_stay_with_their_user(topic, allowed):
    assert TOPICS.own.allows_reply("ann", topic) is allowed


@given(st.text())
def test_no_reply_topic_leaves_the_users_own(text):
    if TOPICS.own.allows_reply("ann", text):
        assert text.startswith("edge_llm/v1/edge/reply/ann/")
    assert not TOPICS.own.allows_reply("ann", "edge_llm/v1/edge/reply/ann/" + text + "/#")


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a\n", "+", "é", "a" * 65])
def test_names(name):
    assert not is_name(name)
    with pytest.raises(ConfigError, match=r"mqtt\.node"):
        Topics(name)


def test_no_node_is_called_pool():
    with pytest.raises(ConfigError, match="pool"):
        Topics("pool")
