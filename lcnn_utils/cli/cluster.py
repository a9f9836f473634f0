"""The command ``lcnn cluster``: scheduler and workers of one machine, for the sweeps of several terminals."""

from __future__ import annotations

import contextlib
import signal
import threading
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from .options import require_free


@dataclass(frozen=True)
class Cluster:
    """Start a scheduler, and a worker for each GPU or CPU core of this machine, until Ctrl-C.

    Sweeps use it with `lcnn sweep … --scheduler ADDRESS`, several at a time; what two of them ask for is trained once.
    For several machines see cluster/README.md.
    """

    workers: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a GPU or a core each)")] = None
    """Processes that train."""
    host: Annotated[str, arg(metavar="ADDRESS", help_behavior_hint="(default: 127.0.0.1, this machine only)")] = (
        "127.0.0.1"
    )
    """Where to listen. Whoever can connect can run programs as you: no other address without a firewall or TLS."""
    port: Annotated[int, arg(metavar="N", help_behavior_hint="(default: 8786)")] = 8786
    """The scheduler's port."""
    dashboard: Annotated[int, arg(metavar="N", help_behavior_hint="(default: 8787)")] = 8787
    """The dashboard's port."""
    device: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda, …"""

    def run(self) -> int:
        for option, port in {"--port": self.port, "--dashboard": self.dashboard}.items():
            require_free(port, f"choose another {option}")
        from ..experiments.clusters import LOCALHOST, local, threads
        from ..experiments.progress import counted

        over = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: over.set())
        with local(
            self.workers, device=self.device, host=self.host, port=self.port, dashboard=self.dashboard
        ) as client:
            address = client.scheduler.address  # type: ignore[union-attr]
            print(f"{counted(threads(client), 'worker')} at {address}, dashboard: {client.dashboard_link}")
            if self.host != LOCALHOST:
                print(f"whoever can connect to {self.host} can run programs as you: is it behind a firewall?")
            print(f"use it: lcnn sweep … --scheduler {address}    (end it: Ctrl-C)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                over.wait()
        return 0
