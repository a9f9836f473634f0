"""The command ``lcnn`` (also ``python -m lcnn_utils``). What computes imports torch, this file does not: ``lcnn lab``
starts at once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from tyro.conf import Positional, Suppress

from ..files import PROJECT
from .copies import make_copies

if TYPE_CHECKING:
    from ..training import Recipe

Names = tuple[str, ...]
FIRST_NOTEBOOK = "01_softplus_and_beta.ipynb"
METRICS = ["accuracy", "curvature", "margin_curvature", "seconds"]


def lab_command(folder: str = "notebooks") -> list[str]:
    """What starts JupyterLab on the first notebook of a folder, with our rules for what is saved (:mod:`.contents`)."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={PROJECT}"]
    command.append("--ServerApp.contents_manager_class=lcnn_utils.cli.contents.Contents")
    command.append(f"--LabApp.default_url=/lab/tree/{folder}/{FIRST_NOTEBOOK}")
    return command + (["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])


def lab_environment() -> dict[str, str]:
    """The environment it starts in: with ``labconfig/``, whose settings ask no question about news."""
    config = [str(Path(__file__).parent), os.environ.get("JUPYTER_CONFIG_PATH")]
    return os.environ | {"JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, config))}


@dataclass(frozen=True)
class Lab:
    """Open JupyterLab on the first of your own copies of the notebooks, in my_notebooks: they are never overwritten.

    All other options go to Jupyter, such as --port 9999 or --no-browser.
    """

    read: bool = False  # open the originals in notebooks, with their outputs; they can be run, but not changed
    instructor: bool = False  # open copies with solutions and answers, in instructor_notebooks
    extra: Suppress[Names] = ()

    def run(self) -> int:
        if not (PROJECT / "notebooks" / FIRST_NOTEBOOK).is_file():
            raise FileNotFoundError(f"no notebooks in {PROJECT}: clone the project, and there: pip install -e .")
        folder = "notebooks" if self.read else "instructor_notebooks" if self.instructor else "my_notebooks"
        if not self.read:
            make_copies(PROJECT, PROJECT / folder, instructor=self.instructor)
        command = lab_command(folder)
        command += self.extra
        if os.name == "posix":  # this process turns into Jupyter, so that Ctrl-C and kill reach it
            os.execve(command[0], command, lab_environment())
        return subprocess.call(command, env=lab_environment())


@dataclass(frozen=True)
class Train:
    """Train methods, or read them from the store where they have been trained, and print what came out.

    Methods: standard, lcnn, gradreg, lcnn_gradreg, cure, softplus_wd, adversarial, minimal, relu, or `all` of them.

    lcnn train lcnn                    (the digits, in seconds)

    lcnn train all --seeds 0 1 2       (the seven methods and two more, three times each)

    lcnn train lcnn --set lambda_beta=0 lambda_gamma=0

    lcnn train --data FOLDER --model resnet18 --method standard lcnn    (your images: a subfolder for each class)
    """

    methods: Positional[Names]  # what to train
    method: Names = ()  # the same, as an option
    dataset: str = "digits"  # moons, digits, cifar10, cifar100 or svhn
    scale: str | None = None  # lab (moons, digits); small (for a CPU), wide or paper (CIFAR, SVHN)
    seeds: tuple[int, ...] = (0,)  # one run each
    set: Names = ()  # FIELD=VALUE: fields of the recipe to change
    device: str | None = None  # cpu, cuda, …; a GPU if there is one
    data: Path | None = None  # images to train on: a folder with a subfolder for each class, or such train and val
    model: str = "resnet18"  # with --data: any classifier of torchvision
    size: int = 64  # with --data: images are resized and cropped to so many pixels a side

    def run(self) -> int:
        from .. import experiments

        methods = self.methods + self.method
        if not methods:
            raise ValueError("say what to train, as in: lcnn train lcnn")
        if self.data is not None:
            from .own_data import train_folder

            options: dict[str, Any] = dict(model=self.model, size=self.size, seeds=self.seeds, device=self.device)
            train_folder(self.data, methods, settings=parsed(self.set), **options)
            return 0
        print(f"{'method':<14} {'seed':>4}  accuracy  C of the loss  C of the margin   seconds")
        for recipe in asked_for(self):
            result = experiments.run(recipe, device=self.device)
            accuracy, loss, margin = (result.metrics[name] for name in METRICS[:3])
            row = f"{recipe.method:<14} {recipe.seed:>4}  {accuracy:>8.2%}  {loss:>13.4g}  {margin:>15.4g}"
            print(f"{row}  {result.provenance['seconds']:>8.1f}", flush=True)
        return 0


@dataclass(frozen=True)
class Sweep:
    """Train whatever is missing of many runs, in order: the first seed of everything, then the second.

    On this machine, a process for each CPU core or one for its GPU, or on the Dask cluster of --scheduler
    (docs/cluster.md); Dask comes with pip install -e '.[cluster]', and --workers 1 does without it.
    Stopped by Ctrl-C or a crash, the same command goes on from the last whole epoch of every run.

    lcnn sweep --methods standard lcnn --seeds 0 1 2

    lcnn sweep --datasets cifar10 --plan    (what would it take?)

    lcnn sweep --methods lcnn --seeds 0 1 2 --grid lambda_beta=1e-4,1e-3 lambda_gamma=0,1e-3    (12 runs)
    """

    datasets: Names = ("digits",)  # moons, digits, cifar10, cifar100 or svhn
    methods: Names = ("all",)  # what to train, in this order
    seeds: tuple[int, ...] = (0,)  # the most important one first
    scale: str | None = None  # lab (moons, digits); small (for a CPU), wide or paper (CIFAR, SVHN)
    set: Names = ()  # FIELD=VALUE: fields of all recipes to change
    grid: Names = ()  # FIELD=VALUE,VALUE…: fields to take several values each, in all combinations
    scheduler: str | None = None  # of Dask: tcp://HOST:PORT
    workers: int | None = None  # processes on this machine; one for each core, or for its GPU
    plan: bool = False  # train nothing: print what is missing, and how long it should take
    device: str | None = None  # cpu, cuda, …; a GPU if there is one

    def run(self) -> int:
        from .. import experiments
        from ..training import run_name

        if not (recipes := asked_for(self)):
            raise ValueError("there is nothing to sweep: give every option a value, or leave it out")
        if self.plan:
            table = experiments.plan(recipes, self.device)
            print(table.to_string(index=False) if len(table) else "nothing is left to train")
            minutes, unknown = table.seconds.sum() / 60, table.seconds.isna().sum()
            print(f"missing: {len(table)} of {len(recipes)} runs, {minutes:.1f} minutes of one process", end="")
            print(f" and {unknown} runs of unknown length" if unknown else "")
            return 0
        from ..experiments.sweep import dask_distributed

        with dask_distributed().Client(self.scheduler) if self.scheduler else nullcontext() as client:
            outcomes = experiments.sweep(recipes, client, workers=self.workers, device=self.device)
        for outcome in outcomes:
            said = f"failed: {outcome.error}\n{outcome.traceback}"
            if outcome.run is not None:
                said = "accuracy {accuracy:.2%}, C of the loss {curvature:.4g}".format(**outcome.run.metrics)
            print(f"{run_name(outcome.recipe)}  {said}")
        failed = sum(outcome.error is not None for outcome in outcomes)
        print(f"{len(outcomes) - failed} of {len(outcomes)} runs done, {failed} failed")
        return 1 if failed else 0


@dataclass(frozen=True)
class Results:
    """List every run that is shipped or in the store: means over seeds, and their standard deviations."""

    dataset: str | None = None  # of one dataset only
    csv: Path | None = None  # write all runs, a row each, with their recipes, into this file instead

    def run(self) -> int:
        from ..experiments import results
        from ..files import write_text
        from ..lab import check_choice
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
            differ = [name for name in recipe if name in ("dataset", "method") or runs[name].nunique(dropna=False) > 1]
            groups = runs.groupby(differ, sort=False, dropna=False)
            table = groups[METRICS].agg(["mean", "std"])
            table.insert(0, ("runs", ""), groups.size())
            print(table.to_string(float_format="{:.4g}".format, na_rep=""))
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Measure trained networks, into the tables from which the figures are drawn (data/README.md).

    What a table has already, of the weights of now, is not measured again: stop and go on as you like. On one core
    digits take half an hour, CIFAR's small networks a quarter each. steps and lambda_search begin from the start.

    lcnn evaluate digits --only masking    (checks for masked gradients: twenty minutes)

    lcnn evaluate digits --only steps    (training steps of all methods, timed in turn: leave the machine idle)

    lcnn evaluate digits --only lambda_search    (trains 30 networks and chooses λ by held-out images)

    lcnn evaluate cifar100 --scale wide --train --minutes 50    (the paper's tables, on a GPU)
    """

    dataset: Positional[str] = "digits"  # digits, cifar10 or cifar100
    scale: str | None = None  # of CIFAR's networks: small (the default), wide or paper
    only: str | None = None  # one kind of table: runs, geometry, stability, curves, steps, masking, lambda_search
    train: bool = False  # each network of the paper's tables that is missing, before it is measured
    minutes: float | None = None  # after which nothing new is begun; the same command goes on

    def run(self) -> int:
        from ..measurements.evaluate import evaluate

        evaluate(self.dataset, self.scale, self.only, self.train, self.minutes)
        return 0


@dataclass(frozen=True)
class Ship:
    """Train what is missing in data/checkpoints, and put it there: for maintainers.

    To make a run again, delete its files there and in data/runs first.
    """

    portfolio: Positional[str] = "digits"  # digits (minutes on a CPU) or cifar10 (hours)

    def run(self) -> int:
        from ..measurements.ship import ship_all

        ship_all(self.portfolio)
        return 0


@dataclass(frozen=True)
class Grade:
    """Run every notebook below a folder and judge its exercises, into a CSV file: passed, tried or not tried.

    Each runs in a process of its own, in fast mode, without the network; none can stop the others. They run as you:
    grade what strangers hand in on a machine, or in a container, that holds nothing else.

    lcnn grade submissions --seconds 300
    """

    folder: Positional[Path]  # the submissions; subfolders are searched, too
    csv: Path | None = None  # where the results go; FOLDER/grades.csv
    seconds: float = 600  # that one notebook may take
    jobs: int | None = None  # notebooks at a time; one for each core

    def run(self) -> int:
        from .grade import grade

        grade(self.folder, self.csv or self.folder / "grades.csv", self.seconds, self.jobs)
        return 0


@dataclass(frozen=True)
class Figures:
    """Make the figures and tables in figures/, and the page that shows them, on a CPU and offline."""

    only: Names = ()  # make these figures and tables, with what is made together with them, and no others
    out: Path | None = None  # write into this folder instead, as where the checkout can't be written

    def run(self) -> int:
        from .make_figures import make

        make(self.only, self.out)
        return 0


@dataclass(frozen=True)
class Doctor:
    """Check Python, versions, device, disk and datasets, and say what to do about each problem."""

    def run(self) -> int:
        from .doctor import report

        return report()


@dataclass(frozen=True)
class Data:
    """List the datasets and where each is (LCNN_DATA, else data/); with names, fetch those that are missing."""

    names: Positional[Names] = ()  # datasets to load, and to download where needed

    def run(self) -> int:
        from .. import data

        if not self.names:
            print("\n".join(f"{name:<10} {place}" for name, place in data.available().items()))
        for name in self.names:
            for split in ("train", "test"):
                images = data.load(name, split)
                print(f"{name:<10} {split:<5} {len(images):>7,} images {tuple(images.x.shape[1:])}")
        return 0


def asked_for(command: Train | Sweep) -> list[Recipe]:
    """The recipes that the options of a command ask for."""
    from ..experiments import ordered
    from ..training import METHODS

    datasets, points = ((command.dataset,), ()) if isinstance(command, Train) else (command.datasets, command.grid)
    grid = {}
    for point in points:
        name, _, values = point.partition("=")
        grid[name] = [parsed((f"{name}={value}",))[name] for value in values.split(",")]
    methods = command.methods + (command.method if isinstance(command, Train) else ())
    methods = tuple(METHODS) if methods == ("all",) else methods
    return ordered(datasets, methods, command.seeds, command.scale, grid, **parsed(command.set))


def parsed(changes: Names) -> dict[str, Any]:
    """``("lr=0.2", "augment=true")`` → ``{"lr": 0.2, "augment": True}``. ValueError: no such field, or another type.
    Dataset, method and seed have options of their own."""
    from ..lab import check_choice
    from ..training import Recipe

    defaults = {name: value for name, value in asdict(Recipe()).items() if name not in ("dataset", "method", "seed")}
    values: dict[str, Any] = {}
    for change in changes:
        name, _, text = change.partition("=")
        default = defaults[check_choice(name, tuple(defaults), "field of a recipe")]
        kind = (float if name.startswith("max_") else bool) if default is None else type(default)
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"{change}: write {name}=VALUE, where VALUE is {what}") from None
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. An expected error is one line on stderr and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ± shows ?
    try:
        return parse(sys.argv[1:] if argv is None else argv).run()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print("lcnn:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lcnn: interrupted", file=sys.stderr)
        return 130


def parse(argv: Sequence[str]) -> Lab | Train | Sweep | Results | Evaluate | Ship | Grade | Figures | Doctor | Data:
    """The command that ``argv`` asks for; a mistake in it ends the program with tyro's explanation and status 2."""
    commands = Lab | Train | Sweep | Results | Evaluate | Ship | Grade | Figures | Doctor | Data
    about = "LCNN Lab: low-curvature neural networks, taught and reproduced."
    if list(argv[:1]) != ["lab"]:
        return tyro.cli(commands, prog="lcnn", description=about, args=argv)
    lab, extra = tyro.cli(Lab, prog="lcnn lab", args=argv[1:], return_unknown_args=True)
    return replace(lab, extra=tuple(extra))
