"""Tables of measurements: what is appended is read, a row is there once, and no fault loses what was there."""

import importlib
import multiprocessing

import numpy as np
import pandas as pd
import pytest
from helpers import contents, files_of_at_most

from lcnn_utils.experiments import append, has, held_images, how_measured, measured
from lcnn_utils.experiments.results import GEOMETRY, best
from lcnn_utils.figures.style import METHOD

tables = importlib.import_module("lcnn_utils.experiments.results")
SHIPPED = sorted({path.name.partition(".")[0] for path in tables.RESULTS.glob("*.csv*")})
FACTS = {"command": "python evaluate ε", "date": "2026-01-02", "n": 3}


def run_of(method: str = "lcnn", seed: int = 0) -> str:
    return f"digits-{method}-seed{seed}-0123456789ab"


def curve(run: str = run_of(), eps=(0.0, 0.1), accuracy: float = 0.5, sha256: str = "0012345678901234", **changes):
    columns = {"label": "LCNN", "seed": 0, "norm": "l2", "eps": eps, "n": 4, "correct": 2, "accuracy": accuracy}
    return pd.DataFrame(columns | {"held": "0110", "run": run, "sha256": sha256} | changes)


def images(run: str = run_of(), **changes) -> pd.DataFrame:
    return curve(run, image=range(2), split="test", method="lcnn", **dict.fromkeys(GEOMETRY, 1.0), **changes)


def test_runs_come_back_by_method_and_seed(results):
    for method in ("lcnn", "standard"):
        for seed in (10, 2):
            append(curve(run_of(method, seed), seed=seed), "digits_curves", FACTS)
    frame = measured("digits_curves")
    assert frame.run.tolist() == [run_of(m, seed) for m in ("standard", "lcnn") for seed in (2, 2, 10, 10)]
    assert set(how_measured("digits_curves")["runs"]) == set(frame.run)
    assert set(frame.sha256) == {"0012345678901234"}, "digits of a hash are no number"
    assert held_images(frame).tolist() == [[0, 1, 1, 0]] * 8
    assert sorted(path.name for path in results.glob("*.*")) == ["digits_curves.csv", "digits_curves.json"]


def test_a_run_replaces_all_there_was_of_it(results):
    append(curve(eps=(0.0, 0.1, 0.25)), "digits_curves", FACTS)
    append(curve(run_of(seed=1)), "digits_curves", FACTS)
    append(curve(eps=(0.25, 0.5), accuracy=0.25, sha256="f" * 16), "digits_curves", {"command": "again"})
    frame = measured("digits_curves")
    assert frame.eps.tolist() == [0.25, 0.5, 0.0, 0.1]
    assert frame.accuracy.tolist() == [0.25, 0.25, 0.5, 0.5]
    assert how_measured("digits_curves")["runs"] == {run_of(): {"command": "again"}, run_of(seed=1): FACTS}
    table = pd.DataFrame({"method": "lcnn", "check": ["one", "two"], "value": [0.5, 0.7]})
    append(table, "digits_masking", FACTS)
    append(table[:1], "digits_masking", FACTS | {"runs": ["lcnn"]})
    about = pd.DataFrame({"dataset": ["digits"], "scale": ["lab"]})
    pd.testing.assert_frame_equal(measured("digits_masking"), pd.concat([about, table[:1]], axis=1))  # the whole table
    assert how_measured("digits_masking") == FACTS | {"runs": ["lcnn"]}


def test_the_store_comes_before_what_is_shipped(results):
    """A run's rows are never mixed from both."""
    append(curve(accuracy=0.25), "digits_curves", FACTS)
    append(curve(run_of("standard")), "digits_curves", FACTS)
    results.rename(tables.RESULTS)
    append(curve(eps=(0.3,)), "digits_curves", {"command": "here"})
    frame = measured("digits_curves")
    assert frame.eps.tolist() == [0.0, 0.1, 0.3]
    assert frame.run.tolist() == [run_of("standard")] * 2 + [run_of()]
    assert how_measured("digits_curves")["runs"] == {run_of("standard"): FACTS, run_of(): {"command": "here"}}


def test_the_best_scale_with_a_standard_network(results):
    row = {"label": "a", "seed": 0, "method": "standard", "accuracy": 1.0}
    for scale in ("small", "paper"):
        append(pd.DataFrame([row | {"method": "lcnn"}]), f"cifar10_{scale}_runs", {"scale": scale})
        assert best("cifar10_runs") != f"cifar10_{scale}_runs", "no Standard network to compare with"
        append(pd.DataFrame([row]), f"cifar10_{scale}_runs", {"scale": scale})
        assert best("cifar10_curves") == f"cifar10_{scale}_curves"
        assert how_measured("cifar10_runs")["scale"] == scale
    assert (best("cifar10_small_runs"), best("cifar100_runs")) == ("cifar10_small_runs", "cifar100_runs")
    append(curve(), "cifar10_small_curves", FACTS)
    assert not has("cifar10_curves"), "scales are never mixed"
    for ask in (measured, how_measured):
        with pytest.raises(FileNotFoundError, match=r"'cifar10_curves' .*there are: cifar10_paper_runs, cifar10_small"):
            ask("cifar10_curves")


# ------------------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize(("name", "rows"), [("digits_curves", curve), ("digits_geometry", images)])
def test_a_full_disk_leaves_the_old_table(results, name, rows):
    append(rows(), name, FACTS)
    before = contents(results)
    many = pd.concat([rows(run_of(seed=seed), value=np.random.default_rng(seed).random()) for seed in range(1, 99)])
    for size in (2048, len(before[f"{name}.json"]) - 1):  # no room for the rows, for the facts
        with files_of_at_most(size), pytest.raises(OSError, match=r"cannot write .*set LCNN_STORE"):
            append(many if size == 2048 else rows(), name, FACTS)
        assert contents(results) == before


DAMAGES = {
    "empty": ("digits_curves", lambda old: b""),
    "too many cells": ("digits_curves", lambda old: old.strip() + b",1,2\n"),
    "half of it": ("digits_geometry", lambda old: old[:50]),
    "one bit": ("digits_geometry", lambda old: old[:-20] + bytes([old[-20] ^ 4]) + old[-19:]),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_table_is_named(results, name, damage):
    rows = curve() if name == "digits_curves" else images()
    path = append(rows, name, FACTS)
    path.write_bytes(damage(path.read_bytes()))
    for use in (measured, lambda name: append(rows, name, FACTS)):
        with pytest.raises(RuntimeError, match=rf"{path.name} .* is damaged"):
            use(name)


def add_runs(seeds) -> None:
    for seed in seeds:
        append(curve(run_of(seed=seed)), "digits_curves", FACTS | {"seconds": seed})


def test_two_processes_lose_nothing(results):
    started = [multiprocessing.get_context("fork").Process(target=add_runs, args=(range(k, 20, 2),)) for k in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    assert measured("digits_curves").run.tolist() == [run_of(seed=seed) for seed in range(20) for _ in range(2)]
    assert sorted(about["seconds"] for about in how_measured("digits_curves")["runs"].values()) == list(range(20))


# ----------------------------------------------------------------------------------------------------- shipped
@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped(name):
    frame, about = measured(name), how_measured(name)
    assert set(frame.scale) == {about.get("scale", "lab")}
    assert about["command"]
    assert set(frame.get("label", ())) <= {label for label, _, _ in METHOD.values()}
    if "run" in frame:
        weights = frame.drop_duplicates("run").set_index("run").sha256.to_dict()
        assert {run: own["weights"] for run, own in about["runs"].items()} == weights
    if name.endswith("_curves"):
        np.testing.assert_allclose(frame.accuracy, frame.correct / frame.n, rtol=1e-4)
        if frame.groupby("method").seed.nunique().max() > 1:  # of single runs nothing is compared
            assert held_images(frame).sum(1).tolist() == frame.correct.tolist()
    if name.endswith("_geometry"):
        np.testing.assert_allclose(frame.curvature, frame.hessian_norm / (frame.grad_norm + 1e-6), rtol=3e-4)
        test = frame[(frame.split == "test") & (frame.method != "relu_reading")]
        runs = measured(name.replace("_geometry", "_runs")).set_index("run")
        for run, part in test.groupby("run"):  # other images of the same split, or Lanczos' 1 % and other batches
            expected, near = runs.loc[run, list(GEOMETRY)].astype(float), runs.measured[run] == len(part)
            np.testing.assert_allclose(part[list(GEOMETRY)].mean(), expected, rtol=0.02 if near else 0.25)
