"""The gallery makes what is missing or out of date, and nothing else; what it made is described, and all of it."""

import importlib
import json
import os
import re
import string
import sys
import textwrap

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from lcnn_utils import gallery, studies
from lcnn_utils.figures import style
from lcnn_utils.gallery import captions, fingerprint, page, records, steps
from lcnn_utils.lab import PROJECT
from lcnn_utils.studies import bounds as bound_studies
from lcnn_utils.training import Recipe

KINDS = ({".png", ".svg", ".json"}, {".csv", ".md", ".tex", ".json"})


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    backend, threads = matplotlib.get_backend(), torch.get_num_threads()
    plt.switch_backend("agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")
    plt.switch_backend(backend)
    torch.set_num_threads(threads)


# ---- a small project: three steps, four outputs -------------------------------------------------------------------

FILES = {
    "toy_lab/__init__.py": "",
    "toy_lab/style.py": "COLOUR = 'red'",
    "toy_lab/toy.mplstyle": "font.size: 10",
    "toy_lab/runtime.py": "PROJECT = None",
    "toy_lab/training.py": '''
        """Trains."""
        from .runtime import PROJECT

        def fit(n):
            """Double it."""
            # a comment
            return 2 * n
    ''',
    "toy_lab/figures/__init__.py": '''
        import matplotlib.pyplot as plt

        def line(n):
            figure, axis = plt.subplots(figsize=(1, 1))
            axis.plot([0, n])
            return figure
    ''',
    "toy_lab/figures/attacks.py": "from . import line\ndef curve(n):\n    return line(-n)",
    "toy_lab/unused.py": "",
    "toy_lab/gallery/__init__.py": "",
    "toy_lab/gallery/steps.py": '''
        import pandas as pd
        from lcnn_utils.gallery.fingerprint import reads
        from .. import figures
        from ..figures import attacks as attack_figures
        from ..training import fit
        from .more import table

        RAN = []
        SEED = 3

        @reads("data/moons*.csv")
        def moons(progress):
            RAN.append("moons")
            yield "moons_map", figures.line(fit(SEED)), {"dataset": "moons", "seeds": [SEED]}
            yield "moons_table", pd.DataFrame({"β": [SEED]}), {}

        @reads("data/attacks.csv")
        def attacks(progress):
            RAN.append("attacks")
            yield "attacks_curve", attack_figures.curve(2), {"step": "not this"}

        def plain(progress):
            RAN.append("plain")
            yield "plain_table", table(), {}

        STEPS = moons, attacks, plain
    ''',
    "toy_lab/gallery/more.py": """
        import pandas as pd
        ROWS = [1, 2]
        OTHER = 1
        def table():
            return pd.DataFrame({"a": ROWS})
    """,
    "data/moons_1.csv": "1",
    "data/attacks.csv": "1",
}  # fmt: skip
ALL = ["moons", "attacks", "plain"]


class Toy:
    """The small project in a folder: ``make`` runs the gallery on it and returns the steps that ran."""

    def __init__(self, root):
        self.root, self.folder, self.said = root, root / "figures", []
        for name, text in FILES.items():
            self.write(name, text)
        self.steps = importlib.import_module("toy_lab.gallery.steps")

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).strip() + "\n", encoding="utf-8")

    def replace(self, name, old, new):
        text = (self.root / name).read_text("utf-8")
        assert old in text
        (self.root / name).write_text(text.replace(old, new), encoding="utf-8")

    def make(self, **options):
        self.steps.RAN.clear()
        self.said.clear()
        self.report = gallery.make(self.folder, False, say=self.said.append, **options)
        assert list(self.report.made) == self.steps.RAN
        return list(self.steps.RAN)

    def files(self):
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = Toy(tmp_path)
    monkeypatch.setattr(gallery, "STEPS", made.steps.STEPS)
    yield made
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_lab"]:
        del sys.modules[name]


def test_what_is_current_is_left_alone(toy):
    assert toy.make() == ALL
    figures, tables = ("moons_map", "attacks_curve"), ("moons_table", "plain_table")
    expected = {f"{name}{end}" for names, kind in zip((figures, tables), KINDS, strict=True)
                for name in names for end in kind}  # fmt: skip
    assert set(toy.files()) == expected | {"README.md"}
    before, times = toy.files(), {path: path.stat().st_mtime_ns for path in toy.folder.iterdir()}
    assert toy.make() == []
    assert toy.report.current == ALL
    assert toy.said == ["current  moons, attacks, plain", "nothing to make"]
    assert {path: path.stat().st_mtime_ns for path in toy.folder.iterdir()} == times
    assert toy.files() == before


def test_it_says_what_it_does(toy):
    toy.make()
    assert re.fullmatch(r"made     moons in \d+\.\d s \(never made\): moons_map, moons_table", toy.said[0])
    assert toy.said[-2].startswith("bare     no caption for attacks_curve, moons_map, moons_table, plain_table: write")
    assert toy.said[-1] == f"{len(toy.report.files)} files written into {toy.folder}"
    assert set(toy.report.files) == set(toy.folder.iterdir())
    (toy.folder / "attacks_curve.svg").unlink()
    toy.make()
    assert "(missing: attacks_curve): attacks_curve" in toy.said[0]
    toy.write("data/attacks.csv", "2")
    toy.make()
    assert "(its code or data changed)" in toy.said[0]


def test_the_record_says_who_made_it(toy):
    toy.make()
    record = json.loads((toy.folder / "moons_map.json").read_text("utf-8"))
    assert record["made_by"] == "lcnn figures --only moons_map"
    assert (record["step"], record["outputs"]) == ("moons", ["moons_map", "moons_table"])
    assert (record["dataset"], record["seeds"]) == ("moons", [3])
    assert re.fullmatch("[0-9a-f]{16}", record["fingerprint"])
    assert set(record["versions"]) == {"lcnn_utils", "torch", "matplotlib", "python"}
    assert json.loads((toy.folder / "attacks_curve.json").read_text("utf-8"))["step"] == "attacks"


@pytest.mark.parametrize(
    ("name", "old", "new", "ran"),
    [
        ("data/moons_1.csv", "1", "2", ["moons"]),
        ("data/attacks.csv", "1", "2", ["attacks"]),
        ("toy_lab/style.py", "red", "blue", ALL),
        ("toy_lab/toy.mplstyle", "10", "11", ALL),
        ("toy_lab/figures/attacks.py", "-n", "-n + 0", ["attacks"]),
        ("toy_lab/figures/__init__.py", "[0, n]", "[1, n]", ["moons", "attacks"]),  # attacks.py takes from it
        ("toy_lab/training.py", "2 * n", "3 * n", ["moons"]),
        ("toy_lab/runtime.py", "None", "1", ["moons"]),  # by way of training
        ("toy_lab/gallery/steps.py", "SEED = 3", "SEED = 4", ["moons"]),
        ("toy_lab/gallery/steps.py", "curve(2)", "curve(3)", ["attacks"]),
        ("toy_lab/gallery/steps.py", '"data/attacks.csv"', '"data/attacks*"', ["attacks"]),
        ("toy_lab/gallery/more.py", "[1, 2]", "[1, 3]", ["plain"]),  # of the steps' own folder counts what is used
        ("toy_lab/gallery/more.py", "OTHER = 1", "OTHER = 2", []),
        ("toy_lab/training.py", "a comment", "another comment\n", []),
        ("toy_lab/training.py", "Double it", "Twice", []),
        ("toy_lab/training.py", "Trains.", "It\n\ntrains.", []),
        ("toy_lab/training.py", "return 2 * n", "return (2  *  n)  # brackets", []),
    ],
)  # fmt: skip
def test_what_changes_decides_what_runs(toy, name, old, new, ran):
    toy.make()
    toy.replace(name, old, new)
    assert toy.make() == ran
    assert toy.make() == []


def test_files_of_data_that_come_and_go(toy):
    toy.make()
    toy.write("data/moons_2.csv", "")
    assert toy.make() == ["moons"]
    (toy.root / "data/moons_2.csv").unlink()
    assert toy.make() == ["moons"]
    toy.write("data/other.csv", "")
    toy.write("toy_lab/unused.py", "changed = 1")
    (toy.root / "data/moons_1.csv").write_bytes(b"1\r\n")  # git on Windows
    assert toy.make() == []


@pytest.mark.parametrize(
    ("names", "ran"),
    [
        (["moons_map.png"], ["moons"]),
        (["moons_map.json"], ["moons"]),
        (["moons_table.tex"], ["moons"]),
        (["moons_table.csv", "moons_table.md", "moons_table.tex", "moons_table.json"], ["moons"]),
        (["attacks_curve.svg", "plain_table.md"], ["attacks", "plain"]),
        (["README.md"], []),
    ],
)
def test_what_was_deleted_comes_back(toy, names, ran):
    toy.make()
    before = toy.files()
    for name in names:
        (toy.folder / name).unlink()
    assert toy.make() == ran
    assert toy.files() == before
    assert toy.make() == []


def test_a_damaged_record_is_made_anew(toy):
    toy.make()
    before = toy.files()
    for damage in ("<<<<<<< ours", "[]", '{"step": "plain"}'):
        (toy.folder / "plain_table.json").write_text(damage)
        assert toy.make() == ["plain"]
        assert toy.files() == before


def test_a_step_that_fails_takes_nothing_with_it(toy, monkeypatch):
    def attacks(progress):
        yield "attacks_curve", plt.figure(), {}
        raise RuntimeError("no such net")

    attacks.__module__ = toy.steps.__name__
    moons, real, plain = toy.steps.STEPS
    monkeypatch.setattr(gallery, "STEPS", (moons, attacks, plain))
    with pytest.raises(RuntimeError, match="no such net"):
        toy.make()
    assert toy.said[-1].startswith("failed   attacks")
    assert {name.partition(".")[0] for name in toy.files()} == {"moons_map", "moons_table"}
    monkeypatch.setattr(gallery, "STEPS", (moons, real, plain))
    assert toy.make() == ["attacks", "plain"], "the first is kept"


def test_ctrl_c_keeps_what_is_done(toy, monkeypatch):
    def interrupted(progress):
        raise KeyboardInterrupt
        yield

    interrupted.__module__, interrupted.__name__ = toy.steps.__name__, "attacks"
    moons, real, plain = toy.steps.STEPS
    monkeypatch.setattr(gallery, "STEPS", (moons, interrupted, plain))
    with pytest.raises(KeyboardInterrupt):
        toy.make()
    monkeypatch.setattr(gallery, "STEPS", (moons, real, plain))
    assert toy.make() == ["attacks", "plain"]


def test_a_save_cut_short_does_not_look_current(toy, monkeypatch):
    """New data, the picture half saved, the data put back: the old record must not vouch for the new picture."""
    toy.make()
    before = toy.files()
    toy.write("data/moons_1.csv", "2")
    monkeypatch.setattr(style, "_write_provenance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        toy.make()
    monkeypatch.undo()
    monkeypatch.setattr(gallery, "STEPS", toy.steps.STEPS)
    toy.write("data/moons_1.csv", "1")
    assert toy.make() == ["moons"]
    assert toy.files() == before


def test_only(toy):
    toy.make()
    assert toy.make(only=["moons_table"]) == ["moons"], "asked for by name, though current"
    assert "(asked for)" in toy.said[0]
    assert toy.make(only=["attacks_curve", "plain"]) == ["attacks", "plain"], "a step's name will do"
    toy.write("toy_lab/style.py", "COLOUR = 'blue'")
    assert toy.make(only=["plain_table"]) == ["plain"]
    assert toy.make() == ["moons", "attacks"], "what was not asked for waited"


def test_only_an_unknown_name(toy):
    with pytest.raises(ValueError, match=r"unknown figure, table or step 'moon': known are moons, .*did you mean"):
        toy.make(only=["moon"])
    toy.make()
    with pytest.raises(ValueError, match="did you mean 'moons_table'"):
        toy.make(only=["moons_tables"])


def test_everything(toy):
    toy.make()
    before = toy.files()
    assert toy.make(everything=True) == ALL
    assert toy.files() == before, "byte for byte the same"


def test_orphans_are_named_and_kept(toy):
    toy.make()
    (toy.folder / "mine.png").write_bytes(b"")
    toy.replace("toy_lab/gallery/steps.py", '"moons_table"', '"moons_numbers"')
    importlib.reload(toy.steps)
    gallery.STEPS = toy.steps.STEPS  # the fixture puts the real ones back
    assert toy.make() == ["moons"]
    assert toy.report.orphans == ["mine.png", *(f"moons_table.{end}" for end in ("csv", "json", "md", "tex"))]
    assert toy.said[-3].startswith("orphans  no step makes mine.png, moons_table.csv")
    assert (toy.folder / "mine.png").exists()
    assert toy.make() == [], "a name given up does not make its step out of date for ever"


def test_names_are_unique(toy, monkeypatch):
    moons, attacks, plain = toy.steps.STEPS
    monkeypatch.setattr(gallery, "STEPS", (moons, moons))
    with pytest.raises(ValueError, match="two steps have one name: moons, moons"):
        toy.make()
    monkeypatch.setattr(gallery, "STEPS", (moons, attacks, plain))
    toy.replace("toy_lab/gallery/steps.py", '"plain_table"', '"moons_table"')
    importlib.reload(toy.steps)
    monkeypatch.setattr(gallery, "STEPS", toy.steps.STEPS)
    with pytest.raises(ValueError, match="'moons_table' is made twice, by plain and moons"):
        toy.make()
    monkeypatch.setattr(gallery, "STEPS", toy.steps.STEPS[::2])
    with pytest.raises(ValueError, match="'moons_table' is made twice, by plain and moons"):
        toy.make()


# ---- the real steps ------------------------------------------------------------------------------------------------


def test_a_step_depends_on_what_it_uses():
    by_name = {step.__name__: {name.removeprefix("lcnn_utils.") for name in fingerprint.uses(step)[0]}
               for step in steps.STEPS}  # fmt: skip
    assert by_name["moons"] >= {"training", "models", "activations", "curvature", "studies", "figures", "style"}
    assert not by_name["moons"] & {"attacks", "figures.attacks", "studies.attacks", "saliency", "bounds", "published"}
    assert by_name["bounds"] >= {"bounds", "walk", "figures.bounds", "studies.bounds", "studies.audits"}
    assert not by_name["bounds"] & {"figures.attacks", "saliency", "figures.saliency"}
    assert by_name["promises"] >= {"published", "figures.attacks", "figures.saliency", "studies.saliency"}
    for names in by_name.values():
        assert "style" in names
        assert not names & {"", "gallery", "gallery.steps", "cli", "explorers", "exercises", "doctor"}
        assert all(fingerprint._is_module(f"lcnn_utils.{name}") for name in names)


@pytest.mark.parametrize("step", gallery.STEPS, ids=lambda step: step.__name__)
def test_what_a_step_reads_is_there(step):
    for pattern in getattr(step, "reads", ()):
        assert list(PROJECT.glob(pattern)), f"{step.__name__} reads {pattern}, of which there is none"


def test_fingerprints_are_the_same_twice_and_differ():
    marks = [fingerprint.fingerprint(step) for step in gallery.STEPS]
    assert marks == [fingerprint.fingerprint(step) for step in gallery.STEPS]
    assert len(set(marks)) == len(marks)


@pytest.fixture
def tiny_gallery(monkeypatch):
    torch.set_num_threads(1)
    moons = lambda method, seed=0, *, epochs=1: Recipe("moons", method, "mlp", width=4, seed=seed, epochs=1)
    digits = lambda method, seed=0, *, epochs=1: Recipe(
        "digits", method, "resnet10", width=2, seed=seed, epochs=1, batch_size=512
    )
    monkeypatch.setattr(studies, "moons_recipe", moons)
    monkeypatch.setattr(studies, "digits_recipe", digits)
    monkeypatch.setattr(steps, "SEEDS", (0, 1))
    real = studies.moons_study, studies.convergence_frame
    monkeypatch.setattr(studies, "moons_study", lambda models, resolution=0: real[0](models, 12))
    monkeypatch.setattr(studies, "convergence_frame", lambda model, x, y, **_: real[1](model, x[:3], y[:3], 4))
    audit, certify = bound_studies.audit_frame, bound_studies.certificate_study
    monkeypatch.setattr(bound_studies, "audit_frame", lambda nets, points: audit(range(6), 2))
    few = dict(epochs=1, images=8, steps=2, restarts=1)
    monkeypatch.setattr(bound_studies, "certificate_study", lambda seeds, **_: certify(seeds, **few))


def test_the_gallery_makes_every_file(tiny_gallery, tmp_path, capsys):
    folder = tmp_path / "made"
    paths = gallery.make_all(folder, progress=False)
    assert capsys.readouterr() == ("", "")
    assert sorted(os.listdir(folder)) == sorted(path.name for path in paths)
    assert len(set(paths)) == len(paths)
    names = {path.stem for path in paths} - {"README"}
    assert names == set(captions.CAPTIONS), "each figure and table has a caption, and each caption belongs to one"
    for name in names:
        assert {path.suffix for path in paths if path.stem == name} in KINDS, name
        assert set(name) <= set(string.ascii_lowercase + string.digits + "_")
        record = json.loads((folder / f"{name}.json").read_text("utf-8"))
        assert record["made_by"] == f"lcnn figures --only {name}"
        assert record["step"] in {step.__name__ for step in gallery.STEPS}
        assert record["dataset"]
        assert record["versions"]
    assert all(path.stat().st_size > 0 for path in paths)
    assert plt.get_fignums() == []


def test_the_gallery_stops_where_it_cannot_write(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "STEPS", gallery.STEPS[:1])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*file/figures"):
        gallery.make_all(tmp_path / "file" / "figures", progress=False)
    assert os.listdir(tmp_path) == ["file"]


def test_the_gallery_shows_its_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gallery, "STEPS", gallery.STEPS[:1])
    gallery.make(tmp_path)
    shown = capsys.readouterr()
    assert "activations" in shown.err
    assert shown.out.startswith("made     activations in ")


# ---- what is committed, and how it is described --------------------------------------------------------------------

PICTURE = re.compile(r"!\[(.*?)\]\((.*?)\)")


def test_committed_figures_are_whole_and_somebodys():
    """Not that they are current: every change of code would then ask for new ones at once."""
    folder, known = PROJECT / "figures", records.read(PROJECT / "figures")
    for name, record in known.items():
        assert record.get("step") in {step.__name__ for step in gallery.STEPS}, f"{name}: run `make figures`"
        assert records.complete(folder, name), name
        assert name in record["outputs"]
        assert all(other in known for other in record["outputs"]), name
        assert record["fingerprint"]
        assert record["dataset"]
    files = {path.stem for path in folder.iterdir() if path.is_file()} - {"README"}
    assert files == set(known) == set(captions.CAPTIONS)


def test_captions():
    titles = [caption.title for caption in captions.CAPTIONS.values()]
    assert len(set(titles)) == len(titles)
    assert sum(map(len, captions.SECTIONS.values())) == len(captions.CAPTIONS)
    for name, caption in captions.CAPTIONS.items():
        assert len(caption.alt) > 40, name
        assert len(caption.reading) > 15, name
        for text in caption:
            assert not set(text) & set("[]\n*|") or "|uᵀHu|" in text, f"{name}: {text!r} would break the page"
            assert text == text.strip()
        assert caption.alt.endswith(".")
        assert caption.reading.endswith(".")


def test_the_page_is_the_figures():
    text = (PROJECT / "figures" / "README.md").read_text("utf-8")
    assert text == page.text(PROJECT / "figures"), "run `make figures`"
    pictures = {path: alt for alt, path in PICTURE.findall(text)}
    assert set(pictures) == {path.name for path in (PROJECT / "figures").glob("*.png")}
    for path, alt in pictures.items():
        assert alt == captions.CAPTIONS[path.removesuffix(".png")].alt
    for path in re.findall(r"\]\(([^)]*)\)", text):
        assert (PROJECT / "figures" / path).is_file(), path
    for path in (PROJECT / "figures").glob("*.csv"):
        assert path.with_suffix(".md").read_text("utf-8").rstrip() in text
        assert f"({path.name})" in text
        assert f"({path.stem}.tex)" in text


def test_the_readme_describes_its_pictures_as_the_gallery_does():
    pictures = PICTURE.findall((PROJECT / "README.md").read_text("utf-8"))
    ours = [(alt, path) for alt, path in pictures if path.startswith("figures/")]
    assert len(ours) >= 3
    assert all(alt for alt, _ in pictures)
    for alt, path in ours:
        assert alt == captions.CAPTIONS[path.removeprefix("figures/").removesuffix(".png")].alt, path
