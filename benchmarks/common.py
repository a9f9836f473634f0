"""What the benchmarks share: contestants timed in turn, and results written with what produced them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from lcnn_utils.lab import write_text
from lcnn_utils.measurements.evaluate import provenance

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(contestants: dict[str, Callable[[], Any]], rounds: int, seconds: float = 15.0) -> dict[str, dict]:
    """Time every contestant once a round, each round starting with another one; the first contestant is the yardstick.

    A disturbance then hits neighbours in time alike, and the median over rounds of the ratio *within* a round forgets
    it. One call of each comes before, untimed. At least 3 rounds, fewer than asked for when ``seconds`` are over.

    Returns by name: ``seconds`` (median), ``ratio`` (median of its time over the yardstick's), its ``quartiles``.
    """
    names = list(contestants)
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(max(rounds, 3)):
        if turn >= 3 and time.perf_counter() > end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - start)
    result = {}
    for name in names:
        ratios = [own / yardstick for own, yardstick in zip(times[name], times[names[0]], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        quartiles = f"{low:.2f} – {high:.2f}"
        result[name] = {"seconds": median(times[name]), "ratio": middle, "quartiles": quartiles}
    return result


def cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def write(name: str, rows: list[dict], n: int, notes: list[str]) -> None:
    """Write ``results/<name>.json`` and ``.md``, each whole or not at all, and print the table.

    Args:
        rows: one dict a line of the table, all with the same keys; None is shown as a dash.
        n: what the numbers are over (samples, elements); the notes say which.
        notes: what a reader must know, a sentence or two each.
    """
    made = provenance(" ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])) | {"n": n}
    document = json.dumps({"provenance": made, "notes": notes, "rows": rows}, indent=1, ensure_ascii=False)
    facts = " · ".join(f"{key} {value}" for key, value in made.items() if key != "command")
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    table = "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
    text = f"# {name}\n\n`{made['command']}`: {facts}\n\n{table}\n\n" + "".join(f"- {note}\n" for note in notes)
    write_text(RESULTS / f"{name}.json", document + "\n")
    write_text(RESULTS / f"{name}.md", text)
    print(text)
