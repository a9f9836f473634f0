"""What ``lcnn doctor`` looks at: each check says what it found and, where something is amiss, what to do about it.

Light to import (no torch): the browser test takes :func:`find_browser` from here, the command line :data:`PROJECT`.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent  # as in `runtime`, which imports torch
NEEDED_GB = 1.0
REINSTALL = f"{sys.executable} -m pip install -r {PROJECT / 'requirements.lock'}"


@dataclass(frozen=True)
class Check:
    """One finding. ``ok`` is None for a note: worth knowing, nothing is broken."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def python_version() -> Check:
    """Python 3.11 or newer."""
    found = f"{platform.python_version()} ({sys.executable})"
    return Check("Python", sys.version_info >= (3, 11), found, "install Python 3.11 or newer, then `make clean lab`")


def locked(lock: Path) -> dict[str, str]:
    """The versions pinned in a requirements file for this machine, by normalised name; empty if there is no file."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    if not lock.is_file():
        return {}
    lines = (line.rstrip("\\ ") for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line)
    pins = [Requirement(line) for line in lines if line[:1].isalnum()]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in here}


def packages(lock: Path = PROJECT / "requirements.lock") -> list[Check]:
    """Every run-time dependency against the bounds of ``pyproject.toml`` and the pins of ``requirements.lock``."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    try:
        wanted = [Requirement(text) for text in metadata.requires("lcnn-utils") or []]
    except metadata.PackageNotFoundError:
        return [Check("packages", False, "lcnn-utils is not installed here", "python -m pip install --no-deps -e .")]
    wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    problems, moved, pins = [], [], locked(lock)
    for need in wanted:
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            problems.append(Check(need.name, False, f"not installed, needs {need.specifier}", REINSTALL))
            continue
        if not need.specifier.contains(version, prereleases=True):
            problems.append(Check(need.name, False, f"{version}, needs {need.specifier}", REINSTALL))
        elif (pin := pins.get(canonicalize_name(need.name))) and Version(version).public != pin:
            moved.append(f"{need.name} {version} (locked: {pin})")
    if moved:
        advice = f"fine unless something fails; for the tested versions: {REINSTALL}"
        return [*problems, Check("packages", None, "other than in requirements.lock: " + ", ".join(moved), advice)]
    as_locked = ", the versions of requirements.lock" if pins else ""
    return problems or [Check("packages", True, f"{len(wanted)} as required{as_locked}")]


def torch_works() -> Check:
    """torch and torchvision load and fit each other: a torchvision built for another torch lacks its operators."""
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        advice = f"torch and torchvision must come from one release: {REINSTALL}"
        return Check("torch", False, str(error).strip().splitlines()[0], advice)
    return Check("torch", True, f"{torch.__version__} with torchvision {torchvision.__version__}")


def device() -> Check:
    """The device that everything computes on."""
    import torch

    from ..lab import pick_device

    try:
        chosen = pick_device()
    except RuntimeError as error:
        return Check("device", False, str(error), "unset LCNN_DEVICE, or set it to cpu")
    if chosen.type == "cuda":
        gpu = torch.cuda.get_device_properties(chosen)
        return Check("device", True, f"{chosen}: {gpu.name}, {gpu.total_memory / 1e9:.0f} GB")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available() and "LCNN_DEVICE" not in os.environ:
        advice = "update the NVIDIA driver, or install a torch for the one you have; on the CPU all works, more slowly"
        return Check("device", None, f"{chosen}, though an NVIDIA driver is here that this torch cannot use", advice)
    return Check("device", True, f"{chosen}, {torch.get_num_threads()} threads")


def folder(name: str, path: Path, variable: str, *, needed: bool) -> Check:
    """Whether ``path``, or the folder it will be made in, can be written and has room; a note unless ``needed``."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    bad = False if needed else None
    advice = f"set {variable} to a folder of yours with {NEEDED_GB:.0f} GB free"
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"room?")
    except OSError as error:
        return Check(name, bad, f"{path} cannot be written ({error.strerror})", advice)
    free = shutil.disk_usage(there).free / 1e9
    if free < NEEDED_GB:
        return Check(name, bad, f"{path}: {free:.1f} GB free", f"free some space, or {advice}")
    return Check(name, True, f"{path}, {free:.0f} GB free")


def datasets() -> Check:
    """Which datasets are on disk."""
    from .. import data

    where = data.available()
    here = [
        f"{name} (embedded)" if place == "embedded" else name for name, place in where.items() if place != "missing"
    ]
    missing = [name for name, place in where.items() if place == "missing"]
    found = f"here: {', '.join(here)}" + (f"; missing: {', '.join(missing)}" if missing else "")
    advice = f"`lcnn data {' '.join(missing)}` fetches what is missing; or set LCNN_DATA to a folder that has it"
    return Check("datasets", None if missing else True, found, advice)


def stored(store: Path) -> Check:
    """How many trained models are shipped, and how many trainings, finished or under way, are in the store."""
    models = len(list((PROJECT / "data" / "checkpoints").glob("[!.]*.safetensors")))
    runs = len(list((store / "runs").glob("[!.]*.safetensors")))
    advice = "none is needed beforehand: notebooks train what they lack"
    return Check("models", True if models else None, f"{models} shipped, {runs} in {store}", advice)


def kernel() -> Check:
    """Whether notebooks run with this Python: another environment's ``python3`` kernel may stand before it."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    advice = f"{sys.executable} -m ipykernel install --sys-prefix"
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return Check("kernel", False, "Jupyter knows no kernel named python3", advice)
    ours = ("python", "python3", f"python3.{sys.version_info.minor}")  # which Jupyter replaces by its own Python
    if program not in ours and Path(program).parent != Path(sys.executable).parent:
        return Check("kernel", False, f"notebooks would run in {program}, not in {sys.executable}", advice)
    return Check("kernel", True, "python3")


def find_browser() -> str | None:
    """Path of a Chromium, Chrome or Edge: ``LCNN_BROWSER``, else on the PATH, else where installers put it.

    Raises:
        FileNotFoundError: ``LCNN_BROWSER`` names no program.
    """
    if asked := os.environ.get("LCNN_BROWSER"):
        if not (found := shutil.which(asked)):
            raise FileNotFoundError(f"LCNN_BROWSER={asked} is no program: give the full path of one, or unset it")
        return found
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
    mac = [f"/Applications/{app}.app/Contents/MacOS/{app}" for app in ("Google Chrome", "Chromium", "Microsoft Edge")]
    programs = [
        os.environ[name] for name in ("ProgramFiles", "ProgramFiles(x86)", "LocalAppData") if name in os.environ
    ]
    windows = [
        str(Path(base) / rest)
        for rest in ("Google/Chrome/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")
        for base in programs
    ]
    return next((found for name in (*names, *mac, *windows) if (found := shutil.which(name))), None)


def browser() -> Check:
    """A browser for the browser test; JupyterLab itself runs in any."""
    advice = "only the browser test needs one: install Chromium, Chrome or Edge, or name it in LCNN_BROWSER"
    try:
        found = find_browser()
    except FileNotFoundError as error:
        return Check("browser", False, str(error), advice)
    return Check(
        "browser", True if found else None, found or "no Chromium, Chrome or Edge found", "" if found else advice
    )


def compiler() -> Check:
    """A C++ compiler, which ``torch.compile`` needs on the CPU."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name]
    found = next((path for name in names if (path := shutil.which(name))), None)
    advice = "only torch.compile needs one: install g++ or clang"
    return Check("compiler", True if found else None, found or "no C++ compiler", advice)


def checks() -> list[Check]:
    """Every check, in the order in which one would mend things."""
    found = [python_version(), *packages(), torch_works()]
    if not found[-1].ok:  # the rest cannot even be imported
        return found
    from ..lab import data_root, store_root

    store = store_root()
    found += [device(), folder("data", data_root(), "LCNN_DATA", needed=False)]
    found += [folder("store", store, "LCNN_STORE", needed=True), datasets(), stored(store)]
    return [*found, kernel(), browser(), compiler()]


def report(found: Sequence[Check]) -> int:
    """Print each check, below it what to do unless all is well; returns the exit status: 1 if something is broken."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ✓ shows ?
    for check in found:
        print({True: "✓", False: "✗", None: "·"}[check.ok], f"{check.name:<13} {check.found}")
        if not check.ok and check.advice:
            print(f"  {'':<13} → {check.advice}")
    problems, notes = (sum(check.ok is kind for check in found) for kind in (False, None))
    ending = f"{problems} to mend" if problems else "all well"
    print(f"{ending}, {notes} to know about" if notes else ending)
    return 1 if problems else 0
