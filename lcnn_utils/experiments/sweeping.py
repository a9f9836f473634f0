"""Sweeps over a cluster (Dask distributed): every recipe is one task, and nothing is lost on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable

import torch
from distributed import Client
from tqdm import tqdm

from ..lab import one_thread
from ..training import Recipe, run_name
from ..training.checkpoint import DAMAGE, Damaged
from . import clusters, merge
from . import runs as experiments
from .dispatch import distribute
from .plan import Outcome, epochs_done, one_by_one, recorded, set_aside
from .progress import Progress, counted
from .workers import TOPIC, Answer, Mail

ASK = 5.0  # seconds between two questions for the workers there are


def sweep(
    recipes: Iterable[Recipe],
    client: Client | None = None,
    *,
    workers: int | None = None,
    until: float = math.inf,
    device: str | torch.device | None = None,
    progress: bool = True,
    told: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Train and measure what is missing of many recipes, on a cluster.

    Each recipe is one task, keyed by its content: two sweeps that ask for the same one get the same run. Workers that
    share the client's store (``LCNN_STORE``) leave the runs there; from others they come back through the scheduler.
    When a worker is lost, its recipe is gone on with elsewhere from its last epoch. When the sweep is stopped, so are
    its trainings, at the end of their epoch; called again, it goes on.

    Args:
        recipes: in the order in which they are to be begun; each is trained once.
        client: of any Dask cluster whose workers have this version of ``lcnn_utils``. None makes a cluster of this
            machine, of ``workers`` processes (default: one for each GPU, or each core); a single one is this process.
            (In a script call it, and set ``LCNN_STORE``, below ``if __name__ == "__main__":``, as always when Python
            starts processes.)
        until: no epoch is begun that would end later (by ``time.monotonic``), but one by each worker, so that every
            call gets on.
        device: the same for all workers; None is their choice.
        progress: print where the dashboard is, and show a line with what is done, running, failed and left.
        told: called with each outcome as it comes.

    Returns:
        The outcomes, in the order of the recipes. One that failed has its error and its traceback; it ends no other.

    Raises:
        ValueError: workers < 1, or both a client and workers; the client is asynchronous.
        RuntimeError: the device is absent, or the scheduler was lost; what was finished is in the store.
        OSError: the store cannot be written.
    """
    if client is not None and (workers is not None or client.asynchronous):
        raise ValueError("give a client that is not asynchronous, or a number of workers, not both")
    ones = list(dict.fromkeys(recipes))
    tell, outcomes, notes = told or (lambda _: None), {}, {}
    for one in ones:
        try:
            if found := _finished(one):
                outcomes[one] = found
                tell(found)
            else:
                epochs_done(one)
        except Damaged as error:
            notes[one] = f"{error}; {set_aside(error.path)}"
    missing = [one for one in ones if one not in outcomes]
    count = 0 if client or not missing else clusters.fitting(device) if workers is None else workers
    if count == 1 or not missing:
        made: Generator[Outcome, None, None] = _alone(missing, until, device, progress)
    else:
        made = _swept(missing, client, count, until, device, progress)
    with contextlib.closing(made):  # a generator
        for outcome in made:
            one = outcome.recipe
            if one in notes:
                outcome = dataclasses.replace(outcome, notes=(notes[one], *outcome.notes))
            outcomes[one] = outcome
            tell(outcome)
    return [outcomes[one] for one in ones]


def _finished(one: Recipe) -> Outcome | None:
    """The run of a recipe, if it is recorded. Damaged: the record is, and it is of the store."""
    if not recorded(one):
        return None
    try:
        return Outcome(one, one.epochs, experiments.run(one, weights=False), None)
    except Damaged as error:
        if error.path.parent == experiments.places()[1]:
            raise
        return Outcome(one, 0, None, error)


def _alone(missing, until, device, progress) -> Generator[Outcome, None, None]:
    """In this process, with as many threads as a worker has, so that the numbers are the same."""
    threads = torch.get_num_threads()
    one_thread()
    try:
        yield from one_by_one(missing, until=until, device=device, progress=progress)
    finally:
        torch.set_num_threads(threads)


def _swept(missing, client, count, until, device, progress) -> Generator[Outcome, None, None]:
    """The outcomes of recipes that are to be trained, as they come."""
    with contextlib.ExitStack() as stack:
        client = client or stack.enter_context(clusters.local(count, device=device))
        state = Progress({one: epochs_done(one) for one in missing})
        if progress:
            there, where = clusters.threads(client), client.dashboard_link
            line = f"{counted(len(missing), 'run')} on {counted(there, 'worker')}"
            tqdm.write(f"{line}, dashboard: {where}" if where else line, file=sys.stdout)
        bar = stack.enter_context(
            tqdm(total=len(missing), leave=False, disable=not progress, bar_format="{desc}|{bar}|")
        )
        looked = -math.inf

        def look() -> None:
            nonlocal looked
            if time.monotonic() - looked > ASK and client.status == "running":
                client.subscribe_topic(TOPIC, lambda event: state.tell(event[1]))  # a new scheduler doesn't know of it
                state.workers, looked = clusters.threads(client), time.monotonic()
            if progress and state.text() != bar.desc:
                bar.set_description_str(state.text())

        if count and device is not None:
            device = torch.device(device).type  # each process of ours sees its own GPU alone
        answers = stack.enter_context(contextlib.closing(distribute(client, missing, until, device, look)))
        for one, found in answers:
            outcome = _outcome(client, one, found)
            state.end(one, outcome.run is not None, outcome.error is not None)
            bar.update()
            yield outcome
        if client.status == "running":
            client.unsubscribe_topic(TOPIC)


def _outcome(client: Client, one: Recipe, found: Answer) -> Outcome:
    """The outcome that an answer tells of. What our store lacks of it is put there."""
    error: Exception | None = RuntimeError(found["error"]) if found["error"] else None
    made, notes = None, tuple(found["notes"])
    try:
        if found["state"] is not None or (found["record"] is not None and not recorded(one)):
            did = merge.take_run(run_name(one), found["record"], found["state"], experiments.places()[1])
            if did in (merge.BUSY, merge.OTHER):
                notes += (f"what came back was not put into the store: it is {did}",)
            elif found["state"] is not None:
                Mail(one, client).forget()
        if found["record"] is not None:
            made = experiments.run(one, weights=False)
    except (OSError, *DAMAGE) as problem:
        error = problem
    return Outcome(one, found["epochs"], made, error, found["traceback"], notes)
