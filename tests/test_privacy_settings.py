"""Settings of privacy and trust that must not be got wrong silently, and the log of a private daemon."""

from __future__ import annotations

import logging
import sys

import pytest

from edge_llm.config import load_config
from edge_llm.errors import ConfigError
from edge_llm.logs import JsonFormatter, TextFormatter


def test_feedback_and_strict_privacy_contradict_each_other():
    assert load_config(flags={"privacy": "strict"}).privacy == "strict"
    with pytest.raises(ConfigError, match=r"feedback\.enabled"):
        load_config(flags={"privacy": "strict", "feedback": {"enabled": True}})
    with pytest.raises(ConfigError, match="privacy"):
        load_config(flags={"privacy": "paranoid"})


def test_keys_come_from_the_environment_with_commas():
    config = load_config(environ={"EDGE_LLM_BUNDLE_KEYS": "/etc/edge-llm/a.pub,/etc/edge-llm/b.pub"})
    assert config.bundle_keys == ("/etc/edge-llm/a.pub", "/etc/edge-llm/b.pub")


@pytest.mark.parametrize("formatter", [JsonFormatter, TextFormatter])
def test_a_private_log_shows_where_an_exception_came_from_but_not_what_it_says(formatter):
    try:
        raise ValueError("Where is my medicine?")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "a fault", (), sys.exc_info())
    private, normal = formatter(private=True).format(record), formatter().format(record)
    assert "medicine" in normal
    assert "medicine" not in private
    assert "ValueError" in private
    assert "test_privacy_settings.py" in private
