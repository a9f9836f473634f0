"""Every figure and table that exists so far, made on a CPU without a network: ``make figures``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from . import figures, published, studies, style
from .bounds import layer_terms
from .experiments import recipe
from .figures import attacks as attack_figures
from .figures import bounds as bound_figures
from .figures import methods as method_figures
from .figures import saliency as saliency_figures
from .recipe import METHODS
from .runtime import one_thread
from .studies import attacks as attack_studies
from .studies import bounds as bound_studies
from .studies import methods as method_studies
from .studies import saliency as saliency_studies
from .studies.scene import PAPER_NETS
from .training import fit, samples

Made = Iterator[tuple[str, Figure | pd.DataFrame, dict[str, object]]]  # file name, what to save, its provenance
SEEDS = (0, 1, 2)


def activations(progress: bool = True) -> Made:
    x = torch.linspace(-4, 4, 401)
    yield "figure_1c", figures.figure_1c(studies.activation_frame((0.5, 1.0, 2.0, 5.0), x)), {}
    yield "activations", figures.activations(studies.activation_frame((2.0,), x)), {}
    yield "composition", figures.composition(studies.composition_frame((0.5, 2.0, 10.0), (1, 2, 5, 10), x)), {}
    betas = torch.logspace(-2, 3, 121).tolist()
    frame = studies.normalised_curvature_frame(betas, (-1.0, 0.0, 0.1, 1.0))
    yield "normalised_curvature", figures.normalised_curvature(frame), {}


def moons(progress: bool = True) -> Made:
    models = {
        method: fit(studies.moons_recipe(method), device="cpu", progress=progress)[0] for method in ("standard", "lcnn")
    }
    yield "figure_1ab", figures.moons(*studies.moons_study(models)), {"dataset": "two moons", "seeds": [0]}


def digits(progress: bool = True) -> Made:
    frame, about = studies.digits_study(SEEDS, device="cpu", progress=progress), {"dataset": "digits, 360 test images"}
    yield "digits_curvature", figures.curvature_distribution(frame), about | {"seeds": list(SEEDS)}
    yield "digits_geometry", studies.geometry_table(frame), about | {"seeds": list(SEEDS)}


def convergence(progress: bool = True) -> Made:
    one = studies.digits_recipe("standard")
    model, (x, y) = fit(one, device="cpu", progress=progress)[0], samples(one, "test")
    frame = studies.convergence_frame(model, x[:32], y[:32], products=20)
    yield "convergence", figures.convergence(frame), {"dataset": "digits, 32 test images", "seeds": [0]}


def bounds(progress: bool = True) -> Made:
    nets = {"LCNN, 3-layer MLP": bound_studies.certificate_recipe("lcnn")}
    nets |= {f"{style.METHOD[m][0]}, ResNet-10": studies.digits_recipe(m) for m in ("lcnn", "standard")}
    parts = []
    for name, one in nets.items():
        model, _ = fit(one, device="cpu", progress=progress)
        parts.append(layer_terms(model, input_shape=(1, 8, 8)).assign(net=name))
    about: dict[str, object] = {"dataset": "digits", "seeds": [0]}
    yield "bound_waterfall", bound_figures.waterfall(pd.concat(parts, ignore_index=True)), about
    audited = bound_studies.audit_frame(range(150), points=8)
    yield "bounds_on_random_nets", bound_figures.audit(audited), {"dataset": "150 random MLPs", "seeds": [0, 149]}


def certificates(progress: bool = True) -> Made:
    frame, about = bound_studies.certificate_study(SEEDS, steps=40), {"dataset": "digits, 360 test images"}
    colours = dict(zip(frame.net.unique(), style.VARIANTS, strict=True))
    shares = bound_studies.robust_accuracy(frame, (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0))
    yield "certified_accuracy", bound_figures.robust_accuracy(shares, colours), about | {"seeds": list(SEEDS)}
    table = bound_studies.certified_table(frame, (0.05, 0.1, 0.2, 0.3))
    yield "digits_certified", table, about | {"seeds": list(SEEDS)}


def methods(progress: bool = True) -> Made:
    """From the runs in data/checkpoints, which ``python benchmarks/ship.py`` makes."""
    about: dict[str, object] = {"dataset": "digits, 360 test images", "seeds": list(SEEDS)}
    about["runs"] = "data/checkpoints, made by python benchmarks/ship.py"
    frame = method_studies.runs_frame(recipe("digits", method, seed) for method in METHODS for seed in SEEDS)
    yield "digits_methods", method_figures.accuracy_against_curvature(frame), about
    table = method_studies.geometry_table(frame).drop(columns=["paper: ‖∇f‖", "paper: ‖∇²f‖"])
    yield "digits_methods_table", table, about
    ingredients = method_studies.arms_frame(method_studies.ingredient_recipes(SEEDS))
    softened = method_studies.softened_frame(SEEDS, (10.0,))
    yield "digits_ingredients", method_studies.arms_table(pd.concat([ingredients, softened])), about
    by_lambda = method_studies.runs_frame(method_studies.lambda_recipes(SEEDS))
    yield "digits_lambda", method_figures.lambdas(by_lambda, method_studies.lambda_layers()), about
    nets = method_studies.arm_nets(method_studies.failure_recipes(SEEDS))
    signal = method_studies.signal_frame(nets, samples(recipe("digits", "lcnn"), "test")[0])
    yield "signal", method_figures.signal(signal), about | {"seeds": [0]}


def promises(progress: bool = True) -> Made:
    """From data/results, which ``python benchmarks/evaluate.py`` makes."""
    panels: dict[str, dict[str, pd.DataFrame]] = {"steady": {}, "l2": {}, "linf": {}}
    sources = {}
    for dataset, name in (("digits", "digits"), ("cifar10", "CIFAR-10, small nets")):
        stable, curves = (published.measured(f"{dataset}_{kind}") for kind in ("stability", "curves"))
        about = {kind: json.loads((published.RESULTS / f"{dataset}_{kind}.json").read_text("utf-8"))
                 for kind in ("stability", "curves")}  # fmt: skip
        sources[f"data/results/{dataset}_*.csv.gz"] = {kind: one["command"] for kind, one in about.items()}
        drawn = saliency_studies.lines(stable[stable.net.isin(PAPER_NETS)])
        panels["steady"] |= {f"{name}, {kind} η": drawn[drawn.noise == kind] for kind in ("random", "worst")}
        points = attack_studies.over_seeds(curves)
        for norm in ("l2", "linf"):
            panels[norm][name] = points[points.norm == norm]
        yield f"{dataset}_promises", saliency_studies.promises_table(stable, points), about["curves"]
        yield f"{dataset}_pgd", attack_studies.table(curves), about["curves"]
    theirs = {f"published: {name}": saliency_studies.paper_lines(key)
              for name, key in (("CIFAR-10", "cifar10"), ("CIFAR-100", "cifar100"))}  # fmt: skip
    yield "gradient_robustness", saliency_figures.gradient_robustness(panels["steady"], theirs), {"from": sources}
    paper = attack_studies.paper_table()
    yield "pgd_l2", attack_figures.curves(panels["l2"], paper), {"from": sources}
    yield "pgd_linf", attack_figures.curves(panels["linf"]), {"from": sources}
    referee = published.measured("digits_masking")
    about = json.loads((published.RESULTS / "digits_masking.json").read_text("utf-8"))
    yield "digits_masking", attack_studies.masking_table(referee), about


STEPS: tuple[Callable[[bool], Made], ...] = (
    activations, moons, digits, convergence, bounds, certificates, methods, promises,
)  # fmt: skip


def make_all(folder: Path | None = None, progress: bool = True) -> list[Path]:
    """Make every figure and table into ``folder`` (default ``figures/``), on the CPU; returns the files.

    Raises:
        OSError: the folder cannot be written.
    """
    style.use_style()
    one_thread()
    with tempfile.TemporaryDirectory() as store, mock.patch.dict(os.environ, LCNN_STORE=store):  # nothing read back
        return _make_all(folder, progress)


def _make_all(folder: Path | None, progress: bool) -> list[Path]:
    paths: list[Path] = []
    for step in (bar := tqdm(STEPS, "figures", disable=not progress)):
        bar.set_postfix_str(step.__name__)
        for name, made, about in step(progress):
            about = {"made_by": "lcnn figures"} | about
            if isinstance(made, Figure):
                paths += style.save(made, name, about, folder)
            else:
                paths += style.save_table(made, name, about, folder)
    return paths
