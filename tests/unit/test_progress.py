"""How far a sweep is, and how long it will take."""

import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcnn_utils.experiments.progress import Progress, duration
from lcnn_utils.training import recipe, run_name

ONE = recipe("moons", "lcnn", epochs=10, width=4)
TWO, OTHER = replace(ONE, seed=1), replace(ONE, method="standard")


def epoch(one, number, seconds):
    return {"run": run_name(one), "epoch": number, "seconds": seconds}


def told(progress, *events):
    for event in events:
        progress.tell(event)
    return progress


def test_before_anything_is_known():
    progress = Progress({ONE: 0, TWO: 3})
    assert progress.left() is None
    assert progress.text() == "0 of 2 done, 0 running, waiting for a worker"
    progress.workers = 5
    assert progress.text() == "0 of 2 done, 2 running"


def test_the_time_that_is_left():
    """A first epoch, which has the start in it, doesn't count; the median of the others does."""
    progress = told(Progress({ONE: 0, TWO: 0}), epoch(ONE, 1, 60.0))
    assert progress.left() is None
    told(progress, epoch(ONE, 2, 2.0), epoch(ONE, 3, 2.0), epoch(ONE, 4, 50.0))
    progress.workers = 1
    assert progress.left() == pytest.approx(6 * 2.0 + 10 * 2.0)
    progress.workers = 2
    assert progress.left() == pytest.approx(10 * 2.0), "the longest run takes longer than its share"
    assert progress.text() == "0 of 2 done, 2 running, about 20 s left"
    progress.end(TWO, done=False, failed=True)
    assert progress.left() == pytest.approx(6 * 2.0)
    assert progress.text() == "0 of 2 done, 1 running, 1 failed, about 12 s left"
    progress.end(ONE, done=True, failed=False)
    assert progress.text() == "1 of 2 done, 0 running, 1 failed"


def test_other_kinds_and_other_sweeps():
    progress = Progress({ONE: 0, OTHER: 5})
    told(progress, epoch(TWO, 2, 99.0), epoch(TWO, 3, 99.0))
    assert progress.left() is None, "not of this sweep"
    told(progress, epoch(ONE, 1, 9.0), epoch(ONE, 2, 3.0))
    progress.workers = 1
    assert progress.left() == pytest.approx(8 * 3.0 + 5 * 3.0), "a kind not seen yet takes as long as those seen"
    told(progress, epoch(OTHER, 6, 9.0), epoch(OTHER, 7, 1.0))
    assert progress.left() == pytest.approx(8 * 3.0 + 3 * 1.0)


def test_runs_of_one_epoch():
    one = replace(ONE, epochs=1)
    progress = told(Progress({one: 0, replace(one, seed=1): 0}), epoch(one, 1, 4.0))
    progress.end(one, done=True, failed=False)
    assert progress.left() == pytest.approx(4.0)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 10), st.floats(0.001, 1e3)), max_size=40),
       st.sets(st.integers(0, 5)), st.integers(0, 9))  # fmt: skip
def test_whatever_is_told(events, ended, workers):
    recipes = [replace(ONE, seed=seed) for seed in range(6)]
    progress = Progress(dict.fromkeys(recipes, 0))
    progress.workers = workers
    told(progress, *(epoch(recipes[seed], number, seconds) for seed, number, seconds in events))
    for seed in ended:
        progress.end(recipes[seed], done=seed % 2 == 1, failed=seed % 4 == 0)
    left = progress.left()
    assert left is None or left >= 0
    if len(ended) == 6:
        assert not left
    assert progress.text().startswith(
        f"{sum(seed % 2 for seed in ended)} of 6 done, {min(workers, 6 - len(ended))} run"
    )


@pytest.mark.parametrize(("seconds", "text"), [(3.0, "3 s"), (119.4, "119 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_stopped_ones_are_not_done():
    progress = Progress({ONE: 0, TWO: 0})
    progress.end(ONE, done=False, failed=False)
    assert progress.text().startswith("0 of 2 done, 0 running, 1 stopped")


def test_it_is_told_by_another_thread():
    """The client's thread adds kinds of recipes while ours looks at them."""
    recipes = [replace(ONE, width=width) for width in range(1, 3000)]
    progress = Progress(dict.fromkeys(recipes, 0))
    thread = threading.Thread(target=lambda: told(progress, *(epoch(one, n, 1.0) for one in recipes for n in (1, 2))))
    thread.start()
    while thread.is_alive():
        progress.left()
        list(progress.seconds)
    assert progress.left() == pytest.approx(8.0 * len(recipes))
