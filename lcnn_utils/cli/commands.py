"""The command ``lcnn`` (also ``python -m lcnn_utils``): the lab, its runs, figures and datasets, and a doctor.

torch is imported by the commands that compute, not here: ``lcnn --help`` and ``lcnn lab`` start at once.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, Suppress, arg

from .sweep import Sweep, parsed

PROJECT = Path(__file__).resolve().parents[2]  # as in ``lab``, which imports torch
FIRST_NOTEBOOK = "notebooks/01_softplus_and_beta.ipynb"
METRICS = ["accuracy", "curvature", "margin_curvature", "seconds"]


def has_display(environ: Mapping[str, str], platform: str) -> bool:
    """Whether a browser opened here would be seen by whoever typed the command."""
    if "SSH_CONNECTION" in environ or "SSH_TTY" in environ:
        return False
    return not platform.startswith("linux") or bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))


def lab_command(extra: Sequence[str] = ()) -> list[str]:
    """JupyterLab with this Python, in the project's folder, on the first notebook; no browser where none would be seen.
    An extra argument replaces ours of the same name: Jupyter refuses two values."""
    ours = [
        f"--ServerApp.root_dir={PROJECT}",
        f"--LabApp.default_url=/lab/tree/{FIRST_NOTEBOOK}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",  # the versions are locked
        *([] if has_display(os.environ, sys.platform) else ["--no-browser"]),
        *(["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
    ]
    given = {argument.partition("=")[0] for argument in extra}
    return [sys.executable, "-m", "jupyterlab", *(a for a in ours if a.partition("=")[0] not in given), *extra]


@dataclass(frozen=True)
class Lab:
    """Open JupyterLab on the first notebook. All options go to Jupyter, such as --port 9999 or --no-browser."""

    extra: Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        if not (PROJECT / FIRST_NOTEBOOK).is_file():
            raise FileNotFoundError(f"{FIRST_NOTEBOOK} is not in {PROJECT}: clone the project, pip install -e . there")
        command = lab_command(self.extra)
        if "--no-browser" in command:
            print("open the URL printed below", flush=True)
        if os.name == "posix":  # this process turns into Jupyter, so that Ctrl-C and kill reach it
            os.execv(command[0], command)
        return subprocess.call(command)


@dataclass(frozen=True)
class Train:
    """Train methods, or read them from the store where they have been trained, and print what came out.

    Methods: standard, lcnn, gradreg, lcnn_gradreg, cure, softplus_wd, adversarial, minimal, relu, or `all` of them.

    For instance,

    lcnn train lcnn                    (the digits, in seconds)

    lcnn train all --seeds 0 1 2       (the seven methods and two more, three times each)

    lcnn train lcnn --set lambda_beta=0 lambda_gamma=0

    lcnn train all --dataset cifar10 --seeds 0 1 --ship    (on a GPU: makes data/checkpoints)
    """

    methods: Annotated[Positional[tuple[str, ...]], arg(metavar="METHOD ...", help_behavior_hint="")]
    """What to train."""
    dataset: Annotated[str, arg(metavar="NAME", help_behavior_hint="(default: digits)")] = "digits"
    """moons, digits, cifar10, cifar100 or svhn."""
    scale: Annotated[str | None, arg(metavar="SCALE", help_behavior_hint="(default: the first it has)")] = None
    """lab (moons, digits); small, tiny (for a CPU), wide or paper (CIFAR, SVHN)."""
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...", help_behavior_hint="(default: 0)")] = (0,)
    """Seeds, one run each."""
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE ...", help_behavior_hint="")] = ()
    """Fields of the recipe to change."""
    device: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda, …"""
    ship: bool = False
    """Write checkpoints (float16) and numbers into data/checkpoints too."""

    def run(self) -> int:
        from .. import experiments
        from ..training import METHODS, recipe

        if not self.methods:
            raise ValueError("say what to train, as in: lcnn train lcnn")
        methods = tuple(METHODS) if self.methods == ("all",) else self.methods
        changes = parsed(self.set)
        recipes = [recipe(self.dataset, name, seed, self.scale, **changes) for name in methods for seed in self.seeds]
        print(f"{'method':<14} {'seed':>4}  accuracy  C of the loss  C of the margin   seconds")
        for one in recipes:
            result = (experiments.ship if self.ship else experiments.run)(one, device=self.device)
            accuracy, loss, margin = (result.metrics[n] for n in ("accuracy", "curvature", "margin_curvature"))
            row = f"{one.method:<14} {one.seed:>4}  {accuracy:>8.2%}  {loss:>13.4g}  {margin:>15.4g}"
            print(f"{row}  {result.provenance['seconds']:>8.1f}", flush=True)
        return 0


@dataclass(frozen=True)
class Results:
    """List every run that is shipped or in the store: means over seeds, and their standard deviations."""

    dataset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: all)")] = None
    """Of one dataset only."""
    csv: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write all runs, a row each, with their recipes, into this file instead."""

    def run(self) -> int:
        from ..experiments import results
        from ..lab import check_choice, write_text
        from ..training import DATASETS

        runs = results()
        if self.dataset is not None and len(runs):
            runs = runs[runs.dataset == check_choice(self.dataset, DATASETS, "dataset")]
        if not len(runs):
            print("no runs yet: try `lcnn train lcnn`")
        elif self.csv is not None:
            print(f"{len(runs)} runs in {write_text(self.csv, runs.to_csv(index=False))}")
        else:
            recipe = [name for name in runs.columns[: runs.columns.get_loc("accuracy")] if name != "seed"]
            differ = [name for name in recipe if name in ("dataset", "method") or runs[name].nunique() > 1]
            groups = runs.groupby(differ, sort=False)
            table = groups[METRICS].agg(["mean", "std"])
            table.insert(0, ("runs", ""), groups.size())
            print(table.to_string(float_format="{:.4g}".format, na_rep=""))
        return 0


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
        try:
            from . import doctor
        except (ImportError, OSError) as error:  # torch without one of its libraries, say
            raise RuntimeError(f"{error}: {sys.executable} -m pip install -r requirements.lock mends that") from error
        return doctor.report()


@dataclass(frozen=True)
class Data:
    """List the datasets and where each is; with names, fetch those that are missing."""

    names: Annotated[Positional[tuple[str, ...]], arg(metavar="[NAME ...]", help_behavior_hint="")] = ()
    """Datasets to load, and to download where needed."""
    root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: LCNN_DATA, else data/)")] = None
    """Folder of the datasets."""

    def run(self) -> int:
        from .. import data

        if not self.names:
            print("\n".join(f"{name:<10} {place}" for name, place in data.available(self.root).items()))
        for name in self.names:
            for split in ("train", "test"):
                images = data.load(name, split, root=self.root)
                print(f"{name:<10} {split:<5} {len(images):>7,} images {tuple(images.x.shape[1:])}")
        return 0


def parse(argv: Sequence[str]) -> Lab | Train | Sweep | Results | Figures | Doctor | Data:
    """The command that ``argv`` asks for; a mistake in it ends the program with tyro's explanation and status 2."""
    commands = Lab | Train | Sweep | Results | Figures | Doctor | Data
    about = "LCNN Lab: low-curvature neural networks, taught and reproduced."
    if list(argv[:1]) != ["lab"]:
        return tyro.cli(commands, prog="lcnn", description=about, args=argv)
    _, extra = tyro.cli(commands, prog="lcnn", description=about, args=argv, return_unknown_args=True)
    return Lab(tuple(extra))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. An expected error is one line on stderr and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ± shows ?
    command = parse(sys.argv[1:] if argv is None else argv)
    try:
        return command.run()
    except (ValueError, RuntimeError, OSError) as error:
        print("lcnn:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lcnn: interrupted", file=sys.stderr)
        return 130
