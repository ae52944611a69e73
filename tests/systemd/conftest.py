from __future__ import annotations

import pytest

from edge_llm import install_command


@pytest.fixture(autouse=True)
def _wherever_the_checkout_lies(monkeypatch):
    """The tests install from their own checkout, which may lie in a folder that the service cannot see."""
    assert {"/home", "/root", "/tmp"} <= set(install_command._HIDDEN)
    monkeypatch.setattr(install_command, "_HIDDEN", ("/home/ann", "/root/venv"))
