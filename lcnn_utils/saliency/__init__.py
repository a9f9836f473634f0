"""Saliency maps, and how much they change under noise."""

from .attribution import MAPS, explain
from .stability import LENGTHS, MEASURES, compare, randomized, stability, summary, worst_step
