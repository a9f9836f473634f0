"""`lcnn figures`: all steps are run whatever becomes of one, each makes what is listed, and all of it is described."""

import dataclasses
import json
import os
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from lcnn_utils import studies
from lcnn_utils.cli import commands, figure_steps, make_figures
from lcnn_utils.cli.make_figures import Entry, entries, make, page
from lcnn_utils.figures import style
from lcnn_utils.lab import PROJECT
from lcnn_utils.studies import bounds as bound_studies
from lcnn_utils.studies import methods as method_studies

FIGURE, TABLE = {"png", "svg", "json"}, {"csv", "md", "tex", "json"}
PICTURE = re.compile(r"!\[(.*?)\]\((.*?)\)")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    backend, threads = matplotlib.get_backend(), torch.get_num_threads()
    plt.switch_backend("agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")
    plt.switch_backend(backend)
    torch.set_num_threads(threads)


def files(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def names(stem: str, ends: set[str]) -> set[str]:
    return {f"{stem}.{end}" for end in ends}


# ---- three small steps ---------------------------------------------------------------------------------------------
@pytest.fixture
def toys(monkeypatch):
    """Three steps, two tables and two figures; the list of those that ran. Change ``toys.broken`` to let one fail."""

    class Ran(list):
        broken: BaseException | None = None

    ran = Ran()

    def first():
        ran.append("first")
        yield "line", plt.figure(figsize=(1, 1)), {"dataset": "none", "seeds": [3], "n": 5, "source": "formulas"}
        yield "numbers", pd.DataFrame({"β": [3], "share %": ["1_000 & |more|"]}), {"source": "formulas"}

    def second():
        ran.append("second")
        yield "half", plt.figure(figsize=(1, 1)), {"source": "formulas"}
        if ran.broken:
            raise ran.broken
        yield "whole", pd.DataFrame({"a": [len(ran)]}), {"source": os.environ["LCNN_STORE"]}

    def third():
        ran.append("third")
        yield "last", pd.DataFrame({"a": [1]}), {"source": "formulas"}

    listed = {"line": "first", "numbers": "first", "half": "second", "whole": "second", "last": "third"}
    texts = ("what is seen of it", "what it says.")
    toy_entries = [Entry("Toys", step, name, f"The {name}", *texts) for name, step in listed.items()]
    monkeypatch.setattr(make_figures, "STEPS", (first, second, third))
    monkeypatch.setattr(make_figures, "entries", lambda: toy_entries)
    return ran


def test_make_writes_everything_and_its_page(toys, tmp_path, monkeypatch):
    monkeypatch.setenv("LCNN_STORE", "mine")
    assert make(folder=tmp_path) == {}
    expected = [names(stem, FIGURE) for stem in ("line", "half")]
    expected += [names(stem, TABLE) for stem in ("numbers", "whole", "last")]
    assert files(tmp_path) == set.union({"README.md"}, *expected)
    record = json.loads((tmp_path / "line.json").read_text("utf-8"))
    assert record["command"] == "lcnn figures --only line"
    assert (record["step"], record["n"], record["seeds"]) == ("first", 5, [3])
    assert set(record) >= {"versions", "hardware"}
    assert json.loads((tmp_path / "whole.json").read_text("utf-8"))["source"] != "mine", "stores are not read back"
    assert os.environ["LCNN_STORE"] == "mine"
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "![what is seen of it](line.png)\n\n*what it says.*" in text
    assert "`lcnn figures --only line` (none; n = 5; seeds [3]; formulas): [SVG](line.svg), [prov" in text
    assert "what is seen of it\n\n| β | share % |\n| --- | --- |\n| 3 | 1_000 & \\|more\\| |\n\n*what it says.*" in text
    assert text.count("## Toys") == 1
    assert plt.get_fignums() == []


def test_only_makes_the_steps_that_make_it(toys, tmp_path):
    assert make(["whole"], tmp_path) == {}
    assert toys == ["second"]
    assert files(tmp_path) == names("half", FIGURE) | names("whole", TABLE) | {"README.md"}
    make(["last", "numbers", "line"], tmp_path)
    assert toys[1:] == ["first", "third"]
    with pytest.raises(ValueError, match=r"unknown figure or table 'numbrs'.*did you mean 'numbers'"):
        make(["numbrs"], tmp_path)
    assert len(toys) == 3


def test_a_step_that_fails_is_reported_and_the_others_are_made(toys, tmp_path, capsys):
    make(folder=tmp_path)
    old = (tmp_path / "whole.csv").read_text("utf-8")
    (tmp_path / "last.csv").unlink()
    toys.broken = KeyError("no such net")
    assert make(folder=tmp_path) == {"second": toys.broken}
    assert (tmp_path / "last.csv").exists()
    assert (tmp_path / "whole.csv").read_text("utf-8") == old, "what could not be made again stays"
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1] == "the step second failed: KeyError: 'no such net'"
    assert "(whole.csv)" in (tmp_path / "README.md").read_text("utf-8")


def test_ctrl_c_ends_it_and_keeps_what_is_done(toys, tmp_path):
    toys.broken = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        make(folder=tmp_path)
    assert toys == ["first", "second"]
    assert files(tmp_path) == names("line", FIGURE) | names("numbers", TABLE) | names("half", FIGURE)


def test_what_no_step_makes_is_named_and_kept(toys, tmp_path, capsys):
    (tmp_path / "mine.png").write_bytes(b"")
    (tmp_path / ".hidden.png").write_bytes(b"")
    make(folder=tmp_path)
    assert "no step makes mine: delete" in capsys.readouterr().out
    assert {"mine.png", ".hidden.png"} <= files(tmp_path)


def test_a_step_that_makes_what_is_not_listed_has_failed(toys, tmp_path, monkeypatch):
    listed = [entry for entry in make_figures.entries() if entry.name != "whole"]
    monkeypatch.setattr(make_figures, "entries", lambda: listed)
    (error,) = make(folder=tmp_path).values()
    assert "disagree on whole" in str(error)


def test_a_folder_that_cannot_be_written(toys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*README\.md"):
        make(folder=tmp_path / "file" / "figures")


@pytest.mark.parametrize("failed", [{}, {"moons": ValueError("no")}])
@pytest.mark.parametrize(("options", "asked"), [([], ()), (["--only", "figure_1c", "signal"], ("figure_1c", "signal"))])
def test_the_command(monkeypatch, options, asked, failed):
    calls = []
    monkeypatch.setattr(make_figures, "make", lambda only: calls.append(only) or failed)
    assert commands.main(["figures", *options]) == (1 if failed else 0)
    assert calls == [asked]


# ---- the real steps ------------------------------------------------------------------------------------------------
def test_two_steps_for_real(tmp_path, capsys):
    assert make(["lambda_search", "saliency_gallery"], tmp_path) == {}
    assert files(tmp_path) == names("lambda_search", FIGURE) | names("saliency_gallery", FIGURE) | {"README.md"}
    assert len(PICTURE.findall((tmp_path / "README.md").read_text("utf-8"))) == 2
    assert "saliency_gallery: saliency_gallery (" in capsys.readouterr().out


@pytest.fixture
def small_settings(monkeypatch):
    """Nets of width 2 and one epoch, few images, points and seeds."""
    monkeypatch.setattr(figure_steps, "SEEDS", (0, 1))
    for module in (figure_steps, studies, bound_studies):
        small = lambda recipe, fit=module.fit, **options: fit(
            dataclasses.replace(recipe, width=2, epochs=1, batch_size=512), device="cpu", progress=False
        )
        monkeypatch.setattr(module, "fit", small)
    real = {name: getattr(studies, name) for name in ("moons_study", "digits_study", "convergence_frame")}
    monkeypatch.setattr(studies, "moons_study", lambda models: real["moons_study"](models, 12))
    monkeypatch.setattr(studies, "digits_study", lambda seeds, **_: real["digits_study"](seeds, images=8))
    convergence = lambda model, x, y, products: real["convergence_frame"](model, x[:3], y[:3], 4)
    monkeypatch.setattr(studies, "convergence_frame", convergence)
    audit, certify = bound_studies.audit_frame, bound_studies.certificate_study
    monkeypatch.setattr(bound_studies, "audit_frame", lambda nets, points: audit(range(6), 2))
    few = dict(images=8, steps=2, restarts=1)
    monkeypatch.setattr(bound_studies, "certificate_study", lambda seeds, steps: certify(seeds, **few))
    soften = method_studies.softened_frame
    monkeypatch.setattr(method_studies, "softened_frame", lambda seeds, betas: soften([0], betas))


@pytest.mark.parametrize("step", make_figures.STEPS, ids=lambda step: step.__name__)
def test_every_step_makes_what_is_listed(step, small_settings, tmp_path, monkeypatch):
    """Nothing is saved here: that is where a figure's time goes."""
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    records = {}
    keep = lambda what, name, provenance, folder: records.update({name: provenance | {"kind": type(what).__name__}})
    monkeypatch.setattr(style, "save", keep)
    monkeypatch.setattr(style, "save_table", keep)
    made = make_figures.run(step, tmp_path)
    assert sorted(made) == sorted(entry.name for entry in entries() if entry.step == step.__name__)
    for name, record in records.items():
        assert record["command"] == f"lcnn figures --only {name}"
        assert record["source"]
        json.dumps(record)


def test_every_figure_and_table_is_described():
    listed = entries()
    assert list(dict.fromkeys(entry.step for entry in listed)) == [step.__name__ for step in make_figures.STEPS]
    assert len({entry.name for entry in listed}) == len({entry.title for entry in listed}) == len(listed)
    for entry in listed:
        assert len(entry.alt) > 40, entry.name
        assert len(entry.reading) > 15, entry.name
        for text in (entry.title, entry.alt, entry.reading):
            assert not re.search(r"[][\n*{}]|DATASET", text), f"{entry.name}: {text!r} would break the page"
        assert entry.alt.endswith(".")
        assert entry.reading.endswith(".")


def test_the_committed_page_shows_the_committed_figures():
    """Not that they are current: every change of code would then ask for new ones at once."""
    folder = PROJECT / "figures"
    listed = {entry.name: entry for entry in entries()}
    kinds = {name: {path.suffix[1:] for path in folder.glob(f"{name}.*")} for name in listed}
    assert [name for name, kind in kinds.items() if kind not in (FIGURE, TABLE)] == [], "run `make figures`"
    assert {path.stem for path in folder.iterdir()} == {*listed, "README"}
    text = (folder / "README.md").read_text("utf-8")
    assert text == page(folder), "run `make figures`"
    assert {path: alt for alt, path in PICTURE.findall(text)} == {
        f"{name}.png": listed[name].alt for name, kind in kinds.items() if kind == FIGURE
    }


def test_tables_for_latex():
    """Escaped, with symbols that are in the font which the first line names (matplotlib brings it)."""
    frame = pd.DataFrame({"net": ["A & B_c", "‖∇²f‖"], "share %": ["1 #2", "~{}^\\$"]})
    lines = style.latex(frame).splitlines()
    assert lines[0].startswith("% lualatex or xelatex")
    assert lines[1:5] == [r"\begin{tabular}{lr}", r"\toprule", r"net & share \% \\", r"\midrule"]
    assert lines[5] == r"A \& B\_c & 1 \#2 \\"
    cell = lines[6].removeprefix("‖∇²f‖ & ").removesuffix(r" \\")
    assert not re.search(r"(?<!\\)[~^$#%&_]", cell)
    font = matplotlib.font_manager.findfont("DejaVu Sans")
    known = set(matplotlib.ft2font.FT2Font(font).get_charmap())
    texts = [path.read_text("utf-8") for path in (PROJECT / "figures").glob("*.csv")]
    assert [c for c in sorted(set("".join(texts))) if ord(c) not in known and c != "\n"] == []
