"""``lcnn grade``: what students hand in, and what their notebooks do to the machine."""

import json
from textwrap import indent

import pandas as pd
import psutil
import pytest

from lcnn_utils.cli.commands import main

IMPORT = "from lcnn_utils.exercises import softplus as check\nimport os, torch, subprocess"
RIGHT = "def my_beta_for_curvature(c):\n    return 4 * c"
WRONG = "def my_beta_for_curvature(c):\n    return c / 4"
STUB = "def my_beta_for_curvature(c):\n    ..."
LOUD = "class Loud:\n    def __repr__(self): return 'x' * 10**8\nLoud()"
LOOP = "while True:\n    try:\n        while True: pass\n    except: pass"
CHILD = "subprocess.Popen(['sleep', '4321'], start_new_session=True)"
SUBMITTED = {  # the cells: the results of the first three exercises, and what their messages say
    "Anna Müller/exercise 1.ipynb": (
        ["1/0", "assert not os.path.exists('made'); open('made', 'w')", WRONG, RIGHT + "\n1/0"],
        ["not tried", "not tried", "passed"],
        ["", "", "correct on"],
    ),
    "wrong.ipynb": (
        [
            "print('x' * 10**7)",
            LOUD,
            "1/0\nmy_centered_softplus = 1",
            "def my_derivatives(x:\n4",
            RIGHT,
            WRONG,
        ],
        ["tried"] * 3,
        ["ZeroDivisionError", "SyntaxError", "for c = 2.5"],
    ),
    "empty.ipynb": ([STUB, STUB], ["not tried"] * 3, ["", "", "not attempted"]),
    "exits.ipynb": ([RIGHT, "os._exit(0)"], ["not tried", "not tried", "passed"], ["died in code cell 3"] * 2 + [""]),
    "kills.ipynb": (
        [RIGHT, "os.kill(os.getppid(), 9)", LOOP],
        ["not tried", "not tried", "passed"],
        ["killed"] * 2 + [""],
    ),
    "loops.ipynb": (
        [CHILD, STUB.replace("    ...", indent(LOOP, "    "))],
        ["not tried", "not tried", "tried"],
        ["stopped"] * 3,
    ),
    "floods.ipynb": ([CHILD, "while True: print('x')", RIGHT], ["not tried"] * 3, ["stopped"] * 3),
}


def test_nothing_to_grade_is_said(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["grade", str(folder)]) == 1
        assert "no notebook" in capsys.readouterr().err


@pytest.mark.slow
def test_every_submission_gets_what_it_deserves(tmp_path, capsys):
    for name, (cells, _, _) in SUBMITTED.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        parts = [{"cell_type": "code", "source": source} for source in (IMPORT, *cells)]
        file.write_text(json.dumps({"cells": parts, "metadata": {}}), encoding="utf-8")
    copied = json.dumps({"cells": [], "metadata": {"lcnn": {"notebook": "01_softplus_and_beta"}}})
    (tmp_path / "copied.ipynb").write_text(copied, encoding="utf-8")
    (tmp_path / "broken.ipynb").write_text("{", encoding="utf-8")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "broken-checkpoint.ipynb").write_text("{", encoding="utf-8")
    assert main(["grade", str(tmp_path), "--seconds", "45", "--jobs", "4"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["grades.csv"], "and no unfinished one"
    assert (tmp_path / "grades.csv").read_bytes().startswith(b"\xef\xbb\xbf"), "which tells Excel that it is UTF-8"
    frame = pd.read_csv(tmp_path / "grades.csv", keep_default_na=False)
    files = dict(iter(frame.groupby("file")))
    for name, (_, results, messages) in SUBMITTED.items():
        rows = files.pop(name)
        assert set(rows.notebook) == {"01_softplus_and_beta"}
        rows = rows.set_index("exercise").loc[["centered_softplus", "derivatives", "beta_for_curvature"]]
        assert list(rows.result) == results, rows.to_string()
        assert all(part in text for part, text in zip(messages, rows.message, strict=True)), rows.to_string()
    assert set(files.pop("copied.ipynb").result) == {"not tried"}
    (broken,) = files.pop("broken.ipynb").itertuples()
    assert broken.result == "not tried"
    assert "read" in broken.message
    assert not files
    shown = capsys.readouterr().out
    assert "Anna Müller/exercise 1.ipynb: 1 passed, 0 tried, " in shown
    assert "01_softplus_and_beta, beta_for_curvature: 3 passed, 2 tried, 3 not tried of 8" in shown
    assert not [p for p in psutil.process_iter(["cmdline"]) if "4321" in (p.info["cmdline"] or ())], "none is left"
