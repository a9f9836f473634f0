"""The steps of notebook 08: the paper's tables and claims beside ours, and what stands behind them."""

from __future__ import annotations

from typing import Any

import torch

from ..experiments import BEYOND, CLAIMS, claims, has, how_measured, measured, readable_claims
from ..figures import methods as method_figures
from ..figures import paper as figures
from ..figures import saliency as saliency_figures
from ..studies import paper as studies
from ..studies import search
from ..studies.scene import scene, shipped
from ..training import recipe
from .fingerprint import parts_of, reads
from .steps import MEASURED, SEEDS, SHIPPED, Made, Step, provenance

LOW = ("lcnn", "lcnn_gradreg", "minimal")  # methods that train β
DIGIT_MAPS = {"gradient": "gradient", "smoothgrad": "SmoothGrad"}


def _about(*datasets: str) -> dict[str, Any]:
    runs = {dataset: provenance(f"{dataset}_runs") for dataset in datasets}
    names = ", ".join(studies.title(dataset) for dataset in datasets)
    return {"dataset": names, "source": MEASURED, "measured": runs}


@reads(*parts_of("*"), "data/published/*.csv")
def tables(progress: bool = True) -> Made:
    """The paper's two tables and its claims, ours beside theirs; what was not measured stands there as such."""
    verdicts = {}
    for dataset in studies.datasets():
        cells, about = studies.cells(dataset), _about(dataset)
        for number in (1, 2):
            yield f"{dataset}_table_{number}", studies.side_by_side(cells, f"Table {number}"), about
        yield f"{dataset}_cells", studies.cells_table(cells), about
        verdicts[studies.title(dataset)] = claims(dataset)
        shown = claims(dataset, (*CLAIMS, *BEYOND))
        yield f"{dataset}_claims", readable_claims(shown), about
    yield "claims", figures.claims(verdicts), _about(*studies.datasets())


@reads(*parts_of("*_runs", "*_geometry"))
def behind_the_tables(progress: bool = True) -> Made:
    """Cost, Standard's two readings, curvature on training and on test images."""
    about = _about(*studies.datasets())
    yield "cost", figures.cost({studies.title(d): studies.cost_frame(d) for d in studies.datasets()}), about
    panels = {}
    for dataset in studies.datasets():
        if has(f"{dataset}_geometry"):
            frame = measured(f"{dataset}_geometry")
            if set(frame.split) == {"train", "test"}:
                panels[studies.title(dataset)] = studies.train_test(frame)
            yield f"{dataset}_readings", studies.readings(frame), _about(dataset)
    yield "train_test_curvature", figures.train_test(panels), about


@reads("data/checkpoints/*lcnn*.json", "data/checkpoints/*minimal*.json", "data/results/*_runs.json")
def layers(progress: bool = True) -> Made:
    """β and γ of the shipped nets, layer by layer."""
    panels = {}
    for dataset in studies.datasets():
        scale = how_measured(f"{dataset}_runs")["scale"]
        recipes = [recipe(dataset, method, seed, scale) for method in LOW for seed in SEEDS]
        if there := [one for one in recipes if shipped([one])]:
            panels[studies.title(dataset)] = studies.trained_layers(there)
    yield "layers", figures.layers(panels), {"dataset": ", ".join(panels), "source": SHIPPED}


@reads("data/checkpoints/digits-*-seed0-*")
def saliency_gallery(progress: bool = True) -> Made:
    """Maps of four nets on digits."""
    here = scene(torch.device("cpu"), dataset="digits")
    about = {"dataset": "digits, test images", "seeds": [0], "source": SHIPPED}
    yield "saliency_gallery", saliency_figures.maps(*studies.saliency_gallery(here, DIGIT_MAPS)), about


@reads(*parts_of("digits_lambda_search"))
def lambda_search(progress: bool = True) -> Made:
    """λ chosen on a held-out part of the training set."""
    frame, made = measured("digits_lambda_search"), how_measured("digits_lambda_search")
    figure = method_figures.lambda_search(frame, search.chosen(frame))
    yield "lambda_search", figure, {"dataset": "digits, held out of training", "source": made["command"]}


PAPER_STEPS: tuple[Step, ...] = (tables, behind_the_tables, layers, saliency_gallery, lambda_search)
