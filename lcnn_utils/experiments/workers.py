"""What a worker of a cluster does with a recipe: train it in the store it shares with the client, or in its own.

A worker that shares no store gets the state of an unfinished training through the scheduler, leaves its own there
after each epoch, so that another can go on when it is lost, and hands back record and state at the end.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import Any

import pandas as pd
from distributed import Variable, get_client, get_worker
from distributed.core import Status

from .. import __version__
from ..lab import store_root
from ..training import Recipe, run_name, state_path
from ..training.checkpoint import DAMAGE, Damaged
from . import merge
from . import runs as experiments
from .plan import Outcome, TimeIsUp, attempt, set_aside, stopper
from .task import waits

TOPIC = "lcnn-sweep"  # of the events: {"run": name, "epoch": n, "seconds": that it took}
SHARE = 0.05  # of a training's time that may go into sending its state
Answer = dict[str, Any]  # epochs, record and state (bytes or None), error, traceback, notes; stopped, unfit (address)
ONE_AT_A_TIME = threading.Lock()
BEGUN: set[str] = set()  # tokens of the sweeps that this process has trained for


def identity() -> str:
    """What tells our store from most others, its copies included: where its file ``runs/.store`` lies on its disk.

    Raises:
        OSError: the store cannot be written.
    """
    path = store_root() / "runs" / ".store"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), path.open("x"):
            pass
        found = path.stat()
    except OSError as error:
        why = f"cannot write {path} ({error.strerror}): set LCNN_STORE to a folder of yours"
        raise type(error)(error.errno, why) from error
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}"


def sees(token: str) -> bool:
    """Whether our store is the one that has this token (``dispatch.mark``) in it.

    Raises:
        OSError: the store cannot be written.
    """
    identity()
    return (store_root() / "runs" / f".sweep-{token}").exists()


def work(fields: dict[str, Any], *, version: str, token: str, until: float | None, device: str | None) -> Answer:
    """Train and measure a recipe, as a task of Dask; whatever goes wrong is in the answer.

    A process trains one recipe at a time, as many threads as Dask may give it: they would draw from one generator.

    Args:
        fields: of the recipe. version: of the client's ``lcnn_utils``, which must be ours.
        token: of ``dispatch.mark``, which lies in the client's store.
        until: no epoch is begun that would end later (by ``time.time``), but one by each process and token.
        device: None is the worker's choice.
    """
    if version != __version__:
        why = f"the worker has lcnn_utils {__version__}, the client {version}: install the same on both"
        return failure(why, get_worker().address)
    with ONE_AT_A_TIME:
        return _work(Recipe(**fields), token, until, device)


def _work(one: Recipe, token: str, until: float | None, device: str | None) -> Answer:
    try:
        mail = None if sees(token) else Mail(one)
        if mail:
            mail.collect()
    except Exception as error:  # of the worker's disk or its connection
        return failure(f"{type(error).__name__}: {error}", get_worker().address)
    begun, stop, wanted = time.perf_counter(), stopper(one, deadline(until)), _wanted()
    stopped = False

    def watch(history: pd.DataFrame) -> None:
        nonlocal begun, stopped
        now = time.perf_counter()
        tell(one, len(history), now - begun)
        begun = now
        if len(history) < one.epochs:  # the last state goes back with the answer
            stopped = not wanted()
            if mail:
                mail.leave(always=stopped)
            if stopped:
                raise TimeIsUp
        stop(history)

    def ready() -> bool:
        first = token not in BEGUN
        BEGUN.add(token)
        return first or time.monotonic() < deadline(until)

    return answer(attempt(one, device=device, watch=watch, ready=ready), mail is not None) | {"stopped": stopped}


def deadline(until: float | None) -> float:
    """By ``time.monotonic`` what is given by ``time.time``, which all machines share."""
    return math.inf if until is None else time.monotonic() + until - time.time()


def failure(message: str, unfit: str | None = None) -> Answer:
    """The answer of a worker that could not begin; ``unfit`` is its address, if another one may be able to."""
    answer = {"epochs": 0, "record": None, "state": None, "error": message, "traceback": "", "notes": ()}
    return answer | {"unfit": unfit}


def answer(outcome: Outcome, with_state: bool) -> Answer:
    """An outcome as plain data, with the files of the run: its record, and its state if asked for."""
    one, error = outcome.recipe, outcome.error
    path = state_path(one)
    records = (folder / f"{run_name(one)}.json" for folder in experiments.places())
    found = {
        "record": next((file.read_bytes() for file in records if file.exists()), None) if outcome.run else None,
        "state": path.read_bytes() if with_state and path.exists() else None,
        "error": f"{type(error).__name__}: {error}" if error else None,
    }
    return found | {"epochs": outcome.epochs, "traceback": outcome.traceback, "notes": outcome.notes}


def tell(one: Recipe, epoch: int, seconds: float) -> None:
    """Let the clients know that an epoch is over."""
    get_worker().log_event(TOPIC, {"run": run_name(one), "epoch": epoch, "seconds": round(seconds, 3)})


def _wanted():
    """Whether the client still wants this task, and the worker still belongs to a cluster: as a function to ask."""
    worker = get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        alive = worker.status in (Status.running, Status.paused)
        return alive and task is not None and task.state != "cancelled"

    return wanted


class Mail:
    """The state of an unfinished training on its way from worker to worker, or from the client: with the scheduler."""

    def __init__(self, recipe: Recipe, client=None):
        self.recipe, self.name, self.client = recipe, run_name(recipe), client or get_client()
        self.variable = Variable(f"lcnn-{self.name}", client=self.client)
        self.sent, self.cost = -math.inf, 0.0

    def collect(self) -> None:
        """Go on from the state that lies there, if it is further along than the one in our store."""
        if not self.client.run_on_scheduler(waits, self.variable.name):
            return
        with contextlib.suppress(TimeoutError, OSError, *DAMAGE):  # somebody took it, or it is damaged: go on without
            state = self.variable.get(timeout=10)
            try:
                merge.take_run(self.name, None, state, experiments.places()[1])
            except Damaged as error:  # ours is
                set_aside(error.path)
                merge.take_run(self.name, None, state, experiments.places()[1])

    def leave(self, always: bool = False) -> None:
        """Put our state there, unless sending would then take more than a twentieth of the time."""
        if always or time.perf_counter() - self.sent >= self.cost / SHARE:
            begun = time.perf_counter()
            with contextlib.suppress(TimeoutError, OSError):  # it is there for the case of a loss only
                self.variable.set(state_path(self.recipe).read_bytes())
            self.sent = time.perf_counter()
            self.cost = self.sent - begun

    def forget(self) -> None:
        """Take it away."""
        self.variable.delete()
