"""What the NAME.json files of a folder say of the steps: which are out of date, and which files nobody makes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures.style import FIGURE, TABLE
from ..lab import check_choice

Records = dict[str, dict[str, Any]]  # name of a figure or table → its NAME.json


def read(folder: Path) -> Records:
    """The records of a folder. One that is damaged counts as none: its step is out of date, and makes it anew."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # not JSON, or not UTF-8
            continue
        if isinstance(record, dict):
            found[path.stem] = record
    return found


def why_stale(folder: Path, step: str, fingerprint: str, records: Records) -> str | None:
    """Why a step must run: one of its files is missing, or its code or data changed; None if it need not."""
    mine = {name: record for name, record in records.items() if record.get("step") == step}
    current = [name for name, record in mine.items() if record.get("fingerprint") == fingerprint]
    if not current:
        return "its code or data changed" if mine else "never made"
    names = records[current[0]].get("outputs", [])
    missing = [name for name in names if name not in current or not complete(folder, name)]
    return f"missing: {', '.join(missing)}" if missing else None


def complete(folder: Path, name: str) -> bool:
    """Whether all files of a figure, or of a table, are there."""
    return any(all((folder / f"{name}{end}").is_file() for end in kind) for kind in (FIGURE, TABLE))


def steps_of(asked: Sequence[str], records: Records, steps: Sequence[str]) -> set[str]:
    """The steps that make what is asked for: names of figures and tables made once, or of steps.

    Raises:
        ValueError: an unknown name.
    """
    known = {name: r["step"] for name, r in records.items() if r.get("step") in steps} | {s: s for s in steps}
    return {known[check_choice(name, tuple(known), "figure, table or step")] for name in asked}


def orphans(folder: Path, fingerprints: Mapping[str, str]) -> list[str]:
    """Files of the folder that no step makes (any more), when all steps (name → fingerprint) are current."""
    made = {f"{name}{end}" for name in owners(read(folder), fingerprints) for end in (*FIGURE, *TABLE, ".json")}
    files = (path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(name for name in files if name not in made and name != "README.md")


def owners(records: Records, fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Name → the step that makes it, of those whose record is current."""
    made = {name: r["step"] for name, r in records.items() if r.get("step") in fingerprints}
    return {name: step for name, step in made.items() if records[name].get("fingerprint") == fingerprints[step]}
