"""`lcnn evaluate` and `lcnn ship`: what is there is not made again."""

import importlib
from dataclasses import replace

import pytest

from lcnn_utils.cli import commands as cli
from lcnn_utils.experiments import held_images, how_measured, measured, runs
from lcnn_utils.measurements import evaluate as module
from lcnn_utils.measurements import ship
from lcnn_utils.measurements.evaluate import evaluate
from lcnn_utils.measurements.paper import cost_frame
from lcnn_utils.measurements.training import lambda_recipes
from lcnn_utils.training import recipe, run_name, samples, state_path

tables = importlib.import_module("lcnn_utils.experiments.results")  # whose name in the package is a function
EPS = {"l2": (0.1,), "linf": (0.1,)}
SMALL = recipe("digits", "lcnn", model="mlp", width=4, epochs=1)


@pytest.fixture
def plan(store, monkeypatch, tmp_path):
    """No tables, and small measurements."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(module.PLANS, "lab", dict(seeds=(0,), test=6, train=6, maps=6, restarts=1, eps=EPS))


@pytest.fixture
def small(plan, monkeypatch, tmp_path):
    """Nothing is shipped, and one small network wanted."""
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(module, "ordered", lambda *_: [SMALL])


def test_every_kind_of_table_of_a_shipped_network(plan, monkeypatch):
    lcnn = recipe("digits", "lcnn")
    monkeypatch.setattr(module, "ordered", lambda *_: [lcnn])
    evaluate("digits")
    assert measured("digits_runs").accuracy.item() > 0.9
    assert len(measured("digits_geometry")) == 2 * 6, "test and training images"
    assert set(measured("digits_stability").noise) == {"random", "worst"}
    curves = measured("digits_curves")
    assert set(curves.norm) == {"l2", "linf"}
    assert held_images(curves).sum(1).tolist() == curves.correct.tolist()
    for kind in module.KINDS:
        assert list(how_measured(f"digits_{kind}")["runs"]) == [run_name(lcnn)]


def test_a_network_is_measured_once_and_again_with_other_weights(small, monkeypatch):
    with pytest.raises(FileNotFoundError, match="--train"):
        evaluate("digits")
    assert cli.main(["evaluate", "digits", "--only", "runs", "--train"]) == 0
    first = measured("digits_runs")
    with monkeypatch.context() as patch:
        patch.setitem(module.KINDS, "runs", lambda *_: pytest.fail("it was measured again"))
        evaluate("digits", only="runs")
    state_path(SMALL).write_bytes(b"other weights")
    evaluate("digits", only="runs")
    second = measured("digits_runs")
    assert len(second) == len(first) == 1
    assert second.sha256.item() != first.sha256.item()


def test_a_training_that_fails_is_named_and_the_others_are_measured(small, monkeypatch):
    broken = replace(SMALL, lr=1e20)
    monkeypatch.setattr(module, "ordered", lambda *_: [broken, SMALL])
    with pytest.raises(RuntimeError, match=f"failed: {run_name(broken)}: ."):
        evaluate("digits", only="runs", train=True)
    assert measured("digits_runs").run.tolist() == [run_name(SMALL)]


def test_steps_are_timed_in_turn(plan, monkeypatch):
    monkeypatch.setattr(module, "METHODS", {"standard": None, "cure": None})
    evaluate("digits", only="steps")
    frame = measured("digits_steps")
    assert frame.groupby("method")["round"].apply(set).tolist() == [set(range(40))] * 2
    ratio = cost_frame("digits").groupby("method").ratio.median()
    assert ratio["cure"] > 2 > ratio["standard"] == 1, "it has several passes"


def test_the_search_for_lambda_measures_the_held_out_part(small, monkeypatch):
    splits = []
    monkeypatch.setattr(runs, "samples", lambda r, split, d: splits.append(split) or samples(r, split))
    monkeypatch.setattr(module, "SEARCHED", (0.0, 0.1))
    tiny = lambda *args, **changes: lambda_recipes(*args, **changes, model="mlp", width=4, epochs=1)
    monkeypatch.setattr(module, "lambda_recipes", tiny)
    evaluate("digits", only="lambda_search")
    assert set(splits) == {"validation"}
    frame = measured("digits_lambda_search")
    assert frame[["lambda_", "seed"]].to_numpy().tolist() == [[lam, seed] for lam in (0.0, 0.1) for seed in range(3)]
    assert set(frame.images) == {287}
    assert how_measured("digits_lambda_search")["chosen"] in (0.0, 0.1)


@pytest.mark.parametrize("args", [["mnist"], ["digits", "--scale", "wide"], ["cifar10", "--only", "masking"]])
def test_what_evaluate_refuses(args, store, capsys):
    assert cli.main(["evaluate", *args]) == 1
    assert "unknown" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "tiny"])
def test_all_that_is_to_be_shipped_is_there(name, store, monkeypatch):
    monkeypatch.setattr(ship, "run", lambda *_, **__: pytest.fail("something is missing"))
    ship.ship_all(name)
