"""The command ``lcnn`` (also ``python -m lcnn_utils``): the lab, its runs, figures and datasets, and a doctor.

torch is imported by the commands that compute, not here: ``lcnn --help`` and ``lcnn lab`` start at once.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from .cluster import Cluster
from .doctor import PROJECT
from .merge import Merge
from .runs import Results, Train
from .sweep import Sweep

FIRST_NOTEBOOK = "notebooks/01_softplus_and_beta.ipynb"


def has_display(environ: Mapping[str, str], platform: str) -> bool:
    """Whether a browser opened here would be seen by whoever typed the command."""
    if "SSH_CONNECTION" in environ or "SSH_TTY" in environ:
        return False
    return not platform.startswith("linux") or bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))


def lab_command(port: int | None, *, browser: bool, root: bool, extra: Sequence[str] = ()) -> list[str]:
    """The command line that starts JupyterLab with this Python, in the project's folder, on the first notebook.

    ``port=None`` lets Jupyter take the first free one from 8888 on; ``root`` is the superuser, whom it refuses unless
    told; an ``extra`` argument replaces ours of the same name (Jupyter refuses two values for some).
    """
    given = {argument.partition("=")[0] for argument in extra}
    ours = [
        f"--ServerApp.root_dir={PROJECT}",
        f"--LabApp.default_url=/lab/tree/{FIRST_NOTEBOOK}",
        # the lab's versions are locked: no message over the first page that a newer JupyterLab is out
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        *([f"--ServerApp.port={port}", "--ServerApp.port_retries=0"] if port is not None else []),
        *([] if browser else ["--no-browser"]),
        *(["--allow-root"] if root else []),
    ]
    kept = [argument for argument in ours if argument.partition("=")[0] not in given]
    return [sys.executable, "-m", "jupyterlab", *kept, *extra]


def require_free(
    port: int, way_out: str = "choose another --port, or leave it out and Jupyter takes the next free one"
) -> None:
    """Raise unless a program could listen on ``port`` of this machine.

    Raises:
        ValueError: not a port number.
        OSError: the port is taken, or reserved for the superuser.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} does not exist: choose one from 1024 to 65535")
    with socket.socket() as probe:
        if os.name == "posix":  # as Jupyter does: a port that was just given up counts as free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise OSError(f"port {port} {why}: {way_out}") from None


def become(command: list[str]) -> int:
    """Go on as another program: on POSIX this process turns into it, so that Ctrl-C and kill reach it."""
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.call(command)


@dataclass(frozen=True)
class Lab:
    """Open JupyterLab on the first notebook. Options not listed here go to Jupyter."""

    port: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the next free one from 8888 on)")] = None
    """Listen on this port."""
    browser: Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")] = True
    """Open no browser: print the URL only."""
    extra: Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        if self.port is not None:
            require_free(self.port)
        if not (PROJECT / FIRST_NOTEBOOK).is_file():
            raise FileNotFoundError(
                f"{FIRST_NOTEBOOK} is not in {PROJECT}: install from a clone of the project (pip install -e .)"
            )
        browser = self.browser and has_display(os.environ, sys.platform)
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        if not browser:
            print(f"{'no display here: ' if self.browser else ''}open the URL printed below", flush=True)
        if root:
            print("started as root: Jupyter is told to allow it (--allow-root)", flush=True)
        return become(lab_command(self.port, browser=browser, root=root, extra=self.extra))


@dataclass(frozen=True)
class Figures:
    """Make the figures and tables in figures/, and the page that shows them, on a CPU and offline."""

    only: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Make these figures and tables, with what is made together with them, and no others."""

    def run(self) -> int:
        from .make_figures import make

        return 1 if make(self.only) else 0


@dataclass(frozen=True)
class Doctor:
    """Check Python, versions, device, disk, datasets and checkpoints, and say what to do about each problem."""

    def run(self) -> int:
        from . import doctor

        return doctor.report(doctor.checks())


@dataclass(frozen=True)
class Data:
    """List the datasets and where each is; with names, fetch those that are missing."""

    names: Annotated[Positional[tuple[str, ...]], arg(metavar="[NAME ...]", help_behavior_hint="")] = ()
    """Datasets to load, and to download where needed."""
    root: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: LCNN_DATA, else data/ of the project)")
    ] = None
    """Folder of the datasets."""

    def run(self) -> int:
        from .. import data

        if not self.names:
            for name, place in data.available(self.root).items():
                print(f"{name:<10} {place}")
        for name in self.names:
            for split in ("train", "test"):
                images = data.load(name, split, root=self.root)
                shape = "×".join(map(str, images.x.shape[1:]))
                print(f"{name:<10} {split:<5} {len(images.x):>7,} images of {shape}, {len(images.classes)} classes")
        return 0


def parse(argv: Sequence[str]) -> Lab | Train | Sweep | Cluster | Results | Merge | Figures | Doctor | Data:
    """The command that ``argv`` asks for; a mistake in it ends the program with tyro's explanation and status 2."""
    commands = Lab | Train | Sweep | Cluster | Results | Merge | Figures | Doctor | Data
    about = "LCNN Lab: low-curvature neural networks, taught and reproduced."
    if list(argv[:1]) != ["lab"]:
        return tyro.cli(commands, prog="lcnn", description=about, args=argv)
    lab, extra = tyro.cli(commands, prog="lcnn", description=about, args=argv, return_unknown_args=True)
    assert isinstance(lab, Lab)
    return dataclasses.replace(lab, extra=tuple(extra))


def one_line(error: Exception) -> str:
    """What went wrong, without the number of the error and without line breaks."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(text.split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. An expected error is one line on stderr and status 1."""
    command = parse(sys.argv[1:] if argv is None else argv)
    try:
        return command.run()
    except (ValueError, RuntimeError, OSError) as error:  # FileNotFoundError is an OSError
        print(f"lcnn: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lcnn: interrupted", file=sys.stderr)
        return 130
