"""A Dask scheduler on this node and its workers as SLURM jobs: see README.md."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from pathlib import Path

from dask_jobqueue import SLURMCluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--host", required=True, help="this node's address in the network of the jobs, closed to others"
    )
    parser.add_argument("--jobs", type=int, default=1, help="at most; jobs come and go with the work there is")
    parser.add_argument("--scheduler-file", type=Path, default=Path("scheduler.json"))
    parser.add_argument("--show", action="store_true", help="print a job's script, and submit nothing")
    arguments = parser.parse_args()
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    options = {"host": arguments.host, "dashboard_address": "127.0.0.1:0"}
    with SLURMCluster(scheduler_options=options) as cluster:
        if arguments.show:
            print(cluster.job_script())
            return
        cluster.adapt(minimum=0, maximum=arguments.jobs)
        arguments.scheduler_file.write_text(json.dumps({"address": cluster.scheduler_address}))
        print(f"scheduler at {cluster.scheduler_address}, dashboard: {cluster.dashboard_link}", flush=True)
        over.wait()


if __name__ == "__main__":
    main()
