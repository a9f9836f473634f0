"""Sweeps on a cluster of this machine, undisturbed: who trains what, in which order, and who may listen."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from distributed import Client

from cluster import by_hand, calm, epochs_of, everything, listening, some, wait_until
from lcnn_utils.experiments import clusters, dispatch, sweep, sweeping, workers
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.experiments.workers import TOPIC, identity
from lcnn_utils.training import run_name, state_path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster") / "store"


@pytest.fixture(scope="module")
def client(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(home))
        patch.setenv("LCNN_DEVICE", "cpu")
        with clusters.local(2) as made:
            yield made


@pytest.fixture(autouse=True)
def shared(monkeypatch, tmp_path, home):
    monkeypatch.setenv("LCNN_STORE", str(home))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    monkeypatch.setattr(experiments, "SHIPPED", tmp_path / "shipped")


def swept(recipes, client=None, **options):
    return sweep(recipes, client, **{"progress": False} | options)


def events(client, *recipes):
    names = {run_name(one) for one in recipes}
    return [event for _, event in client.get_events(TOPIC) if event["run"] in names]


def test_a_sweep_is_its_runs(client, monkeypatch, tmp_path):
    """Outcomes in the order of the recipes, bit for bit what one process makes; called again, nothing is trained."""
    recipes = some("relu", "lcnn", "standard", epochs=3)
    told = []
    outcomes = swept([*recipes, recipes[0]], client, told=told.append)
    assert [outcome.recipe for outcome in outcomes] == [*recipes, recipes[0]][:3]
    assert sorted(map(id, told)) == sorted(map(id, outcomes)), "each is told of once"
    assert {run_name(one): everything(one) for one in recipes} == calm(recipes, monkeypatch, tmp_path / "calm")
    for outcome in outcomes:
        assert (outcome.epochs, outcome.error, outcome.notes) == (3, None, ())
        assert outcome.run.metrics == experiments.run(outcome.recipe, weights=False).metrics
        assert list(outcome.run.history.epoch) == [1, 2, 3]
    monkeypatch.setattr(sweeping, "distribute", lambda *_, **__: pytest.fail("it was sent to the cluster"))
    assert [again.run.metrics for again in swept(recipes, client)] == [outcome.run.metrics for outcome in outcomes]


def test_nothing_to_do_starts_no_cluster(monkeypatch):
    monkeypatch.setattr(clusters, "local", lambda *_, **__: pytest.fail("a cluster was started"))
    recipes = some("relu", seeds=(1,), epochs=2)
    assert swept([]) == []
    (outcome,) = swept(recipes, workers=1)
    assert outcome.run is not None, "one worker is this process"
    assert swept(recipes)[0].run.metrics == outcome.run.metrics


def test_one_that_fails_ends_no_other(client):
    recipes = some("standard", "lcnn", seeds=(2,), epochs=3)
    broken = replace(recipes[0], lr=1e20)
    failed, *others = swept([broken, *recipes], client)
    assert failed.run is None
    assert "RuntimeError: " in str(failed.error)
    assert "is not finite" in str(failed.error)
    assert "lower lr" in str(failed.error)
    assert failed.traceback.startswith("Traceback (most recent call last):")
    assert "training.py" in failed.traceback
    assert [outcome.error for outcome in others] == [None, None]
    assert not state_path(broken).with_suffix(".json").exists()
    again = swept([broken], client)[0]
    assert str(again.error) == str(failed.error), "it is tried again, and fails again"


def test_an_error_of_any_kind_is_an_outcome(client, monkeypatch):
    (one,) = some("relu", seeds=(3,), epochs=2)
    monkeypatch.setattr(dispatch, "__version__", "0.0.9")
    (outcome,) = swept([one], client)
    assert "the worker has lcnn_utils 0.1.0, the client 0.0.9: install the same on both" in str(outcome.error)
    monkeypatch.undo()


def test_the_first_recipe_is_begun_first(client):
    recipes = some("standard", "relu", seeds=(6, 5, 4), epochs=2)
    swept(recipes, client)
    begun = [event["run"] for event in events(client, *recipes) if event["epoch"] == 1]
    order = [run_name(one) for one in recipes]
    assert len(begun) == 6
    assert all(abs(order.index(name) - place) <= 1 for place, name in enumerate(begun)), "two at a time, in order"


def test_a_deadline(client):
    """Those begun stop at the end of an epoch, the others are not begun; a second call goes on."""
    recipes = some("standard", "lcnn", "relu", seeds=(7,), epochs=400)
    outcomes = swept(recipes, client, until=time.monotonic() + 1.5)
    assert all(outcome.run is None and outcome.error is None for outcome in outcomes)
    assert outcomes[0].epochs + outcomes[1].epochs >= 2
    assert max(outcome.epochs for outcome in outcomes) < 400
    for outcome in outcomes:
        assert outcome.epochs == (epochs_of(outcome.recipe) if outcome.epochs else 0)
    again = swept(recipes[:1], client, until=time.monotonic())
    assert again[0].epochs > outcomes[0].epochs, "every call gets on"


def test_who_may_listen(client):
    """Scheduler, workers, nannies and dashboard: all on this machine's own address."""
    assert listening(psutil.Process()) == {"127.0.0.1"}
    assert client.dashboard_link.startswith("http://127.0.0.1:")


def test_threads_that_do_not_fight(client):
    assert set(client.run(torch.get_num_threads).values()) == {1}
    assert clusters.threads(client) == 2


def test_a_store_is_told_from_its_copy(client, monkeypatch, tmp_path, home):
    ours = identity()
    assert set(client.run(identity).values()) == {ours} == {identity()}
    shutil.copytree(home, tmp_path / "copy")
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "copy"))
    assert identity() != ours
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "new"))
    assert identity() not in (ours, "")


def test_the_scheduler_needs_no_torch():
    code = "import sys, lcnn_utils.task; assert not {'torch', 'pandas', 'distributed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("address", "says"), [
    ("tcp://127.0.0.1:9", "no scheduler answers at tcp://127.0.0.1:9 .*: start one .* or leave --scheduler"),
    ("nowhere.json", "no scheduler answers at nowhere.json"),
    *[(f"{name}.json", f"no scheduler answers at {name}.json") for name in ("empty", "list", "deep", "text")],
    ("what is this", "no scheduler answers at what is this"),
])  # fmt: skip
def test_a_scheduler_that_is_not_there(address, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty", "{}"), ("list", "[]"), ("deep", "[" * 100_000), ("text", "hello")):
        (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(RuntimeError, match=says):
        clusters.join(address)


def test_wrong_numbers_of_workers(monkeypatch):
    recipes = some("gradreg", seeds=(8,))
    with pytest.raises(ValueError, match=r"^workers must be at least 1, got 0$"):
        swept(recipes, workers=0)
    monkeypatch.setenv("OMP_NUM_THREADS", "some")
    with pytest.raises(ValueError, match=r"^OMP_NUM_THREADS must be a whole number of at least 1, got 'some'$"):
        swept(recipes)


def test_a_client_and_workers(client):
    with pytest.raises(ValueError, match="give a client that is not asynchronous, or a number of workers, not both"):
        swept([], client, workers=2)


def test_how_many_fit(monkeypatch):
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    monkeypatch.setattr(clusters, "CPU_COUNT", 16)
    for threads, memory, expected in (("1", 64, 16), ("4", 64, 4), ("32", 64, 1), ("1", 6, 3), ("1", 1, 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setattr(clusters, "MEMORY_LIMIT", memory << 30)
        assert clusters.fitting() == expected, (threads, memory)
    monkeypatch.setattr(clusters, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert clusters.fitting() == 3, "a process a GPU"
    assert clusters.visible_gpus() == ["2", "5", "7"]
    assert clusters.gpus(torch.device("cuda:1")) == ["5"], "the one that is named"


def test_every_process_has_its_own_gpu(monkeypatch):
    """Without GPUs here: what the processes of a machine with two would be told."""
    seen = []
    monkeypatch.setattr(clusters, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(
        clusters, "SpecCluster", lambda workers, **_: seen.append(workers) or (_ for _ in ()).throw(OSError("seen"))
    )
    with pytest.raises(OSError, match="seen"), clusters.local(3):
        pass
    variables = [spec["options"]["env"]["CUDA_VISIBLE_DEVICES"] for spec in seen[0].values()]
    assert variables == ["4", "6", "4"]


def test_a_worker_that_dies_of_a_recipe(monkeypatch, tmp_path):
    """A recipe that kills its worker each time is given up and reported; the other is done."""
    recipes = some("standard", "lcnn", seeds=(9,), epochs=3)
    deadly = tmp_path / "deadly.py"
    deadly.write_text(
        "import os\nfrom lcnn_utils import objectives\n"
        "def dask_setup(worker):\n    objectives.OBJECTIVES['standard'] = lambda *_, **__: os._exit(1)\n"
    )
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "1")
    with by_hand(tmp_path, tmp_path / "store", workers=0) as made:
        monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
        for index in range(2):
            made.worker(f"w{index}", DASK_DISTRIBUTED__WORKER__PRELOAD=str(deadly))
        with made.client() as client:
            failed, done = swept(recipes, client)
    assert "KilledWorker" in str(failed.error)
    assert done.run is not None


def test_a_small_line_says_how_far_it_is(client, capsys):
    swept(some("relu", seeds=(10,), epochs=3), client, progress=True)
    out, err = capsys.readouterr()
    assert out == f"1 run on 2 workers, dashboard: {client.dashboard_link}\n"
    assert "0 of 1 done, 1 running" in err


def test_workers_with_several_threads(monkeypatch, tmp_path):
    """A process trains one recipe at a time, whatever Dask allows it: two would draw from one generator."""
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
    recipes = some("relu", "lcnn", "standard", seeds=(0, 1), epochs=2)
    with Client(n_workers=1, threads_per_worker=4, dashboard_address="127.0.0.1:0", set_as_default=False) as made:
        outcomes = swept(recipes, made)
    assert [outcome.error for outcome in outcomes] == [None] * 6
    assert {run_name(one): everything(one) for one in recipes} == calm(recipes, monkeypatch, tmp_path / "calm")


def test_a_cold_start_with_a_deadline(monkeypatch, tmp_path):
    """Even when importing takes longer than there is time: every call gets on."""
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    recipes = some("relu", "lcnn", epochs=30)
    first = swept(recipes, workers=2, until=time.monotonic())
    assert all(outcome.epochs >= 1 for outcome in first)
    assert all(outcome.run is None for outcome in first)


def test_a_deadline_without_workers(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "GRACE", 0.5)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
    with by_hand(tmp_path, tmp_path / "store", workers=0) as made, made.client() as alone:
        (outcome,) = swept(some("relu"), alone, until=time.monotonic() + 1)
    assert (outcome.epochs, outcome.run, outcome.error) == (0, None, None)


def test_an_unfit_worker_swallows_nothing(monkeypatch, tmp_path):
    """Its store cannot be written: what it is given goes to the other one."""
    (tmp_path / "file").write_text("in the way")
    recipes = some("relu", "lcnn", "standard", seeds=(0, 1), epochs=2)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
    swept(recipes[:1], workers=1, until=time.monotonic())  # one is begun
    with by_hand(tmp_path, tmp_path / "store", workers=0) as made:
        made.worker("unfit", LCNN_STORE=str(tmp_path / "file" / "store"))
        made.worker("fit")
        with made.client() as both:
            both.wait_for_workers(2, timeout=60)
            outcomes = swept(recipes, both)
            assert [outcome.error for outcome in outcomes] == [None] * 6
            made.kill("fit")
            (failed,) = swept(some("gradreg"), both)
    assert "NotADirectoryError" in str(failed.error)
    assert "set LCNN_STORE" in str(failed.error)


def test_a_clone_of_a_store_is_another_store(monkeypatch, tmp_path):
    """As containers of one image have: the same inode, the same time; but no token."""
    monkeypatch.setattr(dispatch, "identity", lambda: "the same everywhere")
    recipes = some("relu", epochs=3)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "mine"))
    with by_hand(tmp_path, tmp_path / "theirs", workers=1) as made, made.client() as theirs:
        (outcome,) = swept(recipes, theirs)
    assert outcome.error is None
    assert everything(recipes[0]) == calm(recipes, monkeypatch, tmp_path / "calm")[run_name(recipes[0])]


def test_a_state_that_is_further_along_is_not_written_over(monkeypatch, tmp_path):
    """What a stopped sweep left with the scheduler goes on, though our own store is behind."""
    (one,) = some("lcnn", epochs=60)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "mine"))
    swept([one], workers=1, until=time.monotonic())
    behind = state_path(one).read_bytes()
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "further"))
    swept([one], workers=1, until=time.monotonic() + 1.5)
    further = epochs_of(one)
    assert 1 < further < 60
    with by_hand(tmp_path, tmp_path / "theirs", workers=1) as made, made.client() as theirs:
        workers.Mail(one, theirs).leave(always=True)
        monkeypatch.setenv("LCNN_STORE", str(tmp_path / "mine"))
        assert state_path(one).read_bytes() == behind
        (outcome,) = swept([one], theirs)
        told = [event["epoch"] for event in events(theirs, one)]
        states = lambda dask_scheduler: len(dask_scheduler.extensions["variables"].variables)
        wait_until(lambda: theirs.run_on_scheduler(states) == 0, "nothing stays with the scheduler")
    assert outcome.run is not None
    assert told == list(range(further + 1, 61))
