"""Sweeps over a cluster (Dask distributed): every recipe is one task, and nothing is lost on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from distributed import CancelledError, Client, Future
from tqdm import tqdm

from . import __version__, clusters, experiments, merge
from .plan import Outcome, epochs_done, one_by_one, recorded, set_aside
from .progress import Progress
from .recipe import Recipe
from .state import DAMAGE, Damaged, run_name, state_path
from .task import work
from .workers import TOPIC, Answer, Mail, failure, identity

PREFIX = "lcnn-sweep"  # of the tasks' keys
EVERY = 0.2  # seconds between two looks at what is done
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
            (In a script call it below ``if __name__ == "__main__":``, as always when Python starts processes.)
        until: no epoch is begun that would end later (by ``time.monotonic``).
        device: the same for all workers; None is their choice.
        progress: print where the dashboard is, and show a line with what is done, running, failed and left.
        told: called with each outcome as it comes.

    Returns:
        The outcomes, in the order of the recipes. One that failed has its error and its traceback; it ends no other.

    Raises:
        ValueError: workers < 1.
        RuntimeError: the device is absent, or the scheduler was lost; what was finished is in the store.
        OSError: the store cannot be written.
    """
    ones = list(dict.fromkeys(recipes))
    tell, outcomes, notes = told or (lambda _: None), {}, {}
    for one in ones:
        try:
            found = _finished(one)
        except Damaged as error:
            notes[one] = f"{error}; {set_aside(error.path)}"
        else:
            if found:
                outcomes[one] = found
                tell(found)
    missing = [one for one in ones if one not in outcomes]
    count = 0 if client or not missing else clusters.fitting(device) if workers is None else workers
    if count == 1 or not missing:
        made: Generator[Outcome, None, None] = one_by_one(missing, until=until, device=device, progress=progress)
    else:
        made = _swept(missing, client, count, until, device, progress)
    with contextlib.closing(made):  # a generator
        for outcome in made:
            one = outcome.recipe
            outcomes[one] = (
                dataclasses.replace(outcome, notes=(notes[one], *outcome.notes)) if one in notes else outcome
            )
            tell(outcomes[one])
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


def _swept(missing, client, count, until, device, progress) -> Generator[Outcome, None, None]:
    """The outcomes of recipes that are to be trained, as they come."""
    with contextlib.ExitStack() as stack:
        client = client or stack.enter_context(clusters.local(count, device=device))
        state = Progress({one: _done(one) for one in missing})
        if progress:
            where = f", dashboard: {client.dashboard_link}" if client.dashboard_link else ""
            tqdm.write(f"{len(missing)} runs on {clusters.threads(client)} workers{where}", file=sys.stdout)
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

        for one, found in distribute(client, missing, until, device, look):
            outcome = _outcome(client, one, found)
            state.end(one, outcome.error is not None)
            bar.update()
            yield outcome
        if client.status == "running":
            client.unsubscribe_topic(TOPIC)


def _done(one: Recipe) -> int:
    try:
        return epochs_done(one)
    except Damaged as error:  # the worker would find it too, if it shared this store
        set_aside(error.path)
        return 0


def distribute(
    client: Client,
    recipes: list[Recipe],
    until: float = math.inf,
    device: str | torch.device | None = None,
    look: Callable[[], None] = lambda: None,
    task: Callable[..., Answer] = work,
) -> Iterator[tuple[Recipe, Answer]]:
    """Every recipe with its answer (``workers.Answer``), as they come.

    Args:
        look: called a few times a second.
        task: what a worker does with a recipe.

    Raises:
        RuntimeError: the scheduler was lost.
    """
    store = identity()
    last = None if until == math.inf else max(time.time() + until - time.monotonic(), time.time() + 1)
    told = {"version": __version__, "store": store, "until": last, "device": None if device is None else str(device)}

    def submit(one: Recipe) -> Future:
        key = (PREFIX, f"{run_name(one)}-{store}")
        return client.submit(task, dataclasses.asdict(one), **told, key=key, pure=False)

    _post(client, recipes)
    waiting = {submit(one): one for one in recipes}
    try:
        while waiting:
            time.sleep(EVERY)
            look()
            ready = [future for future in waiting if future.done()] if _connected(client) else []
            for future, found in _gathered(client, ready).items():
                one = waiting.pop(future)
                future.release()
                if found is None or (found.get("stopped") and (last is None or time.time() < last)):
                    waiting[submit(one)] = one  # cancelled by somebody, or with a connection that is there again
                else:
                    yield one, found
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
    with contextlib.suppress(CancelledError, OSError):  # the connection broke: they are asked for again
        found |= zip(done, client.gather(done), strict=True)
    return found


def _connected(client: Client) -> bool:
    """Whether the scheduler is there; Dask tries for a while (the client's timeout, 30 s) to find it again.

    Raises:
        RuntimeError: it has given up.
    """
    if client.status in ("running", "connecting"):
        return client.status == "running"
    raise RuntimeError(
        "the connection to the scheduler broke: start it again, or take another, and the same sweep goes on "
        "(what was finished is in the store)"
    )


def _post(client: Client, recipes: list[Recipe]) -> None:
    """Leave the states of unfinished trainings with the scheduler, for workers that don't share the store."""
    begun = [one for one in recipes if state_path(one).exists()]
    stores = set(client.run(identity).values()) if begun else set()
    if begun and stores != {identity()}:
        for one in begun:
            Mail(one, client).variable.set(state_path(one).read_bytes())


def _outcome(client: Client, one: Recipe, found: dict[str, Any]) -> Outcome:
    """The outcome that an answer tells of; what came back through the scheduler is put into the store."""
    error: Exception | None = RuntimeError(found["error"]) if found["error"] else None
    made = None
    try:
        if found["state"] is not None:
            merge.take_run(run_name(one), found["record"], found["state"], experiments.places()[1])
            Mail(one, client).forget()
        if found["record"] is not None:
            made = experiments.read_record(found["record"], one)
    except (OSError, *DAMAGE) as problem:
        error = problem
    return Outcome(one, found["epochs"], made, error, found["traceback"], tuple(found["notes"]))
