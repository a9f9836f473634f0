"""The copies that students and instructors write in, and what JupyterLab may save."""

import asyncio
import json

import pytest

from lcnn_utils.cli import copies
from lcnn_utils.cli.contents import SCRIPT, VIEW, Contents
from lcnn_utils.cli.copies import instructor_copy, make_copies, student_copy

STUB = 'import math\n\n\ndef my_half(x):\n    """Half of x."""\n    ...\n\n\nhalf = check.use(my_half)'
GUIDE = """# Teaching

## 1 · Halves

**Goals.** To halve.

**Predict 1.** One
half.

**Predict 2.** None.

```python
def my_half(x):
    return x / 2
```

**Discuss.** Why?

## Next

**Predict 1.** Of another section.
"""


def code(source, **more):
    return {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "execution_count": None} | more


def prose(source, *tags):
    return {"cell_type": "markdown", "source": source, "metadata": {"tags": list(tags)}}


def notebook(*cells):
    return {"cells": list(cells), "metadata": {"widgets": {"state": 1}}, "nbformat": 4, "nbformat_minor": 5}


PAGE = notebook(
    prose("| Runs in | 3 s |\n\n**Predict 1.** How much?"),
    prose("*Your answer:*", "answer"),
    code(
        f"assert lab.fast or x > 3\n{STUB}".splitlines(keepends=True),
        outputs=[{"output_type": "stream"}],
        execution_count=3,
    ),
    code("%matplotlib inline\ndef my_half(x): ..."),
    prose("A half.", "reveal"),
    prose("*Your answer:*", "answer"),
)


@pytest.fixture
def project(tmp_path):
    for folder in ("notebooks", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "docs" / "instructor.md").write_text(GUIDE, encoding="utf-8")
    (tmp_path / "notebooks" / "01_halves.ipynb").write_text(json.dumps(PAGE), encoding="utf-8")
    return tmp_path


def test_a_students_copy_shows_no_output_and_no_answer():
    made = student_copy(PAGE)
    assert made["cells"][2]["outputs"] == []
    assert made["cells"][2]["execution_count"] is None
    assert made["metadata"] == {}
    assert made["cells"][4]["source"].startswith("<details>")
    assert "A half." in made["cells"][4]["source"]
    assert PAGE["cells"][2]["execution_count"] == 3, "the original stays"


def test_an_instructors_copy_has_the_solutions_and_answers():
    made = instructor_copy(PAGE, GUIDE.split("\n## Next")[0])
    sources = ["".join(cell["source"]) for cell in made["cells"]]
    assert sources[1] == "*Expected answer:* One\nhalf."
    assert sources[2] == "import math\n\n\ndef my_half(x):\n    return x / 2\n\n\nhalf = check.use(my_half)"
    assert sources[3:5] == ["%matplotlib inline\ndef my_half(x): ...", "A half."]
    assert sources[5] == "*Expected answer:* None."
    assert ["".join(cell["source"]) for cell in instructor_copy(PAGE, "")["cells"]][2] == STUB


@pytest.mark.parametrize("instructor", [False, True])
def test_a_copy_is_never_overwritten(instructor, project, capsys):
    folder = project / "copies"
    original, copy = project / "notebooks" / "01_halves.ipynb", folder / "01_halves.ipynb"
    make_copies(project, folder, instructor=instructor)
    assert "Of another section" not in copy.read_text(encoding="utf-8")
    mine = json.loads(copy.read_text(encoding="utf-8"))
    assert mine["metadata"]["lcnn"]["notebook"] == "01_halves"
    mine["cells"].append(prose("mine"))
    copy.write_text(json.dumps(mine), encoding="utf-8")
    card, answer, stub, *rest = PAGE["cells"]
    card = card | {"source": card["source"].replace("3 s", "5 s")}
    rerun = PAGE | {"cells": [card, answer, stub | {"outputs": []}, *rest]}
    original.write_text(json.dumps(rerun), encoding="utf-8")
    make_copies(project, folder, instructor=instructor)
    assert capsys.readouterr().out == "", "other outputs, and another time, make no new version"
    original.write_text(json.dumps(notebook(*PAGE["cells"], prose("new"))), encoding="utf-8")
    for _ in range(2):
        make_copies(project, folder, instructor=instructor)
    assert capsys.readouterr().out.count("01_halves (2).ipynb") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["01_halves (2).ipynb", "01_halves.ipynb"]
    assert json.loads(copy.read_text(encoding="utf-8")) == mine
    guide = project / "docs" / "instructor.md"
    guide.write_text(GUIDE.replace("To halve", "To halve well"), encoding="utf-8")
    make_copies(project, folder, instructor=instructor)
    assert (folder / "01_halves (3).ipynb").exists() == instructor


@pytest.mark.parametrize("text", ["{}", "not even JSON", '{"metadata": {"lcnn": 3}}'])
def test_a_file_of_ones_own_is_left_alone(text, project):
    folder = project / "copies"
    folder.mkdir()
    (folder / "01_halves.ipynb").write_text(text, encoding="utf-8")
    for _ in range(2):
        make_copies(project, folder)
    assert (folder / "01_halves.ipynb").read_text(encoding="utf-8") == text
    assert copies.version_of(folder / "01_halves (2).ipynb")
    assert len(list(folder.iterdir())) == 2


def test_jupyter_saves_no_dead_widget_and_changes_no_original(project):
    shown = [{VIEW: {}, "text/html": "still"}, {VIEW: {}, "text/plain": "no picture"}, {"text/plain": "3"}]
    all_of_them = [*shown, {SCRIPT: "alert(1)"}]
    outputs = [{"output_type": "display_data", "data": data, "metadata": {}} for data in all_of_them]
    page = notebook(code("explorer()", outputs=outputs, id="a")) | {"metadata": {}}
    contents = Contents(root_dir=str(project))
    saved = asyncio.run(contents.save({"type": "notebook", "content": page}, "mine.ipynb"))
    assert saved["writable"]
    (cell,) = json.loads((project / "mine.ipynb").read_text(encoding="utf-8"))["cells"]
    assert [sorted(output["data"]) for output in cell["outputs"]] == [["text/html"], sorted(shown[1]), ["text/plain"]]
    assert not asyncio.run(contents.get("notebooks/01_halves.ipynb", content=False))["writable"]
