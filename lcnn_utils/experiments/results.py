"""Tables of measurements: a tidy CSV file for each dataset, scale and kind, and a JSON file that says what produced it.

They lie in ``data/results`` (shipped) and in the folder ``results`` of the store (``LCNN_STORE``), where new rows go.
Of a run that is in both, the rows of the store are read.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from ..lab import PROJECT, atomic_path, store_root, write_text
from ..training import METHODS

RESULTS = PROJECT / "data" / "results"
SCALES = ("paper", "wide", "small", "tiny")  # of CIFAR's networks, the best first; digits have none in the name
GEOMETRY = ("grad_norm", "hessian_norm", "curvature", "margin_curvature")
COLUMNS = {  # last word of a name: the columns that tell the rows of one run apart, and the others that it must have
    "runs": (("label", "method", "seed"), ("accuracy", *GEOMETRY, "curvature_median", "images", "seconds", "epochs")),
    "geometry": (("label", "method", "seed", "split", "image"), GEOMETRY),
    "curves": (("label", "seed", "norm", "eps"), ("correct", "n", "accuracy")),
    "stability": (("label", "seed", "image", "method", "weights", "noise", "eps"), ("relative_change",)),
    "masking": (("method", "check"), ("value",)),
    "search": (("lambda_", "seed"), ("accuracy", "curvature", "margin_curvature")),
}
TEXTS = ("run", "sha256", "label", "method", "split", "norm", "noise", "weights", "check")  # the others are numbers
RANGES = {"accuracy": (0, 1), "eps": (0, float("inf")), "n": (1, float("inf")), "images": (1, float("inf"))}


def folders() -> tuple[Path, ...]:
    """Where tables are looked for: ``data/results`` of the project, then ``results`` of the store."""
    return tuple(dict.fromkeys((RESULTS, store_root() / "results")))


def best(name: str) -> str:
    """``DATASET_KIND`` → the table's name at the dataset's best scale: ``cifar10_curves`` → ``cifar10_tiny_curves``.

    The scale is that of the best ``_runs`` table with a Standard network in it: scales are never mixed.
    """
    dataset, _, kind = name.partition("_")
    for scale in SCALES if kind and not _files(name) else ():
        runs = f"{dataset}_{scale}_runs"
        if _files(runs) and "standard" in set(measured(runs).method):
            return f"{dataset}_{scale}_{kind}"
    return name


def has(name: str) -> bool:
    """Whether there is such a table; ``name`` as for :func:`measured`."""
    return bool(_files(best(name)))


def measured(name: str) -> pd.DataFrame:
    """A table of ours, by dataset, method and seed; ``python benchmarks/evaluate.py`` makes it.

    Args:
        name: ``DATASET_KIND`` takes the best scale there is, ``DATASET_SCALE_KIND`` just that. Kinds: ``runs`` (a row
            per network), ``geometry`` (per image), ``curves`` (per ε), ``stability``, ``masking``, ``lambda_search``.

    Raises:
        FileNotFoundError: there is no such table; the message lists those there are.
        RuntimeError: it is damaged.
    """
    frames: list[pd.DataFrame] = []
    for path in _existing(name):
        _, newer = _read(path)
        frames = [frame[~frame.run.isin(newer.run)] for frame in frames if "run" in newer]
        frames.append(newer)
    return frames[0] if len(frames) == 1 else _by_run(pd.concat(frames))


def how_measured(name: str) -> dict[str, Any]:
    """What produced a table: command, hardware, versions, n, scale (all of them where runs differ), and ``runs``: run
    → all about it. Arguments and errors as :func:`measured`."""
    facts: dict[str, dict[str, Any]] = {}
    for path in _existing(name):
        facts |= _facts(path)
    if "" in facts:
        return facts[""]
    together: dict[str, Any] = {}
    for key in dict.fromkeys(key for own in facts.values() for key in own):
        values = list({json.dumps(own[key]): own[key] for own in facts.values() if key in own}.values())
        texts = len(values) > 1 and all(isinstance(value, str) for value in values)
        together[key] = " and ".join(sorted(values)) if texts else values[0] if len(values) == 1 else values
    for key in ("weights", "seconds", "at", "added_to"):  # of single runs
        together.pop(key, None)
    return together | {"runs": {run: facts[run] for run in sorted(facts, key=_place)}}


def append(frame: pd.DataFrame, name: str, provenance: Mapping[str, Any]) -> Path:
    """Add rows to a table of the store: the table's file. Several processes may do so at the same time.

    New rows take the place of those with the same run and key columns, and of the run's rows with other weights.

    Args:
        frame: the columns in :data:`COLUMNS`, ``run`` and ``sha256``; without ``run`` it is the whole table, and
            replaces an older one. Five digits of floats are kept.
        name: ``DATASET_SCALE_KIND``, in full. provenance: what produced these rows, for JSON.

    Raises:
        ValueError: a column is missing, a row is there twice, or a number is none or out of range.
        RuntimeError: the table in the store is damaged.
        OSError: the store cannot be written; the table stays as it was.
    """
    path = _path(store_root() / "results", name)
    text = frame.to_csv(index=False, float_format="%.5g").encode()
    _parsed(text, name)
    new, facts = _cells(text), {"": dict(provenance)}
    path.parent.joinpath("locks").mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / "locks" / f"{name}.lock"):
        if "run" in new:
            old, facts = (_cells(_read(path)[0]), _facts(path)) if path.exists() else (new[:0], {})
            keys = ["run", *_columns(name)[0]]
            replaced = pd.MultiIndex.from_frame(old[keys]).isin(pd.MultiIndex.from_frame(new[keys]))
            other_weights = old.run.isin(new.run) & ~old.sha256.isin(new.sha256)
            old = old[~replaced & ~other_weights]
            for run in new.run.unique():
                facts[run] = {**provenance, "added_to": facts[run]} if run in set(old.run) else dict(provenance)
            new = _by_run(pd.concat([old, new]).fillna(""))
        _write(path, new, facts)
    return path


def _write(path: Path, cells: pd.DataFrame, facts: dict[str, dict[str, Any]]) -> None:
    """Write a table and the JSON about it, in which what all runs have in common stands once."""
    first, *others = facts.values()
    common = {key: first[key] for key in first if all(key in own and own[key] == first[key] for own in others)}
    runs = {run: {key: facts[run][key] for key in facts[run] if key not in common} for run in sorted(facts, key=_place)}
    record = json.dumps({"common": common, "runs": runs}, indent=1, ensure_ascii=False, allow_nan=False)
    text = cells.to_csv(index=False).encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
        write_text(_record(path), record + "\n", "set LCNN_STORE to a folder of yours")


def _path(folder: Path, name: str) -> Path:
    return folder / (f"{name}.csv.gz" if name.endswith(("_geometry", "_stability")) else f"{name}.csv")


def _columns(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return COLUMNS.get(name.rpartition("_")[2], ((), ()))


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name.partition('.')[0]}.json")


def _files(name: str) -> list[Path]:
    return [path for folder in folders() if (path := _path(folder, name)).exists()]


def _existing(name: str) -> list[Path]:
    if files := _files(best(name)):
        return files
    there = sorted({_record(path).stem for folder in folders() for path in folder.glob("[!.]*.csv*")})
    raise FileNotFoundError(f"no results called {name!r} in data/results (there are: {', '.join(there) or 'none'})")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"{path} is damaged ({reason}): restore it with git, or measure again without it") from None


def _read(path: Path) -> tuple[bytes, pd.DataFrame]:
    """A table as it is written, and its rows."""
    with _damage(path):
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if not text.endswith(b"\n"):
            raise ValueError("its last line is cut off")
        return text, _parsed(text, _record(path).stem)


def _facts(path: Path) -> dict[str, dict[str, Any]]:
    """Run → what produced its rows; "" → what produced a table without runs."""
    with _damage(_record(path)):
        facts = json.loads(_record(path).read_text(encoding="utf-8"))
        return {run: facts["common"] | own for run, own in facts["runs"].items()}


def _cells(text: bytes) -> pd.DataFrame:
    """Rows, each cell as it is written."""
    return pd.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False)


def _parsed(text: bytes, name: str) -> pd.DataFrame:
    """Rows, of the right types. ValueError: a column is missing, a row is there twice, a number is none or wrong."""
    frame = pd.read_csv(io.BytesIO(text), dtype=dict.fromkeys(TEXTS, str))
    keys, others = _columns(name)
    if missing := {*keys, *others, *(["sha256"] if "run" in frame else [])} - set(frame.columns):
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for column in {*keys, *others}.difference(TEXTS):
        values = pd.to_numeric(frame[column])  # ValueError: not all are numbers
        low, high = RANGES.get(column, (values.min(), values.max()))
        if len(wrong := values[(values < low) | (values > high)]):
            raise ValueError(f"{column} is {wrong.iloc[0]:g}, not from {low} to {high}")
    rows = frame[[column for column in ("run", *keys) if column in frame]]
    if rows.isna().to_numpy().any():
        raise ValueError(f"a row lacks {' or '.join(rows.columns)}")
    if keys and rows.duplicated().any():
        raise ValueError(f"a row is there twice: {rows[rows.duplicated()].iloc[0].to_dict()}")
    return frame


def _place(run: str) -> tuple:
    """Where a run stands: by dataset, method and seed."""
    dataset, method, seed = (*run.split("-"), "", "", "")[:3]
    return dataset, [*METHODS, method].index(method), len(seed), seed, run


def _by_run(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by dataset, method and seed of their run; those of one run keep their order."""
    order = {run: place for place, run in enumerate(sorted(frame.run.unique(), key=_place))}
    return frame.sort_values("run", key=lambda runs: runs.map(order), kind="stable", ignore_index=True)
