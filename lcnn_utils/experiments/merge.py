"""Merging stores: runs and measurements of another one are added to ours, and what is here stays as it is.

All that comes from outside is checked before it is written, a file's name is never taken from a file's content, and
nothing is executed: weights are safetensors, the rest is JSON and CSV. Where both stores have finished a run with other
numbers, or measured a row with other values, ours are kept.
"""

from __future__ import annotations

import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..lab import atomic_path
from ..training import run_name, strict
from ..training.checkpoint import DAMAGE, Damaged, locked, reached
from ..training.inspection import inspected
from ..training.strict import require
from . import rows, tables

RUN = r"[a-z0-9]+-[a-z0-9_]+-seed[0-9]{1,18}-[0-9a-f]{12}"
STATE = 1 << 32  # bytes of a state, at most
NEW, HERE, FURTHER, OTHER = "new", "already here", "further along", "here with other numbers (ours kept)"
BUSY, GROWN = "left, as it is being trained here", "with rows that were missing"


@dataclass
class Report:
    """How many runs and parts of tables were what; runs being trained here; what was left out: file → reason."""

    runs: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    busy: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def merge(source: Path, into: Path) -> Report:
    """Add what the store ``into`` lacks of the store ``source``: of the folders ``runs`` and ``results`` of both.

    Interrupted, and called again, it goes on. Links that lead out of ``source`` are not followed.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no store, or the one to merge into.
        OSError: ``into`` cannot be written.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source}: name the one that holds a store's runs/ or results/")
    if not any((source / name).is_dir() for name in ("runs", "results")):
        raise ValueError(f"{source} is no store: it has neither runs/ nor results/")
    if source.resolve() == into.resolve():
        raise ValueError(f"{source} is the store to merge into: name another one")
    root, report = source.resolve(), Report()
    for name, files in _files(source / "runs", ".json", ".safetensors"):
        with _noted(report, source / "runs" / name):
            record, state = _content(files, ".json", root, strict.JSON), _content(files, ".safetensors", root, STATE)
            found = take_run(name, record, state, into / "runs")
            report.runs[found] += 1
            report.busy += [name] * (found == BUSY)
    for folder in sorted(source.glob("results/*/")):
        for part, files in _files(folder, ".json", ".csv.gz"):
            with _noted(report, folder / part):
                if (facts := _content(files, ".json", root, strict.JSON)) is not None:  # else it was cut short
                    packed = _content(files, ".csv.gz", root, rows.LIMIT)
                    report.parts.update(take_part(folder.name, part, packed or b"", facts, into / "results"))
    return report


def take_run(name: str, record: bytes | None, state: bytes | None, into: Path) -> str:
    """Add a run that somebody else made to a folder of runs: what was done, as :class:`Report` counts it.

    Args:
        name: of the run. record, state: the content of its JSON and of its safetensors; None where there is none.
            Of two unfinished trainings the one with more epochs stays; one with a record is never written over.

    Raises:
        one of ``state.DAMAGE``: they are not what they should be, or don't belong together; nothing is written. Or the
            run's own files here are damaged (``state.Damaged``).
        OSError: the folder cannot be written.
    """
    theirs, epochs = None, 0
    if record is not None:
        one, theirs = strict.record(record)
        require(run_name(one) == name, f"it is the record of another run, {run_name(one)}")
    if state is not None:
        one, epochs = inspected(state)
        require(run_name(one) == name, f"it is the state of another run, {run_name(one)}")
    require(re.fullmatch(RUN, name) and (record or state), f"{name!r} is no run")
    path = into / f"{name}.safetensors"
    with locked(path, progress=False):
        return _add(path, record, theirs and theirs["metrics"], state, epochs)


def _add(path: Path, record: bytes | None, metrics: dict | None, state: bytes | None, epochs: int) -> str:
    done, ours = _epochs(path), path.with_suffix(".json")
    finished = ours.exists()
    if finished and metrics is not None and _metrics(ours) != metrics:
        return OTHER
    if (finished and metrics is None) or (epochs <= done and (finished or metrics is None)):
        return HERE
    if state is not None and epochs >= done:  # first the state, then the record, whose weights it holds
        _write(path, state)
    if record is not None and not finished:
        _write(ours, record)
    return FURTHER if finished or done else NEW


def _write(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _epochs(path: Path) -> int:
    try:
        return reached(path)[0] if path.exists() else 0
    except DAMAGE as error:
        raise Damaged(path, error, "delete it to train anew") from None


def _metrics(path: Path) -> dict[str, float]:
    try:
        return strict.record(strict.content(path))[1]["metrics"]
    except DAMAGE as error:
        raise Damaged(path, error, "delete it, and it is made anew") from None


def take_part(table: str, part: str, packed: bytes, facts: bytes, into: Path) -> tuple[str, ...]:
    """Add a part of a table that somebody else made to a folder of tables: what was done, as :class:`Report` counts it.

    Args:
        packed, facts: the content of its CSV, packed with gzip, and of its JSON.

    Raises:
        one of ``state.DAMAGE``: they are not what they should be, or ours is damaged; nothing is written.
        OSError: the folder cannot be written.
    """
    require(re.fullmatch(r"[a-z0-9_]+", table) and rows.kind(table), f"{table!r} is no table of a known kind")
    require(re.fullmatch(rf"{tables.ALL}|{RUN}\.[0-9a-f]{{16}}", part), f"{part!r} is no part's name")
    path = into / table / f"{part}.csv.gz"
    if tables.record(path).exists() and path.exists() and path.read_bytes() == packed:
        return (HERE,)  # the usual case, in a tenth of the time
    try:
        text = rows.unzipped(io.BytesIO(packed))
    except rows.DAMAGE as error:  # some of which are OSErrors
        raise ValueError(str(error)) from None
    frame, about, keys = rows.checked(text, table), strict.loads(facts), list(rows.KEYS[rows.kind(table)])
    require(isinstance(about, dict) and strict.plain(about), "its JSON is no table of numbers and texts")
    run, _, weights = part.rpartition(".")
    if run:
        require((about["run"], about["weights"]) == (run, weights), "its JSON is about another part")
        require({*frame.run} <= {run} and {*frame.sha256} <= {weights}, "its rows are of another part")
    with locked(path.parent, progress=False):
        if not tables.record(path).exists():
            tables.write(path, packed, about)
            return (NEW,)
        mine = tables.unpacked(path)
        if mine == text:
            return (HERE,)
        with tables.damage_of(path):
            here = rows.checked(mine, table)
        alike = {
            key: float for key in keys if key in rows.NUMBERS[rows.kind(table)]
        }  # 0 in one may be 0.0 in the other
        both = frame[keys].astype(alike).merge(here.astype(alike), on=keys, how="left", indicator=True)
        missing = (both.pop("_merge") == "left_only").to_numpy()
        same = [name for name in both.columns if name in frame and name not in keys]
        other = ((both[same] != frame[same]) & ~(both[same].isna() & frame[same].isna())).any(axis=1) & ~missing
        if missing.any():
            more = rows.joined(rows.cells(mine), rows.cells(text)[missing])
            tables.write(path, gzip.compress(more, mtime=0), tables.grown(path, about))
        return (GROWN,) * bool(missing.any()) + (OTHER,) * bool(other.any()) or (HERE,)


def _files(folder: Path, *ends: str) -> list[tuple[str, dict[str, Path]]]:
    """The files of a folder with these ends, hidden ones left out: what stands before → end → path."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        for end in ends:
            if path.name.endswith(end) and not path.name.startswith("."):
                found.setdefault(path.name.removesuffix(end), {})[end] = path
    return [*found.items()]


def _content(files: dict[str, Path], end: str, root: Path, limit: int) -> bytes | None:
    """What is in a file. ValueError: it is out of ``root``, no ordinary file, too large, or can't be read."""
    if end not in files:
        return None
    path = files[end]
    require(path.resolve().is_relative_to(root), f"{path.name} is a link that leads out of {root}")
    require(path.is_file(), f"{path.name} is no file")
    try:
        return strict.content(path, limit)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None


@contextmanager
def _noted(report: Report, path: Path) -> Iterator[None]:
    """Note what is wrong with files from outside, and go on; what is wrong with ours is an OSError, which ends all."""
    try:
        yield
    except DAMAGE as error:
        report.left_out[str(path)] = (str(error).strip() or type(error).__name__).splitlines()[0]
