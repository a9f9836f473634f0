"""`lcnn figures`: all steps are run whatever becomes of one, each makes what is listed, and all of it is described."""

import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from lcnn_utils import studies
from lcnn_utils.cli import commands, figure_steps, make_figures
from lcnn_utils.cli.make_figures import Entry, entries, make, page
from lcnn_utils.figures import style
from lcnn_utils.lab import PROJECT
from lcnn_utils.measurements import bound as bound_studies

FIGURE, TABLE = {"png", "svg", "json"}, {"csv", "md", "tex", "json"}
PICTURE = re.compile(r"!\[(.*?)\]\((.*?)\)")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    with matplotlib.rc_context():
        yield
    plt.close("all")


@pytest.fixture
def toys(monkeypatch):
    """Three steps; ``toys.ran`` lists those that ran, and ``toys.broken`` lets one fail."""
    toys = SimpleNamespace(ran=[], broken=None)

    def first():
        toys.ran.append("first")
        yield "line", plt.figure(figsize=(1, 1)), {"dataset": "none", "seeds": [3], "n": 5, "source": "formulas"}

    def second():
        toys.ran.append("second")
        yield "numbers", pd.DataFrame({"β": [3], "share": ["1_000 & |more|"]}), {"source": "formulas"}
        if toys.broken:
            raise toys.broken
        yield "rest", pd.DataFrame({"a": [len(toys.ran)]}), {"source": os.environ["LCNN_STORE"]}

    def third():
        toys.ran.append("third")
        yield "last", pd.DataFrame({"a": [1]}), {"source": "formulas"}

    listed = {"line": "first", "numbers": "second", "rest": "second", "last": "third"}
    toys.entries = [Entry("Toys", step, name, name, "what is seen.", "what it says.") for name, step in listed.items()]
    monkeypatch.setattr(make_figures, "figure_steps", SimpleNamespace(first=first, second=second, third=third))
    monkeypatch.setattr(make_figures, "entries", lambda: toys.entries)
    return toys


def test_make_writes_everything_and_its_page(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LCNN_STORE", "mine")
    (tmp_path / "mine.png").write_bytes(b"")
    assert make(folder=tmp_path) == {}
    files = {"line": FIGURE, "numbers": TABLE, "rest": TABLE, "last": TABLE, "mine": {"png"}, "README": {"md"}}
    assert set(os.listdir(tmp_path)) == {f"{name}.{end}" for name, ends in files.items() for end in ends}
    assert "no step makes mine: delete" in capsys.readouterr().out
    record = json.loads((tmp_path / "line.json").read_text("utf-8"))
    assert (record["command"], record["step"], record["n"]) == ("lcnn figures --only line", "first", 5)
    assert set(record) >= {"versions", "hardware"}
    assert json.loads((tmp_path / "rest.json").read_text("utf-8"))["source"] != "mine", "stores are not read back"
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "![what is seen.](line.png)\n\n*what it says.*" in text
    assert "`lcnn figures --only line` (none; n = 5; seeds [3]; formulas): [SVG](line.svg), [prov" in text
    assert "what is seen.\n\n| β | share |\n| --- | --- |\n| 3 | 1_000 & \\|more\\| |\n\n*what it says.*" in text


def test_only_makes_the_steps_that_make_it(toys, tmp_path):
    assert make(["last", "line"], tmp_path) == {}
    assert toys.ran == ["first", "third"]
    assert not (tmp_path / "rest.csv").exists()
    with pytest.raises(ValueError, match=r"unknown figure or table 'numbrs'.*did you mean 'numbers'"):
        make(["numbrs"], tmp_path)


def test_a_step_that_fails_is_reported_and_the_others_are_made(toys, tmp_path, capsys):
    make(folder=tmp_path)
    old = (tmp_path / "rest.csv").read_text("utf-8")
    (tmp_path / "last.csv").unlink()
    toys.broken = KeyError("no such net")
    assert make(folder=tmp_path) == {"second": toys.broken}
    assert (tmp_path / "last.csv").exists()
    assert (tmp_path / "rest.csv").read_text("utf-8") == old, "what could not be made again stays"
    assert capsys.readouterr().err.endswith("the step second failed: KeyError: 'no such net'\n")
    toys.broken = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        make(folder=tmp_path)


def test_the_command(monkeypatch):
    monkeypatch.setattr(make_figures, "make", lambda only: {name: ValueError() for name in only})
    assert commands.main(["figures"]) == 0
    assert commands.main(["figures", "--only", "figure_1c", "signal"]) == 1


def test_two_steps_for_real(tmp_path):
    assert make(["lambda_search", "saliency_gallery"], tmp_path) == {}
    assert len(PICTURE.findall((tmp_path / "README.md").read_text("utf-8"))) == 2


@pytest.fixture
def small_settings(monkeypatch):
    """Nets of width 2 and one epoch, few images, points and seeds."""

    def shrink(module, name, **options):
        study = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **given: study(*args, **given | options))

    monkeypatch.setattr(figure_steps, "SEEDS", (0, 1))
    for module in (figure_steps, studies, bound_studies):
        tiny = lambda recipe, fit=module.fit, **_: fit(replace(recipe, width=2, epochs=1, batch_size=512), device="cpu")
        monkeypatch.setattr(module, "fit", tiny)
    shrink(studies, "moons_study", resolution=12)
    shrink(studies, "digits_study", images=8)
    shrink(studies, "convergence_frame", products=4)
    shrink(bound_studies, "audit_frame", nets=range(6), points=2)
    shrink(bound_studies, "certificate_study", images=8, steps=2, restarts=1)


@pytest.mark.parametrize("step", dict.fromkeys(entry.step for entry in entries()))
def test_every_step_makes_what_is_listed(step, small_settings, tmp_path, monkeypatch):
    """Nothing is saved here: that is where a figure's time goes."""
    made = {}
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    monkeypatch.setattr(style, "save", lambda _, name, provenance, folder: made.update({name: json.dumps(provenance)}))
    monkeypatch.setattr(style, "save_table", style.save)
    make_figures.run(getattr(figure_steps, step), tmp_path)
    assert sorted(made) == sorted(entry.name for entry in entries() if entry.step == step)


def test_every_figure_and_table_is_described():
    listed = entries()
    steps = {
        name for name, f in vars(figure_steps).items() if getattr(f, "__annotations__", {}).get("return") == "Made"
    }
    assert {entry.step for entry in listed} == steps
    assert len({entry.name for entry in listed}) == len({entry.title for entry in listed}) == len(listed)
    for entry in listed:
        assert len(entry.alt) > 40, entry.name
        for text in (entry.title, entry.alt, entry.reading):
            assert not re.search(r"[][\n*{}]|DATASET", text), f"{entry.name}: {text!r} would break the page"
            assert len(text) > 5
        assert entry.alt.endswith(".")


def test_the_committed_page_shows_the_committed_figures():
    """Not that they are current: every change of code would then ask for new ones at once."""
    folder = PROJECT / "figures"
    listed = [entry.name for entry in entries()]
    kinds = {name: {path.suffix[1:] for path in folder.glob(f"{name}.*")} for name in listed}
    assert [name for name, kind in kinds.items() if kind not in (FIGURE, TABLE)] == [], "run `make figures`"
    assert {path.stem for path in folder.iterdir()} == {*listed, "README"}
    assert (folder / "README.md").read_text("utf-8") == page(folder), "run `make figures`"


def test_tables_for_latex():
    """Escaped, with symbols that are in the font which the first line names (matplotlib brings it)."""
    frame = pd.DataFrame({"net": ["A & B_c", "‖∇²f‖"], "share %": ["1 #2", "~{}^\\$"]})
    lines = style.latex(frame).splitlines()
    assert lines[0].startswith("% lualatex or xelatex")
    assert lines[1:4] == [r"\begin{tabular}{lr}", r"\toprule", r"net & share \% \\"]
    assert lines[5] == r"A \& B\_c & 1 \#2 \\"
    cell = lines[6].removeprefix("‖∇²f‖ & ").removesuffix(r" \\")
    assert not re.search(r"(?<!\\)[~^$#%&_]", cell)
    font = matplotlib.font_manager.findfont("DejaVu Sans")
    known = set(matplotlib.ft2font.FT2Font(font).get_charmap())
    texts = [path.read_text("utf-8") for path in (PROJECT / "figures").glob("*.csv")]
    assert [c for c in sorted(set("".join(texts))) if ord(c) not in known and c != "\n"] == []
