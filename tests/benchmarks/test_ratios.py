from __future__ import annotations

import numpy as np
import pytest

from benchmarks.ratios import Goal, Ratio, compare, judge, median, percentile


@pytest.mark.parametrize("percent", [0, 1, 10, 50, 90, 99, 100])
@pytest.mark.parametrize("values", [[3.0], [4.0, 1.0], [5.0, 2.0, 8.0, 1.0, 9.0, 3.0, 7.0]])
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_percentile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        median([])


def test_ratios_are_taken_round_by_round():
    # In a slow round both are slow: the ratio stays 2, whatever the medians of the times are.
    own, peer = [1.0, 10.0, 1.0], [2.0, 20.0, 4.0]
    ratio = compare("m", "peer", "decode_ms", peer, own)
    assert ratio.median == 2.0
    assert ratio.p10 == 2.0


def test_rounds_that_do_not_pair_up_are_an_error():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        compare("m", "peer", "decode_ms", [1.0, 2.0], [1.0])


def ratio(peer, value, metric="decode_ms"):
    return Ratio(model="m", peer=peer, metric=metric, median=value, p10=value)


def test_a_goal_holds_against_every_way_to_run_the_peer():
    goal = Goal(model="m", peer="llama.cpp", metric="decode_ms", at_least=1.1)
    others = [ratio("llama.cpp", 9.0, "prefill_64_ms"), ratio("llama", 9.0), ratio("llama.cpp2", 9.0)]
    plain, flash = judge(goal, [ratio("llama.cpp", 1.2), ratio("llama.cpp flash-attention", 1.0), *others])
    assert (plain.peer, plain.median, plain.reached) == ("llama.cpp", 1.2, True)
    assert (flash.peer, flash.median, flash.reached) == ("llama.cpp flash-attention", 1.0, False)


def test_a_goal_against_a_peer_that_was_not_measured_is_neither_reached_nor_missed():
    goal = Goal(model="m", peer="llama.cpp", metric="decode_ms", at_least=1.1)
    assert judge(goal, [ratio("ctranslate2", 3.0)]) == [goal]
    assert goal.reached is None
