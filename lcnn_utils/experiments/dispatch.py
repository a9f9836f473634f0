"""Recipes as tasks of a Dask cluster: sent out, asked for, and sent again where a connection or a worker was lost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from distributed import Client, Future

from .. import __version__
from ..lab import write_text
from ..training import Recipe, run_name, state_path
from . import runs as experiments
from .plan import so_far
from .task import work
from .workers import Answer, Mail, failure, identity, sees

PREFIX = "lcnn-sweep"  # of the tasks' keys
EVERY = 0.2  # seconds between two looks at what is done
WEEK = 7 * 24 * 3600
GRACE = 30.0  # seconds after a deadline until what did not stop by itself is left to itself


@contextlib.contextmanager
def mark() -> Iterator[str]:
    """A token that lies in our store, in ``runs/.sweep-TOKEN``, as long as the block: who sees it shares the store."""
    token = uuid.uuid4().hex
    path = experiments.places()[1] / f".sweep-{token}"
    write_text(path, "", "set LCNN_STORE to a folder of yours")
    for other in path.parent.glob(".sweep-*"):
        with contextlib.suppress(OSError):
            if other.stat().st_mtime < time.time() - WEEK:  # of a sweep that was killed
                other.unlink()
    try:
        yield token
    finally:
        path.unlink(missing_ok=True)


def distribute(
    client: Client,
    recipes: list[Recipe],
    until: float = math.inf,
    device: str | torch.device | None = None,
    look: Callable[[], None] = lambda: None,
    task: Callable[..., Answer] = work,
) -> Generator[tuple[Recipe, Answer], None, None]:
    """Every recipe with its answer (``workers.Answer``), as they come.

    Args:
        until: by ``time.monotonic``. Half a minute later no answer is waited for any more.
        look: called a few times a second.
        task: what a worker does with a recipe.

    Raises:
        RuntimeError: the scheduler was lost.
    """
    last = None if until == math.inf else time.time() + until - time.monotonic()
    bad: set[str] = set()  # workers that cannot begin anything

    with mark() as token:
        store = identity()
        told = {
            "version": __version__,
            "token": token,
            "until": last,
            "device": None if device is None else str(device),
        }

        def submit(one: Recipe, workers: list[str] | None = None) -> Future:
            key = (PREFIX, f"{run_name(one)}-{store}")
            return client.submit(task, dataclasses.asdict(one), **told, key=key, pure=False, workers=workers)

        post(client, recipes, token)
        waiting = {submit(one): one for one in recipes}
        try:
            while waiting:
                time.sleep(EVERY)
                look()
                ready = [future for future in waiting if future.done()] if _connected(client) else []
                for future, found in _gathered(client, ready).items():
                    one = waiting.pop(future)
                    future.release()
                    if found is None:  # cancelled by somebody, or with a connection that is there again
                        post(client, [one], token)
                        waiting[submit(one)] = one
                    elif found.get("stopped") and (last is None or time.time() < last):
                        waiting[submit(one)] = one  # somebody else's sweep was stopped, and this task with it
                    elif others := _others(client, bad, found.get("unfit")):
                        waiting[submit(one, others)] = one
                    else:
                        yield one, found
                if last is not None and time.time() > last + GRACE:
                    for one in waiting.values():
                        yield one, failure("") | {"epochs": so_far(one), "error": None}
                    break
        finally:
            if client.status == "running":
                client.cancel(list(waiting), reason="the sweep was stopped")


def _gathered(client: Client, ready: list[Future]) -> dict[Future, Answer | None]:
    """What came back of futures that are done; None of those that were cancelled."""
    found: dict[Future, Answer | None] = {}
    for future in ready:
        if future.status == "error":
            error = future.exception()
            found[future] = failure(f"{type(error).__name__}: {error}")
        elif future.status != "finished":
            found[future] = None
    done = [future for future in ready if future not in found]
    with contextlib.suppress(Exception):  # a connection or a worker was lost meanwhile: the next look will see
        found |= zip(done, client.gather(done), strict=True)
    return found


def _others(client: Client, bad: set[str], unfit: str | None) -> list[str]:
    """The workers to try instead of the one that says it is unfit; none if it doesn't say so, or all are."""
    if unfit is None:
        return []
    bad.add(unfit)
    return [address for address in client.scheduler_info(n_workers=-1)["workers"] if address not in bad]


def _connected(client: Client) -> bool:
    """Whether the scheduler is there; Dask tries for a while (the client's timeout) to find it again.

    Raises:
        RuntimeError: it has given up.
    """
    if client.status in ("running", "connecting"):
        return client.status == "running"
    raise RuntimeError(
        "the connection to the scheduler broke: start it again, or take another, and the same sweep goes on "
        "(what was finished is in the store)"
    )


def post(client: Client, recipes: list[Recipe], token: str) -> None:
    """Leave the states of unfinished trainings with the scheduler, for workers that don't share the store; where one
    lies there that is further along, it is put into the store first."""
    begun = [one for one in recipes if state_path(one).exists()]
    seen: Mapping[str, Any] = client.run(sees, token, on_error="return") if begun else {}
    if begun and not (seen and all(answer is True for answer in seen.values())):
        for one in begun:
            mail = Mail(one, client)
            mail.collect()
            mail.leave(always=True)
