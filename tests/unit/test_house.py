"""The house: what installs the lab, what it says of itself, and that it names no machine."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (PROJECT / "requirements.lock").read_text(encoding="utf-8")
DIRECT = [
    Requirement(text)
    for text in PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["dev"]
]
PINS = [Requirement(line.rstrip("\\ ")) for line in LOCK.splitlines() if line[:1].isalnum()]


# ------------------------------------------------------------------------------------------------- requirements
@pytest.mark.parametrize("need", DIRECT, ids=lambda need: need.name)
def test_every_direct_dependency_is_locked_within_its_bounds(need):
    pins = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(need.name)]
    assert pins, f"{need.name} is not in requirements.lock: run `make lock`"
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert need.specifier.contains(exact.version)


def test_every_locked_package_has_hashes_and_none_names_a_server():
    entries = re.split(r"\n(?=[a-z0-9])", LOCK)
    assert len(entries) == len(PINS)
    for entry in entries:
        assert "--hash=sha256:" in entry, entry.splitlines()[0]
    assert "://" not in LOCK
    assert not re.search(r"^\s*-(?!-hash)", LOCK, re.MULTILINE)  # no option but hashes: no server, no folder


def test_torch_has_lower_bounds_only():
    """A spec that admits nothing newer than some torch picks builds that no torchvision fits."""
    for need in DIRECT:
        if need.name in ("torch", "torchvision"):
            assert [spec.operator for spec in need.specifier] == [">="]


def test_the_build_needs_only_what_is_locked():
    """`make` installs the project without build isolation, hence without a second download."""
    (build,) = (Requirement(text) for text in PYPROJECT["build-system"]["requires"])
    (pin,) = (pin for pin in PINS if pin.name == build.name)
    assert pin.marker is None
    assert build.specifier.contains(next(iter(pin.specifier)).version)


def test_environment_yml():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    assert set(environment) == {"name", "channels", "dependencies"}
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, with_pip = environment["dependencies"]
    python, pip = (Requirement(text) for text in conda)
    assert (python.name, pip.name) == ("python", "pip")
    assert python.specifier == SpecifierSet(PYPROJECT["project"]["requires-python"])
    (line,) = with_pip["pip"]  # no -r line: micromamba breaks on it
    extra = re.fullmatch(r"-e \.\[(\w+)\]", line)[1]
    assert extra in PYPROJECT["project"]["optional-dependencies"]


# ----------------------------------------------------------------------------------------------------- Makefile
def make(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *args], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@needs_make
def test_make_lists_its_targets():
    listed = {line.split()[1] for line in make().stdout.splitlines()}
    assert listed >= {"lab", "test", "figures", "doctor", "notebooks", "lock", "clean"}


@needs_make
def test_make_with_a_python_of_ones_own():
    lab = make("-n", "lab", "PY=some-python", "LAB_ARGS=--no-browser --port 9999").stdout
    assert lab.split("\n") == ["some-python -m lcnn_utils lab --no-browser --port 9999", ""]
    steps = make("-n", "test", "PY=some-python").stdout.splitlines()
    assert all(step.startswith("some-python -m ") for step in steps)
    assert steps[-1] == "some-python -m pytest tests"  # one run, its closing line the last


def fake_python(folder: Path, body: str) -> str:
    program = folder / "fake-python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return str(program)


@needs_make
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            '[ "$1" = -V ] && echo Python 3.9.6; exit 1',
            "needs Python 3.11 or newer, but .* says 'Python 3.9.6':",
        ),
        ('case "$2" in *ensurepip*) exit 1;; esac', "cannot make virtual environments .*apt install python3-venv"),
    ],
)
def test_make_explains_a_python_that_will_not_do(tmp_path, body, message):
    venv = tmp_path / "venv"
    done = make("lab", f"PYTHON={fake_python(tmp_path, body)}", f"VENV={venv}")
    assert done.returncode != 0
    assert re.search(message, done.stderr)
    assert "make lab PYTHON=python3.12" in done.stderr
    assert not venv.exists()


@needs_make
def test_a_failed_set_up_leaves_no_stamp(tmp_path):
    """A Python whose environments have a pip that fails: uv first, then pip, then an end, and not taken for done."""
    copy = 'mkdir -p "$3/bin" && cp "$0" "$3/bin/python"'
    body = f'case "$*" in "-m venv"*) {copy};; *" uv"*|*" install "*) echo failing: "$*" >&2; exit 1;; esac'
    venv = tmp_path / "venv"
    done = make("lab", f"PYTHON={fake_python(tmp_path, body)}", f"VENV={venv}")
    assert done.returncode != 0
    assert "going on with pip" in done.stdout
    assert "failing: -m pip install" in done.stderr
    assert "--require-hashes -r requirements.lock" in done.stderr
    assert (venv / "bin" / "python").exists()
    assert not (venv / ".installed").exists()


# -------------------------------------------------------------------------------------------- nothing is executed
CODE_FROM_FILES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}


def dangers(source: str) -> list[str]:
    """What could run code that a file holds: pickles in any form, and text taken as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found += [name for name in names if name.partition(".")[0] in CODE_FROM_FILES]
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            allowed = {keyword.arg for keyword in node.keywords if ast.unparse(keyword.value) != "False"}
            if call in ("eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "pd.read_pickle"):
                found.append(call)
            if call.endswith(("yaml.load", "unsafe_load", "read_pickle", "to_pickle")) or "allow_pickle" in allowed:
                found.append(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name == "load"]
    return found


@pytest.mark.parametrize("path", sorted((PROJECT / "lcnn_utils").rglob("*.py")), ids=lambda path: path.stem)
def test_no_file_of_the_package_unpickles_or_evaluates(path):
    """Weights are safetensors, the rest is JSON and CSV; CIFAR's pickles are torchvision's, which checks their MD5."""
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import joblib.numpy_pickle", "def f():\n  import dill as d",
        "torch.load(p)", "torch.load(p, weights_only=True)", "from torch import load", "eval('1')", "exec(s)",
        "compile(s, '', 'exec')", "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=yes)", "pd.read_pickle(p)",
        "yaml.load(p)", "__import__(name)", "frame.to_pickle(p)",
    ],
)  # fmt: skip
def test_what_is_dangerous_is_found(source):
    assert dangers(source)
    assert not dangers("model.eval(); re.compile('x'); torch.compile(model); np.load(p); json.load(p); load_file(p)")


# ------------------------------------------------------------------------------------------------ papers and rules
def test_citation():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["title"].startswith("LCNN Lab")
    assert citation["version"] == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"]
    (paper,) = citation["references"]
    assert paper["title"] == "Efficient Training of Low-Curvature Neural Networks"
    assert [author["family-names"] for author in paper["authors"]] == ["Srinivas", "Matoba", "Lakkaraju", "Fleuret"]
    assert paper["year"] == 2022
    assert "2206.07144" in paper["url"]


def test_version_is_said_once():
    import lcnn_utils

    assert lcnn_utils.__version__ == PYPROJECT["project"]["version"]
    assert (PROJECT / "LICENSE").read_text(encoding="utf-8").startswith(f"{PYPROJECT['project']['license']} License")


def test_importing_the_package_costs_little_over_torch():
    code = (
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import lcnn_utils, lcnn_utils.lab, lcnn_utils.nn\n"
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 0.3


def test_no_file_names_a_machine():
    """No path of one machine and no package server: what is committed must work on any."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone: there is no list of its files")
    private = re.compile(r"(^|[^A-Za-z0-9_.])/(work|farm|root|home)/[A-Za-z]|index[-]url", re.MULTILINE)
    found = []
    for name in names:
        path = PROJECT / name
        if not path.is_file() or name.startswith("tests/") or name.endswith(".lock"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {hit[0]!r}" for hit in private.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "table",
    [
        "figures/digits_geometry.md",
        "figures/digits_certified.md",
        "figures/digits_methods_table.md",
        "figures/digits_ingredients.md",
        "figures/digits_promises.md",
        "figures/cifar10_promises.md",
        "figures/cifar10_claims.md",
        "figures/cifar100_table_1.md",
        "figures/cifar10_table_2.md",
        "benchmarks/results/geometry.md",
        "benchmarks/results/training_steps_cpu.md",
    ],
)
def test_tables_in_the_readme_are_the_measured_ones(table):
    rows = [line for line in (PROJECT / table).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) > 3
    assert "\n".join(rows) in (PROJECT / "README.md").read_text(encoding="utf-8"), f"{table} and the README differ"


def test_every_picture_of_the_readme_exists_and_is_described():
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", (PROJECT / "README.md").read_text(encoding="utf-8"))
    assert len(pictures) >= 3
    for alt, path in pictures:
        assert (PROJECT / path).is_file(), path
        assert len(alt) > 40, path


def test_a_machine_that_only_trains_and_measures_needs_no_package_of_the_lab():
    """A GPU server, say, with torch, torchvision and the scientific packages."""
    absent = ("tyro", "distributed", "dask", "bokeh", "captum", "ipywidgets", "IPython", "jupyterlab", "skimage")
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import evaluate"
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT / "benchmarks", env=environment, check=True)
