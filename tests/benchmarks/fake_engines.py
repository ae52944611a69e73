"""Engines without weights, loaded by benchmarks/worker.py in the tests."""

from __future__ import annotations

import time


class Fake:
    version = "1.2"

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    def generate(self, prompt_ids, count, on_token):
        print("chatter on standard output")
        for index in range(count):
            time.sleep(self.step_s)
            on_token((sum(prompt_ids) + index) % 100)


class Short(Fake):
    def generate(self, prompt_ids, count, on_token):
        on_token(1)


def load(path, threads, context):
    assert (threads, context) == (2, 1024)
    return Fake(0.0005)


def load_slow(path, threads, context):
    return Fake(0.002)


def load_broken(path, threads, context):
    raise ValueError(f"cannot read {path.name}")


def load_short(path, threads, context):
    return Short(0.0)
