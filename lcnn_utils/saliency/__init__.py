"""Saliency maps, and how much they change under noise."""

from .attribution import MAPS, explain
from .stability import LENGTHS, MEASURES, compare, curved_ways, randomized, stability, summary, worst_step

__all__ = [
    "LENGTHS",
    "MAPS",
    "MEASURES",
    "compare",
    "curved_ways",
    "explain",
    "randomized",
    "stability",
    "summary",
    "worst_step",
]
