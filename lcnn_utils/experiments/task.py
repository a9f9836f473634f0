"""The task that a sweep hands to Dask. It is alone here: the scheduler imports this module too, and needs no torch."""

from __future__ import annotations

import contextlib
import signal
from typing import Any


def work(fields: dict[str, Any], **told: Any) -> dict[str, Any]:
    """Train and measure a recipe; see :func:`workers.work`."""
    from .workers import work as really

    return really(fields, **told)


def dask_setup(_: Any) -> None:
    """Called by Dask in each worker of this machine: Ctrl-C is for the client, which then ends the workers."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def waits(name: str, dask_scheduler: Any = None) -> bool:
    """Asked on the scheduler: whether there is a variable of this name (Dask logs an error when one isn't there)."""
    return name in dask_scheduler.extensions["variables"].variables
