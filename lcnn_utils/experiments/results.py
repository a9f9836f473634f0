"""Tables of measurements: a tidy CSV file for each dataset, scale and kind, and a JSON file that says what produced it.
Shipped ones are in ``data/results``; new rows go into ``results`` of the store, and are read before shipped ones."""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from ..files import PROJECT, atomic_path, write_text
from ..lab import store_root
from ..training import METHODS, SCALES

RESULTS = PROJECT / "data" / "results"
BEST_FIRST = tuple(reversed(SCALES))
GEOMETRY = ("grad_norm", "hessian_norm", "curvature", "margin_curvature")
AS_WRITTEN: dict[str, Any] = {"dtype": str, "keep_default_na": False}  # a count must not become a float
OF_ONE_RUN = ("weights", "seconds", "at")  # facts that how_measured tells of single runs only


def plus_minus(mean: float, std: float) -> str:
    """Mean ± standard deviation: three significant digits of the larger one, the other to the same place.

    A single run has no standard deviation (NaN), and no ±; – is what was not measured."""
    if math.isnan(mean):
        return "–"
    size = abs(mean) if math.isnan(std) else max(abs(mean), std)
    places = max(0, 2 - math.floor(math.log10(size))) if size else 0
    return f"{mean:.{places}f}" if math.isnan(std) else f"{mean:.{places}f} ± {std:.{places}f}"


def with_interval(value: float, low: float, high: float) -> str:
    """A value and its interval, three significant digits each; without the interval where it is NaN, – without both."""
    if math.isnan(value):
        return "–"
    return f"{value:.3g}" if math.isnan(low) else f"{value:.3g} ({low:.3g} – {high:.3g})"


def best(name: str) -> str:
    """``DATASET_KIND`` → the table's name at the dataset's best scale: ``cifar10_curves`` → ``cifar10_small_curves``,
    which is that of the best ``_runs`` table with a Standard network in it: scales are never mixed."""
    dataset, _, kind = name.partition("_")
    for scale in BEST_FIRST if kind and not _files(name) else ():
        runs = f"{dataset}_{scale}_runs"
        if _files(runs) and "standard" in set(measured(runs).method):
            return f"{dataset}_{scale}_{kind}"
    return name


def has(name: str) -> bool:
    """Whether there is such a table; ``name`` as for :func:`measured`."""
    return bool(_files(best(name)))


def measured(name: str) -> pd.DataFrame:
    """A table of ours, by dataset, method and seed; ``lcnn evaluate`` makes it.

    Args:
        name: ``DATASET_KIND`` takes the best scale there is, ``DATASET_SCALE_KIND`` just that. Kinds: ``runs`` (a row
            per network), ``geometry`` (per image), ``curves`` (per ε), ``stability``, ``steps`` (of training),
            ``masking``, ``lambda_search``.

    FileNotFoundError: there is no such table (those there are get listed). RuntimeError: it is damaged.
    """
    text = {"sha256": str, "held": str}  # their digits are no number
    frames = [_read(path, dtype=text)[0] for path in _existing(name)]
    older, newer = frames[0], frames[-1]
    if len(frames) == 1 or "run" not in newer:
        return newer
    return _by_run(pd.concat([older[~older.run.isin(newer.run)], newer]))


def how_measured(name: str) -> dict[str, Any]:
    """What produced a table: command, hardware, versions, n, scale (a list where runs differ), and ``runs``: run → all
    about it. Arguments and errors as :func:`measured`."""
    facts: dict[str, dict[str, Any]] = {}
    for path in _existing(name):
        facts |= _read(path, nrows=0)[1]
    if "" in facts:
        return facts[""]
    together: dict[str, Any] = {"runs": facts}
    for key in {key: None for own in facts.values() for key in own if key not in OF_ONE_RUN}:
        values = list({json.dumps(own[key]): own[key] for own in facts.values() if key in own}.values())
        together[key] = values[0] if len(values) == 1 else values
    return together


def append(frame: pd.DataFrame, name: str, provenance: Mapping[str, Any]) -> Path:
    """Add runs to a table of the store, in place of all that it had of them: the table's file. Several processes may do
    so at the same time. RuntimeError: the table is damaged. OSError: it cannot be written, and stays as it was.

    Args:
        frame: with a column ``run``, else it replaces the whole table. Five digits of floats are kept; the columns
            ``dataset`` and ``scale`` are written as the name says.
        name: ``DATASET_SCALE_KIND`` in full, ``DATASET_KIND`` at the scale ``lab``.
        provenance: what produced these rows, for JSON.
    """
    rows = _placed(frame, name)
    new = pd.read_csv(io.StringIO(rows.to_csv(index=False, float_format="%.5g")), **AS_WRITTEN)
    facts = {run: dict(provenance) for run in (new.run.unique() if "run" in new else [""])}
    path = _path(store_root() / "results", name)
    path.parent.joinpath("locks").mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / "locks" / f"{name}.lock"):
        if "run" in new and path.exists():
            old, known = _read(path, **AS_WRITTEN)
            if "run" in old:  # masking's had none
                new, facts = pd.concat([old[~old.run.isin(new.run)], new]).fillna(""), known | facts
        first, *others = facts.values()
        common = {key: first[key] for key in first if all(key in own and own[key] == first[key] for own in others)}
        runs = {run: {key: own[key] for key in own if key not in common} for run, own in facts.items()}
        record = json.dumps({"common": common, "runs": runs}, indent=1, ensure_ascii=False, allow_nan=False)
        content = (_by_run(new) if "run" in new else new).to_csv(index=False).encode()
        with atomic_path(path) as temporary:
            temporary.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
            write_text(_record(path), record + "\n", "set LCNN_STORE to a folder of yours")
    return path


def _placed(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """``frame`` with the dataset and scale that a table's name tells, after the run."""
    dataset, _, kind = name.partition("_")
    second = kind.partition("_")[0]
    scale = second if second in SCALES else "lab"
    if not kind or dataset not in SCALES[scale]:
        raise ValueError(f"{name!r} names no table: write DATASET_SCALE_KIND, or DATASET_KIND at the scale lab")
    rows = frame.drop(columns=["dataset", "scale"], errors="ignore")
    position = list(rows.columns).index("run") + 1 if "run" in rows else 0
    rows.insert(position, "dataset", dataset)
    rows.insert(position + 1, "scale", scale)
    return rows


def _path(folder: Path, name: str) -> Path:
    return folder / (f"{name}.csv.gz" if name.endswith(("_geometry", "_stability")) else f"{name}.csv")


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name.partition('.')[0]}.json")


def _files(name: str) -> list[Path]:
    """The files of a table, the project's before the store's."""
    folders = dict.fromkeys((RESULTS, store_root() / "results"))
    return [path for folder in folders if (path := _path(folder, name)).exists()]


def _existing(name: str) -> list[Path]:
    if files := _files(best(name)):
        return files
    records = [*RESULTS.glob("[!.]*.json"), *(store_root() / "results").glob("[!.]*.json")]
    names = sorted({path.stem for path in records})
    raise FileNotFoundError(f"no results called {name!r} in data/results (there are: {', '.join(names) or 'none'})")


def _read(path: Path, **options: Any) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Rows, and run → what produced them; "" → what produced a table without runs."""
    try:
        facts = json.loads(_record(path).read_text(encoding="utf-8"))
        frame = _placed(pd.read_csv(path, **options), _record(path).stem)  # older tables do not name their place
        return frame, {run: facts["common"] | own for run, own in facts["runs"].items()}
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
        name = f"{path} (or {_record(path).name})"
        raise RuntimeError(f"{name} is damaged ({error}): restore it with git, or measure again without it") from None


def _by_run(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by method and seed of their run, ``DATASET-METHOD-seedN-HASH``; those of one run keep their order."""

    def place(run: str) -> tuple[int, int]:
        _, method, seed, _ = run.split("-")
        return list(METHODS).index(method), int(seed.removeprefix("seed"))

    order = {run: number for number, run in enumerate(sorted(frame.run.unique(), key=place))}
    return frame.sort_values("run", key=lambda runs: runs.map(order), kind="stable", ignore_index=True)
