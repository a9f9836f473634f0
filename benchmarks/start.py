"""What ``import lcnn_utils`` adds to ``import torch``, and how long an explorer takes to redraw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median, quantiles

from common import summary, write

IMPORTS, REDRAWS = 15.0, 8.0  # seconds
ROOMS = ["lipschitz", "data", "models", "curvature", "training", "figures", "studies", "explorers", "exercises"]
STARTS = {
    "import torch, lcnn_utils": ["import torch", "import lcnn_utils"],
    "torch, lcnn_utils, all rooms": ["import torch", "import lcnn_utils", *(f"import lcnn_utils.{r}" for r in ROOMS)],
}
CHILD = """
import json, sys, time
times = []
for statement in json.loads(sys.argv[1]):
    start = time.perf_counter()
    exec(statement)
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""


def child(statements: list[str]) -> list[float]:
    """Seconds of each statement, run one after the other in a new Python."""
    command = [sys.executable, "-c", CHILD, json.dumps(statements)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def import_rows() -> list[dict]:
    found: dict[str, list[list[float]]] = {name: [] for name in STARTS}
    child(STARTS["torch, lcnn_utils, all rooms"])  # fills the disk cache and __pycache__
    names, end, turn = list(STARTS), time.perf_counter() + IMPORTS, 0
    while turn < 3 or (turn < 9 and time.perf_counter() < end):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(child(STARTS[name]))
        turn += 1
    rows = []
    for name, runs in found.items():
        total = summary([sum(times) for times in runs], [times[0] for times in runs])
        added = median(sum(times[1:]) for times in runs)
        facts = {"ms": total["seconds"] * 1e3, "added to torch, ms": added * 1e3, "time / import torch": total["ratio"]}
        rows.append({"what": name, **facts, "n": turn})
    for i, room in enumerate(ROOMS):
        cost = median(times[2 + i] for times in found["torch, lcnn_utils, all rooms"])
        rows.append({"what": f"room {room}, after those above", "added to torch, ms": cost * 1e3})
    return rows


def redraw_rows() -> list[dict]:
    """Each control moved to and fro between its ends, in this process: from the new value to the new PNG."""
    from ipywidgets import Dropdown, FloatLogSlider

    from lcnn_utils import explorers
    from lcnn_utils.measurements import moons_recipe
    from lcnn_utils.training import fit, samples

    recipes = {method: moons_recipe(method, epochs=10) for method in ("standard", "lcnn")}
    models = {method: fit(recipe, device="cpu", progress=False)[0] for method, recipe in recipes.items()}
    makers = {
        "beta_explorer": explorers.beta_explorer,
        "moons_explorer": lambda: explorers.moons_explorer(models, *samples(recipes["lcnn"], "test")),
    }
    rows = []
    for name, make in makers.items():
        first = len(explorers.CONTROLS)
        shown = make()  # held until its controls have been moved
        for control, image in explorers.CONTROLS[first:]:
            if isinstance(control, Dropdown):
                values = list(control.options)
            else:
                low, high = control.min, control.max
                values = [low + (high - low) * k / 20 for k in range(21)]
                values = [10**v for v in values] if isinstance(control, FloatLogSlider) else sorted({*map(int, values)})
            times, changed, end = [], 0, time.perf_counter() + REDRAWS / 5
            for k in range(60):
                if k >= 8 and time.perf_counter() > end:
                    break
                before, wanted = image.value, values[k % len(values)]
                if wanted == control.value:
                    continue
                start = time.perf_counter()
                control.value = wanted
                times.append(time.perf_counter() - start)
                changed += image.value != before
            assert changed > len(times) / 2, f"{name}: {control.description} does not change the picture"
            worst = quantiles(times, n=20, method="inclusive")[-1]
            what = f"redraw {name}, {control.description}"
            rows.append({"what": what, "ms": median(times) * 1e3, "95 % ms": worst * 1e3, "n": len(times)})
        shown.close()
    return rows


def main() -> None:
    begin, rows = time.perf_counter(), import_rows()
    with tempfile.TemporaryDirectory() as store:
        os.environ["LCNN_STORE"] = store
        rows += redraw_rows()
    notes = [
        "Imports: new processes in turn, medians; `added` is what the same process spent after torch. The package's "
        "rooms load when first used, so `import lcnn_utils` alone loads none; a room's time has its libraries in it.",
        "Redraws: a new value of the control to the new PNG, in this process; the browser's part comes on top. "
        "Median over the whole range of a control, both ends included.",
        f"The whole script took {time.perf_counter() - begin:.0f} s.",
    ]
    write("start", rows, "python benchmarks/start.py", len(rows), 0, notes)


if __name__ == "__main__":
    main()
