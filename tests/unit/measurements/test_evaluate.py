"""`lcnn evaluate` and `lcnn ship`: what is there is not made again."""

import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import pandas as pd
import pytest

from lcnn_utils.cli import commands as cli
from lcnn_utils.experiments import has, held_images, how_measured, measured, runs
from lcnn_utils.measurements import evaluate as module
from lcnn_utils.measurements import ship
from lcnn_utils.measurements.evaluate import evaluate
from lcnn_utils.measurements.paper import cost_frame
from lcnn_utils.measurements.training import lambda_recipes
from lcnn_utils.training import PAPER_METHODS, recipe, run_name, samples, state_path

masking = importlib.import_module("lcnn_utils.attacks.masking")
EPS = {"l2": (0.1,), "linf": (0.1,)}
SMALL = recipe("digits", "lcnn", model="mlp", width=4, epochs=1)


@pytest.fixture
def plan(results, monkeypatch):
    """No tables, and small measurements."""
    monkeypatch.setitem(
        module.PLANS,
        "lab",
        dict(seeds=(0,), test=6, train=6, maps=6, attacked=6, restarts=1, eps=EPS, masking=(6, 0.5)),
    )


@pytest.fixture
def small(plan, shipped, monkeypatch):
    """Nothing is shipped, and one small network wanted."""
    monkeypatch.setattr(module, "SHIPPED", shipped)
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
    assert not has("digits_masking"), "it takes minutes: only where it is asked for"
    monkeypatch.setattr(masking, "autoattack", lambda model, x, *_, **__: x)  # it takes a minute, and has its own test
    evaluate("digits", only="masking")
    checks = measured("digits_masking")
    assert (checks.check.nunique(), set(checks.other), set(checks.n)) == (len(checks), {"Standard"}, {6})
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
    with pytest.raises(RuntimeError, match=f"1 of 2 networks failed: {run_name(broken)}: ."):
        evaluate("digits", only="runs", train=True)
    assert measured("digits_runs").run.tolist() == [run_name(SMALL)]


def test_numbers_shipped_without_weights_are_trained_again_for_a_table_that_lacks_them(small, store, shipped):
    ship.ship(SMALL, shipped, weights=False, progress=False)
    for trained_again in (True, False):
        shutil.rmtree(store / "runs")
        if trained_again:
            with pytest.raises(FileNotFoundError, match="--train"):
                evaluate("digits", only="runs")
        evaluate("digits", only="runs", train=True)
        assert state_path(SMALL).exists() == trained_again
        assert measured("digits_runs").run.tolist() == [run_name(SMALL)]
        (store / "runs").mkdir(exist_ok=True)


def test_masking_trains_no_network(small):
    runs.run(SMALL, progress=False)
    with pytest.raises(RuntimeError, match="its checks need digits-standard-"):
        evaluate("digits", only="masking")


ON_A_BARE_SERVER = """
import importlib.machinery, sys

class Missing(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in MISSING:
            return importlib.machinery.ModuleSpec(name, cls)

    @staticmethod
    def create_module(spec):
        raise ModuleNotFoundError(f"a GPU server lacks {spec.name}")

    exec_module = None

sys.meta_path.insert(0, Missing)
import torch
from lcnn_utils import data
from lcnn_utils.experiments import runs
from lcnn_utils.measurements import evaluate as module
from lcnn_utils.training.recipe import SCALES

x, y = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), torch.zeros(40, dtype=torch.long)
images = data.Images(x, y, (), "cifar100")  # of one class, so that a step learns it
data.load = lambda name, split: images
runs.GEOMETRY = 2
SCALES["wide"]["cifar100"] |= dict(model="resnet10", width=2, epochs=2, batch_size=20)
module.PLANS["wide"] |= dict(seeds=(0,), test=2, train=2, maps=2, attacked=2, restarts=1)
module.evaluate("cifar100", "wide", train=True, minutes=0)
module.evaluate("cifar100", "wide", train=True)
"""


def test_the_papers_grid_on_a_bare_server(store, tmp_path):
    """All methods, tiny, from the first epoch to the last table, without most of what the lab installs."""
    needed = {"torch", "torchvision", "numpy", "pandas", "scipy", "safetensors", "filelock", "tqdm"}
    wanted = {re.match("[a-z-]+", line).group() for line in metadata.requires("lcnn-utils")} - needed - {"lcnn-utils"}
    missing = [
        name for name, owners in metadata.packages_distributions().items() if wanted & {o.lower() for o in owners}
    ]
    assert {"matplotlib", "sklearn", "captum", "jupyterlab", "tyro", "distributed"} <= set(missing)
    script = ON_A_BARE_SERVER.replace("MISSING", repr(missing))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 networks are done: the same command goes on" in done.stdout
    for kind in set(module.KINDS) - {"masking"}:
        (table,) = (store / "results").glob(f"cifar100_wide_{kind}.csv*")
        assert pd.read_csv(table).run.nunique() == len(PAPER_METHODS)


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


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_all_that_is_to_be_shipped_is_there(name, store, monkeypatch):
    monkeypatch.setattr(ship, "run", lambda *_, **__: pytest.fail("something is missing"))
    ship.ship_all(name)
