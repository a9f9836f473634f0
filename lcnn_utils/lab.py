"""What every room asks of the machine: which device, which folders, fast mode, and how a file is written safely.

Environment variables read here (``LCNN_MIRRORS`` belongs to ``download``, ``LCNN_BROWSER`` to ``doctor``):

- ``LCNN_DATA``: folder of the datasets (default ``data/`` of the project);
- ``LCNN_STORE``: folder for trained models and results (default ``data/``);
- ``LCNN_FAST``: ``1``, ``true``, ``yes`` or ``on`` for smaller settings, for tests and impatient readers;
- ``LCNN_DEVICE``: ``cpu``, ``cuda``, ``mps``, … (default: a GPU when there is one).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from . import __version__

PROJECT = Path(__file__).resolve().parent.parent


def data_root(root: str | Path | None = None) -> Path:
    """Folder of the datasets: the argument, else ``LCNN_DATA``, else ``data/`` of the project."""
    return Path(root or os.environ.get("LCNN_DATA") or PROJECT / "data").expanduser()


def store_root() -> Path:
    """Folder for trained models and results: ``LCNN_STORE``, else ``data/`` of the project."""
    return Path(os.environ.get("LCNN_STORE") or PROJECT / "data").expanduser()


def fast() -> bool:
    """Whether fast mode is on: what ``LCNN_FAST`` says, in letters of any case (ValueError: it says neither)."""
    on, off = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
    return nearest(os.environ.get("LCNN_FAST", "").strip().lower() or "0", on + off, "value of LCNN_FAST") in on


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device to compute on: the argument, else ``LCNN_DEVICE``, else a GPU when there is one, else the CPU.

    Raises:
        RuntimeError: a device was asked for by name and this machine does not have it.
    """
    wanted = device or os.environ.get("LCNN_DEVICE") or None
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(wanted)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RuntimeError(
            f"device {str(wanted)!r} is not available here ({str(error).splitlines()[0]}): "
            "use device='cpu', or unset LCNN_DEVICE to let the lab choose"
        ) from None
    return chosen


def eager_cpu(x: torch.Tensor) -> bool:
    """Whether fused CPU kernels with one derivative may compute with x: no compiler, tracer, torch.func or forward
    mode is at work, which need every operation written out."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def double(t: torch.Tensor) -> torch.Tensor:
    """t in float64: on its device, or on the CPU where that has none (Apple's MPS)."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def made_on(device: torch.device) -> dict[str, Any]:
    """What a run's provenance says of where it was trained."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type.upper()}"
    )
    versions = {"lcnn_utils": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return versions | {"device": name, "threads": torch.get_num_threads()}


def keep_memory() -> None:
    """Let glibc keep memory that was freed, up to 1 GiB, for the next training step.

    By default it gives large pieces back at once, and part of a step's time goes into having them zeroed again.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, size in ((-1, 1 << 30), (-3, 1 << 25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (its largest value)
            mallopt(option, size)


def one_thread() -> None:
    """Let torch compute with one thread, unless ``OMP_NUM_THREADS`` says otherwise.

    The nets of the notebooks hardly gain from a second one, and lose by far more as soon as another program wants the
    same core, because waiting threads spin.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@contextlib.contextmanager
def atomic_path(path: Path, way_out: str = "set LCNN_STORE to a folder of yours") -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, delete it on failure.

    A reader therefore never sees a half-written file, and a full disk leaves nothing behind.

    Raises:
        OSError: the folder cannot be written or the disk is full; the message names the folder and the way out.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes files private; results are for everybody
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"cannot write {path} ({error.strerror}): free some space, or {way_out}",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, way_out: str = "choose another folder") -> Path:
    """Write ``text`` to ``path`` atomically; see :func:`atomic_path`."""
    with atomic_path(path, way_out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def nearest(name: str, known: list[str] | tuple[str, ...], kind: str) -> str:
    """Return ``name`` if it is one of ``known``; otherwise raise a ValueError that lists them and suggests one."""
    import difflib

    if name in known:
        return name
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {kind} {name!r}: known are {', '.join(known)}{hint}")


def use_style() -> None:
    """Apply the project's matplotlib style."""
    import matplotlib.pyplot as plt

    plt.style.use(PROJECT / "lcnn_utils" / "figures" / "lcnn.mplstyle")


@dataclass(frozen=True)
class Lab:
    """What a notebook runs with: its device, its seeds, whether fast mode is on, and when it began."""

    device: torch.device
    seeds: tuple[int, ...]
    fast: bool
    started: float

    def finish(self) -> str:
        """How long the notebook took, from :func:`setup` on: the sentence for its last cell."""
        seconds = time.perf_counter() - self.started
        where = f"{self.device}, {torch.get_num_threads()} thread(s)"
        return f"ran in {seconds:.0f} s ({where}, torch {torch.__version__}, fast mode {'on' if self.fast else 'off'})"


def setup(*, seeds: int = 3, show: Callable[[str], None] = print) -> Lab:
    """Start a notebook: choose the device, set style and threads, and state what will be used.

    Args:
        seeds: number of random seeds of the experiments (2 in fast mode).
        show: receives the one line that says it all.
    """
    use_style()
    one_thread()
    keep_memory()
    chosen = tuple(range(min(seeds, 2) if fast() else seeds))
    lab = Lab(pick_device(), chosen, fast(), time.perf_counter())
    name = (
        torch.cuda.get_device_name(lab.device) if lab.device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
    )
    mode = "on (small settings)" if lab.fast else "off"
    show(f"torch {torch.__version__} · device {lab.device} ({name}) · seeds {list(lab.seeds)} · fast mode {mode}")
    return lab
