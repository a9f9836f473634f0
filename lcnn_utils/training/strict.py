"""JSON that somebody else may have written, and the record of a run in it: an error for whatever is not expected."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from .checkpoint import recipe_of
from .recipe import Recipe

MB = 1 << 20
JSON = 64 * MB  # bytes of a JSON file, at most
DIGITS = 18  # of a whole number
TEXT = 10_000  # characters of a text
PARTS = {"recipe", "metrics", "provenance", "history"}  # of a record
METRICS = {"accuracy", "grad_norm", "hessian_norm", "curvature", "margin_curvature"}  # that every record has
ABOUT = {"seconds", "device", "date", "torch"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with what a spreadsheet's formulas begin


def content(path: Path, limit: int = JSON) -> bytes:
    """The bytes of a file. ValueError: there are more than ``limit``."""
    with path.open("rb") as file:
        found = file.read(limit + 1)
    if len(found) > limit:
        raise ValueError(f"it is larger than {limit / MB:g} MB")
    return found


def require(fine: object, otherwise: str) -> None:
    """Raise a ValueError that says ``otherwise``, unless it is fine."""
    if not fine:
        raise ValueError(otherwise)


def loads(text: bytes | str) -> Any:
    """JSON in UTF-8, in which no key stands twice and no whole number has over 18 digits; NaN is let through.

    Raises:
        ValueError: it is none. RecursionError (a RuntimeError): it is nested too deeply.
    """
    text = text if isinstance(text, str) else text.decode("utf-8")
    return json.loads(text, object_pairs_hook=_table, parse_int=_whole)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one table")
    return found


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def is_number(value: object) -> bool:
    """Whether it is a finite int or float, and no bool."""
    return type(value) in (int, float) and -1e300 < value < 1e300  # type: ignore[operator]


def is_text(value: object) -> bool:
    """Whether it is a text that may be shown anywhere: not endless, printable, and no formula for a spreadsheet."""
    return isinstance(value, str) and len(value) <= TEXT and value.isprintable() and not value.startswith(FORMULA)


def plain(value: object) -> bool:
    """Whether a value of JSON holds such texts and numbers only, at any depth."""
    if isinstance(value, dict):
        return all(is_text(key) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or _scalar(value)


def _scalar(value: object) -> bool:
    return value is None or isinstance(value, bool) or is_number(value) or is_text(value)


def recipe(fields: object) -> Recipe:
    """The recipe of these fields. ValueError, TypeError: they are none."""
    if not isinstance(fields, dict) or not all(map(_scalar, fields.values())):
        raise ValueError("its recipe is no table of numbers and texts")
    return recipe_of(fields)


def history(rows: object) -> list[dict[str, float]]:
    """A history: a row of numbers an epoch, counted from 1; only ``curvature`` may be NaN. ValueError: it is none."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("its history is no list of tables")
    if not rows:
        raise ValueError("it has no history")
    if [row.get("epoch") for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError("the epochs of its history are not 1, 2, …")
    if not all(map(is_text, set().union(*rows))):
        raise ValueError("a name in its history is no text")
    for row in rows:
        for name, value in row.items():
            if type(value) not in (int, float) or not -1e300 < value < 1e300:  # is_number, but faster
                require(name == "curvature" and value != value, f"{name!r} in its history is {str(value)[:50]!r}")
    return rows


def record(text: bytes) -> tuple[Recipe, dict[str, Any]]:
    """The record of a finished run, as ``experiments.run`` writes it: its recipe, and all of it.

    Raises:
        one of ``state.DAMAGE``: it is none.
    """
    found = loads(text)
    if not isinstance(found, dict) or set(found) - {"sha256"} != PARTS:
        raise ValueError(f"it is no table of {', '.join(sorted(PARTS))}")
    one, metrics, about = recipe(found["recipe"]), found["metrics"], found["provenance"]
    if not isinstance(metrics, dict) or not isinstance(about, dict):
        raise ValueError("its parts are not tables")
    if missing := METRICS - set(metrics) or ABOUT - set(about):
        raise ValueError(f"{', '.join(sorted(missing))} is missing")
    for name, value in metrics.items():
        if not is_text(name) or not is_number(value) or name in {field.name for field in dataclasses.fields(Recipe)}:
            raise ValueError(f"the metric {name[:50]!r} is no number: {str(value)[:50]!r}")
    for name, value in about.items():
        fits = is_number if name in ("seconds", "threads", "seed") else is_text
        if not is_text(name) or not fits(value):
            raise ValueError(f"{name[:50]!r} in its provenance is of a wrong type: {str(value)[:50]!r}")
    datetime.date.fromisoformat(about["date"])
    if len(history(found["history"])) != one.epochs:
        raise ValueError(f"its history has {len(found['history'])} epochs, its recipe {one.epochs}")
    return one, found
