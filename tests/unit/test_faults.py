"""Sweeps on a local cluster to which bad things happen: nothing is lost or doubled, every number that of a calm run."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import small_disk

from cluster import PATIENCE, by_hand, calm, epochs_of, everything, pid_at_work, some, wait_until
from lcnn_utils.experiments import clusters, sweep
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.experiments.workers import TOPIC
from lcnn_utils.training import run_name, state_path

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes as POSIX does")
NO_MORE = {"progress": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The store that client and workers share."""
    return tmp_path_factory.mktemp("cluster") / "store"


@pytest.fixture(scope="module")
def cluster(home):
    """A scheduler and two workers."""
    with by_hand(home.parent, home) as made:
        yield made


@pytest.fixture(autouse=True)
def shared(monkeypatch, tmp_path, home):
    """The shared store is ours, and nothing is shipped."""
    monkeypatch.setenv("LCNN_STORE", str(home))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    monkeypatch.setattr(experiments, "SHIPPED", tmp_path / "shipped")


@pytest.fixture
def client(cluster):
    with cluster.client() as made:
        made.wait_for_workers(2, timeout=PATIENCE)
        yield made


class Sweep(threading.Thread):
    """A sweep in a thread of its own."""

    def __init__(self, recipes, client, **options):
        super().__init__(daemon=True)
        self.work = lambda: sweep(recipes, client, **NO_MORE, **options)
        self.outcomes, self.error = None, None
        self.start()

    def run(self):
        try:
            self.outcomes = self.work()
        except Exception as error:
            self.error = error

    def reaches(self, one, epoch):
        """Wait until a recipe's state in our store has so many epochs."""

        def reached():
            assert not self.error, self.error
            return epochs_of(one) >= epoch

        wait_until(reached, f"epoch {epoch}")

    def result(self, patience=PATIENCE):
        self.join(patience)
        assert not self.is_alive(), "the sweep hangs"
        if self.error:
            raise self.error
        return self.outcomes


def told(client, one):
    """The epochs of a run that workers told of, in order."""
    return [event["epoch"] for _, event in client.get_events(TOPIC) if event["run"] == run_name(one)]


def require_calm(recipes, outcomes, monkeypatch, folder):
    """Every run is there once, as if nothing had happened."""
    assert [outcome.recipe for outcome in outcomes] == recipes
    assert [(outcome.error, outcome.traceback) for outcome in outcomes] == [(None, "")] * len(recipes)
    found = {run_name(one): everything(one) for one in recipes}
    assert found == calm(recipes, monkeypatch, folder / "calm")
    for outcome in outcomes:
        assert outcome.run.metrics == found[run_name(outcome.recipe)][0]["metrics"]
    left = [
        path.name
        for path in state_path(recipes[0]).parent.glob(".*")
        if not path.name.startswith((".store", ".sweep-"))
    ]
    assert left == [], "half-written files"


def test_a_killed_worker(client, monkeypatch, tmp_path):
    """kill −9 in mid-training: the recipe is gone on with from its last epoch."""
    recipes = some("lcnn", "standard", "gradreg", epochs=30)
    running = Sweep(recipes, client)
    victim = recipes[0]
    running.reaches(victim, 5)
    os.kill(pid_at_work(client, victim), signal.SIGKILL)
    done = epochs_of(victim)
    assert 5 <= done < 30, "killed in the middle"
    outcomes = running.result()
    require_calm(recipes, outcomes, monkeypatch, tmp_path)
    epochs = told(client, victim)
    assert sorted(set(epochs)) == list(range(1, 31)), "all epochs"
    assert len(epochs) - 30 <= 1, "none but the one at hand was trained twice"


@pytest.mark.parametrize("soon", [True, False], ids=["started again soon", "started again later"])
def test_a_killed_scheduler(monkeypatch, tmp_path, home, soon):
    """The sweep goes on by itself when the scheduler is there again soon, else it says so and is called again."""
    recipes = some("lcnn", "standard", seeds=(1 + soon,), epochs=30)
    (tmp_path / "hand").mkdir()
    with by_hand(tmp_path / "hand", home) as made:
        with made.client(timeout=60 if soon else 2) as client:
            running = Sweep(recipes, client)
            running.reaches(recipes[0], 5)
            made.kill("scheduler")
            if not soon:
                with pytest.raises(RuntimeError, match=r"^the connection to the scheduler broke: start it again"):
                    running.result()
            made.scheduler()
            done = [epochs_of(one) for one in recipes]
            for name in ("again0", "again1"):
                made.worker(name)
            if soon:
                outcomes = running.result()
        assert 5 <= done[0] < 30, "killed in the middle"
        with made.client() as client:
            outcomes = outcomes if soon else Sweep(recipes, client).result()
            again = told(client, recipes[0])
    require_calm(recipes, outcomes, monkeypatch, tmp_path)
    assert again[0] > done[0], "it went on from its last epoch"


def test_a_full_disk(monkeypatch, tmp_path):
    """A store of 256 KiB: what finds no room fails and says so, what is there stays whole, and room is all it takes."""
    recipes = some("standard", "lcnn", seeds=(0, 1), width=24, epochs=6)
    with small_disk(tmp_path / "small", "256k") as folder:
        monkeypatch.setenv("LCNN_STORE", str(folder))
        filler = folder / "filler"
        filler.write_bytes(b"0" * 200_000)
        outcomes = Sweep(recipes, None, workers=2).result()
        failed = [outcome for outcome in outcomes if outcome.error]
        assert failed, "the disk is too small for all"
        for outcome in failed:
            assert "No space left on device): free some space, or set LCNN_STORE" in str(outcome.error)
            assert "save_state" in outcome.traceback
        filler.unlink()
        monkeypatch.setenv("LCNN_STORE", str(tmp_path / "large"))
        shutil.copytree(folder / "runs", tmp_path / "large" / "runs")
    outcomes = Sweep(recipes, None, workers=2).result()
    require_calm(recipes, outcomes, monkeypatch, tmp_path)


@pytest.mark.parametrize("what", ["state", "flipped", "record"])
def test_a_damaged_file(client, monkeypatch, tmp_path, what):
    recipes = some("lcnn", "relu", seeds=({"state": 3, "flipped": 4, "record": 12}[what],), epochs=10)
    if what != "record":
        sweep(recipes, None, workers=1, until=time.monotonic(), **NO_MORE)
        path = state_path(recipes[0])
    else:
        sweep(recipes, None, workers=1, **NO_MORE)
        path = state_path(recipes[0]).with_suffix(".json")
    content = path.read_bytes()
    damaged = content[: len(content) // 2]
    if what == "flipped":  # one bit of the weights: the head is whole
        damaged = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    path.write_bytes(damaged)
    outcomes = Sweep(recipes, client).result()
    require_calm(recipes, outcomes, monkeypatch, tmp_path)
    assert (path.parent / "damaged" / path.name).read_bytes() == damaged
    assert [len(outcome.notes) for outcome in outcomes] == [1, 0], "it is said"


def command(cluster, recipes, **variables):
    """The same sweep from a shell."""
    seeds = sorted({str(one.seed) for one in recipes})
    methods = list(dict.fromkeys(one.method for one in recipes))
    return subprocess.Popen(
        [sys.executable, "-m", "lcnn_utils", "sweep", "--datasets", "moons", "--methods", *methods, "--seeds", *seeds,
         "--set", f"epochs={recipes[0].epochs}", f"width={recipes[0].width}", "--scheduler", str(cluster.file)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | variables,
    )  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_stopped_client(cluster, client, monkeypatch, tmp_path, how):
    """Its trainings stop at the end of their epoch; whoever asks again goes on from there."""
    recipes = some("lcnn", "standard", seeds=(5 + int(how),), epochs=60)
    process = command(cluster, recipes)
    wait_until(lambda: epochs_of(recipes[0]) >= 5, "five epochs")
    process.send_signal(how)
    output = process.communicate(timeout=PATIENCE)[0]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "lcnn: interrupted" in output
    wait_until(lambda: not any(client.processing().values()), "the scheduler forgets them")
    time.sleep(1.0)  # the epoch at hand is finished
    done = epochs_of(recipes[0])
    time.sleep(1.0)
    assert epochs_of(recipes[0]) == done < 60, "nobody trains on"
    assert not state_path(recipes[0]).with_suffix(".json").exists()
    outcomes = Sweep(recipes, client).result()
    require_calm(recipes, outcomes, monkeypatch, tmp_path)
    assert told(client, recipes[0]) == list(range(1, 61)), "every epoch once"


def test_overlapping_sweeps_on_one_cluster(cluster, client, monkeypatch, tmp_path):
    recipes = some("lcnn", "standard", "relu", seeds=(7,))
    with cluster.client() as other:
        first, second = Sweep(recipes[:2], client), Sweep(recipes[::-1][:2], other)
        outcomes = first.result() + second.result()[:1]
    require_calm(recipes, outcomes, monkeypatch, tmp_path)
    assert [told(client, one) for one in recipes] == [list(range(1, 21))] * 3, "every epoch once"


def test_a_sweep_that_another_one_leaves(cluster, client, monkeypatch, tmp_path):
    """Two sweeps want the same run, and one of them is stopped: the other gets it all the same."""
    recipes = some("lcnn", seeds=(8,), epochs=60)
    process = command(cluster, recipes)
    wait_until(lambda: epochs_of(recipes[0]) >= 5, "five epochs")
    running = Sweep(recipes, client)
    running.reaches(recipes[0], 20)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    require_calm(recipes, running.result(), monkeypatch, tmp_path)
    assert told(client, recipes[0]) == list(range(1, 61)), "every epoch once"


def test_overlapping_sweeps_of_two_clusters(client, monkeypatch, tmp_path, home):
    """Two schedulers that know nothing of each other, and one store: every epoch is trained once."""
    recipes = some("lcnn", "standard", seeds=(9, 10))
    with clusters.local(2, device="cpu") as other:
        first, second = Sweep(recipes, client), Sweep(recipes, other)
        outcomes = first.result()
        assert [outcome.error for outcome in second.result()] == [None] * len(recipes)
        for one in recipes:
            assert sorted(told(client, one) + told(other, one)) == list(range(1, 21))
    require_calm(recipes, outcomes, monkeypatch, tmp_path)


def test_workers_without_our_store(monkeypatch, tmp_path):
    """Three stores, and a worker killed in mid-training: the state goes from one to the other by the scheduler."""
    recipes = some("lcnn", "standard", seeds=(11,), epochs=60)
    begun = recipes[1]
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "mine"))
    sweep([begun], None, workers=1, until=time.monotonic(), **NO_MORE)
    assert epochs_of(begun) == 1
    with by_hand(tmp_path, tmp_path / "nowhere", workers=0) as made:
        for index in range(2):
            made.worker(f"w{index}", LCNN_STORE=str(tmp_path / f"store{index}"))
        with made.client() as client:
            running = Sweep(recipes, client)
            here = wait_until(lambda: next((e for e in told(client, recipes[0]) if e >= 20), None), "twenty epochs")
            name = next(
                index
                for index in range(2)
                if (tmp_path / f"store{index}" / "runs" / state_path(recipes[0]).name).exists()
            )
            made.kill(f"w{name}")  # its nanny, which would start it again
            outcomes = running.result()
            epochs, others = told(client, recipes[0]), told(client, begun)
    require_calm(recipes, outcomes, monkeypatch, tmp_path)
    assert others[0] == 2, "what was begun here was gone on with there"
    assert sorted(set(epochs)) == list(range(1, 61))
    assert here >= 20
    assert len(epochs) < 60 + 20, "it did not begin anew"
