"""The rows of a part of a table (see ``tables``), which somebody else may have written: checked before use."""

from __future__ import annotations

import gzip
import io
import warnings
import zlib
from typing import BinaryIO

import pandas as pd

from ..training import strict

LIMIT = 1 << 30  # bytes of a part's rows, unpacked
KEYS = {  # of a kind of table: the columns that tell its rows apart, within a part
    "runs": ("label", "seed"),
    "geometry": ("label", "seed", "split", "image"),
    "curves": ("label", "seed", "norm", "eps"),
    "stability": ("label", "seed", "image", "method", "weights", "noise", "eps"),
    "masking": ("method", "check"),
    "lambda_search": ("lambda_", "seed"),
}
GEOMETRY = ("grad_norm", "hessian_norm", "curvature", "margin_curvature")
NUMBERS = {  # of a kind: the columns that hold numbers, at least
    "runs": ("seed", "accuracy", *GEOMETRY, "curvature_median", "images", "seconds", "epochs"),
    "geometry": ("seed", "image", *GEOMETRY),
    "curves": ("seed", "eps", "correct", "n", "accuracy"),
    "stability": ("seed", "image", "eps", "relative_change"),
    "masking": ("value",),
    "lambda_search": ("lambda_", "seed", "accuracy", "curvature", "margin_curvature"),
}
ALSO = {"runs": ("method",), "geometry": ("method",)}  # other columns that there must be
TEXTS = ("run", "sha256", "label", "method", "split", "norm", "noise", "weights", "check")  # columns read as they stand
DAMAGE = (OSError, EOFError, zlib.error, ValueError, RecursionError)


def kind(name: str) -> str:
    """``cifar10_tiny_runs`` → ``runs``; "" for a table of no known kind."""
    return next((known for known in KEYS if name.endswith(f"_{known}")), "")


def unzipped(file: BinaryIO) -> bytes:
    """The content of a gzip file. One of ``DAMAGE``: it is none, or larger than ``LIMIT``."""
    with gzip.open(file) as packed:
        text = packed.read(LIMIT + 1)
    if len(text) > LIMIT:
        raise ValueError(f"it unpacks to more than {LIMIT / strict.MB:g} MB")
    return text


def parsed(text: bytes, name: str) -> pd.DataFrame:
    """Rows, with all columns that their kind has, of the right types. ValueError: they are not so."""
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            frame = pd.read_csv(io.BytesIO(text), dtype=dict.fromkeys(TEXTS, str), index_col=False)
    except pd.errors.ParserWarning:
        raise ValueError("its rows have more cells than columns") from None
    needed = (*KEYS.get(kind(name), ()), *NUMBERS.get(kind(name), ()), *ALSO.get(kind(name), ()))
    if missing := set(needed) - set(frame.columns):
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for column, values in frame.items():
        if values.dtype.kind in "biuf":
            continue
        if column in NUMBERS.get(kind(name), ()) and len(frame):
            raise ValueError(f"not all of {column} is numbers")
        for value in values.dropna().unique():
            if not isinstance(value, bool) and not strict.is_text(value):
                raise ValueError(f"a {column} is {str(value)[:50]!r}")
    return frame


def checked(text: bytes, name: str) -> pd.DataFrame:
    """The rows of one part, each of which its keys tell from the others. ValueError: they don't, or as above."""
    frame, keys = parsed(text, name), list(KEYS.get(kind(name), ()))
    if keys and frame[keys].isna().any(axis=None):
        raise ValueError(f"a row of {name} has no {' or '.join(frame[keys].columns[frame[keys].isna().any()])}")
    if keys and (twice := frame.duplicated(keys)).any():
        raise ValueError(f"a row of {name} is there twice: {frame.loc[twice, keys].iloc[0].to_dict()}")
    return frame


def cells(text: bytes) -> pd.DataFrame:
    """Rows, each cell as it is written."""
    return pd.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False, index_col=False)


def joined(*frames: pd.DataFrame) -> bytes:
    """Rows of :func:`cells` below rows, as text; a column that only some have is empty in the others."""
    return pd.concat(frames).fillna("").to_csv(index=False).encode()
