"""What ``lcnn grade`` does: run students' notebooks, and judge every function ``my_NAME`` that they define.

Each notebook runs in a kernel of its own below a worker process of its own. The worker writes what it learns, line by
line; whatever happens to the two, this is read, and every process that they started is killed.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from queue import Empty
from typing import Any

import pandas as pd
import psutil
from jupyter_client.manager import KernelManager

from ..files import PROJECT, write_text

PAGE = re.compile(r"from lcnn_utils\.exercises import (\w+)")
BINDS = re.compile(r"^[ \t]*(?:async )?def my_(\w+)|^[ \t]*my_(\w+)\s*(?::[^=\n]+)?=(?!=)", re.MULTILINE)
MEMORY = 4e9  # bytes that a kernel may take
RESULTS = ("passed", "tried", "not tried")
COLUMNS = ["file", "notebook", "exercise", "result", "message"]
DEFINED: dict[str, Any] = {}  # in a kernel: the functions judged last


# ---- in the kernel -----------------------------------------------------------------------------------------------


def verdict(page: str, name: str, function: Any) -> str:
    """The exercise's result and message for a function, in JSON; null where the cell before has not defined it."""
    known: Any = vars(import_module(f"lcnn_utils.exercises.{page}")).get(name)
    if function is None or function is DEFINED.get(name) or not hasattr(known, "judge"):
        return "null"
    DEFINED[name] = function
    right, message = known.judge(function)
    return json.dumps([RESULTS[(True, False, None).index(right)], message])


# ---- in the worker -----------------------------------------------------------------------------------------------


def work(file: Path, report: Path) -> None:
    """Run a notebook, whatever its cells raise, and write down what is learnt of it as soon as it is, a line each."""

    def tell(**line: Any) -> None:
        with report.open("a", encoding="utf-8") as lines:
            print(json.dumps(line), file=lines)

    def ask(code: str, **options: Any) -> dict[str, Any]:
        client.execute(code, allow_stdin=False, stop_on_error=False, **options)
        while kernel.is_alive():
            with suppress(Empty):
                return client.get_shell_msg(timeout=1)["content"]
            if psutil.Process(kernel.provisioner.pid).memory_info().rss > MEMORY:  # what it prints piles up there, too
                raise RuntimeError(f"stopped at {MEMORY / 1e9:g} GB of memory")
        raise RuntimeError("the kernel died")

    try:
        notebook = json.loads(file.read_text(encoding="utf-8"))
        cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
        page = page_of(cells, notebook["metadata"].get("lcnn", {}).get("notebook"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return tell(problem=f"no notebook that can be read ({type(error).__name__}: {error})")
    if page is None:
        return tell(problem="no exercises: the line `from lcnn_utils.exercises import … as check` is missing")
    tell(page=page)
    kernel: Any = KernelManager()
    kernel.start_kernel(cwd=str(Path.cwd()))
    client = kernel.blocking_client()
    client.start_channels(iopub=False, stdin=False, hb=False)  # nobody listens to what it prints, so nothing is kept
    for number, source in enumerate(cells, 1):
        names = list(dict.fromkeys(filter(None, itertools.chain(*BINDS.findall(source)))))
        tell(running=names)
        try:
            outcome = ask(source)
            for name in names:
                call = f"_verdict({page!r}, {name!r}, globals().get('my_{name}'))"
                judge = "from lcnn_utils.cli.grade import verdict as _verdict"
                reply = ask(judge, store_history=False, user_expressions={"it": call})
                judged = reply.get("user_expressions", {}).get("it", reply)
                said = judged["status"] == "ok" and json.loads(ast.literal_eval(judged["data"]["text/plain"]))
                for failed in (judged, outcome):
                    if not said and failed["status"] != "ok":
                        said = ["tried", f"{failed['ename']}: {failed['evalue']}"]
                if said:
                    message = " ".join(said[1].split())[:500].encode(errors="replace").decode()
                    tell(judged=[name, said[0], message])
        except (RuntimeError, psutil.Error) as error:
            return tell(problem=f"{error} in code cell {number}")
    tell(finished=True)


@cache
def originals() -> dict[str, str]:
    """The page of exercises of every original notebook: ``{"07_pgd_robustness": "attacks"}``."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (PROJECT / "notebooks").glob("*.ipynb")}
    return {stem: found[1] for stem, text in texts.items() if (found := PAGE.search(text))}


def page_of(cells: list[str], original: str | None) -> str | None:
    """The page of exercises that a notebook imports, else that of the original that it was made from."""
    imported = [found[1] for found in map(PAGE.search, cells) if found]
    return next((page for page in imported if page in originals().values()), originals().get(original or ""))


# ---- in the command ----------------------------------------------------------------------------------------------


@cache
def exercises(page: str | None) -> list[str]:
    """The names of a page's exercises; a nameless one where the page is not known."""
    if page is None:
        return [""]
    module = import_module(f"lcnn_utils.exercises.{page}")
    return [name for name, value in vars(module).items() if hasattr(value, "judge")]


def isolated(store: Path) -> dict[str, str]:
    """An environment for kernels: a store of their own, no datasets, no network, no start-up files."""
    env = os.environ | {"LCNN_STORE": str(store), "LCNN_DATA": str(store / "no-datasets")}
    env |= {"IPYTHONDIR": str(store / "ipython"), "no_proxy": "", "NO_PROXY": ""}
    for name in ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy"):
        env |= {name: "http://127.0.0.1:9", name.upper(): "http://127.0.0.1:9"}  # nobody listens there
    return env


def kill(store: Path) -> None:
    """Kill every process that was started with this store, or with one in it, and twice, should one be starting."""
    for _ in range(2):
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if Path(process.environ().get("LCNN_STORE", "/")).is_relative_to(store):
                    process.kill()


def graded(file: Path, shown: str, seconds: float, root: Path) -> tuple[pd.DataFrame, str]:
    """The results of one notebook, and why there are not all; empty if there are."""
    store = Path(tempfile.mkdtemp(dir=root))
    (store / "work").mkdir()
    report = store / "report"
    command = [sys.executable, "-m", "lcnn_utils.cli.grade", str(file), str(report)]
    env = isolated(store) | {"LCNN_FAST": "1", "LCNN_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    env |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(store))
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    worker = subprocess.Popen(command, cwd=store / "work", env=env, start_new_session=True, **quiet)
    problem = "its process was killed"
    try:
        worker.wait(seconds)
    except subprocess.TimeoutExpired:
        problem = f"stopped after {seconds:g} s"
    kill(store)
    worker.wait()
    state: dict[str, Any] = {}
    verdicts: dict[str, list[str]] = {}
    for line in report.read_text(encoding="utf-8").splitlines() if report.exists() else ():
        with suppress(ValueError):  # the last line, if the worker was killed there
            state |= json.loads(line)
        if "judged" in state:
            name, *verdicts[name] = state.pop("judged")
            state["running"].remove(name)
    problem = "" if "finished" in state else state.get("problem", problem)
    if problem:
        verdicts |= {name: ["tried", problem] for name in state.get("running", ())}
    page = state.get("page")
    original = next((stem for stem in originals() if originals()[stem] == page), "")
    rows = [[shown, original, name, *verdicts.get(name, ["not tried", problem])] for name in exercises(page)]
    return pd.DataFrame(rows, columns=COLUMNS), problem


def counts(results: pd.Series) -> str:
    """As in ``2 passed, 0 tried, 1 not tried of 3``."""
    number = results.value_counts()
    return ", ".join(f"{number.get(name, 0)} {name}" for name in RESULTS) + f" of {len(results)}"


def grade(folder: Path, csv: Path, seconds: float, jobs: int | None) -> None:
    """Grade every notebook below a folder, into a CSV file. Until all are graded, the results so far stand beside it.

    FileNotFoundError: there is no such folder, or no notebook in it.
    """
    found = {path: path.relative_to(folder) for path in sorted(folder.rglob("*.ipynb"))}
    hidden = lambda name: any(part.startswith((".", "__MACOSX")) for part in name.parts)  # checkpoints, a Mac's copies
    files = {path.absolute(): name.as_posix() for path, name in found.items() if not hidden(name)}
    if not files:
        raise FileNotFoundError(f"there is no notebook (a file *.ipynb) in {folder.absolute()}")
    frame, unfinished = pd.DataFrame(columns=COLUMNS), csv.with_stem(f"{csv.stem}_unfinished")
    jobs = jobs or os.cpu_count() or 1
    print(f"notebooks to grade: {len(files)}, {jobs} at a time; the results so far: {unfinished}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="lcnn-grade-", ignore_cleanup_errors=True) as root,
        ThreadPoolExecutor(jobs) as pool,
    ):
        shown = [os.fsencode(name).decode(errors="replace") for name in files.values()]
        futures = [pool.submit(graded, *both, seconds, Path(root)) for both in zip(files, shown, strict=True)]
        try:
            for future in as_completed(futures):
                rows, problem = future.result()
                frame = pd.concat([frame, rows]).sort_values("file", kind="stable")
                write_text(unfinished, "\ufeff" + frame.to_csv(index=False))  # by its mark Excel knows UTF-8
                print(f"{rows.file[0]}: {counts(rows.result)}{problem and f' ({problem})'}", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            kill(Path(root))
    print()
    by_exercise = frame[frame.exercise != ""].groupby(["notebook", "exercise"], sort=False)
    for (notebook, exercise), rows in by_exercise:
        print(f"{notebook}, {exercise}: {counts(rows.result)}")
    print(f"all results: {unfinished.replace(csv)}")


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
