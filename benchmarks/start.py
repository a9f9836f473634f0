"""What ``import lcnn_utils`` and all its rooms add to ``import torch``, in new processes."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from common import interleaved, write

ROOMS = "nn, data, curvature, attacks, saliency, training, experiments, measurements, figures, widgets, exercises"
STARTS = {
    "import torch": "import torch",
    "import torch, lcnn_utils": "import torch, lcnn_utils",
    "… and all rooms": f"import torch; from lcnn_utils import {ROOMS}",
}


def start(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    times = interleaved({name: partial(start, code) for name, code in STARTS.items()}, rounds=9, seconds=60)
    rows = [{"what": name, "time / import torch": t["ratio"], "quartiles": t["quartiles"]} for name, t in times.items()]
    notes = [f"Whole processes, in turn. Rooms: {ROOMS}; a room's time has its libraries in it."]
    write("start", rows, 9, notes)


if __name__ == "__main__":
    main()
