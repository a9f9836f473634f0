"""How long a sweep takes: the model against bounds, a brute force and worked examples; what the chapter measures."""

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcnn_utils.experiments import clusters, sweep
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.experiments.plan import Outcome
from lcnn_utils.studies import scaling
from lcnn_utils.studies.scaling import makespan, speedups
from lcnn_utils.training import METHODS, Recipe, run_name, steps_an_epoch

LENGTHS = st.lists(st.floats(0, 1e4), min_size=1, max_size=40)
SLACK = 1 + 1e-9


# ------------------------------------------------------------------------------------------------------ worked examples
@pytest.mark.parametrize(
    ("seconds", "workers", "overhead", "expected"),
    [
        ([], 3, 0.0, 0.0),
        ([5], 1, 0.0, 5),
        ([3, 1, 2], 1, 0.0, 6),
        ([3, 1, 2], 2, 0.0, 3),  # 3 | 1, 2
        ([1, 2, 3], 2, 0.0, 4),  # 1, 3 | 2: the longest should have come first
        ([3, 2, 1], 2, 0.0, 3),
        ([4, 4, 4], 100, 0.0, 4),
        ([0, 0, 7], 2, 0.0, 7),
        ([3, 1, 2], 1, 0.5, 7.5),  # one after another, each handed out first
        ([2, 2], 2, 1.0, 4),  # handed out at 1 and at 2
        ([1, 1, 1, 1], 100, 10.0, 41),  # the scheduler is the bottleneck
        ([10, 1, 1], 2, 1.0, 11),  # begun at 1, 2, 4
    ],
)
def test_worked_by_hand(seconds, workers, overhead, expected):
    assert makespan(seconds, workers, overhead) == pytest.approx(expected)


def test_the_anomaly_longest_first_is_better_here_and_worse_there():
    """Order matters, and no simple order is always best (Graham 1969)."""
    assert makespan([1, 1, 1, 1, 4], 2) == 6
    assert makespan([4, 1, 1, 1, 1], 2) == 4
    assert makespan([3, 3, 2, 2, 2], 2) == 7, "longest first"
    assert makespan([3, 2, 2, 3, 2], 2) == 6, "another order, and the best there is"
    assert optimum([3, 3, 2, 2, 2], 2) == 6


# ---------------------------------------------------------------------------------------------------------- properties
@given(LENGTHS, st.integers(1, 60), st.floats(0, 10))
def test_never_under_the_bound(lengths, workers, overhead):
    bound = max(max(lengths), math.fsum(lengths) / workers, len(lengths) * overhead)
    assert makespan(lengths, workers, overhead) * SLACK >= bound


@given(LENGTHS, st.integers(1, 60))
def test_never_over_grahams_bound(lengths, workers):
    assert makespan(lengths, workers) <= SLACK * (math.fsum(lengths) / workers + (1 - 1 / workers) * max(lengths))


@given(LENGTHS)
def test_one_worker_is_the_sum(lengths):
    assert makespan(lengths, 1) == pytest.approx(math.fsum(lengths))


@given(LENGTHS, st.floats(0, 10))
def test_one_worker_pays_the_overhead_of_every_run(lengths, overhead):
    assert makespan(lengths, 1, overhead) == pytest.approx(math.fsum(lengths) + len(lengths) * overhead)


@given(LENGTHS, st.integers(1, 60), st.floats(0, 10))
def test_more_overhead_never_helps(lengths, workers, overhead):
    assert makespan(lengths, workers, overhead) <= SLACK * makespan(lengths, workers, 2 * overhead)


@given(LENGTHS, st.integers(1, 60), st.floats(0, 10), st.floats(1e-3, 1e3))
def test_the_unit_of_time_does_not_matter(lengths, workers, overhead, unit):
    scaled = makespan([unit * length for length in lengths], workers, unit * overhead)
    assert scaled == pytest.approx(unit * makespan(lengths, workers, overhead), rel=1e-6, abs=1e-300)


@given(LENGTHS, st.integers(0, 60), st.floats(0, 10))
def test_a_worker_for_each_run_is_enough(lengths, more, overhead):
    assert makespan(lengths, len(lengths) + more, overhead) == makespan(lengths, len(lengths), overhead)


def optimum(lengths, workers):
    """By trying every way to share the runs out."""
    shares = itertools.product(range(workers), repeat=len(lengths))
    return min(
        max(sum(length for length, at in zip(lengths, share, strict=True) if at == worker) for worker in range(workers))
        for share in shares
    )


def by_steps(lengths, workers, overhead):
    """List scheduling, written down as a clock that ticks in whole units."""
    waiting, busy, clock, begins = list(lengths), [0] * workers, 0, 0
    while waiting or any(end > clock for end in busy):
        for worker in range(workers):
            if waiting and busy[worker] <= clock and begins <= clock:
                begins = clock + overhead
                busy[worker] = begins + waiting.pop(0)
        clock += 1
    return max(busy)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 3))
def test_between_the_optimum_and_twice_it(lengths, workers):
    best = optimum(lengths, workers)
    assert best <= makespan(lengths, workers) <= SLACK * (2 - 1 / workers) * best


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 4))
def test_a_clock_says_the_same(lengths, workers, overhead):
    assert makespan(lengths, workers, overhead) == by_steps(lengths, workers, overhead)


@pytest.mark.parametrize(
    ("seconds", "workers", "overhead"),
    [([-1.0], 1, 0.0), ([1.0, math.nan], 2, 0.0), ([math.inf], 1, 0.0), ([1.0], 1, -0.1), ([1.0], 1, math.nan),
     ([1.0], 0, 0.0), ([1.0], -3, 0.0), ([1.0], 1.5, 0.0), ([1.0], True, 0.0), ([], 0, 0.0)],
)  # fmt: skip
def test_wrong_input(seconds, workers, overhead):
    with pytest.raises(ValueError, match=r"must be a (finite|whole) number"):
        makespan(seconds, workers, overhead)


# ------------------------------------------------------------------------------------------------------------- speedups
@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=20), st.floats(0, 10))
def test_speedups(lengths, overhead):
    counts = [1, 2, 5, 100]
    frame = speedups((length for length in lengths), counts, overhead)
    assert list(frame.columns) == ["workers", "seconds", "speedup", "efficiency", "bound"]
    assert frame.workers.tolist() == counts
    assert frame.seconds.tolist() == [makespan(lengths, count, overhead) for count in counts]
    np.testing.assert_allclose(frame.speedup * frame.seconds, math.fsum(lengths))
    np.testing.assert_allclose(frame.efficiency * frame.workers, frame.speedup)
    assert (frame.bound <= frame.seconds * SLACK).all()
    assert (frame.speedup <= frame.workers * SLACK).all()


def test_speedups_of_nothing():
    for lengths in ([], [0.0, 0.0]):
        with pytest.raises(ValueError, match="nothing to speed up"):
            speedups(lengths, [1, 2])


# ------------------------------------------------------------------------------------------------- measured durations
@pytest.fixture(scope="module")
def shipped():
    return scaling.timed_runs()


def test_workers_are_even_on_a_logarithmic_axis():
    assert scaling.WORKERS[0] == 1
    assert scaling.WORKERS[-1] == 1000
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(scaling.WORKERS))


def test_a_large_sweep_trains_each_method_once_for_what_means_nothing_to_it():
    recipes = scaling.large_sweep("digits")
    assert len(set(recipes)) == len(recipes)
    counts = pd.Series([one.method for one in recipes]).value_counts() / len(scaling.SEEDS)
    nine = len(scaling.LAMBDAS)
    assert counts.to_dict() == {m: 1 for m in METHODS if m != "relu"} | {
        "lcnn": nine**2, "lcnn_gradreg": nine**2, "minimal": nine,
    }  # fmt: skip


def test_durations_are_those_measured(shipped):
    assert set(shipped.device.str.contains("CPU")) == {True}
    known = experiments.recipe("digits", "cure", 0)
    row = shipped[(shipped.method == "cure") & (shipped.seed == 0)].iloc[0]
    only = shipped[shipped.index == row.name]
    assert scaling.durations([known], only) == [pytest.approx(row.seconds)]
    longer = replace(known, epochs=3 * known.epochs, seed=9, lambda_cure=1.0)
    assert scaling.durations([longer], only) == [pytest.approx(3 * row.seconds)], "by steps; the rest doesn't matter"
    median = shipped[(shipped.method == "cure")].seconds.median() / steps_an_epoch(known)
    assert scaling.durations([known], shipped)[0] / steps_an_epoch(known) == pytest.approx(median)
    with pytest.raises(ValueError, match="no timed run is of the kind of digits-cure-seed0-"):
        scaling.durations([replace(known, width=999)], shipped)


def test_panels_are_of_shipped_runs(shipped):
    panels = scaling.panels(shipped, (0.0, 0.1))
    assert [title.split(":")[0] for title in panels] == ["digits", "CIFAR-10, tiny"]
    for frame in panels.values():
        assert set(frame.overhead) == {0.0, 0.1}
        free, dear = (part.set_index("workers") for _, part in frame.groupby("overhead"))
        assert (dear.seconds >= free.seconds).all()
        assert free.speedup[1] == pytest.approx(1)
        assert free.speedup[1000] > 100


# --------------------------------------------------------------------------------------------------------- the chapter
def test_store_at(tmp_path, monkeypatch):
    monkeypatch.setenv("LCNN_STORE", "before")
    with scaling.store_at(tmp_path):
        assert os.environ["LCNN_STORE"] == str(tmp_path)
    assert os.environ["LCNN_STORE"] == "before"


def test_outcomes_frame_and_content(store):
    recipes = [Recipe("moons", method, "mlp", width=4, epochs=2) for method in ("standard", "lcnn")]
    broken = replace(recipes[0], lr=1e20)
    frame = scaling.outcomes_frame(sweep([*recipes, broken], workers=1, progress=False))
    assert frame.method.tolist() == ["standard", "lcnn", "standard"]
    assert frame.epochs.tolist() == [2, 2, 0]
    assert frame.accuracy.notna().tolist() == [True, True, False]
    assert frame.error[2] == "the loss is not finite in epoch 1, step 2 of 20,"
    assert frame.error.tolist()[:2] == ["", ""]
    assert frame.file.tolist() == [run_name(one) for one in (*recipes, broken)]
    assert scaling.outcomes_frame([Outcome(broken, 0, None, None)]).error.tolist() == [""]
    marks = [scaling.content(one) for one in recipes]
    assert marks[0] != marks[1]
    with pytest.raises(FileNotFoundError, match="is not in the store"):
        scaling.content(broken)
    with scaling.store_at(store.parent / "other"):
        sweep(recipes, workers=1, progress=False)
        assert [scaling.content(one) for one in recipes] == marks, "elsewhere and later: the same"
        one = recipes[0]
        record = experiments.places()[1] / f"{run_name(one)}.json"
        record.write_text(record.read_text().replace('"accuracy": ', '"accuracy": 1', 1))
        assert scaling.content(one) != marks[0]


@pytest.mark.skipif(os.name != "posix", reason="kills a process as POSIX does")
def test_a_killed_worker_and_the_overhead(store):
    one = Recipe("moons", "lcnn", "mlp", width=4, epochs=40)
    with clusters.local(1, device="cpu") as client:
        with ThreadPoolExecutor(1) as pool:
            murder = pool.submit(scaling.kill_worker, client, one, 3)
            (outcome,) = sweep([one], client, progress=False)
        done = murder.result()
        assert 3 <= done < 40
        assert outcome.run is not None
        assert scaling.kill_worker(client, one, 40) is None, "it is over"
        with pytest.raises(TimeoutError, match="had 0 of 1 epochs"):
            scaling.kill_worker(client, replace(one, seed=5), patience=0.1)
        assert 0 < scaling.overhead(client, 40) < 1
    mark = scaling.content(one)
    with scaling.store_at(store.parent / "calm"):
        sweep([one], workers=1, progress=False)
        assert scaling.content(one) == mark, "bit for bit"
