"""Run notebooks in full and write them back with clean outputs.

    python tests/notebooks/execute.py [NAME ...]

NAME is the beginning of a notebook's name, such as ``01``; without one it is every notebook. Views of widgets are left
out: without a kernel they are empty boxes, and the picture that an explorer began with is stored beside its view. What
the last cell says (seconds, memory) also goes into the row "Runs in" of the notebook's first cell.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

from lcnn_utils.cli.grade import isolated
from lcnn_utils.files import write_text

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
TIMEOUT = 300  # seconds a cell may take
VIEW = "application/vnd.jupyter.widget-view+json"
SCRIPT = "application/javascript"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
KEPT = ("tags", "jupyter")  # of a cell's metadata: what its author wrote, not what a run left behind
RAN = re.compile(r"^ran in (.*) \(", re.MULTILINE)  # what Lab.finish says
CARD = re.compile(r"^\| Runs in \|.*\|$", re.MULTILINE)


def execute(path: Path, store: Path, *, fast: bool = False, folder: Path | None = None, last: str = "") -> NotebookNode:
    """Run a notebook with this environment's kernel, cut off from datasets and the network; it is not written.

    Args:
        path: the notebook.
        store: folder for trained models.
        fast: run in fast mode (``LCNN_FAST=1``).
        folder: the folder to run in; the notebook's own by default.
        last: code of one more cell, run at the end.

    Raises:
        CellExecutionError: a cell raised.
        CellTimeoutError: a cell took too long.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what is seen afterwards was made now
            cell.outputs, cell.execution_count = [], None
    if last:
        notebook.cells.append(nbformat.v4.new_code_cell(last))
    env = isolated(store) | {"LCNN_FAST": "1" if fast else "0", "TQDM_DISABLE": "1"}  # no progress bars
    env |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # a warning of the debugger that ipykernel loads
    resources = {"metadata": {"path": str(folder or path.parent)}}
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources).execute(env=env)
    return notebook


def stored_outputs(cell: NotebookNode) -> list[NotebookNode]:
    """A cell's outputs without scripts and views of widgets; text that came in pieces is put together. An explorer's
    picture and the line below it become two outputs: GitHub shows no picture that stands in HTML."""
    kept: list[NotebookNode] = []
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            data["image/png"] = in_256_colours(data["image/png"])
        if data.pop(VIEW, None) or SCRIPT in data:
            if "image/png" in data:
                line = re.sub("<img.*?>", "", data["text/html"])
                still = {"image/png": data["image/png"]}, {"text/html": line}
                kept += [nbformat.v4.new_output("display_data", part) for part in still]
            continue
        stream = output.get("name")
        if stream and kept and kept[-1].get("name") == stream:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def in_256_colours(png: str) -> str:
    """A picture in base64, as another one that looks the same in less than half the bytes."""
    picture, smaller = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    if picture.mode == "P":
        return png
    picture.convert("RGB").quantize().save(smaller, "png", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def fill_card(notebook: NotebookNode) -> None:
    """Write into the row "Runs in" of the first cell what the last one says."""
    first, last = notebook.cells[0], notebook.cells[-1]
    said = RAN.search("".join(output.get("text", "") for output in last.get("outputs", [])))
    if said:
        first.source = CARD.sub(f"| Runs in | {said[1]} |", first.source)


def clean(notebook: NotebookNode) -> NotebookNode:
    """Take out, in place, all that differs between two runs or machines, and all that needs a live kernel."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": LANGUAGE})
    count = 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({name: cell.metadata[name] for name in KEPT if name in cell.metadata})
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        if cell.source.strip():
            count += 1
            cell.execution_count = count
        cell.outputs = stored_outputs(cell)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
            if "metadata" in output:  # sizes of pictures stay
                sizes = {mime: size for mime, size in output.metadata.items() if mime in output.get("data", {})}
                output.metadata = nbformat.from_dict({mime: size for mime, size in sizes.items() if size})
    fill_card(notebook)
    return notebook


def to_text(notebook: NotebookNode) -> str:
    """The notebook as it is stored; nbformat.ValidationError if it is no valid notebook."""
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def main() -> int:
    """The command line; returns the exit status: 1 if a notebook fails, which is then not written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="how the notebook's name begins, such as 01")
    names = tuple(parser.parse_args().names)
    paths = [path for path in NOTEBOOKS if not names or path.name.startswith(names)]
    if not paths:
        parser.error(f"no notebook begins with {' or '.join(names)}: there are {', '.join(p.stem for p in NOTEBOOKS)}")
    status = 0
    for path in paths:
        began = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(prefix="store-") as store:
                text = to_text(clean(execute(path, Path(store))))
            write_text(path, text)
        except (CellExecutionError, CellTimeoutError, DeadKernelError, OSError) as error:
            print(f"{path.stem}: {str(error).strip()}\n(not written)", file=sys.stderr)
            status = 1
        else:
            print(f"{path.stem}: {time.perf_counter() - began:.1f} s, {len(text.encode()) / 1000:.0f} kB", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
