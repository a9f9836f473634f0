"""Run the notebooks, store them executed, and check what is stored.

    python tests/notebooks/execute.py --store [NAME ...]    run in full and write back with clean outputs
    python tests/notebooks/execute.py --check [NAME ...]    look at what is stored, run nothing

NAME is the beginning of a notebook's name, such as ``01``; without one it is every notebook. What readers on the web
see is the static twin of each explorer: a stored widget view would be an empty box there, so views are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TIMEOUT = 300  # seconds a cell may take
MAX_BYTES = 1_000_000
MAX_LINES = 30
VIEW = "application/vnd.jupyter.widget-view+json"
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
BANNED = {
    "installs packages": re.compile(r"^\s*[!%]\s*(pip|conda|mamba|uv)\b", re.MULTILINE),
    "changes sys.path": re.compile(r"\bsys\.path\b"),
    "filters warnings": re.compile(r"\bwarnings\.(filterwarnings|simplefilter|catch_warnings)\b"),
}
MACHINE_PATH = re.compile(r"(^|[^A-Za-z0-9_.])(/(work|root|home|tmp|Users)/|[A-Z]:\\Users\\)", re.MULTILINE)
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{6,}")
PROGRESS = re.compile(r"\d+%\||\d+(it|s)/(s|it)\b|\[[\d:]+<|\d+it \[")  # a line that tqdm writes


# -------------------------------------------------------------------------------------------------------- run
def merged(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """The outputs, with text that came in pieces, one after another on the same stream, put together."""
    whole: list[NotebookNode] = []
    for output in outputs:
        last = whole[-1] if whole else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            whole.append(output)
    return whole


def environment(*, fast: bool, store: Path | None, scratch: Path) -> dict[str, str]:
    """The kernel's environment. With a ``store`` nothing comes from outside: no datasets, no models, no network."""
    env = {name: value for name, value in os.environ.items() if name != "LCNN_FAST"}
    env["IPYTHONDIR"] = str(scratch)  # not the reader's own start-up files
    env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # a warning of the debugger that ipykernel loads
    if fast:
        env["LCNN_FAST"] = "1"
    if store is not None:
        env |= {"LCNN_STORE": str(store), "LCNN_DATA": str(store / "no-datasets")}
        for name in ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy"):
            env |= {name: "http://127.0.0.1:9", name.upper(): "http://127.0.0.1:9"}  # nobody listens there
        env |= {"no_proxy": "", "NO_PROXY": "", "HF_HUB_OFFLINE": "1"}
    return env


def execute(
    path: Path,
    *,
    extra_source: str | None = None,
    fast: bool = False,
    store: Path | None = None,
    cwd: Path | None = None,
    timeout: float = TIMEOUT,
) -> tuple[NotebookNode, float]:
    """Run a notebook with this environment's kernel; returns it with its outputs, and the seconds it took.

    Args:
        path: the notebook, which is not written.
        extra_source: code of one more cell, run at the end.
        fast: run in fast mode (``LCNN_FAST=1``).
        store: folder for trained models; with one, the notebook is cut off from datasets and the network.
        cwd: folder to run in; the notebook's own by default.
        timeout: seconds that one cell may take.

    Raises:
        CellExecutionError: a cell raised.
        CellTimeoutError: a cell took too long.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what is seen afterwards was made now
            cell.outputs, cell.execution_count = [], None
    notebook.metadata.pop("widgets", None)
    if extra_source is not None:
        notebook.cells.append(nbformat.v4.new_code_cell(extra_source))
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(cwd or path.resolve().parent)}},
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ipython-") as scratch:
        client.execute(env=environment(fast=fast, store=store, scratch=Path(scratch)))
    seconds = time.perf_counter() - began
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
    return notebook, seconds


# ------------------------------------------------------------------------------------------------------ store
def outputs(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Every output with the number of its cell, counted from 1."""
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", []):
            yield number, output


def is_progress(output: NotebookNode) -> bool:
    """Whether an output is stderr that holds nothing but progress bars."""
    if output.output_type != "stream" or output.name != "stderr":
        return False
    lines = [line for line in re.split(r"[\r\n]+", output.text) if line.strip()]
    return all(PROGRESS.search(line) for line in lines)


def is_view(output: NotebookNode) -> bool:
    """Whether an output is a view of a widget, or the text that stands for one."""
    return VIEW in output.get("data", {})


def clean(notebook: NotebookNode) -> NotebookNode:
    """Take out, in place, all that differs between two runs or machines, and all that needs a live kernel."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": LANGUAGE})
    count = 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({name: cell.metadata[name] for name in KEPT if name in cell.metadata})
        if cell.cell_type != "code":
            continue
        if cell.source.strip():
            count += 1
        cell.execution_count = count if cell.source.strip() else None
        cell.outputs = merged([output for output in cell.outputs if not is_progress(output) and not is_view(output)])
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
            if "metadata" in output:  # sizes of pictures stay
                output.metadata = nbformat.from_dict(
                    {mime: value for mime, value in output.metadata.items() if mime in output.get("data", {}) and value}
                )
    return notebook


def to_text(notebook: NotebookNode) -> str:
    """The notebook as it is stored.

    Raises:
        nbformat.ValidationError: it is no valid notebook.
    """
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


# ------------------------------------------------------------------------------------------------------ check
def text_of(output: NotebookNode) -> str:
    """All text of an output that a reader could see; pictures are left out."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join(output.traceback)
    shown = [value for mime, value in output.data.items() if not mime.startswith(("image/png", "image/jpeg"))]
    return "\n".join(value if isinstance(value, str) else repr(value) for value in shown)


def has_figure(cell: NotebookNode) -> bool:
    """Whether a cell shows a picture."""
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def source_problems(notebook: NotebookNode) -> list[str]:
    """What is wrong with what the author wrote."""
    found = []
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "code":
            continue
        if (lines := len(cell.source.splitlines())) > MAX_LINES:
            found.append(f"cell {number}: {lines} lines, more than {MAX_LINES}")
        found += [f"cell {number}: {what}" for what, pattern in BANNED.items() if pattern.search(cell.source)]
    ids = [cell.get("id") for cell in notebook.cells]
    if None in ids or len(set(ids)) != len(ids):
        found.append("cells without an id, or two with the same")
    return found


def output_problems(notebook: NotebookNode) -> list[str]:
    """What is wrong with what the cells show, in a notebook that has been run."""
    found = []
    for number, output in outputs(notebook):
        text = text_of(output)
        if output.output_type == "error":
            found.append(f"cell {number}: error {output.ename}: {output.evalue}")
        if output.output_type == "stream" and output.name == "stderr" and not is_progress(output):
            found.append(f"cell {number}: writes to stderr: {text.strip().splitlines()[-1][:200]}")
        if hit := MACHINE_PATH.search(text):
            line = text[text.rfind("\n", 0, hit.end()) + 1 :].splitlines()[0]
            found.append(f"cell {number}: shows a path of this machine: {line[:200]}")
        if hit := ADDRESS.search(text):
            found.append(f"cell {number}: shows an address in memory ({hit[0]}), which differs at each run")
    return found


def stored_problems(text: str) -> list[str]:
    """Everything wrong with a stored notebook, given as the text of its file; empty if it is as it should be."""
    notebook = nbformat.reads(text, as_version=4)
    found = source_problems(notebook) + output_problems(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"not stored as run from top to bottom: the cells are numbered {counts}")
    if (size := len(text.encode())) >= MAX_BYTES:
        found.append(f"{size:,} bytes, more than {MAX_BYTES:,}")
    if not any(has_figure(cell) for cell in notebook.cells):
        found.append("shows no picture")
    for number, cell in enumerate(notebook.cells, 1):
        after = notebook.cells[number] if number < len(notebook.cells) else None
        if has_figure(cell) and (after is None or after.cell_type != "markdown"):
            found.append(f"cell {number}: no paragraph after it reads its figure")
    for number, output in outputs(notebook):
        if is_view(output):
            found.append(f"cell {number}: a dead view of a widget")
        if is_progress(output):
            found.append(f"cell {number}: a progress bar")
        if "fast mode on" in text_of(output):
            found.append(f"cell {number}: was run in fast mode")
    if not found and to_text(clean(notebook)) != text:
        found.append("its metadata is not clean")
    return found


# ---------------------------------------------------------------------------------------------------- command
def chosen(names: Sequence[str], folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks whose names begin so; all of them without names.

    Raises:
        ValueError: a name fits none.
    """
    known = sorted(folder.glob("*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in known):
            raise ValueError(
                f"no notebook begins with {name!r}: there are {', '.join(p.stem for p in known) or 'none'}"
            )
    return [path for path in known if not names or path.name.startswith(tuple(names))]


def store(path: Path) -> list[str]:
    """Run a notebook in full, write it back, and return what is wrong with it; a run that fails writes nothing."""
    from lcnn_utils.lab import write_text

    with tempfile.TemporaryDirectory(prefix="store-") as folder:  # no datasets: their pictures are not ours to publish
        notebook, seconds = execute(path, store=Path(folder))
    text = to_text(clean(notebook))
    write_text(path, text)
    print(f"{path.stem}: ran in {seconds:.1f} s, {len(text.encode()) / 1000:.0f} kB", flush=True)
    return stored_problems(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a notebook fails or is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--store", action="store_true", help="run in full and write back with clean outputs")
    mode.add_argument("--check", action="store_true", help="look at what is stored, run nothing")
    parser.add_argument("names", nargs="*", metavar="NAME", help="how the notebook's name begins, such as 01")
    asked: Any = parser.parse_args(argv)
    try:
        paths = chosen(asked.names)
    except ValueError as error:
        parser.error(str(error))
    status = 0
    for path in paths:
        try:
            problems = store(path) if asked.store else stored_problems(path.read_text(encoding="utf-8"))
        except (CellExecutionError, CellTimeoutError, DeadKernelError, OSError) as error:
            problems = [f"{str(error).strip()}\n(not written)"]
        for problem in problems:
            print(f"{path.stem}: {problem}", file=sys.stderr)
        if not problems and asked.check:
            print(f"{path.stem}: as it should be")
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main())
