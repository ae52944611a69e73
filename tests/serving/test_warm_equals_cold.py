"""Whatever came before, a query is answered as on a cold start: the same tokens, to the right user, once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.serving.driver import Driver

# Room for a few prompts, so that leaves are given up all the time.
MAX_BYTES = 30_000
USERS = st.sampled_from(["ann", "bob"])
SESSIONS = st.sampled_from([None, None, "s"])
# No two of them are equal after normalising: a hit on another spelling is another test's business.
WORDS = st.lists(st.sampled_from(["is", "it", "far", "today", "charging"]), min_size=1, max_size=5).map(" ".join)


class WarmMachine(RuleBasedStateMachine):
    """Every query goes to a scheduler with every cache, and to one with none."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.cold = Driver(stop_after=5)
        self.warm = self.start()

    def start(self) -> Driver:
        return Driver(self.folder, max_bytes=MAX_BYTES, stop_after=5, max_speculative_tokens=4, min_confidence=0.5)

    @rule(
        user=USERS,
        text=WORDS,
        session=SESSIONS,
        tokens=st.integers(1, 6),
        utterance=st.sampled_from([None, "u"]),
        stop=st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), max_size=3).map(tuple),
        priority=st.sampled_from(["interactive", "background"]),
    )
    def ask(self, user, text, session, tokens, utterance, stop, priority):
        fields = {"session": session, "max_tokens": tokens, "stop": stop, "priority": priority}
        warm = self.warm.ask(text, user, utterance=utterance, **fields).final
        cold = self.cold.ask(text, user, **fields).final
        assert (warm.text, warm.finish_reason) == (cold.text, cold.finish_reason)
        assert warm.usage.prompt_tokens == cold.usage.prompt_tokens
        assert warm.usage.completion_tokens == cold.usage.completion_tokens
        assert warm.usage.cached_tokens <= warm.usage.prompt_tokens

    @rule(user=USERS, text=WORDS, session=SESSIONS, name=st.sampled_from(["u", "v"]))
    def pause(self, user, text, session, name):
        for _ in range(2):
            self.warm.partial(text, user, name, session=session)
        self.warm.idle(8)

    @rule(first=WORDS, second=WORDS, third=WORDS)
    def ask_at_once(self, first, second, third):
        asked = [("ann", first), ("bob", second), ("bob", third)]
        warm = [self.warm.submit(text, user) for user, text in asked]
        cold = [self.cold.submit(text, user) for user, text in asked]
        self.warm.run()
        self.cold.run()
        assert [answer.final.text for answer in warm] == [answer.final.text for answer in cold]

    @rule(user=USERS, text=WORDS, session=SESSIONS, name=st.sampled_from(["u", "v"]), seq=st.integers(0, 20))
    def partial(self, user, text, session, name, seq):
        self.warm.partial(text, user, name, seq, session)

    @rule(units=st.integers(1, 12))
    def idle(self, units):
        self.warm.idle(units)

    @rule(user=USERS, text=WORDS, steps=st.integers(0, 4))
    def cancel(self, user, text, steps):
        asked = self.warm.submit(text, user, name="to-cancel")
        for _ in range(steps):
            if not asked.terminal:
                self.warm.step()
        self.warm.scheduler.cancel(user, "to-cancel")
        self.warm.run()
        cold = self.cold.ask(text, user).final.text
        assert cold.startswith(asked.final.text)

    @rule(user=USERS, text=WORDS)
    def bypass(self, user, text):
        warm = self.warm.ask(text, user, cache="bypass").final
        assert warm.usage.cached_tokens == 0
        assert warm.source == "model"
        assert warm.text == self.cold.ask(text, user).final.text

    @rule()
    def restart(self):
        self.warm.close()
        self.cold.close()
        self.cold, self.warm = Driver(stop_after=5), self.start()

    @invariant()
    def sound(self):
        self.warm.check()
        assert self.warm.caches.reuse.tree.nbytes <= MAX_BYTES

    def teardown(self):
        self.warm.idle()
        self.warm.close()
        shutil.rmtree(self.folder)


TestWarmMachine = WarmMachine.TestCase
TestWarmMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
