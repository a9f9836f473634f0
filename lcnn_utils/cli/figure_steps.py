"""The steps of ``lcnn figures``: each takes measurements, draws them, and yields ``(name, figure or table, about)``.
``about`` says where the numbers come from, for NAME.json: dataset, n, seeds, source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from ..curvature import layer_terms
from ..experiments import BEYOND, CLAIMS, claims, has, how_measured, measured, ordered
from ..figures import attacks, bound, curvature, paper, saliency, softplus, training
from ..figures.style import METHOD, VARIANTS
from ..measurements import attacks as attack_measurements
from ..measurements import bound as bound_measurements
from ..measurements import curvature as curvature_measurements
from ..measurements import paper as paper_measurements
from ..measurements import saliency as saliency_measurements
from ..measurements import training as training_measurements
from ..measurements.curvature import means_table
from ..measurements.paper import NAME, datasets, title
from ..measurements.softplus import activation_frame, composition_frame, normalised_curvature_frame
from ..saliency import MAPS, explain
from ..training import fit_recipe, recipe, samples

Made = Iterator[tuple[str, Figure | pd.DataFrame, dict[str, Any]]]
SEEDS = (0, 1, 2)
FORMULAS: dict[str, Any] = {"source": "formulas"}
TRAINED = "trained for this figure"
SHIPPED = "runs in data/checkpoints, trained by lcnn ship"
MEASURED = "data/results, measured by lcnn evaluate"


def about_digits(source: str, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    n = len(samples(recipe("digits", "standard"), "test")[1])
    return {"dataset": "digits, test images", "n": n, "seeds": list(seeds), "source": source}


def about_results(*names: str) -> dict[str, Any]:
    """What produced stored results: command, hardware, versions, n, seeds, and the names of their runs."""
    sources = {name: how_measured(name) for name in names}
    for about in sources.values():
        about["runs"] = list(about.get("runs", ()))
    titles = dict.fromkeys(title(name.partition("_")[0]) for name in names)
    return {"dataset": ", ".join(titles), "source": MEASURED, "measured": sources}


def activations() -> Made:
    x = torch.linspace(-4, 4, 401)
    betas = torch.logspace(-2, 3, 121).tolist()
    yield "figure_1c", softplus.figure_1c(activation_frame((0.5, 1.0, 2.0, 5.0), x)), FORMULAS
    yield "activations", softplus.activations(activation_frame((2.0,), x)), FORMULAS
    frame = composition_frame((0.5, 2.0, 10.0), (1, 2, 5, 10), x)
    yield "composition", softplus.composition(frame), FORMULAS
    frame = normalised_curvature_frame(betas, (-1.0, 0.0, 0.1, 1.0))
    yield "normalised_curvature", softplus.normalised_curvature(frame), FORMULAS


def moons() -> Made:
    models = {method: fit_recipe(recipe("moons", method), progress=False)[0] for method in ("standard", "lcnn")}
    fields, points = curvature_measurements.moons_study(models)
    yield "figure_1ab", curvature.moons(fields, points), {"dataset": "two moons", "seeds": [0], "source": TRAINED}


def digits() -> Made:
    frame = curvature_measurements.digits_study(SEEDS, progress=False)
    yield "digits_curvature", curvature.curvature_distribution(frame), about_digits(TRAINED)
    yield "digits_geometry", curvature_measurements.geometry_table(frame), about_digits(TRAINED)


def convergence() -> Made:
    net = curvature_measurements.digits_recipe("standard")
    model, (x, y) = fit_recipe(net, progress=False)[0], samples(net, "test")
    frame = curvature_measurements.convergence_frame(model, x[:32], y[:32], products=20)
    yield "convergence", curvature.convergence(frame), about_digits(TRAINED, [0]) | {"n": 32}


def bounds() -> Made:
    nets = {"LCNN, 3-layer MLP": bound_measurements.certificate_recipe("lcnn")}
    for method in ("lcnn", "standard"):
        nets[f"{METHOD[method][0]}, ResNet-10"] = curvature_measurements.digits_recipe(method)
    models = {name: fit_recipe(net, progress=False)[0] for name, net in nets.items()}
    terms = [layer_terms(model, (1, 8, 8)).assign(net=name) for name, model in models.items()]
    about: dict[str, Any] = {"dataset": "digits", "seeds": [0], "source": TRAINED}
    yield "bound_waterfall", bound.waterfall(pd.concat(terms, ignore_index=True)), about
    frame = bound_measurements.audit_frame(nets=range(150), points=8)
    about = {"dataset": "150 random MLPs", "n": len(frame), "seeds": "0 to 149", "source": "random weights"}
    yield "bounds_on_random_nets", bound.audit(frame), about


def certificates() -> Made:
    frame = bound_measurements.certificate_study(SEEDS, steps=40)
    colours = dict(zip(frame.net.unique(), VARIANTS, strict=True))
    shares = bound_measurements.robust_accuracy(frame, (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0))
    yield "certified_accuracy", bound.robust_accuracy(shares, colours), about_digits(TRAINED)
    yield "digits_certified", bound_measurements.certified_table(frame, (0.05, 0.1, 0.2, 0.3)), about_digits(TRAINED)


def methods() -> Made:
    frame, about = measured("digits_runs"), about_results("digits_runs")
    yield "digits_methods", training.accuracy_against_curvature(frame), about
    table = means_table(frame, "label", training_measurements.GEOMETRY).rename(columns={"label": "net"})
    yield "digits_methods_table", table, about
    about = about_digits(SHIPPED)
    trained = training_measurements.arms_frame(training_measurements.ingredient_recipes(SEEDS))
    arms = pd.concat([trained, training_measurements.softened_frame(SEEDS, 10.0)])
    yield "digits_ingredients", training_measurements.arms_table(arms), about
    by_lambda = training_measurements.runs_frame(training_measurements.lambda_recipes(SEEDS))
    by_layer = training_measurements.trained_layers(training_measurements.lambda_recipes([0]))
    yield "digits_lambda", training.lambdas(by_lambda, by_layer), about
    failures = training_measurements.failure_recipes(SEEDS[:1])
    nets = {arm: training_measurements.trained_net(first) for arm, (first,) in failures.items()}
    frame = training_measurements.signal_frame(nets, samples(recipe("digits", "lcnn"), "test")[0])
    yield "signal", training.signal(frame), about_digits(SHIPPED, [0])


def promises() -> Made:
    stable = {d: measured(f"{d}_stability") for d in datasets()}
    curves = {d: measured(f"{d}_curves") for d in datasets()}
    points = {d: attack_measurements.over_seeds(frame) for d, frame in curves.items()}
    for d in ("digits", "cifar10"):  # notebook 8 has all that was measured on CIFAR-100
        yield f"{d}_pgd", attack_measurements.table(curves[d]), about_results(f"{d}_curves")
        checks = attack_measurements.masking_table(measured(f"{d}_masking"))
        yield f"{d}_masking", checks, about_results(f"{d}_masking")
    panels: dict[str, pd.DataFrame] = {}
    for d, frame in stable.items():
        lines = saliency_measurements.lines(frame[frame.net.isin(saliency_measurements.PAPER_NETS)])
        panels |= {f"{title(d)}, {noise} η": lines[lines.noise == noise] for noise in ("random", "worst")}
    published = {f"published: {NAME[d]}": saliency_measurements.paper_lines(d) for d in ("cifar10", "cifar100")}
    about = about_results(*(f"{d}_stability" for d in stable))
    yield "gradient_robustness", saliency.gradient_robustness(panels, published), about
    for norm, theirs in (("l2", attack_measurements.paper_table()), ("linf", None)):
        attacked = {d: frame[frame.norm == norm] for d, frame in points.items() if norm in set(frame.norm)}
        figure = attacks.curves({title(d): frame for d, frame in attacked.items()}, theirs)
        yield f"pgd_{norm}", figure, about_results(*(f"{d}_curves" for d in attacked))


def paper_tables() -> Made:
    for d in datasets():
        about = about_results(f"{d}_runs")
        if d != "digits":  # of which nothing is published
            yield f"{d}_cells", paper_measurements.cells_table(paper_measurements.cells(d)), about
        yield f"{d}_claims", paper_measurements.readable_claims(claims(d, (*CLAIMS, *BEYOND))), about
        yield f"{d}_readings", paper_measurements.readings(measured(f"{d}_geometry")), about
    about = about_results(*(f"{d}_runs" for d in datasets()))
    yield "claims", paper.claims({title(d): claims(d) for d in datasets()}), about


def behind_the_tables() -> Made:
    """What stands behind the tables: time of training steps, and curvature on training images."""
    timed = [d for d in datasets() if has(f"{d}_steps")]
    figure = training.cost({title(d): paper_measurements.cost_frame(d) for d in timed})
    yield "cost", figure, about_results(*(f"{d}_steps" for d in timed))
    frames = {d: measured(f"{d}_geometry") for d in datasets()}
    both = {d: paper_measurements.train_test(frame) for d, frame in frames.items() if "train" in set(frame.split)}
    figure = paper.train_test({title(d): frame for d, frame in both.items()})
    yield "train_test_curvature", figure, about_results(*(f"{d}_geometry" for d in both))


def layers() -> Made:
    panels = {}
    for d in datasets():
        scale = how_measured(f"{d}_runs")["scale"]
        with_beta = ordered([d], ("lcnn", "lcnn_gradreg", "minimal"), range(5), scale)
        shipped = [run for run in with_beta if saliency_measurements.shipped([run])]
        if shipped:
            panels[title(d)] = training_measurements.trained_layers(shipped)
    yield "layers", paper.layers(panels), {"dataset": ", ".join(panels), "source": SHIPPED}


def saliency_gallery() -> Made:
    scene = saliency_measurements.scene(torch.device("cpu"), dataset="digits").correct().first(4)
    pictures, columns = paper_measurements.pictures, {}
    for method in ("gradient", "smoothgrad"):
        for name, net in scene.nets.items():
            columns[f"{METHOD[name][0]},\n{MAPS[method]}"] = pictures(explain(net, scene.x, scene.y, method))
    figure = saliency.maps(pictures(scene.x), columns, [scene.classes[label] for label in scene.y])
    yield "saliency_gallery", figure, about_digits(SHIPPED, [0]) | {"n": len(scene.x)}


def lambda_search() -> Made:
    frame = measured("digits_lambda_search")
    chosen = frame.lambda_.map({training_measurements.chosen(frame): " (chosen)"}).fillna("")
    named = frame.assign(λ=frame.lambda_.astype(str) + chosen)
    table = means_table(named, "λ", {"accuracy %": "accuracy", "C": "curvature"})
    yield "lambda_search", table, about_results("digits_lambda_search") | {"dataset": "digits, held out of training"}
