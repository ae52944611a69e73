"""What a node tells of itself while one model takes over from another; the models only pretend."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from edge_llm import node as node_module
from edge_llm.config import Config
from edge_llm.node import Node


class FakeScheduler:
    """Keeps what it was to go on with, should its provider fail."""

    def __init__(self, *_arguments, **_settings):
        pass

    def start(self, failover):
        self.failover = failover


def model(name):
    manifest = SimpleNamespace(name=name, version="1.0", generation=None)
    provider = SimpleNamespace(name="CPUExecutionProvider")
    bundle = SimpleNamespace(manifest=manifest)
    return SimpleNamespace(
        bundle=bundle,
        provider=provider,
        engine=None,
        tokenizer=None,
        renderer=None,
        domain=None,
        prepared=False,
        load_s=0.1,
    )


@pytest.fixture
def node(monkeypatch):
    def caches(*_):
        return SimpleNamespace(power=SimpleNamespace(on_change=None, temperature_c=None), feedback=None)

    monkeypatch.setattr(node_module, "open_caches", caches)
    monkeypatch.setattr(node_module, "Scheduler", FakeScheduler)
    monkeypatch.setattr(node_module, "Failover", lambda _model, _caches, on_change: on_change)
    monkeypatch.setattr(node_module, "info_document", lambda model, _config: {"served": model.bundle.manifest.name})
    monkeypatch.setattr(node_module, "collect_garbage", lambda: None)
    node = Node(Config(), Mock(), Mock(), Mock())
    node.info = lambda: node._gateway.publish_info.call_args.args[0]["served"]
    return node


def test_info_tells_of_another_provider_only_for_the_model_that_answers_new_queries(node):
    node.start(model("old"))
    node.announce()
    old = node.served.scheduler
    old.failover(model("old elsewhere"))
    assert node.info() == "old elsewhere"
    node.start(model("new"))
    # Until it is recorded, nothing is told of it.
    assert node.info() == "old elsewhere"
    assert node._gateway.set_state.call_args.kwargs == {"bundle": "old"}
    node.announce({"digest": "a" * 64, "ok": True})
    assert node._gateway.set_state.call_args.kwargs == {"bundle": "new"}
    # It fails over while it finishes what it has accepted.
    old.failover(model("old again"))
    assert node.info() == "new"
    node.set_update({"digest": "b" * 64, "ok": True})
    assert node.info() == "new"
    node.served.scheduler.failover(model("new elsewhere"))
    assert node.info() == "new elsewhere"
