"""The command ``lcnn merge``: what another store has and this one lacks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Merge:
    """Add the runs and measurements of another store to this one. What is here stays as it is.

    FROM is a folder with runs/ or results/ in it: somebody's LCNN_STORE, or the data/ of another clone (of which
    checkpoints/ are left: they belong to the project). Finished runs, unfinished trainings that are further along, and
    rows of results that are missing here are added; a run that is being trained here is left for the next time.
    Everything is checked first; what is damaged is named, and the exit status is then 1.

    For instance,

    lcnn merge /media/stick/store

    lcnn merge ../other-clone/data --into /scratch/store
    """

    source: Annotated[Positional[Path], arg(metavar="FROM", help_behavior_hint="")]
    """The other store."""
    into: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: LCNN_STORE, else data/)")] = None
    """The store to add to."""

    def run(self) -> int:
        from ..experiments.merge import merge
        from ..lab import store_root

        into = self.into.expanduser() if self.into else store_root()
        report = merge(self.source.expanduser(), into)
        print(f"runs: {counts(report.runs)}\nparts of tables: {counts(report.parts)}")
        for name in report.busy:
            print(f"left, as it is being trained here: {name}")
        for path, reason in report.left_out.items():
            print("".join(c if c.isprintable() else "?" for c in f"left out: {path} ({reason})"))  # no terminal's codes
        return 1 if report.left_out else 0


def counts(found: Counter[str]) -> str:
    """``3 new, 1 already here``."""
    return ", ".join(f"{number} {what}" for what, number in found.items()) or "none"
