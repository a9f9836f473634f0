"""Runs that are trained once and then read, sweeps over many, results, the paper's numbers."""

from .runs import SHIPPED, load_weights, measure, results, run, ship
from .sweep import Outcome, ordered, plan, sweep

__all__ = ["SHIPPED", "Outcome", "load_weights", "measure", "ordered", "plan", "results", "run", "ship", "sweep"]
