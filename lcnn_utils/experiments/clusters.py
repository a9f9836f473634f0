"""A cluster of this machine: a process for each GPU, or for each core (or group of cores), all on localhost."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import dask
import torch
from dask.system import CPU_COUNT
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.system import MEMORY_LIMIT

from ..lab import pick_device
from ..training import strict

LOCALHOST = "127.0.0.1"
PATIENCE = 30.0  # seconds for a scheduler to answer, or to be there again
EACH = 2 << 30  # bytes of memory that a process should find
# a worker has one task at a time: the others wait with the scheduler, where any worker that gets free can have them
SETTINGS = {"distributed.scheduler.worker-saturation": 1.0}


def visible_gpus() -> list[str]:
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES writes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def threads_each() -> int:
    """Threads of a process: ``OMP_NUM_THREADS``, else one, with which small nets lose least."""
    text = os.environ.get("OMP_NUM_THREADS") or "1"
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"OMP_NUM_THREADS must be a whole number of at least 1, got {text!r}")
    return int(text)


def gpus(device: torch.device) -> list[str]:
    """Those that a sweep on ``device`` may use: all of them, or the one it names (``cuda:1``); none on a CPU."""
    if device.type != "cuda":
        return []
    return visible_gpus() if device.index is None else [visible_gpus()[device.index]]


def fitting(device: str | torch.device | None = None) -> int:
    """How many processes this machine has room for: one for each GPU, or for each group of cores and 2 GiB."""
    chosen = pick_device(device)
    if chosen.type == "cuda":
        return len(gpus(chosen))
    return max(1, min(CPU_COUNT // threads_each(), int(MEMORY_LIMIT // EACH)))


@contextmanager
def local(
    workers: int | None = None,
    *,
    device: str | torch.device | None = None,
    host: str = LOCALHOST,
    port: int = 0,
    dashboard: int = 0,
) -> Iterator[Client]:
    """A client of a cluster that lives as long as the block; see the module.

    Scheduler, workers and dashboard listen on ``host`` only. **Whoever reaches them can run programs as you**: Dask
    has no passwords.

    Args:
        workers: processes, default :func:`fitting`. On one GPU several share it.
        port, dashboard: 0 takes free ones.

    Raises:
        ValueError: workers < 1.
        RuntimeError: the device is absent, or the cluster does not start.
    """
    chosen, count = pick_device(device), fitting(device) if workers is None else workers
    if count < 1:
        raise ValueError(f"workers must be at least 1, got {count}")
    names = gpus(chosen)
    options = {"nthreads": 1, "host": host, "memory_limit": 0, "dashboard": False, "silence_logs": logging.ERROR}
    options |= {"preload": ["lcnn_utils.task"]}
    variables = {name: threads_each() for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    specs = {}
    for index in range(count):
        own = {"CUDA_VISIBLE_DEVICES": names[index % len(names)], "LCNN_DEVICE": "cuda"} if names else {}
        specs[index] = {"cls": Nanny, "options": options | {"env": own}}
    bind = {"host": host, "port": port, "dashboard_address": f"{host}:{dashboard}"}
    with dask.config.set(SETTINGS | {"distributed.nanny.pre-spawn-environ": variables}):
        cluster = SpecCluster(
            workers=specs, scheduler={"cls": Scheduler, "options": bind}, silence_logs=logging.ERROR, name="lcnn"
        )
    with cluster, Client(cluster) as client:
        yield client


def join(address: str) -> Client:
    """A client of the scheduler at ``address`` (``tcp://HOST:PORT``, or a scheduler file that ends in .json).

    Raises:
        RuntimeError: nobody answers there.
    """
    place = address
    try:
        if address.endswith(".json"):
            found = strict.loads(strict.content(Path(address)))
            strict.require(isinstance(found, dict) and strict.is_text(found.get("address")), "it has no address")
            place = found["address"]
        parts = urlsplit(place if "://" in place else f"tcp://{place}")
        socket.create_connection((parts.hostname or "", parts.port or 8786), timeout=PATIENCE).close()
        return Client(place, timeout=PATIENCE)
    except (OSError, ValueError, RecursionError) as error:
        raise RuntimeError(
            f"no scheduler answers at {address} ({error}): start one (cluster/README.md says how), or leave --scheduler"
            " out to use this machine"
        ) from None


def threads(client: Client) -> int:
    """How many recipes a cluster trains at a time: one a worker, however many threads that has."""
    return len(client.scheduler_info(n_workers=-1)["workers"])
