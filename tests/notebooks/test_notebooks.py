"""Every notebook runs once, in fast mode and cut off from the network, and its controls survive their ends; what is
stored is what a reader on the web should see."""

import builtins
import dis
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import execute as runner
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PROBE = (Path(__file__).parent / "probe.py").read_text(encoding="utf-8")
# in a namespace of its own: what it defines must not replace what callbacks look up
LAST_CELL = f"exec(compile({PROBE!r}, 'probe.py', 'exec'), {{'__name__': 'probe'}})"
MAX_BYTES = 1_000_000
BANNED = {
    "installs packages": re.compile(r"^\s*[!%]\s*(pip|conda|mamba|uv)\b", re.MULTILINE),
    "changes sys.path": re.compile(r"\bsys\.path\b"),
    "filters warnings": re.compile(r"\bwarnings\.(filterwarnings|simplefilter|catch_warnings)\b"),
}
UNWANTED = {
    "a path of this machine": re.compile(r"(^|[^A-Za-z0-9_.])(/(work|root|home|tmp|Users)/|[A-Z]:\\Users\\)", re.M),
    "an address in memory": re.compile(r"\bat 0x[0-9a-fA-F]{6,}"),
}
ROWS = ["You will be able to", "Time", "Runs in", "Data", "Before", "Words", "Paper"]  # of the card
MAX_WORDS = 2_000
CURIOUS = re.compile(r"^## [^\n]*For the curious.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
PREDICT = re.compile(r"\*+Predict\b[^*]*\*+")
NO_WORDS = re.compile(r"\$[^$]*\$|<[^>]*>|\]\([^)]*\)|[^\w\s]")  # formulas, tags, addresses, signs
NAN = re.compile(r"\bnan\b", re.IGNORECASE)
by_name = pytest.mark.parametrize("path", runner.NOTEBOOKS, ids=lambda path: path.stem)


def has_figure(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def text_of(output) -> str:
    """All text of an output that a reader could see; pictures are left out."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join(output.traceback)
    return "\n".join(str(value) for mime, value in output.data.items() if not mime.startswith("image/"))


def output_problems(notebook) -> list[str]:
    """Errors, warnings, and what differs between machines or runs, in what the cells show."""
    problems = []
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", []):
            text = text_of(output)
            if output.output_type == "error":
                problems.append(f"cell {number}: {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                problems.append(f"cell {number}: on stderr: {text[-200:]}")
            problems += [f"cell {number}: {what}" for what, pattern in UNWANTED.items() if pattern.search(text)]
    return problems


def functions(code: CodeType) -> Iterator[CodeType]:
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield part
            yield from functions(part)


def reads_and_binds(source: str) -> tuple[set[str], set[str]]:
    """Names of the notebook that a cell reads without having bound them itself (so do its functions, when they are
    called), and names that it binds."""
    code = compile(source, "cell", "exec")
    reads, binds = set(), set()
    for step in dis.get_instructions(code):
        if step.opname == "STORE_NAME":
            binds.add(step.argval)
        elif step.opname == "LOAD_NAME" and step.argval not in binds:
            reads.add(step.argval)
    steps = [step for function in functions(code) for step in dis.get_instructions(function)]
    return reads | {step.argval for step in steps if step.opname == "LOAD_GLOBAL"} - binds, binds


def rebound(cells) -> list[str]:
    """Where a cell reads a name that several cells bind, or that it binds itself afterwards: run again after all the
    others, it would see another value than before."""
    found = [reads_and_binds(cell.source) for cell in cells]
    problems = []
    for number, (reads, _) in enumerate(found, 1):
        for name in sorted(reads):
            places = [place for place, (_, binds) in enumerate(found, 1) if name in binds]
            if len(places) > 1:
                problems.append(f"code cell {number} reads {name!r}, which code cells {places} bind")
    return problems


def form_problems(notebook) -> list[str]:
    """What the students' and instructors' copies, and a reader who runs cells twice, rely on."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    problems = rebound(code)
    rows = [line.split("|")[1].strip() for line in notebook.cells[0].source.splitlines() if line.startswith("|")]
    problems += [f"the card has no row {row!r}" for row in ROWS if row not in rows]
    if (words := len(NO_WORDS.sub(" ", CURIOUS.sub("", text)).split())) > MAX_WORDS:
        problems.append(f"{words} words outside 'For the curious', which may be {MAX_WORDS}")
    asked = PREDICT.findall(text)
    if asked != [f"**Predict {number}.**" for number in range(1, len(asked) + 1)]:
        problems.append(f"not numbered as **Predict 1.**, **Predict 2.**, …: {asked}")
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    if sum("answer" in names for names in tags) != len(asked):
        problems.append("there are not as many answer cells as Predicts")
    for number, cell in enumerate(notebook.cells, 1):
        count = len(PREDICT.findall(cell.source))
        if cell.cell_type == "markdown" and not all("answer" in names for names in tags[number : number + count]):
            problems.append(f"cell {number} is not followed by an answer cell for each Predict in it")
        if ("hide-input" in tags[number - 1]) != cell.metadata.get("jupyter", {}).get("source_hidden", False):
            problems.append(f"cell {number}: the tag hide-input goes together with jupyter.source_hidden")
        for stub in set(re.findall(r"^def (my_\w+)", cell.source, re.MULTILINE)):
            if cell.cell_type == "code" and f"check.use({stub})" not in cell.source:
                problems.append(f"cell {number} does not use {stub}: NAME = check.use({stub})")
    return problems


def test_the_guides_paths_can_be_run_without_the_sections_left_out():
    guide = (runner.NOTEBOOKS[0].parents[1] / "docs" / "instructor.md").read_text(encoding="utf-8")
    paths = re.findall(r"^### (?:90 minutes|One day).*?(?=^### )", guide, re.MULTILINE | re.DOTALL)
    assert len(paths) == 2
    for path in paths:
        rows = re.findall(r"^\| \d+ \| (\d) \| (.*?) \|", path, re.MULTILINE)
        assert len(rows) > 3
        for number in {number for number, _ in rows}:
            text = " ".join(row for other, row in rows if other == number)
            ranges = re.findall(rf"\b{number}\.(\d)(?: to {number}\.(\d))?", text)
            wanted = {section for low, high in ranges for section in range(int(low), int(high or low) + 1)}
            assert wanted, f"no section of notebook {number} is named"
            known, section = set(vars(builtins)), 0  # section 0: the cells before the first one
            for cell in nbformat.read(runner.NOTEBOOKS[int(number) - 1], as_version=4).cells:
                if heading := re.search(rf"^## (?:{number}\.(\d))?", cell.source, re.MULTILINE):
                    section = int(heading[1] or 99)
                if cell.cell_type == "code" and section in wanted | {0}:
                    reads, binds = reads_and_binds(cell.source)
                    assert reads <= known, f"section {section} of notebook {number}: {reads - known}"
                    known |= binds


@pytest.mark.slow
@by_name
def test_notebook_runs_and_its_controls_survive_their_ends(path, tmp_path):
    """In another folder than its own, where it leaves nothing."""
    store, folder = tmp_path / "store", tmp_path / "folder"
    store.mkdir()
    folder.mkdir()
    notebook = runner.execute(path, store, fast=True, folder=folder, last=LAST_CELL)
    assert output_problems(notebook) == []
    assert "moved 0 controls" not in notebook.cells[-1].outputs[-1].text
    assert list(folder.iterdir()) == []


@by_name
def test_form(path):
    assert form_problems(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize(
    ("cells", "seen"),
    [
        (["x = 1", "y = x", "x = 2"], ["code cell 2 reads 'x', which code cells [1, 3] bind"]),
        (["x = 1", "x = x + 1"], ["code cell 2 reads 'x', which code cells [1, 2] bind"]),
        (
            ["x = 1", "x = 2", "def f(y):\n    return [x * y for _ in y]"],
            ["code cell 3 reads 'x', which code cells [1, 2] bind"],
        ),
        (["x = 1\nprint(x)", "x = 2\nf = lambda: x", "for x in []:\n    pass", "def f(x):\n    return x"], []),
    ],
)
def test_what_rebinding_is(cells, seen):
    assert rebound([new_code_cell(source) for source in cells]) == seen


@by_name
def test_stored_notebook(path):
    """Where this fails: ``make notebooks`` runs and stores them again."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert notebook.cells[0].source.startswith("# ")
    assert [what for cell in code for what, pattern in BANNED.items() if pattern.search(cell.source)] == []
    assert output_problems(notebook) == []
    on_purpose = [cell for cell in code if "shows-nan" in cell.metadata.get("tags", [])]
    shown = [text_of(output) for cell in code if cell not in on_purpose for output in cell.outputs]
    assert [text for text in shown if NAN.search(text)] == [], "a NaN: measure it, or say what is missing"
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from top to bottom"
    assert "fast mode on" not in text
    assert len(text.encode()) < MAX_BYTES
    assert any(has_figure(cell) for cell in code)
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if has_figure(cell):
            assert after is not None
            assert after.cell_type == "markdown", f"no paragraph reads the figure of {cell.source!r}"
    assert runner.to_text(runner.clean(notebook)) == text, "a card, views of widgets or metadata of a run"


EXPLORER = """
import ipywidgets
slider, image = ipywidgets.IntSlider(1, min=0, max=2, description="n"), ipywidgets.Image()
box = ipywidgets.VBox([slider, image])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "fault"),
    [
        ("lambda change: setattr(image, 'value', bytes([8 // change.new]))", "ZeroDivisionError"),
        ("lambda change: None", "changes no picture"),
    ],
)
def test_the_probe_sees(update, fault, tmp_path):
    path = tmp_path / "faulty.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(f"{EXPLORER}slider.observe({update}, 'value')")]), path)
    with pytest.raises(CellExecutionError, match=fault):
        runner.execute(path, tmp_path, last=LAST_CELL)


SHOWS = """
import sys, time
import ipywidgets as widgets
from IPython.display import display
from PIL import Image
from lcnn_utils.lab import track
from lcnn_utils.widgets.softplus import beta_explorer
print("before")
for _ in track(range(3), "step"):
    time.sleep(0.12)
print("after")
display(widgets.VBox([widgets.IntSlider()]), Image.new("RGB", (9, 9)), beta_explorer())
21 * 2
"""
INTERRUPTED = """
import signal, time
from lcnn_utils.lab import setup, track
lab = setup()
def work():
    for step in track(range(9), "step"):
        time.sleep(0.2)
        if step == 3:
            signal.raise_signal(signal.SIGINT)
work()
"""


@pytest.mark.slow
def test_an_interrupted_cell_says_so_in_one_line_and_run_all_stops_there(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    notebook = new_notebook(cells=[new_code_cell(INTERRUPTED), new_code_cell("print('not run')")])
    with pytest.raises(CellExecutionError) as raised:
        NotebookClient(notebook, kernel_name="python3").execute()
    assert raised.value.ename == "KeyboardInterrupt"
    first, second = notebook.cells
    assert {output.name for output in first.outputs} == {"stdout"}, "neither a traceback nor a bar on stderr"
    _, rest = "".join(output.text for output in first.outputs).rstrip("\n").split("\n")
    assert "step:  33%" in rest
    assert re.search(r"\r +\rinterrupted", rest), "the bar is wiped out first"
    assert second.outputs == []


@pytest.mark.slow
def test_what_is_stored_is_clean_and_a_run_that_fails_is_not_stored(tmp_path, monkeypatch, capsys):
    good, bad = tmp_path / "01.ipynb", tmp_path / "02.ipynb"
    cells = [new_code_cell(""), new_code_cell(SHOWS, id="mine", metadata={"tags": ["t"], "collapsed": True})]
    nbformat.write(new_notebook(cells=[*cells, new_markdown_cell("read", id="last")]), good)
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), bad)
    before = bad.read_bytes()
    monkeypatch.setattr(runner, "NOTEBOOKS", [good, bad])
    monkeypatch.setattr("sys.argv", ["execute.py"])
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert runner.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert bad.read_bytes() == before
    notebook = nbformat.read(good, as_version=4)
    shown = notebook.cells[1]
    assert (shown.id, shown.metadata, shown.execution_count) == ("mine", {"tags": ["t"]}, 1)
    assert [output.output_type for output in shown.outputs] == ["stream", *["display_data"] * 3, "execute_result"]
    _, _, picture, line, _ = shown.outputs
    assert set(picture.data) == {"image/png"}
    assert line.data["text/html"].startswith("<p>β = 2: largest curvature <b>0.5</b>")
    assert shown.outputs[0].text == "before\nafter\n"
