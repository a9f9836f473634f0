"""The steps that make the figures and tables of the notebooks, on a CPU and without a network.

A step is a function ``(progress) -> Iterator[(file name, Figure | DataFrame, about)]``; ``about`` says dataset, seeds
and ``source``, where the numbers come from. What it reads in ``data/`` is declared with ``@reads``; which code it
uses is found by :mod:`fingerprint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from .. import figures, studies
from ..curvature import layer_terms
from ..experiments import how_measured, measured
from ..figures import attacks as attack_figures
from ..figures import bounds as bound_figures
from ..figures import methods as method_figures
from ..figures import saliency as saliency_figures
from ..figures import style
from ..studies import attacks as attack_studies
from ..studies import bounds as bound_studies
from ..studies import methods as method_studies
from ..studies import paper as paper_studies
from ..studies import saliency as saliency_studies
from ..studies.scene import PAPER_NETS
from ..training import METHODS, fit, recipe, samples
from .fingerprint import parts_of, reads

Made = Iterator[tuple[str, Figure | pd.DataFrame, Mapping[str, object]]]  # file name, what to save, its provenance
Step = Callable[[bool], Made]
SEEDS = (0, 1, 2)
FORMULAS = {"dataset": "none", "source": "formulas"}
TRAINED = "trained by the step, recipes of lcnn_utils.studies"
SHIPPED = "runs in data/checkpoints, trained by python benchmarks/ship.py"
MEASURED = "data/results, measured by python benchmarks/evaluate.py"


def provenance(name: str) -> dict[str, Any]:
    """What produced stored results, in short: the names of their runs, without each one's own provenance."""
    whole = how_measured(name)
    return whole | {"runs": list(whole["runs"])}


def activations(progress: bool = True) -> Made:
    x = torch.linspace(-4, 4, 401)
    yield "figure_1c", figures.figure_1c(studies.activation_frame((0.5, 1.0, 2.0, 5.0), x)), FORMULAS
    yield "activations", figures.activations(studies.activation_frame((2.0,), x)), FORMULAS
    yield "composition", figures.composition(studies.composition_frame((0.5, 2.0, 10.0), (1, 2, 5, 10), x)), FORMULAS
    betas = torch.logspace(-2, 3, 121).tolist()
    frame = studies.normalised_curvature_frame(betas, (-1.0, 0.0, 0.1, 1.0))
    yield "normalised_curvature", figures.normalised_curvature(frame), FORMULAS


def moons(progress: bool = True) -> Made:
    models = {
        method: fit(studies.moons_recipe(method), device="cpu", progress=progress)[0] for method in ("standard", "lcnn")
    }
    about = {"dataset": "two moons", "seeds": [0], "source": TRAINED}
    yield "figure_1ab", figures.moons(*studies.moons_study(models)), about


def digits(progress: bool = True) -> Made:
    frame = studies.digits_study(SEEDS, device="cpu", progress=progress)
    about = {"dataset": "digits, 360 test images", "seeds": list(SEEDS), "source": TRAINED}
    yield "digits_curvature", figures.curvature_distribution(frame), about
    yield "digits_geometry", studies.geometry_table(frame), about


def convergence(progress: bool = True) -> Made:
    one = studies.digits_recipe("standard")
    model, (x, y) = fit(one, device="cpu", progress=progress)[0], samples(one, "test")
    frame = studies.convergence_frame(model, x[:32], y[:32], products=20)
    about = {"dataset": "digits, 32 test images", "seeds": [0], "source": TRAINED}
    yield "convergence", figures.convergence(frame), about


def bounds(progress: bool = True) -> Made:
    nets = {"LCNN, 3-layer MLP": bound_studies.certificate_recipe("lcnn")}
    nets |= {f"{style.METHOD[m][0]}, ResNet-10": studies.digits_recipe(m) for m in ("lcnn", "standard")}
    parts = []
    for name, one in nets.items():
        model, _ = fit(one, device="cpu", progress=progress)
        parts.append(layer_terms(model, input_shape=(1, 8, 8)).assign(net=name))
    about: dict[str, object] = {"dataset": "digits", "seeds": [0], "source": TRAINED}
    yield "bound_waterfall", bound_figures.waterfall(pd.concat(parts, ignore_index=True)), about
    audited = bound_studies.audit_frame(range(150), points=8)
    about = {"dataset": "150 random MLPs", "seeds": "0 to 149", "source": "random weights"}
    yield "bounds_on_random_nets", bound_figures.audit(audited), about


def certificates(progress: bool = True) -> Made:
    frame = bound_studies.certificate_study(SEEDS, steps=40)
    about = {"dataset": "digits, 360 test images", "seeds": list(SEEDS), "source": TRAINED}
    colours = dict(zip(frame.net.unique(), style.VARIANTS, strict=True))
    shares = bound_studies.robust_accuracy(frame, (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0))
    yield "certified_accuracy", bound_figures.robust_accuracy(shares, colours), about
    yield "digits_certified", bound_studies.certified_table(frame, (0.05, 0.1, 0.2, 0.3)), about


@reads("data/checkpoints/digits-*", "data/published/*.csv")
def methods(progress: bool = True) -> Made:
    """From the runs in data/checkpoints, which ``python benchmarks/ship.py`` makes."""
    about: dict[str, object] = {"dataset": "digits, 360 test images", "seeds": list(SEEDS), "source": SHIPPED}
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


@reads(
    *parts_of("digits_curves", "digits_stability", "digits_masking", "cifar10*_runs", "cifar10*_curves"),
    *parts_of("cifar10*_stability"), "data/published/*.csv",  # cifar10* is CIFAR-100 too
)  # fmt: skip
def promises(progress: bool = True) -> Made:
    """From data/results, which ``python benchmarks/evaluate.py`` makes."""
    panels: dict[str, dict[str, pd.DataFrame]] = {"steady": {}, "l2": {}, "linf": {}}
    both: dict[str, Any] = {"dataset": "digits, CIFAR-10 and CIFAR-100, test images", "seeds": {}, "source": MEASURED}
    for dataset in ("digits", "cifar10", "cifar100"):
        name = paper_studies.title(dataset) if dataset != "digits" else dataset
        stable, curves = (measured(f"{dataset}_{kind}") for kind in ("stability", "curves"))
        drawn = saliency_studies.lines(stable[stable.net.isin(PAPER_NETS)])
        panels["steady"] |= {f"{name}, {kind} η": drawn[drawn.noise == kind] for kind in ("random", "worst")}
        points = attack_studies.over_seeds(curves)
        for norm in points.norm.unique():
            panels[norm][name] = points[points.norm == norm]
        both["seeds"][dataset] = sorted(map(int, set(stable.seed) | set(curves.seed)))
        made = {kind: provenance(f"{dataset}_{kind}") for kind in ("curves", "stability")}
        both[f"{dataset}, measured"] = {kind: part["command"] for kind, part in made.items()}
        if dataset != "cifar100":  # of which notebook 08 has all that was measured
            about = {"dataset": f"{dataset}, test images", "seeds": both["seeds"][dataset], "source": MEASURED}
            about["measured"] = made
            yield f"{dataset}_promises", saliency_studies.promises_table(stable, points), about
            yield f"{dataset}_pgd", attack_studies.table(curves), about
    theirs = {f"published: {name}": saliency_studies.paper_lines(key)
              for name, key in (("CIFAR-10", "cifar10"), ("CIFAR-100", "cifar100"))}  # fmt: skip
    yield "gradient_robustness", saliency_figures.gradient_robustness(panels["steady"], theirs), both
    yield "pgd_l2", attack_figures.curves(panels["l2"], attack_studies.paper_table()), both
    yield "pgd_linf", attack_figures.curves(panels["linf"]), both | {"dataset": "digits and CIFAR-10, test images"}
    made = provenance("digits_masking")
    about = {"dataset": "digits, test images", "seeds": [made["seed"]], "source": MEASURED, "measured": made}
    yield "digits_masking", attack_studies.masking_table(measured("digits_masking")), about


STEPS: tuple[Step, ...] = (
    activations, moons, digits, convergence, bounds, certificates, methods, promises,
)  # fmt: skip
