"""A cluster started by hand, as ``cluster/README.md`` tells it: a scheduler and workers, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from distributed import Client
from safetensors.torch import load_file

from lcnn_utils.experiments import run
from lcnn_utils.experiments.plan import ordered
from lcnn_utils.training import run_name, state_path
from lcnn_utils.training.checkpoint import reached

PATIENCE = 90.0  # seconds for anything to happen


def wait_until(condition, what: str, patience: float = PATIENCE):
    """What ``condition()`` returns as soon as it is true."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {patience:.0f} s in vain: {what}")


def some(*methods, seeds=(0,), **changes):
    """Recipes of a second or two: two moons."""
    return ordered(("moons",), methods, seeds, **{"width": 8, "epochs": 20} | changes)


def epochs_of(one) -> int:
    """The epochs that the state in our store has."""
    with contextlib.suppress(Exception):
        return reached(state_path(one))[0]
    return 0


def everything(one):
    """All that a run is: its record but for its times and date, and its weights, momenta and generator."""
    record = json.loads(state_path(one).with_suffix(".json").read_text())
    del record["provenance"]
    state = {name: value.tolist() for name, value in load_file(state_path(one)).items()}
    return record, state


def calm(recipes, monkeypatch, folder):
    """What undisturbed runs in this process come to: by name."""
    with monkeypatch.context() as patch:
        patch.setenv("LCNN_STORE", str(folder))
        for one in recipes:
            run(one, progress=False)
        return {run_name(one): everything(one) for one in recipes}


class ByHand:
    """Processes of a cluster, with ``LCNN_STORE`` set to ``store`` unless a worker is given its own."""

    def __init__(self, folder: Path, store: Path):
        self.file, self.store, self.processes = folder / "scheduler.json", store, {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])

    def start(self, name: str, *command: str, **variables: str) -> None:
        log = (self.file.parent / f"{name}.log").open("ab")
        environment = os.environ | {"LCNN_STORE": str(self.store), "OMP_NUM_THREADS": "1"} | variables
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=log, stderr=log, env=environment, cwd=self.file.parent
        )

    def scheduler(self) -> None:
        self.file.unlink(missing_ok=True)
        options = (
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
            "--dashboard-address",
            "127.0.0.1:0",
            "--scheduler-file",
            str(self.file),
        )
        self.start("scheduler", "distributed.cli.dask_scheduler", *options)
        wait_until(self.file.exists, "the scheduler's file")

    def worker(self, name: str, **variables: str) -> None:
        options = (
            "--nthreads",
            "1",
            "--memory-limit",
            "0",
            "--host",
            "127.0.0.1",
            "--dashboard-address",
            "127.0.0.1:0",
            "--name",
            name,
        )
        self.start(name, "distributed.cli.dask_worker", "--scheduler-file", str(self.file), *options, **variables)

    def client(self, timeout: float = 30) -> Client:
        return Client(scheduler_file=str(self.file), timeout=timeout, set_as_default=False)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes.pop(name).wait()

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


@contextlib.contextmanager
def by_hand(folder: Path, store: Path, workers: int = 2):
    """A cluster that is stopped at the end."""
    made = ByHand(folder, store)
    try:
        made.scheduler()
        for index in range(workers):
            made.worker(f"worker{index}")
        if workers:
            with made.client() as client:
                client.wait_for_workers(workers, timeout=PATIENCE)
        yield made
    finally:
        made.stop()


def pid_at_work(client: Client, one) -> int | None:
    """The process that is training a recipe."""
    for address, keys in client.processing().items():
        if any(run_name(one) in str(key) for key in keys):
            return client.run(os.getpid, workers=[address])[address]
    return None


def listening(*processes: psutil.Process) -> set[str]:
    """The addresses that processes and their children listen on."""
    return {
        connection.laddr.ip
        for one in processes
        for process in (one, *one.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
