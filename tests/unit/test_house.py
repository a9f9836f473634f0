"""The house: what installs the lab, what it says of itself, and that it names no machine."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import folder_of_images
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (PROJECT / "requirements.lock").read_text(encoding="utf-8")
README = (PROJECT / "README.md").read_text(encoding="utf-8")
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
NEEDED = [*PYPROJECT["project"]["dependencies"], *EXTRAS["cluster"], *EXTRAS["dev"]]
NEEDED.remove("lcnn-utils[cluster]")
DIRECT = [Requirement(text) for text in NEEDED + PYPROJECT["build-system"]["requires"]]
PINS = [Requirement(line.rstrip("\\ ")) for line in LOCK.splitlines() if line[:1].isalnum()]


def test_every_direct_dependency_is_locked_within_its_bounds():
    for need in DIRECT:
        pins = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(need.name)]
        assert pins, f"{need.name} is not in requirements.lock: run `make lock`"
        for (exact,) in (pin.specifier for pin in pins):
            assert exact.operator == "=="
            assert need.specifier.contains(exact.version), need.name
        if need.name in ("torch", "torchvision"):  # an upper bound picks builds that no torchvision fits
            assert [bound.operator for bound in need.specifier] == [">="]


def test_every_locked_package_has_hashes_and_none_names_a_server():
    entries = re.split(r"\n(?=[a-z0-9])", LOCK)
    assert len(entries) == len(PINS)
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert not re.search(r"://|^\s*-(?!-hash)", LOCK, re.MULTILINE)  # no option but hashes


def test_environment_yml():
    python, _, with_pip = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert Requirement(python).specifier == SpecifierSet(PYPROJECT["project"]["requires-python"])
    (line,) = with_pip["pip"]  # no -r line: micromamba breaks on it
    assert re.fullmatch(r"-e \.\[(\w+)\]", line)[1] in PYPROJECT["project"]["optional-dependencies"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_explains_a_python_that_is_too_old(tmp_path):
    python = tmp_path / "fake-python"
    python.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.6; exit 1\n')
    python.chmod(0o755)
    command = ["make", "lab", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv" / ".installed").exists()


DANGER = re.compile(
    r"^\s*(?:import|from)\s+(?:_?pickle|cPickle|cloudpickle|dill|joblib|marshal|shelve|jsonpickle)\b"
    r"|allow_pickle=(?!False)|\btorch\.(?:hub\.)?load\(|from torch import .*\bload\b|\b(?:read|to)_pickle\("
    r"|(?<![.\w])(?:eval|exec|compile|__import__)\((?!\))|\byaml\.(?:unsafe_)?load\(",
    re.MULTILINE,
)


def test_nothing_that_is_read_is_executed():
    """Weights are safetensors, the rest JSON and CSV; CIFAR's pickles are torchvision's, which checks their MD5."""
    for path in (PROJECT / "lcnn_utils").rglob("*.py"):
        assert DANGER.findall(path.read_text(encoding="utf-8")) == [], path
    assert len(DANGER.findall("import pickle\n torch.load(p)\n eval('1')\n np.load(p, allow_pickle=yes)")) == 4
    assert not DANGER.search("model.eval(); re.compile('x'); torch.compile(model); json.load(p); yaml.safe_load(p)")


def test_no_file_names_a_machine():
    """No path of one machine and no package server: what is committed must work on any."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git clone: there is no list of its files")
    private = re.compile(r"(?:^|[^A-Za-z0-9_.])/(?:work|farm|root|home)/[A-Za-z]|index[-]url", re.MULTILINE)
    for path in (PROJECT / name for name in done.stdout.split("\0") if not name.startswith("tests/")):
        if path.is_file() and path.suffix != ".lock":
            assert not private.search(path.read_text(encoding="utf-8", errors="ignore")), path


def test_tables_of_the_readme_are_the_measured_ones():
    """Every table with a number in it stands in figures/ or in benchmarks/results/, row for row."""
    made = [*(PROJECT / "figures").glob("*_*.md"), *(PROJECT / "benchmarks" / "results").glob("*.md")]
    measured = "\n".join(path.read_text(encoding="utf-8") for path in made)
    tables = [table for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE) if re.search(r"\d\.\d", table)]
    assert tables
    assert [table for table in tables if table not in measured] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/package.md"])
def test_python_on_a_page_runs_as_it_stands(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / page).read_text(encoding="utf-8"), re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "LCNN_STORE": str(tmp_path), "LCNN_DEVICE": "cpu"}
    for part in ("train", "val"):
        folder_of_images(tmp_path / "photos" / part, n=2)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, check=True)


def test_links_of_the_pages_resolve():
    for page in (*PROJECT.glob("*.md"), *PROJECT.glob("*/*.md")):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


WITHOUT_CLONE = """
from lcnn_utils.cli.commands import Lab
from lcnn_utils.cli.make_figures import make
from lcnn_utils.experiments import measured, published
for call in (published, lambda: measured("digits_runs"), make, Lab().run):
    try:
        call()
    except FileNotFoundError as error:
        print(error)
"""


@pytest.mark.slow
def test_without_a_clone_what_is_missing_is_said(tmp_path):
    """A package that was installed from a wheel: no notebooks and no data beside it."""
    shutil.copytree(PROJECT / "lcnn_utils", tmp_path / "site" / "lcnn_utils")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "LCNN_STORE": ""}
    command = [sys.executable, "-c", WITHOUT_CLONE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for line, way_out in zip(done.stdout.splitlines(), ("clone", "digits_runs", "clone", "clone"), strict=True):
        assert way_out in line
    assert [path.name for path in tmp_path.iterdir()] == ["site"], "nothing is written"


def test_the_layers_hold(monkeypatch):
    """An arrow between rooms only ever points down: the contracts stand in pyproject.toml."""
    monkeypatch.chdir(PROJECT)
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == EXIT_STATUS_SUCCESS
