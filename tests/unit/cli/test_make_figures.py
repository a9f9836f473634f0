"""`lcnn figures`: each step makes what is listed, and all of it is described."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from lcnn_utils.cli import commands, figure_steps, make_figures
from lcnn_utils.cli.make_figures import Entry, entries, make, run, write_page
from lcnn_utils.files import PROJECT
from lcnn_utils.measurements import bound, curvature

FIGURE, TABLE = {"png", "svg", "json"}, {"csv", "md", "json"}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    backend = plt.get_backend()
    with matplotlib.rc_context():
        yield
    plt.close("all")
    plt.switch_backend(backend)


@pytest.fixture
def toys(monkeypatch):
    """Three steps; ``toys.ran`` lists those that ran."""
    toys = SimpleNamespace(ran=[])

    def first():
        toys.ran.append("first")
        yield "line", plt.figure(figsize=(1, 1)), {"dataset": "none", "seeds": [3], "n": 5, "source": "formulas"}

    def second():
        toys.ran.append("second")
        yield "numbers", pd.DataFrame({"β": [3], "share": ["1_000 & |more|"]}), {"source": "formulas"}
        yield "rest", pd.DataFrame({"a": [len(toys.ran)]}), {"source": os.environ["LCNN_STORE"]}

    def third():
        toys.ran.append("third")
        yield "last", pd.DataFrame({"a": [1]}), {"source": "formulas"}

    listed = {"line": "first", "numbers": "second", "rest": "second", "last": "third"}
    known = [Entry("Toys", step, name, name, "what is seen.", "what it says.") for name, step in listed.items()]
    monkeypatch.setattr(make_figures, "figure_steps", SimpleNamespace(first=first, second=second, third=third))
    monkeypatch.setattr(make_figures, "entries", lambda: known)
    return toys


def test_everything_is_written_and_shown(toys, tmp_path, monkeypatch):
    monkeypatch.setenv("LCNN_STORE", "mine")
    folder = tmp_path / "made" / "here"
    make(folder=folder)
    files = {"line": FIGURE, "numbers": TABLE, "rest": TABLE, "last": TABLE, "README": {"md"}}
    assert set(os.listdir(folder)) == {f"{name}.{end}" for name, ends in files.items() for end in ends}
    record = json.loads((folder / "line.json").read_text("utf-8"))
    assert (record["command"], record["step"], record["n"]) == ("lcnn figures --only line", "first", 5)
    assert json.loads((folder / "rest.json").read_text("utf-8"))["source"] != "mine", "a reader's runs are not used"
    page = (folder / "README.md").read_text("utf-8")
    assert "![what is seen.](line.png)\n\n*what it says.*" in page
    assert "`lcnn figures --only line` (none; n = 5; seeds [3]; formulas): [SVG](line.svg), [prov" in page
    assert "what is seen.\n\n| β | share |\n| --- | --- |\n| 3 | 1_000 & \\|more\\| |\n\n*what it says.*" in page


def test_only_runs_the_steps_that_make_it(toys, tmp_path):
    make(["last", "line"], tmp_path)
    assert toys.ran == ["first", "third"]
    assert "rest" not in (tmp_path / "README.md").read_text("utf-8"), "the page shows what is there"
    with pytest.raises(ValueError, match=r"did you mean 'numbers'"):
        make(["numbrs"], tmp_path)


def test_a_folder_that_cannot_be_written(toys, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert commands.main(["figures", "--out", str(tmp_path / "file" / "figures")]) == 1
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_readers_settings_do_not_matter(tmp_path):
    """LaTeX for all texts, which is rarely installed, other sizes, a backend that needs a screen; in a new process."""
    settings = tmp_path / "matplotlibrc"
    settings.write_text("text.usetex: True\nfont.size: 30\nbackend: TkAgg\naxes.facecolor: black\n")
    command = [sys.executable, "-m", "lcnn_utils", "figures", "--only", "train_test_curvature", "--out"]
    subprocess.run([*command, tmp_path / "theirs"], env=os.environ | {"MATPLOTLIBRC": str(settings)}, check=True)
    make(["train_test_curvature"], tmp_path / "ours")
    theirs, ours = ((tmp_path / name / "train_test_curvature.svg").read_bytes() for name in ("theirs", "ours"))
    assert theirs == ours


@pytest.fixture
def small_settings(monkeypatch):
    """Nets of width 2 and one epoch, few images, points and seeds."""

    def shrink(module, name, **options):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **given: whole(*args, **given | options))

    monkeypatch.setattr(figure_steps, "SEEDS", (0, 1))
    for module in (figure_steps, curvature, bound):
        tiny = lambda recipe, fit=module.fit_recipe, **_: fit(
            replace(recipe, width=2, epochs=1, batch_size=512), device="cpu"
        )
        monkeypatch.setattr(module, "fit_recipe", tiny)
    shrink(curvature, "moons_study", resolution=12)
    shrink(curvature, "digits_study", images=8)
    shrink(curvature, "convergence_frame", products=4)
    shrink(bound, "audit_frame", nets=range(6), points=2)
    shrink(bound, "certificate_study", images=8, steps=2, restarts=1)


@pytest.mark.slow
@pytest.mark.parametrize("step", dict.fromkeys(entry.step for entry in entries()))
def test_every_step_makes_what_is_listed(step, small_settings, tmp_path, monkeypatch):
    """Nothing is saved here: that is where a figure's time goes."""
    made = {}
    note = lambda _, name, provenance, folder: made.update({name: json.dumps(provenance)})
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    monkeypatch.setattr(make_figures, "save", note)
    monkeypatch.setattr(make_figures, "save_table", note)
    run(step, tmp_path)
    assert sorted(made) == sorted(entry.name for entry in entries() if entry.step == step)


def test_every_step_has_captions_that_fit_the_page():
    listed = entries()
    functions = vars(figure_steps).items()
    steps = {name for name, step in functions if getattr(step, "__annotations__", {}).get("return") == "Made"}
    assert {entry.step for entry in listed} == steps
    assert len({entry.name for entry in listed}) == len({entry.title for entry in listed}) == len(listed)
    for entry in listed:
        for text in (entry.title, entry.alt, entry.reading):
            assert text
            assert not re.search(r"[][\n*{}]|DATASET", text), f"{entry.name}: {text!r} would break the page"


def test_the_committed_page_shows_the_committed_figures(tmp_path):
    """Not that they are current: every change of code would then ask for new ones at once."""
    folder, names = PROJECT / "figures", [entry.name for entry in entries()]
    kinds = {name: {path.suffix[1:] for path in folder.glob(f"{name}.*")} for name in names}
    assert [name for name, kind in kinds.items() if kind not in (FIGURE, TABLE)] == [], "run `make figures`"
    assert {path.stem for path in folder.iterdir()} == {*names, "README"}
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "README.md").unlink()
    write_page(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (folder / "README.md").read_text("utf-8"), (
        "run `make figures`"
    )
