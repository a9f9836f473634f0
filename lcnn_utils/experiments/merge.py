"""Runs that a worker made: added to a folder of runs, where what is here stays as it is."""

from __future__ import annotations

import re
from pathlib import Path

from ..lab import atomic_path
from ..training import run_name, strict
from ..training.checkpoint import DAMAGE, Damaged, Held, locked, reached
from ..training.inspection import inspected
from ..training.strict import require

RUN = r"[a-z0-9]+-[a-z0-9_]+-seed[0-9]{1,18}-[0-9a-f]{12}"
NEW, HERE, FURTHER, OTHER = "new", "already here", "further along", "here with other numbers (ours kept)"
BUSY = "left, as it is being trained here"


def take_run(name: str, record: bytes | None, state: bytes | None, into: Path) -> str:
    """Add a run that somebody else made to a folder of runs: what was done.

    Args:
        name: of the run. record, state: the content of its JSON and of its safetensors; None where there is none.
            Of two unfinished trainings the one with more epochs stays; one with a record is never written over.

    Raises:
        one of ``state.DAMAGE``: they are not what they should be, or don't belong together; nothing is written. Or the
            run's own files here are damaged (``state.Damaged``).
        OSError: the folder cannot be written.
    """
    theirs, epochs = None, 0
    if record is not None:
        one, theirs = strict.record(record)
        require(run_name(one) == name, f"it is the record of another run, {run_name(one)}")
    if state is not None:
        one, epochs = inspected(state)
        require(run_name(one) == name, f"it is the state of another run, {run_name(one)}")
    require(re.fullmatch(RUN, name) and (record or state), f"{name!r} is no run")
    path = into / f"{name}.safetensors"
    try:
        with locked(path, wait=False):
            return _add(path, record, theirs and theirs["metrics"], state, epochs)
    except Held:
        return BUSY


def _add(path: Path, record: bytes | None, metrics: dict | None, state: bytes | None, epochs: int) -> str:
    done, ours = _epochs(path), path.with_suffix(".json")
    finished = ours.exists()
    if finished and metrics is not None and _metrics(ours) != metrics:
        return OTHER
    if (finished and metrics is None) or (epochs <= done and (finished or metrics is None)):
        return HERE
    if state is not None and epochs >= done:  # first the state, then the record, whose weights it holds
        _write(path, state)
    if record is not None and not finished:
        _write(ours, record)
    return FURTHER if finished or done else NEW


def _write(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _epochs(path: Path) -> int:
    try:
        return reached(path)[0] if path.exists() else 0
    except DAMAGE as error:
        raise Damaged(path, error, "delete it to train anew") from None


def _metrics(path: Path) -> dict[str, float]:
    try:
        return strict.record(strict.content(path))[1]["metrics"]
    except DAMAGE as error:
        raise Damaged(path, error, "delete it, and it is made anew") from None
