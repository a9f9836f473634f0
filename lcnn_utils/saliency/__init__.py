"""Saliency maps, and how much they change under noise."""

from .attribution import MAPS, explain
from .stability import LENGTHS, randomized, stability
from .steadiness import MEASURES, captum_scores, compare, summary
from .worst import curved_ways, worst_step

__all__ = [
    "LENGTHS",
    "MAPS",
    "MEASURES",
    "captum_scores",
    "compare",
    "curved_ways",
    "explain",
    "randomized",
    "stability",
    "summary",
    "worst_step",
]
