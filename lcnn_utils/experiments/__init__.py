"""Runs that are trained once and then read, sweeps over many, tables of results, the paper's numbers and claims."""

from .paper import BEYOND, CLAIMS, Claim, claims, comparison, ours, published
from .results import append, has, how_measured, measured, plus_minus, with_interval
from .runs import SHIPPED, load_weights, measure, results, run
from .sweep import Outcome, ordered, plan, sweep

__all__ = ["BEYOND", "CLAIMS", "SHIPPED", "Claim", "Outcome", "append", "claims", "comparison", "has", "how_measured"]
__all__ += ["load_weights", "measure", "measured", "ordered", "ours", "plan", "plus_minus", "published", "results"]
__all__ += ["run", "sweep", "with_interval"]
