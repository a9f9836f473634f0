"""Tables in parts: what is written is read, a row is there once, and nothing else is opened than what was asked for."""

import builtins
import gzip
import io
import json
import pickle
import re
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcnn_utils.experiments import published, rows, tables
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.lab import PROJECT
from lcnn_utils.training import METHODS, strict

WEIGHTS = "00112233445566ff"
FACTS = {"command": "python evaluate ε", "date": "2026-01-02", "n": 3}


def run_of(method: str = "lcnn", seed: int = 0, dataset: str = "digits") -> str:
    return f"{dataset}-{method}-seed{seed}-0123456789ab"


def curve(eps=(0.0, 0.1), accuracy: float = 0.5, **changes) -> pd.DataFrame:
    frame = pd.DataFrame({"label": "LCNN", "seed": 0, "norm": "l2", "eps": eps, "n": 100, "correct": 50})
    return frame.assign(accuracy=accuracy, **changes)


def add(folder: Path, frame=None, method: str = "lcnn", seed: int = 0, weights: str = WEIGHTS, **facts) -> Path:
    frame = curve(seed=seed) if frame is None else frame
    run = run_of(method, seed)
    return tables.append(folder, "digits_curves", frame, FACTS | facts, run=run, weights=weights)


# ---- written and read --------------------------------------------------------------------------------------------


def test_parts_come_back_in_the_order_of_methods_and_seeds(tmp_path):
    for method in reversed(METHODS):
        for seed in (10, 2, 0):
            add(tmp_path, curve(seed=seed, method=method), method, seed)
    found = tables.read((tmp_path,), "digits_curves")
    assert list(dict.fromkeys(found.method)) == list(METHODS)
    assert found[found.method == "cure"].seed.tolist() == [0, 0, 2, 2, 10, 10]
    assert list(found.columns) == [*curve(method="").columns, "run", "sha256"]
    assert tables.names((tmp_path, tmp_path / "none")) == ["digits_curves"]
    assert list(tables.about((tmp_path,), "digits_curves")["runs"]) == list(dict.fromkeys(found.run))
    assert set(tmp_path.iterdir()) == {tmp_path / "digits_curves", tmp_path / "locks"}


def test_only_what_is_asked_for_is_opened(tmp_path, monkeypatch):
    for method in ("lcnn", "lcnn_gradreg", "cure"):
        for seed in range(3):
            add(tmp_path, None, method, seed)
    opened, real = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or real(self, *a, **k))
    assert set(tables.read((tmp_path,), "digits_curves", "digits-lcnn-seed*").run) == {run_of(seed=s) for s in range(3)}
    assert len(opened) == 3
    assert all(name.startswith("digits-lcnn-seed") for name in opened)
    assert set(tables.read((tmp_path,), "digits_curves", run_of("cure", 1)).run) == {run_of("cure", 1)}
    assert len(opened) == 4
    with pytest.raises(FileNotFoundError, match=r"no rows of 'digits_curves', runs 'cifar\*'"):
        tables.read((tmp_path,), "digits_curves", "cifar*")


def test_all_is_a_part_without_a_run(tmp_path):
    tables.append(tmp_path, "digits_curves", curve(), FACTS)
    add(tmp_path, curve(eps=[0.3]))
    assert tables.read((tmp_path,), "digits_curves").run.isna().tolist() == [True, True, False]
    assert len(tables.read((tmp_path,), "digits_curves", "")) == 2
    assert len(tables.read((tmp_path,), "digits_curves", "digits-*")) == 1
    (path,) = (tmp_path / "digits_curves").glob("digits-*.json")
    own = {key: value for key, value in json.loads(path.read_text()).items() if key in ("weights", "date", "at")}
    assert own["weights"] == WEIGHTS
    assert tables.about((tmp_path,), "digits_curves") == FACTS | {"runs": {run_of(): own}}


def test_rows_that_came_later_have_facts_of_their_own(tmp_path):
    for eps, command in ((0.1, "one"), (0.2, "two"), (0.3, "three")):
        path = add(tmp_path, curve(eps=[eps]), command=command)
    facts = tables.provenance(path)
    assert (facts["command"], [later["command"] for later in facts["rows_of"]]) == ("one", ["two", "three"])
    assert "rows_of" not in tables.about((tmp_path,), "digits_curves")


def test_facts_that_differ_are_all_told(tmp_path):
    for seed, (cpu, n) in enumerate((("B", 3), ("A", 3), ("B", 5))):
        add(tmp_path, seed=seed, cpu=cpu, n=n)
    about = tables.about((tmp_path,), "digits_curves")
    assert (about["cpu"], about["n"], about["command"]) == ("A and B", [3, 5], FACTS["command"])
    assert [facts["cpu"] for facts in about["runs"].values()] == ["B", "A", "B"]


numbers = st.floats(allow_infinity=False, width=64) | st.integers(-(10**9), 10**9)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(numbers, min_size=1, max_size=6), cut=st.integers(0, 5))
def test_in_pieces_or_at_once_is_the_same(values, cut, tmp_path_factory):
    """Any numbers: to five digits, and the same whether one part or two, or appended to."""
    folder = tmp_path_factory.mktemp("tables")
    frame = curve(eps=np.arange(len(values)), accuracy=pd.Series(values, dtype=float), seed=0)
    text = frame.assign(run=run_of(), sha256=WEIGHTS).to_csv(index=False, float_format="%.5g")
    for piece in (frame[:cut], frame[cut:]):
        if len(piece):
            add(folder, piece)
    expected = pd.read_csv(io.StringIO(text), dtype={"sha256": str})
    pd.testing.assert_frame_equal(tables.read((folder,), "digits_curves"), expected)


def test_the_digits_of_a_hash_stay_a_text(tmp_path):
    for weights in ("0012345678901234", "1234567890123456", "12345678901234e5"):
        add(tmp_path, weights=weights)
    assert set(tables.read((tmp_path,), "digits_curves", every=True).sha256) == {
        "0012345678901234", "1234567890123456", "12345678901234e5"
    }  # fmt: skip


def test_types_do_not_depend_on_the_parts(tmp_path):
    """A part of whole numbers beside one with fractions, one with another column, one with quotes."""
    add(tmp_path, curve(eps=[0, 1]), seed=0)
    add(tmp_path, curve(eps=[0.5]), seed=1)
    add(tmp_path, curve(eps=[0.5], note='a "quoted", note'), seed=2)
    found = tables.read((tmp_path,), "digits_curves")
    assert found.eps.dtype == float
    assert found.eps.tolist() == [0, 1, 0.5, 0.5]
    assert found.note.isna().tolist() == [True, True, True, False]
    assert found.note.iloc[3] == 'a "quoted", note'


# ---- each row once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (curve(eps=[0.1, 0.1]), "a row of digits_curves is there twice: .*'eps': 0.1"),
        (curve(eps=[0.1, 0.1000001]), "is there twice"),  # to five digits
        (curve(eps=[0.1, np.nan]), "a row of digits_curves has no eps"),
        (curve(label=None), "has no label"),
        (curve().drop(columns=["norm", "n"]), "it lacks n, norm"),
        (curve(eps=["a", "b"]), "not all of eps is numbers"),
        (curve(label="=HYPERLINK(1)"), r"a label is '=HYPERLINK\(1\)'"),
        (curve(label="@SUM(1)"), "a label is"),
    ],
)
def test_append_refuses(tmp_path, frame, says):
    add(tmp_path, curve(eps=[0.7]))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=says):
        add(tmp_path, frame)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="is there twice"):
        add(tmp_path, curve(eps=[0.7], accuracy=0.1))
    add(tmp_path, curve(eps=[0.8]))
    assert tables.read((tmp_path,), "digits_curves").eps.tolist() == [0.7, 0.8]


@pytest.mark.parametrize("table", sorted({*tables.names((published.RESULTS,))}))
def test_the_keys_tell_the_stored_rows_apart(table):
    frame, keys = published.measured(table), [*rows.KEYS[rows.kind(table)]]
    assert not frame.duplicated([name for name in ("run", "sha256", *keys) if name in frame]).any()
    assert frame[keys].notna().all(axis=None)
    for path in tables.parts((published.RESULTS,), table, every=True).values():
        part = rows.checked(tables.unpacked(path), table)
        run, _, weights = path.name.removesuffix(".csv.gz").rpartition(".")
        assert not run or ({*part.run}, {*part.sha256}) == ({run}, {weights})


def test_of_several_weights_one_is_read(tmp_path, monkeypatch):
    """The one measured last; of those of one time, the last in the alphabet; every=True gives all."""
    for weights, date in (("b" * 16, "2026-01-03"), ("c" * 16, "2026-01-02"), ("a" * 16, "2026-01-03")):
        path = add(tmp_path, weights=weights, date=date)
        facts = tables.provenance(path)
        tables.record(path).write_text(json.dumps({key: value for key, value in facts.items() if key != "at"}))
    assert set(tables.read((tmp_path,), "digits_curves").sha256) == {"b" * 16}
    assert len(tables.read((tmp_path,), "digits_curves")) == 2
    assert len(tables.read((tmp_path,), "digits_curves", every=True)) == 6
    add(tmp_path, weights="0" * 16, date="2026-01-01")  # measured now
    assert set(tables.read((tmp_path,), "digits_curves").sha256) == {"0" * 16}
    assert tables.about((tmp_path,), "digits_curves")["runs"][run_of()]["weights"] == "0" * 16


def test_a_part_in_two_folders_counts_once(tmp_path, monkeypatch):
    here, store = tmp_path / "here", tmp_path / "store" / "results"
    add(here, curve(accuracy=0.1))
    add(store, curve(accuracy=0.9))
    add(store, seed=1)
    monkeypatch.setattr(published, "RESULTS", here)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
    assert published.measured("digits_curves").accuracy.tolist() == [0.1, 0.1, 0.5, 0.5]
    published.save_measured(curve(eps=[0.9]), "digits_curves", {})
    assert (store / "digits_curves" / "all.json").exists()
    assert len(published.measured("digits_curves")) == 5
    monkeypatch.setattr(published, "RESULTS", store)
    assert published.folders() == (store,)


def test_what_was_cut_short_is_not_there(tmp_path, monkeypatch):
    """The rows are written first; a part is there when its JSON is."""

    def refuse(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "write_text", refuse)
    with pytest.raises(KeyboardInterrupt):
        add(tmp_path, curve(accuracy=0.1))
    monkeypatch.undo()
    assert [path.suffix for path in (tmp_path / "digits_curves").iterdir()] == [".gz"]
    assert tables.names((tmp_path,)) == []
    add(tmp_path, curve(accuracy=0.2))
    assert tables.read((tmp_path,), "digits_curves").accuracy.tolist() == [0.2, 0.2]


# ---- hostile and damaged parts -----------------------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


def damaged(content: bytes, path: Path) -> dict[str, bytes]:
    text = gzip.decompress(content)
    head, first, *rest = text.splitlines()
    packed = lambda *lines: gzip.compress(b"\n".join(lines) + b"\n")
    return {
        "a pickle": pickle.dumps(Evil(path)),
        "a packed pickle": gzip.compress(pickle.dumps(Evil(path))),
        "cut": content[:-10],
        "empty": b"",
        "nothing packed": gzip.compress(b""),
        "a bit": content[:-20] + bytes([content[-20] ^ 4]) + content[-19:],
        "not packed": text,
        "an open quote": packed(head, b'"' + first, *rest),
        "cells too many": packed(head, first + b",1,2", *rest),
        "cells too many everywhere": packed(head, *(line + b",1" for line in (first, *rest))),
        "text for a number": packed(head, first.replace(b"0.5", b"__import__('os')"), *rest),
        "a formula": packed(head, first.replace(b"LCNN", b"=cmd|' /C calc'!A0"), *rest),
        "a terminal's codes": packed(head, first.replace(b"LCNN", b"\x1b[2J"), *rest),
        "no UTF-8": packed(head, first.replace(b"LCNN", b"\xff\xfe"), *rest),
        "another table": packed(b"a,b", b"1,2"),
        "a bomb": gzip.compress(text + b" " * 3_000_000),
    }


@pytest.mark.parametrize("what", damaged(gzip.compress(b"a\nb\n"), Path()))
def test_a_damaged_part_is_named(tmp_path, what, monkeypatch):
    monkeypatch.setattr(rows, "LIMIT", 1_000_000)
    add(tmp_path, seed=1)
    path, trap = add(tmp_path), tmp_path / "trap"
    path.write_bytes(damaged(path.read_bytes(), trap)[what])
    with pytest.raises(
        RuntimeError, match=rf"{re.escape(str(path))} is damaged \(.*\): restore it with git, or delete"
    ):
        tables.read((tmp_path,), "digits_curves")
    assert not trap.exists()
    assert len(tables.read((tmp_path,), "digits_curves", run_of(seed=1))) == 2, "the others are read"


def test_cells_without_a_column():
    """pandas would take the first column for names of the rows, and the others for the one before."""
    with pytest.raises(ValueError, match="more cells than columns"):
        rows.parsed(b"a,b\n1,2,3\n4,5,6\n", "table")


FACTS_DAMAGED = {
    "a pickle": pickle.dumps([1, 2]),
    "deep": b"[" * 100_000,
    "deep tables": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": b'{"n": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"n": NaN}',
    "infinite": b'{"n": 1e999}',
    "twice": b'{"n": 1, "n": 2}',
    "a list": b"[1]",
    "a formula": b'{"command": "=cmd()"}',
    "codes": b'{"command": "\\u001b[2J"}',
    "empty": b"",
}


@pytest.mark.parametrize("what", FACTS_DAMAGED)
def test_damaged_facts_are_named(tmp_path, what):
    path = add(tmp_path)
    tables.record(path).write_bytes(FACTS_DAMAGED[what])
    with pytest.raises(RuntimeError, match=rf"{re.escape(str(tables.record(path)))} is damaged"):
        tables.about((tmp_path,), "digits_curves")


def test_a_json_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(strict.content, "__defaults__", (1000,))
    path = add(tmp_path)
    tables.record(path).write_text('{"a": "' + "b" * 2000 + '"}')
    with pytest.raises(RuntimeError, match="it is larger than"):
        tables.about((tmp_path,), "digits_curves")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file"):
        add(tmp_path / "file")


# ---- duckdb ------------------------------------------------------------------------------------------------------


def queries() -> list[str]:
    """The queries that data/README.md shows, on the shipped runs and tables."""
    text = (PROJECT / "data" / "README.md").read_text(encoding="utf-8")
    return [query.strip() for query in re.findall(r"```sql\n(.*?)```", text, re.DOTALL)]


def test_duckdb_and_pandas_agree(monkeypatch):
    """The very queries of data/README.md, from the folder they are to be typed in."""
    monkeypatch.chdir(PROJECT / "data")
    by_method, counts, curves, runs = (duckdb.sql(query).df() for query in queries())
    frame = published.measured("digits_runs").groupby("method")[["accuracy", "curvature"]].mean()
    pd.testing.assert_frame_equal(by_method.set_index("method")[["accuracy", "curvature"]].sort_index(), frame,
                                  check_index_type=False, check_names=False, rtol=1e-12)  # fmt: skip
    assert counts.set_index("name").n.to_dict() == {
        name: len(tables.read((published.RESULTS,), name, every=True)) for name in tables.names((published.RESULTS,))
    }
    frame = tables.read((published.RESULTS,), "digits_curves", "*-lcnn-*")
    frame = frame[frame.norm == "l2"].groupby("eps").accuracy.mean()
    np.testing.assert_allclose(curves.set_index("eps").accuracy.sort_index(), frame, rtol=1e-12)
    frame = experiments.results((experiments.SHIPPED,))
    frame = frame.groupby(["dataset", "method"])[["accuracy", "curvature"]].agg(["size", "mean"])
    runs = runs.set_index(["dataset", "method"]).sort_index()
    assert runs.runs.tolist() == frame["accuracy", "size"].tolist()
    np.testing.assert_allclose(runs.accuracy, frame["accuracy", "mean"], rtol=1e-12)
    np.testing.assert_allclose(runs.curvature, frame["curvature", "mean"], rtol=1e-12)
