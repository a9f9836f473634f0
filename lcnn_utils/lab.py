"""What every room asks of the machine: device, folders, threads, the start of a notebook.

Environment variables: ``LCNN_DATA`` and ``LCNN_STORE``, folders of the datasets and of what is trained (default:
``data/`` of the project); ``LCNN_DEVICE`` (default: a GPU when there is one); ``LCNN_FAST=1`` for smaller settings.
"""

from __future__ import annotations

import ctypes
import difflib
import os
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .files import CLONE, PROJECT

LABEL = {  # method: its name in tables and figures
    "standard": "Standard",
    "lcnn": "LCNN",
    "gradreg": "GradReg",
    "lcnn_gradreg": "LCNN + GradReg",
    "cure": "CURE",
    "softplus_wd": "Softplus + weight decay",
    "adversarial": "Adversarial training",
    "minimal": "Minimal recipe",
    "relu": "ReLU, ordinary net",
    "relu_reading": "Standard, read as ReLU",
}


def data_root(root: str | Path | None = None) -> Path:
    """Folder of the datasets: the argument, else ``LCNN_DATA``, else ``data/`` of the project."""
    return Path(root or os.environ.get("LCNN_DATA") or PROJECT / "data").expanduser()


def store_root() -> Path:
    """Folder for trained models and results: ``LCNN_STORE``, else ``data/`` of the project."""
    return Path(os.environ.get("LCNN_STORE") or PROJECT / "data").expanduser()


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The argument, else ``LCNN_DEVICE``, else a GPU when there is one, else the CPU (RuntimeError: not there)."""
    wanted = device or os.environ.get("LCNN_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = f"device {str(wanted)!r} is not available here (use device='cpu', or unset LCNN_DEVICE)"
        raise RuntimeError(text) from error
    return torch.device(wanted)


def double(t: torch.Tensor) -> torch.Tensor:
    """t in float64: on its device, or on the CPU where that has none (Apple's MPS)."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def keep_memory() -> None:
    """Let glibc keep freed memory, up to 1 GiB, for the next training step: it need not be zeroed again."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, size in ((-1, 1 << 30), (-3, 1 << 25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (its largest value)
            mallopt(option, size)


def one_thread() -> None:
    """One thread for torch, unless OMP_NUM_THREADS is set: small nets gain little from a second, which spins."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check_choice(name: str, known: list[str] | tuple[str, ...], kind: str) -> str:
    """Return ``name`` if it is one of ``known``; otherwise raise a ValueError that lists them and suggests one."""
    if name in known:
        return name
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {kind} {name!r}: known are {', '.join(known)}{hint}")


def shell() -> Any:
    """IPython's, in a notebook; else None, and a machine that only trains needs no IPython."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def track(iterable: Iterable | None = None, text: str = "", *, progress: bool = True, **options: Any) -> tqdm:
    """A progress bar that leaves nothing behind. It is on stdout in a notebook, since JupyterLab shows stderr on pink,
    and bars within bars take turns on one line, since JupyterLab moves no cursor up.
    ``progress=False`` or ``TQDM_DISABLE=1``: none. ``options``: of tqdm."""
    if not progress:
        options["disable"] = True
    stream = sys.stdout if shell() else sys.stderr
    return tqdm(iterable, text, leave=False, position=0, file=stream, **options)


def say_interrupted(_shell: Any, _kind: type[BaseException], error: BaseException, *_: Any, **__: Any) -> None:
    """One line in place of a traceback, for IPython; what the interrupted functions held is freed, their bars too."""
    traceback.clear_frames(error.__traceback__)
    print("interrupted: the kernel keeps what it had, and any cell can be run")


def use_style() -> None:
    """Apply the project's matplotlib style, whatever the reader's own settings are; the backend stays as it is."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.rcdefaults()
    plt.style.use(CLONE / "lcnn_utils" / "figures" / "lcnn.mplstyle")


def show_whole_cells() -> None:
    """Let pandas show long texts in tables whole, not cut off with dots."""
    import pandas

    pandas.set_option("display.max_colwidth", None)


@dataclass(frozen=True)
class Lab:
    """What a notebook runs with: its device, its seeds, whether fast mode is on, and when it began."""

    device: torch.device
    seeds: tuple[int, ...]
    fast: bool
    started: float

    @property
    def machine(self) -> str:
        """What kind it is, such as "1 thread of a CPU"."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return f"{threads} thread{'s' * (threads > 1)} of a CPU" if self.device.type == "cpu" else str(self.device)

    def finish(self) -> str:
        """Seconds since :func:`setup` and the largest memory of the process: the sentence for a notebook's last cell,
        whose beginning also stands on the notebook's card."""
        seconds = time.perf_counter() - self.started
        about = f"torch {torch.__version__}, fast mode {'on' if self.fast else 'off'}"
        return f"ran in {seconds:.0f} s on {self.machine}{peak_memory()} ({about})"


def peak_memory() -> str:
    """Such as ", 1.2 GB of memory"; empty on Windows, where Python has no module ``resource``."""
    if sys.platform == "win32":
        return ""
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", {largest / 1e9:.1f} GB of memory"


def setup(*, seeds: int = 3) -> Lab:
    """Start a notebook: device, style, threads, seeds (2 at most in fast mode), all of it printed in one line. From
    then on, interrupting a cell prints one line too."""
    use_style()
    show_whole_cells()
    one_thread()
    keep_memory()
    fast = check_choice(os.environ.get("LCNN_FAST") or "0", ("0", "1"), "value of LCNN_FAST") == "1"
    lab = Lab(pick_device(), tuple(range(min(seeds, 2) if fast else seeds)), fast, time.perf_counter())
    if shell():
        shell().set_custom_exc((KeyboardInterrupt,), say_interrupted)
    mode = "on (small settings)" if fast else "off"
    print(f"torch {torch.__version__} · {lab.machine} · seeds {list(lab.seeds)} · fast mode {mode}")
    return lab
