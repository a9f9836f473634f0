"""Runs that are trained once and then read, sweeps over many, results, the paper's numbers."""

from .runs import SHIPPED, load_weights, measure, results, run, ship
from .sweeping import sweep

__all__ = ["SHIPPED", "load_weights", "measure", "results", "run", "ship", "sweep"]
