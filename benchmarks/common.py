"""What the benchmarks share: contestants timed in turn, and results written with what produced them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from lcnn_utils.lab import write_text

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(contestants: dict[str, Callable[[], Any]], rounds: int, seconds: float = 15.0) -> dict[str, dict]:
    """Time every contestant once a round, each round starting with another one; the first contestant is the yardstick.

    A disturbance then hits neighbours in time alike, and the median over rounds of the ratio *within* a round forgets
    it. One call of each comes before, untimed.

    Returns:
        by name: ``seconds`` (median), ``ratio`` (median of its time over the yardstick's), ``low`` and ``high`` (its
        quartiles), ``best`` (ratio of the fastest times), ``rounds`` (fewer than asked for when ``seconds`` were over,
        never under 3).
    """
    names = list(contestants)
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(max(rounds, 3)):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - start)
    return {name: summary(times[name], times[names[0]]) for name in names}


def summary(times: list[float], yardstick: list[float]) -> dict:
    """Medians and quartiles of what was timed in the same rounds as the yardstick; see :func:`interleaved`."""
    ratios = [a / b for a, b in zip(times, yardstick, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    best = min(times) / min(yardstick)
    return {
        "seconds": median(times),
        "ratio": median(ratios),
        "low": low,
        "high": high,
        "best": best,
        "rounds": len(times),
    }


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def provenance(command: str, n: int, seed: int) -> dict:
    """What a number must carry to be repeated; neither host names nor paths."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "n": n,
        "seed": seed,
    }


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def table(rows: list[dict]) -> str:
    """Rows as a markdown table; the columns are the keys in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows])


def write(name: str, rows: list[dict], command: str, n: int, seed: int, notes: list[str]) -> None:
    """Write ``results/<name>.json`` and ``.md``, each whole or not at all, and print the table.

    Args:
        rows: one dict a line of the table; None is shown as a dash.
        n: what the numbers are over (samples, elements); the notes say which.
        notes: what a reader must know, a sentence or two each.
    """
    made = provenance(command, n, seed)
    document = json.dumps({"provenance": made, "notes": notes, "rows": rows}, indent=1, ensure_ascii=False)
    facts = " · ".join(f"{key} {value}" for key, value in made.items() if key != "command")
    text = f"# {name}\n\n`{command}`: {facts}\n\n{table(rows)}\n\n" + "".join(f"- {note}\n" for note in notes)
    write_text(RESULTS / f"{name}.json", document + "\n")
    write_text(RESULTS / f"{name}.md", text)
    print(text)
