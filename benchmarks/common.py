"""What the benchmarks share: contestants timed in turn, and results written with what produced them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcnn_utils.files import write_text
from lcnn_utils.measurements.evaluate import provenance
from lcnn_utils.measurements.paper import timed_in_turn

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(contestants: dict[str, Callable[[], Any]], rounds: int, seconds: float = 15.0) -> dict[str, dict]:
    """Contestants timed in turn; the first one is the yardstick.

    Returns by name: ``seconds`` (median), ``ratio`` (median of its time over the yardstick's), its ``quartiles``.
    """
    times = timed_in_turn(contestants, rounds, seconds)
    ratios = times.div(times.iloc[:, 0], axis=0).quantile([0.25, 0.5, 0.75])
    result = {}
    for name, (low, middle, high) in ratios.items():
        result[name] = {"seconds": times[name].median(), "ratio": middle, "quartiles": f"{low:.2f} – {high:.2f}"}
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
