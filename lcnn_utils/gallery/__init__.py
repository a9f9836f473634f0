"""Every figure and table, made on a CPU without a network: ``make figures`` makes those whose sources have changed.

Each NAME.json carries the step that made it, a fingerprint of the step's code and data (:mod:`fingerprint`) and the
names of all that the step makes; nothing else is remembered, so that a fresh clone knows that its figures are current.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from matplotlib.figure import Figure
from tqdm import tqdm

from ..figures import style
from ..lab import one_thread, use_style
from . import page, records
from .captions import CAPTIONS
from .fingerprint import fingerprint as fingerprint_of
from .paper import PAPER_STEPS
from .steps import SEEDS as SEEDS
from .steps import STEPS as NOTEBOOK_STEPS
from .steps import Step

STEPS: tuple[Step, ...] = (*NOTEBOOK_STEPS, *PAPER_STEPS)


@dataclass(frozen=True)
class Report:
    """What :func:`make` did: files of each step made, steps that were current, files that no step makes (any more)."""

    made: dict[str, list[Path]] = field(default_factory=dict)
    current: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    page: list[Path] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """Every file written."""
        return [path for paths in self.made.values() for path in paths] + self.page


def make(
    folder: Path | None = None,
    progress: bool = True,
    *,
    everything: bool = False,
    only: Sequence[str] = (),
    say: Callable[[str], object] = tqdm.write,
) -> Report:
    """Make the figures and tables in ``folder`` (default ``figures/``) that are missing or out of date.

    A step that is done is recorded at once: what stops a later one, or Ctrl-C, loses nothing of it.

    Args:
        everything: make all of them anew.
        only: names of figures, tables or steps: make these steps, whatever their state, and no other.
        say: receives a line for each step that was made, and for what was not.

    Raises:
        ValueError: an unknown name in ``only`` (the nearest known one is suggested); two steps of one name; a name
            that two steps make.
        OSError: the folder cannot be written.
        Exception: whatever a step raises, which ends the work; a line says which step it was.
    """
    folder, report = folder or style.PROJECT / "figures", Report()
    prints = {step.__name__: fingerprint_of(step) for step in STEPS}  # now: an edit during the run counts for the next
    if len(prints) < len(STEPS):
        raise ValueError(f"two steps have one name: {', '.join(sorted(step.__name__ for step in STEPS))}")
    known = records.read(folder)
    asked = records.steps_of(only, known, list(prints))
    use_style()
    one_thread()
    with tempfile.TemporaryDirectory() as store, mock.patch.dict(os.environ, LCNN_STORE=store):  # nothing read back
        for step in (bar := tqdm([s for s in STEPS if not only or s.__name__ in asked], disable=not progress)):
            name = step.__name__
            bar.set_description(name)
            why = records.why_stale(folder, name, prints[name], known)
            if why is None and not everything and not only:
                report.current.append(name)
                continue
            started, taken = time.perf_counter(), records.owners(known, prints) | _makers(report)
            try:
                report.made[name] = _run(step, prints[name], folder, progress, taken)
            except BaseException:
                say(f"failed   {name}: it keeps no new file; what the steps before it made stays")
                raise
            made = sorted({path.stem for path in report.made[name]})
            say(f"made     {name} in {time.perf_counter() - started:.1f} s ({why or 'asked for'}): {', '.join(made)}")
    if not only:
        report.orphans.extend(records.orphans(folder, prints))
    report.page.extend(page.write(folder))
    for line in _summary(report, folder):
        say(line)
    return report


def make_all(folder: Path | None = None, progress: bool = True) -> list[Path]:
    """Make everything anew, without a word; returns the files. Errors as :func:`make`."""
    return make(folder, progress, everything=True, say=lambda _: None).files


def _run(step: Step, mark: str, folder: Path, progress: bool, taken: dict[str, str]) -> list[Path]:
    """Run a step and save all it makes; the records go first, as a save cut short must not look current."""
    made = list(step(progress))
    names = [name for name, _, _ in made]
    for name in names:
        if names.count(name) > 1 or taken.get(name, step.__name__) != step.__name__:
            raise ValueError(f"{name!r} is made twice, by {step.__name__} and {taken.get(name, step.__name__)}")
        if (path := folder / f"{name}.json").is_file():
            path.unlink()
    paths: list[Path] = []
    for name, what, about in made:
        ours = {"made_by": f"lcnn figures --only {name}", "step": step.__name__, "fingerprint": mark, "outputs": names}
        save: Callable[..., list[Path]] = style.save if isinstance(what, Figure) else style.save_table
        paths += save(what, name, ours | dict(about) | ours, folder)
    return paths


def _makers(report: Report) -> dict[str, str]:
    """Name → the step that has made it in this run."""
    return {path.stem: step for step, paths in report.made.items() for path in paths}


def _summary(report: Report, folder: Path) -> list[str]:
    bare = sorted({name for name in _makers(report) if name not in CAPTIONS})
    return [
        *([f"current  {', '.join(report.current)}"] if report.current else []),
        *([f"orphans  no step makes {', '.join(report.orphans)}: delete them"] if report.orphans else []),
        *([f"bare     no caption for {', '.join(bare)}: write it in lcnn_utils/gallery/captions*.py"] if bare else []),
        f"{len(report.files)} files written into {folder}" if report.files else "nothing to make",
    ]
