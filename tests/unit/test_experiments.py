"""Experiments that remember: recipes of each scale, runs trained once and then read, and the shipped checkpoints."""

import datetime
import importlib
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import files_of_at_most
from torch import nn

import lcnn_utils
from lcnn_utils import data
from lcnn_utils.experiments import load_weights, measure, results, run, ship
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.lab import PROJECT
from lcnn_utils.nn import conv_norm
from lcnn_utils.studies.lipschitz import conv_layers
from lcnn_utils.training import (
    METHODS,
    OBJECTIVES,
    SCALES,
    Recipe,
    accuracy,
    build,
    fit,
    recipe,
    run_name,
    samples,
    state_path,
)
from lcnn_utils.training.checkpoint import read, write

training = importlib.import_module("lcnn_utils.training.fit")

TINY = recipe("moons", "lcnn", epochs=2, width=4)
OTHER = recipe("moons", "standard", epochs=1, width=4)
CONV = recipe("digits", "lcnn", epochs=3, width=4, batch_size=32)
METRICS = (
    "accuracy", "grad_norm", "hessian_norm", "curvature", "margin_curvature", "curvature_median",
    "margin_curvature_median", "images", "measured", "parameters",
)  # fmt: skip


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """A folder of one's own for what is shipped."""
    monkeypatch.setattr(experiments, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


@pytest.fixture
def no_training(monkeypatch):
    """From ``no_training()`` on, a step of training fails the test."""

    def refuse():
        for method in METHODS:
            monkeypatch.setitem(OBJECTIVES, method, lambda *_, **__: pytest.fail("it was trained again"))

    return refuse


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but for the locks: name → content."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


# ---- recipes -----------------------------------------------------------------------------------------------------

PLACES = [(dataset, scale) for scale, table in SCALES.items() for dataset in table]


@pytest.mark.parametrize(("dataset", "scale"), PLACES)
def test_every_method_has_a_recipe_at_every_scale(dataset, scale):
    recipes = [recipe(dataset, method, seed, scale) for method in METHODS for seed in (0, 7)]
    assert len({run_name(one) for one in recipes}) == len(recipes), "each its own file"
    for one in recipes:
        assert (one.dataset, one.method in METHODS) == (dataset, True)
        differing = {name for name, value in asdict(one).items() if value != asdict(recipes[0])[name]}
        assert differing <= {"method", "seed"}, "a scale treats all methods alike"
    assert recipe(dataset, "lcnn", 7, scale, epochs=3, lambda_beta=0) == replace(
        recipe(dataset, "lcnn", 7, scale), epochs=3, lambda_beta=0.0
    )


def test_without_a_scale_it_is_the_smallest():
    for dataset, scale in dict(reversed(PLACES)).items():
        assert recipe(dataset, "cure") == recipe(dataset, "cure", scale=scale)
    assert (
        recipe("digits", "lcnn").epochs < recipe("cifar10", "lcnn").epochs < recipe("svhn", "lcnn", 0, "paper").epochs
    )


def test_the_scale_of_the_paper():
    """Paper §5 and the authors' code of 2022: SGD, 200 epochs, ×0.1 at 75 % and 87.5 %, both λ 1e-3."""
    one = recipe("cifar100", "lcnn_gradreg", scale="paper")
    assert (one.model, one.width, one.epochs, one.schedule, one.augment) == ("resnet18", 64, 200, "steps", True)
    assert (one.lr, one.momentum, one.weight_decay, one.batch_size) == (0.1, 0.9, 5e-4, 128)
    assert (one.lambda_beta, one.lambda_gamma, one.lambda_grad, one.beta, one.gamma) == (1e-3, 1e-3, 6.1e-3, 5, 10)


@pytest.mark.parametrize(
    ("args", "changes", "says"),
    [
        (("digts", "lcnn"), {}, r"unknown dataset 'digts'.*did you mean 'digits'"),
        (("mnist", "lcnn"), {}, r"unknown dataset 'mnist': known are moons, digits, cifar10, cifar100, svhn"),
        (("digits", "lcn"), {}, r"unknown method 'lcn'.*did you mean 'lcnn'"),
        (("digits", "LCNN+GradReg"), {}, r"unknown method 'LCNN\+GradReg': known are standard, lcnn,"),
        (("cifar10", "lcnn", 0, "smal"), {}, r"unknown scale 'smal'.*did you mean 'small'"),
        (("digits", "lcnn"), {"lamda_beta": 0}, r"unknown field of a recipe 'lamda_beta'.*did you mean 'lambda_beta'"),
        (("digits", "lcnn", 0, "paper"), {}, r"^digits has no scale 'paper': use 'lab'$"),
        (("moons", "lcnn", 0, "small"), {}, r"^moons has no scale 'small': use 'lab'$"),
        (("cifar10", "lcnn", 0, "lab"), {}, r"^cifar10 has no scale 'lab': use 'small' or 'tiny'"),
        (("digits", "lcnn"), {"lambda_beta": -1e-3}, r"lambda_beta must be a finite number >= 0, got -0\.001"),
        (("digits", "lcnn"), {"lambda_gamma": math.nan}, "lambda_gamma must be a finite number >= 0, got nan"),
        (("digits", "lcnn"), {"lambda_grad": "1"}, "lambda_grad must be a finite number >= 0, got '1'"),
        (("digits", "lcnn"), {"epochs": 0}, "epochs must be a whole number from 1 .*got 0"),
        (("digits", "lcnn", -1), {}, "seed must be a whole number from 0 .*got -1"),
        (("moons", "lcnn"), {"model": "resnet10"}, "resnet10 cannot take: use model='mlp'"),
    ],
)
def test_a_mistaken_recipe_is_explained(args, changes, says):
    with pytest.raises(ValueError, match=says):
        recipe(*args, **changes)


# ---- runs --------------------------------------------------------------------------------------------------------


def test_a_run_is_trained_once_and_then_read(store, no_training, monkeypatch):
    first = run(TINY, progress=False)
    before = files(store / "runs")
    assert set(before) == {f"{run_name(TINY)}.json", f"{run_name(TINY)}.safetensors"}, "and nothing half-written"
    assert not first.model.training
    no_training()
    second = run(TINY, progress=False)
    assert same_weights(first.model, second.model)
    assert not second.model.training
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: pytest.fail("the weights were not asked for"))
    monkeypatch.setattr(experiments, "measure", lambda *_: pytest.fail("it was measured again"))
    third = run(TINY, progress=False, weights=False)
    assert third.model is None
    for other in (second, third):
        assert (other.recipe, other.metrics, other.provenance) == (TINY, first.metrics, first.provenance)
        pd.testing.assert_frame_equal(other.history, first.history, check_dtype=False, atol=1e-6, rtol=0)
    assert files(store / "runs") == before


def test_the_metrics_are_what_they_say(store, monkeypatch):
    made = run(OTHER, progress=False)
    assert tuple(made.metrics) == METRICS
    x, y = samples(OTHER, "test")
    assert made.metrics["images"] == made.metrics["measured"] == len(y) == 1000
    assert made.metrics["parameters"] == (2 * 4 + 4) + (4 * 4 + 4) + (4 * 2 + 2)
    assert made.metrics["accuracy"] == pytest.approx((made.model(x).argmax(1) == y).float().mean().item())
    net = made.model.double()
    x = x.double()
    loss = lambda z, label: nn.functional.cross_entropy(net(z[None]), label[None])
    margin = lambda z, label: net(z[None])[0, label] - net(z[None])[0, 1 - label]
    monkeypatch.setattr(experiments, "samples", lambda *_: (x[:60], y[:60]))
    found = measure(net, OTHER)
    norms = []
    for f in (loss, margin):
        of = lambda what, f=f: torch.stack([what(lambda z, i=i: f(z, y[i]), x[i]) for i in range(60)])
        gradient, hessian = of(torch.autograd.functional.jacobian), of(torch.autograd.functional.hessian)
        norms.append((gradient.norm(dim=1), torch.linalg.matrix_norm(hessian, 2)))
    for name, (grad_norm, hessian_norm) in zip(("curvature", "margin_curvature"), norms, strict=True):
        curvature = hessian_norm / (grad_norm + 1e-6)
        assert found[name] == pytest.approx(curvature.mean().item(), rel=1e-5)
        assert found[f"{name}_median"] == pytest.approx(curvature.sort().values[29].item(), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norms[0][0].mean().item(), rel=1e-5)
    assert found["hessian_norm"] == pytest.approx(norms[0][1].mean().item(), rel=1e-5)


def test_curvature_is_measured_on_the_first_images_only(store, monkeypatch):
    monkeypatch.setattr(experiments, "GEOMETRY", 10)
    model = build(OTHER).eval()
    few = measure(model, OTHER)
    assert (few["images"], few["measured"]) == (1000, 10)
    x, y = samples(OTHER, "test")
    assert few["accuracy"] == pytest.approx(accuracy(model, x, y)), "of all"
    monkeypatch.setattr(experiments, "samples", lambda *_: (x[:10], y[:10]))
    assert measure(model, OTHER)["grad_norm"] == pytest.approx(few["grad_norm"])


HOLDING_OUT = {
    "moons": replace(OTHER, held_out=0.2),
    "digits": recipe("digits", "relu", model="mlp", width=4, epochs=1, held_out=0.2),
}


@pytest.mark.parametrize("one", HOLDING_OUT.values(), ids=HOLDING_OUT)
def test_a_recipe_that_holds_out_is_measured_there(one, store, shipped, monkeypatch):
    seen = []
    monkeypatch.setattr(experiments, "samples", lambda one, split, device: seen.append(split) or samples(one, split))
    made = run(one, progress=False)
    assert seen == ["held_out"], "and the test set is not looked at"
    x, y = samples(one, "held_out")
    assert made.metrics["images"] == made.metrics["measured"] == len(y) == (80 if one.dataset == "moons" else 287)
    assert made.metrics["accuracy"] == pytest.approx(accuracy(made.model, x, y))
    plain = run(replace(one, held_out=0.0), progress=False)
    assert not same_weights(made.model, plain.model), "trained on less"
    assert plain.metrics["images"] == (1000 if one.dataset == "moons" else 360)
    assert sorted(results().held_out) == [0.0, 0.2]


def test_files_from_before_a_field_are_read(store, shipped, no_training):
    """A recipe's file without ``held_out`` is one that holds nothing out: the record and the state."""
    made = run(TINY, progress=False)
    (path,) = (store / "runs").glob("*.json")
    path.write_bytes(without("recipe", "held_out")(path.read_bytes()))
    tensors, metadata = read(state_path(TINY))
    old = {name: value for name, value in asdict(TINY).items() if name != "held_out"}
    write(state_path(TINY), tensors, metadata | {"recipe": json.dumps(old)})
    no_training()
    assert same_weights(run(TINY, progress=False).model, made.model)
    assert run(TINY, weights=False).metrics == made.metrics
    assert results().held_out.tolist() == [0.0]


class Enough(Exception):
    pass


def test_what_watch_raises_ends_a_run_without_a_record(store):
    def stop(history):
        raise Enough

    with pytest.raises(Enough):
        run(TINY, progress=False, watch=stop)
    assert set(files(store / "runs")) == {f"{run_name(TINY)}.safetensors"}
    seen = []
    made = run(TINY, progress=False, watch=seen.append)
    assert [len(history) for history in seen] == [2]
    assert len(made.history) == 2
    assert set(files(store / "runs")) == {f"{run_name(TINY)}.json", f"{run_name(TINY)}.safetensors"}


def test_the_record_tells_where_it_comes_from(store):
    made = run(TINY, progress=False)
    record = json.loads((store / "runs" / f"{run_name(TINY)}.json").read_text(encoding="utf-8"))
    assert record["recipe"] == asdict(TINY)
    assert record["metrics"] == made.metrics
    about = record["provenance"]
    assert about == made.provenance
    assert about["lcnn_utils"] == lcnn_utils.__version__
    assert about["torch"] == torch.__version__
    assert about["python"] == platform.python_version()
    assert about["device"].endswith("CPU")
    assert (about["threads"], about["seed"]) == (1, 0)
    assert 0 < about["seconds"] < 60
    assert abs(datetime.date.fromisoformat(about["date"]) - datetime.date.today()) <= datetime.timedelta(days=1)
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    columns = {"epoch", "loss", "accuracy", "sum_beta", "sum_abs_log_gamma", "curvature", "sigma_error"}
    layers = {name for name in record["history"][0] if name.startswith(("beta ", "gamma "))}
    assert set(record["history"][1]) == columns | layers
    assert len(layers) == 4
    _, trained = fit(TINY, progress=False)
    pd.testing.assert_frame_equal(pd.DataFrame(record["history"]), trained, check_dtype=False, atol=1e-6, rtol=0)


def test_the_numbers_come_from_the_record_and_the_state_may_go(store, no_training):
    made = run(TINY, progress=False)
    state_path(TINY).unlink()
    (path,) = (store / "runs").glob("*.json")
    path.write_text(path.read_text().replace('"accuracy": ', '"accuracy": -'))
    again = run(TINY, progress=False)  # trained and measured anew: new weights don't get old numbers
    assert same_weights(again.model, made.model)
    assert again.metrics == made.metrics
    state_path(TINY).unlink()
    no_training()
    assert run(TINY, progress=False, weights=False).metrics == made.metrics


def test_a_trained_state_without_a_record_is_measured(store, no_training):
    fit(TINY, progress=False)
    no_training()
    assert run(TINY, progress=False, weights=False).metrics["images"] == 1000
    assert len(results(folders=(store / "runs",))) == 1


def test_a_record_that_cannot_be_written(store):
    fit(TINY, progress=False)
    before = files(store / "runs")
    with files_of_at_most(600), pytest.raises(OSError, match=r"cannot write .*\.json .*set LCNN_STORE to a folder"):
        run(TINY, progress=False)
    assert files(store / "runs") == before, "no half of a record"
    assert run(TINY, progress=False).metrics["images"] == 1000


def test_a_store_that_cannot_be_made(store):
    store.write_text("in the way")
    with pytest.raises(OSError, match="set LCNN_STORE"):
        run(TINY, progress=False)
    assert store.read_text() == "in the way"


@pytest.mark.parametrize("weights", [True, False])
def test_a_device_that_is_not_there(store, weights):
    with pytest.raises(RuntimeError, match=r"device 'cuda:99' is not available here .*use device='cpu'"):
        run(TINY, device="cuda:99", weights=weights)
    assert not store.exists()


def test_a_dataset_that_is_not_there(store, monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("LCNN_MIRRORS", raising=False)
    monkeypatch.setattr(data, "MIRRORS", dict.fromkeys(data.MIRRORS, ()))
    one = recipe("cifar10", "lcnn", width=1, epochs=1)
    with pytest.raises((FileNotFoundError, RuntimeError), match=r"(?s)cifar-10-python.*set LCNN_DATA to a folder"):
        run(one, progress=False)
    assert files(store / "runs") == {}


# ---- what is damaged ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store in which TINY has been trained, and a folder in which it has been shipped."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(folder / "store"))
        patch.setenv("LCNN_DEVICE", "cpu")
        ship(TINY, progress=False, folder=folder / "shipped")
    return folder


@pytest.fixture
def stored(store, made):
    """The record of TINY, in a copy of that store."""
    shutil.copytree(made / "store", store)
    return store / "runs" / f"{run_name(TINY)}.json"


def altered(change):
    def damage(content: bytes) -> bytes:
        record = json.loads(content)
        change(record)
        return json.dumps(record).encode()

    return damage


def without(*keys):
    def change(record):
        for key in keys[:-1]:
            record = record[key]
        del record[keys[-1]]

    return altered(change)


RECORDS = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not text": lambda content: b"\xff\xfe" + content,
    "a list": lambda content: b"[]",
    "a number": lambda content: b"3",
    "no recipe": without("recipe"),
    "no metrics": without("metrics"),
    "no accuracy": without("metrics", "accuracy"),
    "no curvature": without("metrics", "curvature"),
    "no margin": without("metrics", "margin_curvature"),
    "no history": without("history"),
    "an empty history": altered(lambda record: record["history"].clear()),
    "no provenance": without("provenance"),
    "no seconds": without("provenance", "seconds"),
    "no device": without("provenance", "device"),
    "a field too many": altered(lambda record: record["recipe"].update(lambda_delta=1.0)),
    "a wrong type": altered(lambda record: record["recipe"].update(width="4")),
    "a value out of range": altered(lambda record: record["recipe"].update(lr=-1.0)),
}
OF_ANOTHER = {
    "another seed": altered(lambda record: record["recipe"].update(seed=1)),
    "another λ": altered(lambda record: record["recipe"].update(lambda_beta=0.5)),
    "a field too few": without("recipe", "lambda_beta"),
}


@pytest.mark.parametrize("damage", [*RECORDS, *OF_ANOTHER])
def test_a_damaged_record_is_named_and_kept(damage, stored, no_training):
    path = stored
    path.write_bytes((RECORDS | OF_ANOTHER)[damage](path.read_bytes()))
    before = files(path.parent)
    no_training()
    for weights in (True, False):
        with pytest.raises(RuntimeError) as raised:
            run(TINY, progress=False, weights=weights)
        text = str(raised.value)
        assert text.startswith(f"{path} is damaged or of another version (")
        assert text.endswith("): delete it, and it is made anew")
        assert "\n" not in text
        assert raised.value.__suppress_context__
    assert files(path.parent) == before
    path.unlink()  # the way out
    assert run(TINY, progress=False).metrics["images"] == 1000


@pytest.mark.parametrize("damage", RECORDS)
def test_a_damaged_record_in_the_list(damage, stored, shipped):
    """It is left out, with a warning that names it, and hides none of the others."""
    whole = results()
    stored.write_bytes(RECORDS[damage](stored.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"left out: .* is damaged or of another version") as told:
        assert len(results()) == len(whole) - 1
    assert str(stored) in str(told[0].message)


def test_a_record_that_is_being_written_is_not_in_the_list(stored, recwarn):
    whole = results()
    stored.with_name(f".{stored.name}").touch()
    assert len(results()) == len(whole)
    assert not recwarn.list


def test_a_damaged_state(store, stored):
    path = state_path(TINY)
    path.write_bytes(path.read_bytes()[:-100])
    before = files(store / "runs")
    with pytest.raises(RuntimeError, match=r"is damaged or of another version .*delete it") as raised:
        run(TINY, progress=False)
    assert str(path) in str(raised.value)
    assert files(store / "runs") == before
    assert run(TINY, progress=False, weights=False).metrics["images"] == 1000, "the numbers are still there"


def flipped(content: bytes) -> bytes:
    """One bit of the last tensor."""
    return content[:-1] + bytes([content[-1] ^ 1])


CHECKPOINTS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in its head": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "a page of HTML": lambda path: path.write_text("<html>404</html>" * 99),
    "without metadata": lambda path: __import__("safetensors.torch").torch.save_file(read(path)[0], path),
    "of another recipe": lambda path: write(path, read(path)[0], {"recipe": json.dumps(asdict(OTHER))}),
    "of another net": lambda path: write(path, build(OTHER).state_dict(), read(path)[1]),
    "of another width": lambda path: write(path, build(replace(TINY, width=5)).state_dict(), read(path)[1]),
    "a layer too few": lambda path: write(path, dict([*read(path)[0].items()][1:]), read(path)[1]),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_damaged_checkpoint_is_named_and_kept(damage, store, made, shipped, no_training):
    shutil.copytree(made / "shipped", shipped)
    path = shipped / f"{run_name(TINY)}.safetensors"
    CHECKPOINTS[damage](path)
    before = files(shipped)
    no_training()
    with pytest.raises(RuntimeError) as raised:
        run(TINY, progress=False)
    text = str(raised.value)
    assert text.startswith(f"{path} is damaged or of another version (")
    assert text.endswith("): restore it with git")
    assert "\n" not in text
    assert raised.value.__suppress_context__
    assert files(shipped) == before
    assert run(TINY, weights=False).metrics["images"] == 1000, "the numbers are still there"
    with pytest.raises(RuntimeError, match="restore it with git"):
        ship(TINY, progress=False)
    assert files(shipped) == before, "and are not overwritten"


@pytest.mark.parametrize("damage", ["truncated", "another seed"])
def test_a_damaged_record_among_the_shipped(damage, store, shipped, no_training):
    ship(TINY, progress=False)
    path = shipped / f"{run_name(TINY)}.json"
    path.write_bytes((RECORDS | OF_ANOTHER)[damage](path.read_bytes()))
    before = files(shipped)
    no_training()
    with pytest.raises(RuntimeError, match=r"\.json is damaged or of another version .*: restore it with git$"):
        run(TINY, progress=False)
    assert files(shipped) == before


# ---- two processes -----------------------------------------------------------------------------------------------

RACE = """
import json, os, sys, time
from pathlib import Path
import torch
from lcnn_utils.experiments import recipe, run
from lcnn_utils.objectives import OBJECTIVES
from lcnn_utils.training import samples

folder, one, objective = Path(sys.argv[1]), recipe("moons", "lcnn", epochs=1, width=4), OBJECTIVES["lcnn"]
samples(one, "train"), torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1).zero_grad()  # all is imported

def slow(*args, **more):
    with open(folder / "steps", "a") as file:
        file.write(f"{os.getpid()}\\n")
    end = time.monotonic() + 60
    while not any("another process is training" in path.read_text() for path in folder.glob("out*")):
        assert time.monotonic() < end, "the other doesn't wait"
        time.sleep(0.01)
    return objective(*args, **more)

OBJECTIVES["lcnn"] = slow
children = []
for i in (0, 1):
    children.append(os.fork())
    if not children[-1]:
        os.dup2(os.open(folder / f"out{i}", os.O_WRONLY | os.O_CREAT), 1)
        made = run(one)
        print(json.dumps({"metrics": made.metrics, "history": made.history.round(6).to_dict("list")}), flush=True)
        os._exit(0)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which spares the second process its imports")
def test_two_processes_train_once(store, tmp_path):
    """The one that comes second waits, and reads what the first has made."""
    done = subprocess.run([sys.executable, "-c", RACE, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = (tmp_path / "steps").read_text().split()
    assert (len(steps), len(set(steps))) == (20, 1)
    one, two = (json.loads((tmp_path / f"out{i}").read_text().splitlines()[-1]) for i in (0, 1))
    assert one == two
    name = run_name(recipe("moons", "lcnn", epochs=1, width=4))
    assert set(files(store / "runs")) == {f"{name}.json", f"{name}.safetensors"}


# ---- shipping ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An LCNN of convolutions in a store, and the store."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(folder))
        return fit(CONV, device="cpu", progress=False)[0], folder


@pytest.fixture
def conv_net(trained, monkeypatch):
    monkeypatch.setenv("LCNN_STORE", str(trained[1]))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    monkeypatch.setattr(experiments, "GEOMETRY", 20)
    return trained[0]


def test_shipped_weights_are_rounded_and_so_are_their_metrics(conv_net, tmp_path):
    folder = tmp_path / "made"
    made = ship(CONV, folder=folder, progress=False)
    assert set(files(folder)) == {f"{run_name(CONV)}.json", f"{run_name(CONV)}.safetensors"}
    path = folder / f"{run_name(CONV)}.safetensors"
    tensors, about = read(path)
    assert Recipe(**json.loads(about["recipe"])) == CONV
    exact = conv_net.state_dict()
    assert all(name in tensors or name.endswith("weight.0.v") for name in exact), "directions may be found anew"
    exact = {name: exact[name] for name in tensors}
    for name, value in exact.items():
        assert tensors[name].dtype == (torch.float16 if value.is_floating_point() else value.dtype), name
        torch.testing.assert_close(tensors[name].to(value.dtype), value, rtol=2**-11, atol=1e-7, msg=name)
    rounded = load_weights(path, CONV)
    assert not same_weights(rounded, conv_net)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["metrics"] == made.metrics == measure(rounded, CONV)
    assert made.metrics["grad_norm"] != measure(conv_net, CONV)["grad_norm"]
    assert same_weights(made.model, conv_net), "the run itself has its own weights"


def test_loaded_weights_have_norm_1_and_predict_the_same(conv_net, tmp_path):
    ship(CONV, folder=tmp_path, progress=False)
    net = load_weights(tmp_path / f"{run_name(CONV)}.safetensors", CONV)
    assert not net.training
    assert all(value.dtype == torch.float32 for value in net.state_dict().values() if value.is_floating_point())
    x, y = samples(CONV, "test")
    assert accuracy(conv_net, x, y) > 0.5, "a net that has learnt something"
    found, trained = (
        {name: conv_norm(conv, shape, "exact").item() for name, (conv, _, shape) in conv_layers(one, x[:1]).items()}
        for one in (net, conv_net)
    )
    for name, norm in trained.items():
        assert abs(found[name] - 1) < abs(norm - 1) + 2e-3, f"{name}: as near to 1 as training left it"
    with torch.no_grad():
        ours, theirs = net(x), conv_net(x)
    assert (ours - theirs).abs().max() < 0.02 * theirs.std()
    assert (ours.argmax(1) != theirs.argmax(1)).sum() <= 1


def test_the_random_state_is_left_alone(conv_net, tmp_path):
    state = torch.random.get_rng_state()
    ship(CONV, folder=tmp_path, progress=False)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_shipped_is_read_and_not_trained(method, store, shipped, no_training, monkeypatch, tmp_path):
    one = replace(TINY, method=method, epochs=1)
    made = ship(one, progress=False)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "empty"))
    no_training()
    rounded = read(shipped / f"{run_name(one)}.safetensors")[0]
    for weights in (True, False):
        found = run(one, progress=False, weights=weights)
        assert found.metrics == made.metrics
        assert (found.model is None) == (not weights)
        assert found.provenance == made.provenance
        pd.testing.assert_frame_equal(found.history, made.history, check_dtype=False, atol=1e-6, rtol=0)
    assert ship(one, progress=False).metrics == pytest.approx(made.metrics, rel=1e-4)
    path = shipped / f"{run_name(one)}.safetensors"
    tensors = read(path)[0]
    assert tensors.keys() == rounded.keys()
    kept = [name for name in tensors if not name.endswith("weight.0.v")]
    assert all(torch.equal(tensors[name], rounded[name]) for name in kept), "rounded once, rounded for ever"
    assert not (tmp_path / "empty").exists()


def test_numbers_shipped_without_weights(store, shipped, no_training, monkeypatch, tmp_path):
    made = ship(TINY, progress=False, weights=False)
    assert set(files(shipped)) == {f"{run_name(TINY)}.json"}
    assert made.metrics == run(TINY, progress=False, weights=False).metrics
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    net = run(TINY, progress=False).model  # its weights are trained, into the store
    assert state_path(TINY).parent == tmp_path / "another" / "runs"
    assert same_weights(net, run(TINY, progress=False).model)
    no_training()
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "empty"))
    assert run(TINY, weights=False).metrics == made.metrics


def test_a_shipped_run_comes_before_a_stored_one(store, shipped):
    run(TINY, progress=False)
    made = ship(TINY, progress=False)
    path = shipped / f"{run_name(TINY)}.json"
    path.write_bytes(altered(lambda record: record["metrics"].update(accuracy=0.25))(path.read_bytes()))
    assert run(TINY, progress=False).metrics == made.metrics | {"accuracy": 0.25}


def test_a_checkpoint_that_cannot_be_written_keeps_the_old_one(store, shipped):
    ship(TINY, progress=False)
    before = files(shipped)
    with files_of_at_most(600), pytest.raises(OSError, match="cannot write"):
        ship(TINY, progress=False)
    assert files(shipped) == before


# ---- the list ----------------------------------------------------------------------------------------------------


def test_results_lists_each_run_once(store, shipped):
    assert results().empty
    made = run(TINY, progress=False)
    ship(TINY, progress=False)
    other = ship(replace(OTHER, seed=3), progress=False, weights=False)
    stored = run(OTHER, progress=False)
    frame = results()
    assert len(frame) == 3
    assert list(frame.columns) == [*asdict(TINY), *METRICS, "seconds", "device", "date"]
    for one in (made, other, stored):
        (row,) = frame[(frame.method == one.recipe.method) & (frame.seed == one.recipe.seed)].to_dict("records")
        assert {name: row[name] for name in asdict(TINY)} == asdict(one.recipe)
        assert row["accuracy"] == pytest.approx(one.metrics["accuracy"], abs=2e-3)
        assert (row["seconds"], row["date"]) == (one.provenance["seconds"], one.provenance["date"])
    assert len(results(folders=(store / "runs",))) == 3
    assert len(results(folders=(shipped,))) == 2
    assert len(results(folders=(shipped, shipped))) == 2
    assert results(folders=(store / "nothing",)).empty


# ---- what is shipped ---------------------------------------------------------------------------------------------

RECORDED = sorted(experiments.SHIPPED.glob("*.json"))
WEIGHTS = sorted(experiments.SHIPPED.glob("*.safetensors"))
stem = lambda path: path.stem
needs_shipped = pytest.mark.skipif(not RECORDED, reason="no checkpoints are shipped: data/checkpoints is empty")


def recipe_of(path: Path) -> Recipe:
    return Recipe(**json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["recipe"])


def portfolio(dataset: str) -> dict[str, bool]:
    """What ``benchmarks/ship.py`` makes: the name of each run, and whether its weights are shipped."""
    spec = importlib.util.spec_from_file_location("ship", PROJECT / "benchmarks" / "ship.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wanted: dict[str, bool] = {}
    for one, weights in module.portfolio(dataset):
        wanted[run_name(one)] = weights or wanted.get(run_name(one), False)
    return wanted


@needs_shipped
def test_the_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS) < 24e6
    assert {path.stem for path in WEIGHTS} <= {path.stem for path in RECORDED}
    assert {path.suffix for path in experiments.SHIPPED.iterdir()} == {".json", ".safetensors"}


@needs_shipped
def test_every_method_is_shipped_for_digits():
    for method in METHODS:
        for seed in range(3):
            name = run_name(recipe("digits", method, seed))
            assert {f"{name}.json", f"{name}.safetensors"} <= set(os.listdir(experiments.SHIPPED)), (method, seed)


@needs_shipped
def test_the_shipped_runs_are_those_that_ship_py_makes():
    """A portfolio is shipped whole or not at all, and nothing else is but numbers of what evaluate.py trains."""
    recorded, weights = ({path.stem for path in paths} for paths in (RECORDED, WEIGHTS))
    known: set[str] = set()
    for name in ("digits", "tiny", "cifar10"):
        wanted = portfolio(name)
        assert recorded & set(wanted) in (set(), set(wanted)), name
        assert weights & set(wanted) == recorded & {one for one, kept in wanted.items() if kept}, name
        known |= set(wanted)
    wide = {run_name(recipe("cifar100", method, seed, "wide")) for method in METHODS for seed in (0, 1)}
    assert set(portfolio("digits")) <= recorded <= known | wide
    assert not weights & wide


@pytest.mark.parametrize("path", RECORDED, ids=stem)
def test_every_shipped_record_is_whole(path):
    one = recipe_of(path)
    assert path.stem == run_name(one)
    made = run(one, weights=False)
    assert set(made.metrics) == set(METRICS)
    assert all(np.isfinite(value) and value >= 0 for value in made.metrics.values())
    assert made.history.epoch.tolist() == list(range(1, one.epochs + 1))
    assert set(made.provenance) >= {"lcnn_utils", "torch", "python", "device", "threads", "seconds", "seed", "date"}
    assert made.provenance["seconds"] > 0
    assert made.provenance["seed"] == one.seed


@pytest.mark.parametrize("path", [path for path in WEIGHTS if path.name.startswith("digits-")], ids=stem)
def test_every_shipped_digits_net_has_its_accuracy(path, store, no_training):
    no_training()
    one = recipe_of(path)
    made = run(one, progress=False)
    x, y = samples(one, "test")
    assert len(y) == 360
    errors = abs(accuracy(made.model, x, y) - made.metrics["accuracy"]) * 360
    assert errors < 1.5, "one image may fall on the other side on another machine"
    assert not store.exists(), "it was read where it is shipped"


def wilson(share: float, n: int, z: float = 2.576) -> tuple[float, float]:
    """The 99 % interval of a share among n (E. Wilson, JASA 1927)."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def test_wilson():
    """The interval holds exactly the p whose score test at this z does not reject."""
    for share, n in ((0.93, 1000), (0.0, 50), (0.5, 10)):
        for p in wilson(share, n):
            assert abs(share - p) == pytest.approx(2.576 * math.sqrt(p * (1 - p) / n), abs=1e-9)


CIFAR = [path for path in WEIGHTS if path.name.startswith("cifar10-")]


@pytest.fixture(scope="module")
def cifar_images(cifar_root):
    """The first 1,000 test images of CIFAR-10."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_DATA", str(cifar_root))
        return tuple(part[:1000] for part in samples(recipe("cifar10", "standard"), "test"))


@pytest.mark.skipif(not CIFAR, reason="no CIFAR-10 checkpoints are shipped")
@pytest.mark.parametrize("path", CIFAR, ids=stem)
def test_every_shipped_cifar_net_has_its_accuracy(path, store, no_training, cifar_images):
    no_training()
    made = run(recipe_of(path), progress=False)
    low, high = wilson(accuracy(made.model, *cifar_images), 1000)
    assert low <= made.metrics["accuracy"] <= high, "of all 10,000"
    assert not store.exists(), "it was read where it is shipped"


@needs_shipped
def test_one_of_them_trained_anew_is_as_good(store, shipped):
    one = recipe("digits", "lcnn", 1)
    recorded = json.loads((PROJECT / "data" / "checkpoints" / f"{run_name(one)}.json").read_text())
    model, history = fit(one, progress=False)
    assert accuracy(model, *samples(one, "test")) == pytest.approx(recorded["metrics"]["accuracy"], abs=0.03)
    assert list(history.columns) == list(recorded["history"][0])
    last = pd.DataFrame(recorded["history"]).iloc[-1]
    assert history.sum_beta.iloc[-1] == pytest.approx(last.sum_beta, rel=0.1)
    assert history.sum_abs_log_gamma.iloc[-1] == pytest.approx(last.sum_abs_log_gamma, rel=0.1)


def test_ship_py_makes_the_folder_anew(store, shipped, monkeypatch, capsys):
    """With two recipes for the portfolio: what it finds of their dataset and width goes, what it makes is complete."""
    spec = importlib.util.spec_from_file_location("ship", PROJECT / "benchmarks" / "ship.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHIPPED", shipped)
    monkeypatch.setattr(module, "portfolio", lambda _: iter([(TINY, False), (OTHER, False), (TINY, True)]))
    monkeypatch.setattr(sys, "argv", ["ship.py", "digits"])
    shipped.mkdir()
    for name in ("moons-old.json", "moons-old.safetensors", "digits-other.json"):
        (shipped / name).touch()
    (shipped / "moons-wide.json").write_text(json.dumps({"recipe": {"width": 99}}))
    module.main()
    made = {f"{run_name(TINY)}.json", f"{run_name(TINY)}.safetensors", f"{run_name(OTHER)}.json"}
    assert set(files(shipped)) == made | {"digits-other.json", "moons-wide.json"}
    assert len(capsys.readouterr().out.splitlines()) == 2, "each once"


def test_the_folders():
    assert experiments.SHIPPED == PROJECT / "data" / "checkpoints"
    assert training.state_path(TINY).parent.name == "runs"
    assert data.available()["digits"] == "embedded"
