"""Every notebook runs, in fast mode and cut off from the network; its explorers survive every control at both ends;
what is stored is what a reader on the web should see. The tests of the test come first."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import execute as runner
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

PATHS = runner.chosen([])
PROBE = (Path(__file__).parent / "probe.py").read_text(encoding="utf-8")
# in a namespace of its own: what it defines must not replace what callbacks look up
PROBE_CELL = f"exec(compile({PROBE!r}, 'probe.py', 'exec'), {{'__name__': 'probe'}})"
RECORD = "application/vnd.lcnn.probe+json"
WIDGETS = "application/vnd.jupyter.widget-state+json"
by_name = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder for trained models, shared by the notebooks."""
    return tmp_path_factory.mktemp("store")


def probe(path: Path, store: Path) -> tuple[NotebookNode, dict, float]:
    """Run a notebook in fast mode and move its controls; returns it, what the probe recorded, and the seconds."""
    notebook, seconds = runner.execute(path, extra_source=PROBE_CELL, fast=True, store=store)
    last = notebook.cells.pop()
    (record,) = (output.data[RECORD] for output in last.outputs if RECORD in output.get("data", {}))
    return notebook, record, seconds


def unregistered(notebook: NotebookNode, record: dict) -> list[str]:
    """The controls that exist in the kernel but are not in ``CONTROLS``: nobody would move them."""
    state = notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    known = {control["id"] for control in record["controls"]}
    # of ipywidgets' models exactly those that a reader can operate can be disabled
    return [
        f"{model['model_name']} {model['state'].get('description', '')!r}"
        for key, model in state.items()
        if "disabled" in model["state"] and key not in known
    ]


def shown_errors(notebook: NotebookNode) -> list[str]:
    """Errors that ``Output`` widgets hold: they are in no cell's outputs."""
    state = notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    held = [output for model in state.values() for output in model["state"].get("outputs", [])]
    return [f"{output['ename']}: {output['evalue']}" for output in held if output["output_type"] == "error"]


# ---------------------------------------------------------------------------------------- the tests of the test
HEAD = """
import sys, types
import ipywidgets as widgets
module = sys.modules["lcnn_utils.widgets"] = types.ModuleType("lcnn_utils.widgets")  # stands for it, without torch
module.CONTROLS = []
image = widgets.Image(value=b"\\x89PNG start")

def control(widget, image=image):
    module.CONTROLS.append((widget, image))
    return widget

def draw(change):
    image.value = b"\\x89PNG " + repr(change.new).encode()
"""
SLIDER = """
slider = control(widgets.FloatLogSlider(value=1, min=-2, max=3, base=10, description="β"))
"""
FINE = HEAD + SLIDER + "slider.observe(draw, 'value')\n"


@pytest.fixture
def throwaway(tmp_path):
    """Writes a notebook of the given code cells and runs it; returns its record and what is wrong outside of it."""

    def run(*sources: str) -> tuple[dict, list[str]]:
        path = tmp_path / "throwaway.ipynb"
        nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
        notebook, record, _ = probe(path, tmp_path / "store")
        return record, [*runner.output_problems(notebook), *unregistered(notebook, record), *shown_errors(notebook)]

    return run


def test_the_runner_passes_an_explorer_that_works(throwaway):
    more = """
for widget in (widgets.Dropdown(options=["a", "b"]), widgets.Checkbox(), widgets.IntSlider(min=0, max=3, value=0),
               widgets.ToggleButtons(options=[("one", 1), ("two", 2)]), widgets.FloatRangeSlider(min=-1, max=1)):
    control(widget).observe(draw, "value")
control(widgets.Button(description="again"), None).on_click(lambda button: None)
widgets.VBox([*(widget for widget, _ in module.CONTROLS), image])
"""
    record, problems = throwaway(FINE, more)
    assert (record["raised"], record["still"], problems) == ([], [], [])
    assert [control["name"].split()[0] for control in record["controls"]] == [
        *("FloatLogSlider", "Dropdown", "Checkbox", "IntSlider", "ToggleButtons", "FloatRangeSlider", "Button")
    ]


BREAKS_AT_THE_END = """
def redraw(beta):
    if beta > 999:
        raise ZeroDivisionError("only at the end")
    image.value = b"\\x89PNG " + repr(beta).encode()
"""


BROKEN = {  # what goes wrong: (code of a cell, what the record must say)
    "observe": (
        "slider.observe(lambda change: redraw(change.new), 'value')",
        r"FloatLogSlider β → 1000\.0: ZeroDivisionError",
    ),
    "interact": (
        "interactive = widgets.interactive(redraw, beta=slider)",
        r"β → 1000\.0: ZeroDivisionError: only at the end",
    ),
    "output": (
        "out = widgets.Output()\ndef caught(change):\n    with out:\n        redraw(change.new)\n    out.outputs = ()\n"
        "slider.observe(caught, 'value')",
        r"β → 1000\.0: ZeroDivisionError: only at the end",
    ),
    "click": (
        "control(widgets.Button(description='go')).on_click(lambda button: redraw(1000))",
        r"Button go, clicked: ZeroDivisionError",
    ),
    "warning": (
        "import warnings\nslider.observe(lambda change: change.new > 999 and warnings.warn('overflow'), 'value')",
        r"β → 1000\.0: on stderr: .*overflow",
    ),
    "corner": (
        "other, beta = control(widgets.IntSlider(min=0, max=3, value=0, description='depth'), image), slider\n"
        "other.observe(draw, 'value')\n"
        "other.observe(lambda change: other.value == 3 and beta.value > 99 and redraw(1000), 'value')",
        r"all to an end, IntSlider depth → 3: ZeroDivisionError",
    ),
    "unknown": ("control(widgets.Text()).observe(draw, 'value')", r"knows no ends of a Text"),
    "picture": ("slider.observe(lambda change: setattr(image, 'value', b'GIF'), 'value')", r"the image holds no PNG"),
}


def test_the_runner_sees_a_callback_that_breaks_only_at_the_end(throwaway):
    """Every kind of fault, in one notebook, each with a slider (named after it) and an image of its own."""
    own = 'image = widgets.Image(value=b"\\x89PNG start")\n'
    cells = []
    for name, (code, _) in BROKEN.items():
        slider = SLIDER.replace("))", "), image)").replace("β", name)
        breaks = BREAKS_AT_THE_END.replace("def redraw(beta)", "def redraw(beta, image=image)")
        cells.append(
            own + slider + breaks + code.replace("def caught(change):", "def caught(change, out=out, redraw=redraw):")
        )
    record, _ = throwaway(HEAD, *cells)
    for name, (_, said) in BROKEN.items():
        wanted = said.replace("β", name)
        assert any(re.search(wanted, text) for text in record["raised"]), (wanted, record["raised"])


def test_the_runner_sees_a_control_that_redraws_nothing(throwaway):
    record, problems = throwaway(FINE + "control(widgets.IntSlider(min=0, max=3, description='dead'))")
    assert (record["still"], record["raised"], problems) == (["IntSlider dead"], [], [])


def test_the_runner_sees_a_control_that_no_factory_made_and_an_error_in_an_output(throwaway):
    shown = (
        "out = widgets.Output()\nwith out:\n    1 / 0\nwidgets.VBox([slider, widgets.IntSlider(description='x'), out])"
    )
    _, problems = throwaway(FINE, shown)
    assert problems == ["IntSliderModel 'x'", "ZeroDivisionError: division by zero"]


def test_the_runner_sees_a_cell_that_fails(throwaway):
    with pytest.raises(CellExecutionError, match="NameError"):
        throwaway(FINE, "missing")


def stored(**change) -> str:
    """The text of a notebook stored as it should be, but for one change."""
    figure = new_output("display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})
    says = new_output("stream", name="stdout", text=change.get("says", "fast mode off\n"))
    extra = change.get("outputs", [])
    code = new_code_cell(change.get("source", "show()"), outputs=[says, figure, *extra], execution_count=1)
    after = [new_markdown_cell("What one sees.")] if change.get("read", True) else []
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), code, *after])
    if change.get("clean", True):
        count, shown = change.get("count", 1), list(code.outputs)
        runner.clean(notebook)
        code.execution_count, code.outputs = count, shown
    return nbformat.writes(notebook) + "\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"clean": False}, "its metadata is not clean"),
        ({"count": None}, "not stored as run from top to bottom: the cells are numbered [None]"),
        ({"count": 7}, "not stored as run from top to bottom: the cells are numbered [7]"),
        ({"read": False}, "cell 2: no paragraph after it reads its figure"),
        ({"source": "!pip install x"}, "cell 2: installs packages"),
        ({"source": "import sys\nsys.path.append('.')"}, "cell 2: changes sys.path"),
        ({"source": "import warnings\nwarnings.simplefilter('ignore')"}, "cell 2: filters warnings"),
        ({"source": "x\n" * 31}, "cell 2: 31 lines, more than 30"),
        ({"says": "fast mode on (small settings)\n"}, "cell 2: was run in fast mode"),
        ({"says": "written\nto /work/x.png\n"}, "cell 2: shows a path of this machine: to /work/x.png"),
        ({"says": "/home/me/x\n"}, "cell 2: shows a path of this machine: /home/me/x"),
        ({"says": "C:\\Users\\me\n"}, "cell 2: shows a path of this machine: C:\\Users\\me"),
        ({"says": "see https://x.org/home/a and ../work/b and data/tmp/c\n"}, None),
        (
            {"says": "<f at 0x7f00aa11bb>\n"},
            "cell 2: shows an address in memory (at 0x7f00aa11bb), which differs at each run",
        ),
        ({"says": "x" * 1_000_001}, "1,001,"),
        (
            {"outputs": [new_output("error", ename="E", evalue="no", traceback=["E"])]},
            "cell 2: error E: no",
        ),
        (
            {"outputs": [new_output("stream", name="stderr", text="UserWarning: odd\n")]},
            "cell 2: writes to stderr: UserWarning: odd",
        ),
        (
            {"outputs": [new_output("stream", name="stderr", text="\r 50%|##  | 1/2\r          \r")]},
            "cell 2: a progress bar",
        ),
        (
            {"outputs": [new_output("display_data", data={runner.VIEW: {"model_id": "x"}, "text/plain": "VBox()"})]},
            "cell 2: a dead view of a widget",
        ),
    ],
    ids=lambda value: next(iter(value), "good") if isinstance(value, dict) else "",
)
def test_the_check_of_stored_notebooks_sees(change, said):
    problems = runner.stored_problems(stored(**change))
    if said is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert problems[0].startswith(said)


def test_a_notebook_without_a_picture_is_seen():
    notebook = runner.clean(new_notebook(cells=[new_code_cell("1", execution_count=1)]))
    assert runner.stored_problems(runner.to_text(notebook)) == ["shows no picture"]


def test_storing_takes_out_all_that_differs_between_two_runs(tmp_path):
    path = tmp_path / "nb.ipynb"
    code = """
import sys, time
import ipywidgets as widgets
from IPython.display import Image, display
from tqdm import tqdm
print("before")
for _ in tqdm(range(3), leave=False):
    time.sleep(0.12)
print("after")
display(widgets.VBox([widgets.IntSlider()]), Image(b"\\x89PNG\\r\\n\\x1a\\n", format="png"))
21 * 2
"""
    cells = [new_code_cell(""), new_code_cell(code, id="mine", metadata={"tags": ["t"], "collapsed": True})]
    nbformat.write(new_notebook(cells=[*cells, new_markdown_cell("read", id="last")]), path)
    assert runner.store(path) == []
    first = path.read_text(encoding="utf-8")
    assert runner.store(path) == []
    assert path.read_text(encoding="utf-8") == first
    notebook = nbformat.reads(first, as_version=4)
    assert [cell.id for cell in notebook.cells][1:] == ["mine", "last"]
    assert notebook.cells[1].metadata == {"tags": ["t"]}
    assert [output.output_type for output in notebook.cells[1].outputs] == ["stream", "display_data", "execute_result"]
    assert notebook.cells[1].outputs[0].text == "before\nafter\n"
    assert [file.name for file in tmp_path.iterdir()] == ["nb.ipynb"]


def test_a_run_that_fails_stores_nothing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "07_x.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    monkeypatch.setattr(runner, "chosen", lambda names: [path])
    assert runner.main(["--store"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_unknown_name_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        runner.main(["--check", "99"])
    assert "no notebook begins with '99': there are" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- the notebooks
def test_there_are_notebooks():
    assert PATHS, f"no notebooks in {runner.NOTEBOOKS}"


@by_name
def test_notebook_runs_and_its_controls_survive_their_ends(path, store, record_property):
    notebook, record, seconds = probe(path, store)
    record_property("seconds", round(seconds, 1))
    print(f"{path.stem}: {seconds:.1f} s in fast mode, {len(record['controls'])} controls, "
          f"slowest redraw {1000 * record['slowest']:.0f} ms")  # fmt: skip
    assert Path(record["prefix"]).resolve() == Path(sys.prefix).resolve(), "it ran in another environment's kernel"
    assert record["raised"] == []
    assert record["still"] == [], "these controls change no picture"
    assert unregistered(notebook, record) == [], "these controls were not made by the factory"
    assert shown_errors(notebook) == []
    assert runner.output_problems(notebook) == []
    if any(runner.is_view(output) for _, output in runner.outputs(notebook)):
        assert any(control["redraws"] for control in record["controls"]), "it shows widgets but no control"


@pytest.mark.skipif(not PATHS, reason="no notebooks")
def test_a_notebook_runs_from_another_folder_and_leaves_nothing_there(tmp_path, store):
    """The first one, which is the cheapest."""
    runner.execute(PATHS[0], fast=True, store=store, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@by_name
def test_stored_notebooks_are_clean(path):
    """Where this fails: ``make notebooks`` runs and stores them anew."""
    assert runner.stored_problems(path.read_text(encoding="utf-8")) == []
