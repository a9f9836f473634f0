"""What ``lcnn doctor`` looks at. A check: its name, whether all is well (None: a note), what was found, what to do."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from jupyter_client.kernelspec import KernelSpecManager
from packaging.requirements import Requirement

from .. import data
from ..files import PROJECT
from ..lab import data_root, pick_device, store_root

Check = tuple[str, bool | None, str, str]
REINSTALL = f"{sys.executable} -m pip install -r {PROJECT / 'requirements.lock'}"


def programs() -> Iterator[Check]:
    """What is installed, and whether it works together."""
    lacking = []  # missing, or older than pyproject.toml asks for
    for need in map(Requirement, metadata.requires("lcnn-utils") or []):
        versions = [package.version for package in metadata.distributions(name=need.name)] or ["0"]
        if "extra" not in str(need.marker) and not need.specifier.contains(versions[0], prereleases=True):
            lacking.append(f"{need} (here: {versions[0]})")
    python = f"Python {sys.version.split()[0]} ({sys.executable})"
    yield "packages", not lacking, ", ".join(lacking) or f"all here, and new enough; {python}", REINSTALL
    try:
        used = not shutil.which("nvidia-smi") or torch.cuda.is_available()
        advice = "an NVIDIA driver is here that this torch cannot use: update the driver, or install a torch for it"
        yield "device", used or None, f"{pick_device()}, {torch.get_num_threads()} threads", advice
    except RuntimeError as error:
        yield "device", False, str(error), "unset LCNN_DEVICE, or set it to cpu"
    kernels = KernelSpecManager().get_all_specs()
    program = Path(kernels["python3"]["spec"]["argv"][0] if "python3" in kernels else "/no/kernel/named/python3")
    ours = program.parent in (Path(), Path(sys.executable).parent)  # for a bare name Jupyter takes its own Python
    yield "kernel", ours, f"notebooks run in {program}", f"{sys.executable} -m ipykernel install --sys-prefix"


def folders() -> Iterator[Check]:
    """What is on the disk, and whether more can be written."""
    store = store_root().absolute()
    existing = next(folder for folder in (store, *store.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
        free = shutil.disk_usage(existing).free / 1e9
        yield "store", free >= 1, f"{store}, {free:.1f} GB free", "free some space, or set LCNN_STORE to a larger disk"
    except OSError as error:
        yield "store", False, f"{store} can't be written ({error.strerror})", "set LCNN_STORE to a folder of yours"
    missing = " ".join(name for name, place in data.available().items() if place == "missing")
    state = f"{data_root()} lacks {missing}" if missing else f"all in {data_root()}"
    yield "datasets", not missing or None, state, f"`lcnn data {missing}` fetches what is missing"
    clone = (PROJECT / "notebooks").is_dir() or None
    state = str(PROJECT) if clone else f"no notebooks in {PROJECT}"
    yield "project", clone, state, "clone it, and there: pip install -e ."


def report() -> int:
    """Print every check and, below each that failed, what to do; the exit status is 1 if something is broken."""
    checks = [*programs(), *folders()]
    for name, ok, state, advice in checks:
        print(f"{'ok' if ok else 'note' if ok is None else 'MEND':<5} {name:<9} {' '.join(state.split())}")
        if not ok:
            print(f"{'':<15} -> {advice}")
    return 1 if any(ok is False for _, ok, _, _ in checks) else 0
