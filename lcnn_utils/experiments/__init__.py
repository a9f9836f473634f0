"""Runs that are trained once and then read, sweeps over many, tables of results, the paper's numbers and claims."""

from .intervals import geometric_interval, mean_interval
from .paper import (
    BEYOND,
    CLAIMS,
    Claim,
    by_seed_and_image,
    claims,
    comparison,
    held_images,
    ours,
    points_kept,
    published,
    ratio_of_means,
)
from .results import append, has, how_measured, measured, plus_minus, with_interval
from .runs import SHIPPED, load_weights, measure, results, run
from .sweep import Outcome, ordered, plan, sweep
