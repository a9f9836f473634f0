"""The notebooks to write in: a student's without outputs and answers, an instructor's with the solutions.

They are made from ``notebooks/`` when JupyterLab starts. No copy is ever written over: where the original has changed
since, the newer version is put beside it.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import write_text

Notebook = dict[str, Any]
REVEAL = "<details><summary>Read on when you have answered</summary>\n\n{}\n\n</details>"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUR_CHECK = re.compile(r"^ *assert lab\.fast or .*\n", re.MULTILINE)
MEASURED = re.compile(r"^\| Runs in \|.*", re.MULTILINE)  # on the card: no change of the notebook
PREDICT = re.compile(r"^\*\*Predict (\d+)\.\*\*\s*(.*?)(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])  # a text, or a list of its lines


def tagged(notebook: Notebook, tag: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", ())]


def without_outputs(notebook: Notebook) -> Notebook:
    """A copy of a notebook as if it had never been run, and without the lines that hold its text against a full run:
    on another machine, with other weights, a student could do nothing about them."""
    made = copy.deepcopy(notebook)
    made["metadata"].pop("widgets", None)
    for cell in made["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
            cell["source"] = OUR_CHECK.sub("", source(cell))
    return made


def student_copy(notebook: Notebook) -> Notebook:
    """A notebook without outputs, its cells tagged ``reveal`` folded."""
    made = without_outputs(notebook)
    for cell in tagged(made, "reveal"):
        cell["source"] = REVEAL.format(source(cell))
    return made


def instructor_copy(notebook: Notebook, guide_section: str) -> Notebook:
    """A notebook without outputs, with the guide's solutions in place of the stubs ``my_NAME``, and its answers to
    **Predict k.** in the k-th cell tagged ``answer``. What the guide lacks stays as it is."""
    made = without_outputs(notebook)
    solutions: dict[str, str] = {}
    for block in BLOCK.findall(guide_section):
        solutions |= {function.name: block.strip() for function in functions(block)}
    for cell in made["cells"]:
        if cell["cell_type"] == "code":
            lines = source(cell).split("\n")
            for stub in reversed(functions(source(cell))):
                if stub.name in solutions:
                    lines[stub.lineno - 1 : stub.end_lineno] = [solutions[stub.name]]
            cell["source"] = "\n".join(lines)
    answers = dict(PREDICT.findall(guide_section))
    for number, cell in enumerate(tagged(made, "answer"), 1):
        if str(number) in answers:
            cell["source"] = f"*Expected answer:* {answers[str(number)]}"
    return made


def functions(code: str) -> list[ast.FunctionDef]:
    """The functions called ``my_NAME`` that a cell defines, from top to bottom; none where it is not plain Python."""
    with suppress(SyntaxError):
        return [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name[:3] == "my_"]
    return []


def guide_sections(project: Path) -> dict[str, str]:
    """The sections of the instructor's guide that belong to a notebook: ``"07"``: text."""
    guide = project / "docs" / "instructor.md"
    parts = re.split(r"^## (\d+) · ", guide.read_text(encoding="utf-8") if guide.is_file() else "", flags=re.MULTILINE)
    return {f"{int(number):02}": text.split("\n## ")[0] for number, text in zip(parts[1::2], parts[2::2], strict=True)}


def version_of(path: Path) -> str | None:
    """The version of the original that a copy was made from; None where it doesn't say."""
    with suppress(ValueError, KeyError, TypeError):
        return json.loads(path.read_text(encoding="utf-8"))["metadata"]["lcnn"]["version"]
    return None


def make_copies(project: Path, folder: Path, *, instructor: bool = False) -> None:
    """Write into ``folder`` the copies that it lacks, and say which ones are new beside older ones."""
    sections = guide_sections(project) if instructor else {}
    for original in sorted((project / "notebooks").glob("*.ipynb")):
        notebook = json.loads(original.read_text(encoding="utf-8"))
        section = sections.get(original.name[:2], "")
        content = [section, *((cell["cell_type"], MEASURED.sub("", source(cell))) for cell in notebook["cells"])]
        version = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        path, number = folder / original.name, 1
        if path.exists():
            if version in map(version_of, folder.glob(f"{original.stem}*.ipynb")):
                continue
            while path.exists():
                number += 1
                path = folder / f"{original.stem} ({number}).ipynb"
            print(f"{original.stem} has changed: the newer one is {folder.name}/{path.name}, yours stays", flush=True)
        made = instructor_copy(notebook, section) if instructor else student_copy(notebook)
        made["metadata"]["lcnn"] = {"notebook": original.stem, "version": version}
        write_text(path, json.dumps(made, ensure_ascii=False, indent=1) + "\n")
