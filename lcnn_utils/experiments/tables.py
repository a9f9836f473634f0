"""Tables of measurements on disk: a folder a table, a part a network, a row a measurement.

``NAME/PART.csv.gz`` holds rows, ``PART.json`` says what produced them. It is written last: a part without it is not
there. PART is ``RUN.WEIGHTS``, a run and the first 16 hex digits of the SHA-256 of its weights' file (columns ``run``
and ``sha256``), or ``all`` where a table isn't made net by net. A row is known by its part and the columns of
``rows.KEYS``. Where a run has parts of several weights a reader gets one: that which was measured last, of those of
one time that whose digits come last in the alphabet.
"""

from __future__ import annotations

import datetime
import fnmatch
import gzip
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from ..lab import atomic_path, write_text
from ..training import METHODS, strict
from ..training.checkpoint import locked
from .rows import DAMAGE, cells, checked, joined, parsed, unzipped

ALL = "all"
OF_A_PART = ("run", "runs", "weights", "seconds", "at", "rows_of")  # facts about one part, not about its table
WAY_OUT = "set LCNN_STORE to a folder of yours"
SHOWN = ("weights", "seconds", "date", "at", "torch", "cpu", "device")  # of a part, by ``about``


def names(folders: Sequence[Path]) -> list[str]:
    """The tables that are in these folders."""
    found = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if _stems(path)}
    return sorted(found)


def _stems(folder: Path) -> list[str]:
    there = os.listdir(folder) if folder.is_dir() else []
    return [name.removesuffix(".json") for name in there if name.endswith(".json") and not name.startswith(".")]


def parts(folders: Sequence[Path], name: str, runs: str = "*", *, every: bool = False) -> dict[str, Path]:
    """PART → its file of rows: of ``all`` first, then by dataset, method and seed.

    Args:
        folders: a part of the first one hides those of the same name in the others.
        runs: a run's name, or a pattern like ``digits-lcnn-seed?-*``; "" is the part ``all``.
        every: all parts of a run, not one of them.
    """
    found = {stem: folder / name / f"{stem}.csv.gz" for folder in reversed(folders) for stem in _stems(folder / name)}
    matches = re.compile(fnmatch.translate(runs)).match
    by_run: dict[str, list[str]] = {}
    for part in found:
        run = part.rpartition(".")[0]
        if matches(run):
            by_run.setdefault(run, []).append(part)
    chosen = []
    for _, several in sorted(by_run.items(), key=_place):
        if len(several) > 1:
            several.sort(key=lambda part: (_time(found[part]), part))
        chosen += several if every else several[-1:]
    return {part: found[part] for part in chosen}


def _place(item: tuple[str, list[str]]) -> tuple:
    dataset, method, seed = (*item[0].split("-"), "", "", "")[:3]
    return dataset, [*METHODS, method].index(method), int(seed[4:]) if seed[4:].isdecimal() else -1, item[0]


def _time(path: Path) -> str:
    facts = provenance(path)
    return str(facts.get("at") or facts.get("date", ""))


def read(folders: Sequence[Path], name: str, runs: str = "*", *, every: bool = False) -> pd.DataFrame:
    """The rows of the parts that :func:`parts` lists; no other file is opened.

    Raises:
        FileNotFoundError: there are none.
        RuntimeError: one is damaged.
    """
    texts = {path: unpacked(path) for path in parts(folders, name, runs, every=every).values()}
    if not texts:
        raise FileNotFoundError(f"no rows of {name!r}, runs {runs!r}, in {' or '.join(map(str, folders))}")
    alone = lambda text: (text.partition(b"\n")[0], text if b'"' in text else b"")  # quotes may hold line breaks
    frames = []
    try:  # parts with the same columns at once
        for (head, _), some in itertools.groupby(texts.values(), alone):
            frames.append(parsed(b"\n".join([head, *(text.partition(b"\n")[2] for text in some)]), name))
    except ValueError:
        for path, text in texts.items():
            with damage_of(path):
                parsed(text, name)
        raise
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def about(folders: Sequence[Path], name: str) -> dict[str, Any]:
    """What produced a table: the facts of its parts, all of them where they differ, and ``runs``: run → its own.

    Raises: as :func:`read`.
    """
    found = [provenance(path) for path in parts(folders, name).values()]
    if not found:
        raise FileNotFoundError(f"no table {name!r} in {' or '.join(map(str, folders))}")
    if len(found) == 1 and "run" not in found[0]:
        return found[0]
    together: dict[str, Any] = {}
    for key in dict.fromkeys(key for facts in found for key in facts if key not in OF_A_PART):
        values = list({json.dumps(facts[key]): facts[key] for facts in found if key in facts}.values())
        words = len(values) > 1 and all(isinstance(value, str) for value in values)
        together[key] = " and ".join(sorted(values)) if words else values[0] if len(values) == 1 else values
    own = {str(facts["run"]): {key: facts[key] for key in SHOWN if key in facts} for facts in found if "run" in facts}
    return together | {"runs": own}


def append(
    folder: Path, name: str, frame: pd.DataFrame, facts: Mapping[str, Any], *, run: str = "", weights: str = "",
    anew: bool = False,
) -> Path:  # fmt: skip
    """Write rows as a part, or add them to it if it is there: its file.

    Args:
        folder: of the tables. frame: the rows; of numbers five digits are kept. facts: what produced them, for JSON.
        run, weights: name the part; without them it is ``all``.
        anew: write over the part, if it is there.

    Raises:
        ValueError: a column is missing, a key is empty, or a row is there twice.
        OSError: the folder cannot be written.
    """
    path = folder / name / f"{f'{run}.{weights}' if run else ALL}.csv.gz"
    if run:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        frame, facts = frame.assign(run=run, sha256=weights), {**facts, "run": run, "weights": weights, "at": now}
    text = frame.to_csv(index=False, float_format="%.5g").encode()
    checked(text, name)
    with locked(path.parent, progress=False):
        if anew:
            record(path).unlink(missing_ok=True)
        elif record(path).exists():
            text, facts = joined(cells(unpacked(path)), cells(text)), grown(path, facts)
            checked(text, name)
        write(path, gzip.compress(text, mtime=0), facts)  # the same bytes each time
    return path


def record(path: Path) -> Path:
    """The file that says what produced a part's rows."""
    return path.with_name(path.name.removesuffix(".csv.gz") + ".json")


def write(path: Path, packed: bytes, facts: Mapping[str, Any]) -> None:
    """Write a part: the rows, packed with gzip, then the JSON about them, with which it is there.

    Raises:
        ValueError: the facts are nothing for JSON.
        OSError: the folder cannot be written.
    """
    text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if record(path).exists():  # it gets new rows: were it cut short here, merging again would bring them
        write_text(record(path), text, WAY_OUT)
    with atomic_path(path, WAY_OUT) as temporary:
        temporary.write_bytes(packed)
    write_text(record(path), text, WAY_OUT)


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into a RuntimeError that names it."""
    try:
        yield
    except DAMAGE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"{path} is damaged ({reason}): restore it with git, or delete it and measure anew"
        ) from None


def provenance(path: Path) -> dict[str, Any]:
    """What produced a part's rows. RuntimeError: its JSON is damaged."""
    with damage_of(record(path)):
        facts = strict.loads(strict.content(record(path)))
        if not isinstance(facts, dict) or not strict.plain(facts):
            raise ValueError("it is no table of numbers and texts")
    return facts


def grown(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What produced a part's rows, when rows come to it that ``facts`` tell of: those are in its ``rows_of``."""
    old = provenance(path)
    return old | {"rows_of": [*(one for one in old.get("rows_of", []) if one != facts), dict(facts)]}


def unpacked(path: Path) -> bytes:
    """The text of a part's rows. RuntimeError: it is damaged."""
    with damage_of(path), path.open("rb") as file:
        return unzipped(file)
