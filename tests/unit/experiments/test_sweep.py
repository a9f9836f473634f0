"""Sweeps on a cluster of this machine, what they promise when something fails, the plan, and ``lcnn sweep``."""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest
import torch
from distributed import Client
from safetensors.torch import load_file

from lcnn_utils.cli import commands as cli
from lcnn_utils.experiments import ordered, plan, run, sweep
from lcnn_utils.experiments.sweep import local_cluster
from lcnn_utils.training import fit_recipe, recipe, run_name, state_path
from lcnn_utils.training.checkpoint import epochs_done
from lcnn_utils.training.fit import made_on

HERE = made_on(torch.device("cpu"))["device"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep") / "store"


@pytest.fixture(autouse=True)
def own_store(shipped, monkeypatch, home):
    """Nothing is shipped, and a store that the cluster shares."""
    monkeypatch.setenv("LCNN_STORE", str(home))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")


@pytest.fixture(scope="module")
def client(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(home))
        patch.setenv("LCNN_DEVICE", "cpu")
        with local_cluster(2, "cpu") as cluster, Client(cluster) as made:
            yield made


def moons(*methods, seeds=(0,), **changes):
    return ordered(["moons"], methods, seeds, **{"width": 4, "epochs": 3} | changes)


def numbers(one):
    """All that a run is except when and where: its record, and its weights, momenta and generator."""
    record = json.loads(state_path(one).with_suffix(".json").read_text())
    del record["provenance"]
    return record, {name: value.tolist() for name, value in load_file(state_path(one)).items()}


def calm(recipes, monkeypatch, folder):
    """What undisturbed runs in this process come to."""
    with monkeypatch.context() as patch:
        patch.setenv("LCNN_STORE", str(folder))
        for one in recipes:
            run(one, progress=False)
        return [numbers(one) for one in recipes]


def wait_for(one, epochs):
    """Until the state in the store has so many epochs."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if epochs_done(state_path(one)) >= epochs:
            return
        time.sleep(0.01)
    raise TimeoutError(f"{run_name(one)} did not reach epoch {epochs}")


# ------------------------------------------------------------------------------------------------------- promises
@pytest.mark.slow
def test_a_sweep_is_its_runs_and_one_that_fails_ends_no_other(client, no_training, monkeypatch, tmp_path):
    """Outcomes in the order of the recipes, the numbers of one process bit for bit; called again, it reads."""
    recipes = moons("relu", "lcnn")
    broken = replace(recipes[0], lr=1e20)
    first, failed, last, again = outcomes = sweep([recipes[0], broken, *recipes[::-1]], client)
    assert [outcome.recipe for outcome in outcomes] == [recipes[0], broken, *recipes[::-1]]
    assert first is again
    assert [numbers(one) for one in recipes] == calm(recipes, monkeypatch, tmp_path / "calm")
    assert failed.run is None
    assert "not finite" in str(failed.error)
    assert "in _train" in failed.traceback
    for outcome in (first, last):
        assert (outcome.error, outcome.traceback, outcome.run.model) == (None, "", None)
        assert outcome.run.provenance["threads"] == 1
    no_training()
    read = sweep(recipes)  # and starts no cluster
    assert [outcome.run.metrics for outcome in read] == [first.run.metrics, last.run.metrics]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_a_killed_worker(client, monkeypatch, tmp_path):
    recipes = moons("lcnn", "standard", seeds=(1,), epochs=20)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sweep, recipes, client)
        wait_for(recipes[0], 2)
        (address,) = [worker for worker, keys in client.processing().items() if run_name(recipes[0]) in str(keys)]
        os.kill(client.run(os.getpid, workers=[address])[address], signal.SIGKILL)
        assert epochs_done(state_path(recipes[0])) < 20, "in mid-training"
        outcomes = running.result()
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert [numbers(one) for one in recipes] == calm(recipes, monkeypatch, tmp_path / "calm")


@pytest.mark.slow
def test_no_other_machine_can_connect(client):
    """Whoever could, could run programs as us."""
    mine = psutil.Process()
    found = [c for p in (mine, *mine.children(recursive=True)) for c in p.net_connections("inet")]
    assert {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_one_process_needs_no_dask(monkeypatch, tmp_path):
    """It goes on after a recipe that fails; more than one process says what to install."""
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "distributed", None)
    (recipe,) = moons("lcnn", seeds=(4,))
    failed, done = sweep([replace(recipe, lr=1e20), recipe], workers=1)
    assert failed.run is None
    assert "in _train" in failed.traceback
    assert done.run.metrics == run(recipe, weights=False).metrics
    with pytest.raises(ImportError, match=r"pip install -e '.\[cluster\]'"):
        sweep([replace(recipe, seed=5)])


# ----------------------------------------------------------------------------------------------- the order, the plan
def test_ordered():
    """All combinations once: the first seed of everything first; λ_β means nothing to Standard."""
    found = ordered(
        ["moons"], ["standard", "lcnn"], [1, 0], grid={"lambda_beta": [0.1, 0.2], "lr": [0.3, 0.4]}, width=4
    )
    lcnn = [(0.1, 0.3), (0.1, 0.4), (0.2, 0.3), (0.2, 0.4)]
    expected = []
    for seed in (1, 0):
        expected += [recipe("moons", "standard", seed, width=4, lr=lr) for lr in (0.3, 0.4)]
        expected += [recipe("moons", "lcnn", seed, width=4, lambda_beta=b, lr=lr) for b, lr in lcnn]
    assert found == expected


def pretend(one, seconds, device=HERE):
    """A record that says that training took so long, there."""
    run(one, progress=False)
    path = state_path(one).with_suffix(".json")
    record = json.loads(path.read_text())
    record["provenance"] |= {"seconds": seconds, "device": device}
    path.write_text(json.dumps(record))


def test_a_plan(no_training, monkeypatch, tmp_path):
    """The median epoch of the runs of a kind, this device's if there are any; nothing is trained."""
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    one, other, third = moons("lcnn", "relu", "standard")
    assert list(plan([one, other]).device) == ["unknown"] * 2, "with an empty store"
    for seed, seconds, device in ((1, 30.0, HERE), (2, 60.0, HERE), (3, 36.0, HERE), (4, 3.0, "another")):
        pretend(replace(one, seed=seed), seconds, device)
    pretend(replace(other, seed=1, epochs=1), 7.0, "another")
    with pytest.raises(KeyboardInterrupt):
        fit_recipe(other, progress=False, watch=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    state_path(third).write_bytes(b"damaged")
    no_training()
    wider = replace(one, width=5, seed=1, epochs=7)
    table = plan([replace(one, seed=1), one, other, third, wider, replace(one, lr=0.2, lambda_beta=0.5, epochs=5)])
    assert list(table.run) == [run_name(r) for r in (one, other, third, wider)] + [table.run[4]]
    assert list(table.columns[1:-4]) == ["method", "seed", "lr", "lambda_beta", "width"], "what they differ in"
    assert list(table.done) == [0, 1, 0, 0, 0]
    assert list(table.seconds.fillna(-1)) == pytest.approx([3 * 12.0, 2 * 7.0, -1, -1, 5 * 12.0])
    assert list(table.device) == [HERE, "another", "unknown", "unknown", HERE]
    assert plan([replace(one, seed=1)]).empty


# ---------------------------------------------------------------------------------------------------------- command
SMALL = ("sweep", "--datasets", "moons", "--methods", "lcnn", "relu", "--seeds", "5", "--set", "epochs=2", "width=4")


@pytest.mark.slow
def test_the_command(client, capsys):
    lambdas = ("--grid", "lambda_beta=0.01,0.02")
    assert cli.main([*SMALL, *lambdas, "--plan"]) == 0
    assert "missing: 3 of 3 runs" in capsys.readouterr().out
    assert cli.main([*SMALL, *lambdas, "--scheduler", client.scheduler.address]) == 0
    printed = capsys.readouterr().out
    for one in moons("lcnn", "relu", seeds=(5,), epochs=2):
        assert f"{run_name(one)}  accuracy {run(one, weights=False).metrics['accuracy']:.2%}" in printed
    assert printed.endswith("3 of 3 runs done, 0 failed\n")
    assert cli.main([*SMALL, *lambdas, "--plan"]) == 0
    assert "nothing is left" in capsys.readouterr().out
    assert cli.main([*SMALL, "lr=1e20", "--scheduler", client.scheduler.address]) == 1
    printed = capsys.readouterr().out
    assert "Traceback" not in printed.split("failed: the loss or a weight is not finite")[0]
    assert printed.endswith("0 of 2 runs done, 2 failed\n")
