"""Runs that are trained once and then read, sweeps over many, tables of results, the paper's numbers and claims."""

from .paper import BEYOND, CLAIMS, Claim, claims, comparison, ours, published, readable_claims
from .results import append, has, how_measured, measured
from .runs import SHIPPED, load_weights, measure, results, run, ship
from .sweeping import sweep

__all__ = [
    "BEYOND",
    "CLAIMS",
    "SHIPPED",
    "Claim",
    "append",
    "claims",
    "comparison",
    "has",
    "how_measured",
    "load_weights",
    "measure",
    "measured",
    "ours",
    "published",
    "readable_claims",
    "results",
    "run",
    "ship",
    "sweep",
]
